"""Reading a cache: readers of parts and batches, sampling, prefetching, the loader and dask arrays."""
