"""Extraction by the workers of a dask cluster."""
