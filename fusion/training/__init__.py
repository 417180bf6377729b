"""Training a head from caches: batches, steps, checkpoints, metrics, several processes."""
