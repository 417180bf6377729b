"""Configure glibc's malloc to keep freed memory for reuse.

By default, glibc maps each large block (the limit is at most 32 MB) separately and unmaps it when it is freed. Each
page of a new mapping costs a page fault and 4 KB of zeros. With activations of 10 to 800 MB per layer, that takes as
long as the computation. Here large blocks come from the heap, and the heap never shrinks: it grows to the peak memory
use in the first batches and stays there.

Sources: mallopt(3), "Malloc Tunable Parameters" in the glibc manual, and the constants of malloc/malloc.h.
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform

# glibc's malloc/malloc.h
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX, _ARENA_MAX = -1, -2, -4, -8

SETTINGS = {
    # No separately mapped blocks. A high threshold would do the same, but older glibcs refuse more than 32 MB.
    _MMAP_MAX: 0,
    _TRIM_THRESHOLD: -1,  # never shrink the heap
    _TOP_PAD: 256 << 20,  # bytes by which the heap grows: few system calls, and untouched pages cost nothing
    # One heap for all threads: other heaps consist of pieces of 64 MB that are unmapped when empty.
    _ARENA_MAX: 1,
}
# If one of these is set, the user has configured malloc.
ENVIRONMENT = ("GLIBC_TUNABLES", "MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")


@functools.cache
def keep_memory() -> bool:
    """Apply SETTINGS to this process, once; returns whether they were applied.

    Call it when the work begins, not at import: it affects the whole process. It does nothing if the C library is not
    glibc or a variable of ENVIRONMENT is set.
    """
    if platform.libc_ver()[0] != "glibc" or any(os.environ.get(name) for name in ENVIRONMENT):
        return False
    mallopt = ctypes.CDLL(None).mallopt
    results = [mallopt(parameter, value) == 1 for parameter, value in SETTINGS.items()]
    return all(results)
