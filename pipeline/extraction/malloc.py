"""glibc's allocator, told to keep what it was given: memory that a model frees is the memory of its next layer.

By default glibc maps every large block (at most 32 MB may pass for a small one) anew and unmaps it when it is freed.
Each page of a new mapping costs a fault and 4 KB of zeros on its first touch: at activations of 10 to 800 MB a layer,
that is as long as the computing itself. Here large blocks come from the heap like small ones, and the heap is never
given back before the process ends. It grows to the peak of what is in use at once: in the first batches, then no more.

Sources: mallopt(3), "Malloc Tunable Parameters" in the manual of glibc, and the numbers of its malloc/malloc.h.
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform

# glibc's malloc/malloc.h
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX, _ARENA_MAX = -1, -2, -4, -8

SETTINGS = {
    # Blocks mapped on their own: none. Older glibcs refuse a threshold above 32 MB, which would do the same.
    _MMAP_MAX: 0,
    _TRIM_THRESHOLD: -1,  # never give the top of the heap back
    _TOP_PAD: 256 << 20,  # bytes taken at a time: few calls, and pages that are never touched cost nothing
    # One heap for all threads: others are made of pieces of 64 MB, which are unmapped when they are empty.
    _ARENA_MAX: 1,
}
# Whoever has set glibc up from outside knows why.
ENVIRONMENT = ("GLIBC_TUNABLES", "MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")


@functools.cache
def keep_memory() -> bool:
    """Set this up for the rest of the process, once; whether it was done.

    Called where the work begins, not when a module is imported: it is the whole process that changes. Nothing happens
    where the C library is not glibc, and where the environment has settings of its own (ENVIRONMENT).
    """
    if platform.libc_ver()[0] != "glibc" or any(os.environ.get(name) for name in ENVIRONMENT):
        return False
    mallopt = ctypes.CDLL(None).mallopt
    done = [mallopt(parameter, value) == 1 for parameter, value in SETTINGS.items()]
    return all(done)
