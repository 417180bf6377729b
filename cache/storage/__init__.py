"""Where bytes are kept: local folders, object stores, HTTP, fsspec, HDF5, and the local mirror of a remote cache."""
