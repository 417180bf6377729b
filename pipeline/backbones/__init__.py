"""The frozen models: protocols, registry, weights, and each SAM and CLIP variant."""
