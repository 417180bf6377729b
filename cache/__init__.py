"""The embedding store: its layout, writing, reading and integrity. Knows nothing of SAM or CLIP."""
