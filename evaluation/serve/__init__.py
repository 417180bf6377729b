"""The web page: name regions of your own images, and explore a cache."""
