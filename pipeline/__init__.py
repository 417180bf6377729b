"""Runs the frozen backbones over the images of a dataset, once, and writes what they say into a cache."""
