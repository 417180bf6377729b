"""Search in the regions of a cache, by words or by another region."""
