"""Decode image files and convert them to the input of each backbone."""
