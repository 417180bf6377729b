"""Large arrays in temporary files: the kernel writes them out and drops them from memory when it needs the space."""

from __future__ import annotations

import logging
import math
import mmap
import os
import tempfile
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

log = logging.getLogger(__name__)

_MIN_BYTES = 4 << 20  # of an array that is worth a file


def scratch_array(shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
    """A writable array of zeros in a file of its own in the folder for temporary files (TMPDIR), without a name there.

    A small array is in memory, and so is one for which the folder has no space or which the system cannot reserve.
    """
    size = math.prod(shape) * np.dtype(dtype).itemsize
    if size < _MIN_BYTES or not hasattr(os, "posix_fallocate"):
        return np.zeros(shape, dtype)
    try:
        with tempfile.TemporaryFile() as file:
            # Reserved, because a full disk kills a process that writes to a map of a sparse file.
            os.posix_fallocate(file.fileno(), 0, size)
            memory = mmap.mmap(file.fileno(), size)
    except OSError as error:
        log.warning(
            "%s: no temporary file of %s MB (%s); that much is kept in memory instead; set TMPDIR to a folder on "
            "a local disk with more space",
            tempfile.gettempdir(),
            f"{size / 1e6:,.0f}",
            error.strerror,
        )
        return np.zeros(shape, dtype)
    return np.frombuffer(memory, dtype).reshape(shape)
