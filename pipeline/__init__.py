"""Runs the frozen backbones over the pictures of a dataset, once, and writes what they say into a cache."""
