"""Annotation files to a Manifest: the registry of datasets, their readers and proposals."""
