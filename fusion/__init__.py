"""The fusion head, its losses and vocabularies, and its training from a cache. Never opens a picture."""
