"""From stored parts to batches: readers, samplers, prefetching and the loader."""
