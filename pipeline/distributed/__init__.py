"""Extraction, and any other job made of parts, by the workers of a dask cluster."""
