"""Replace a folder by another so that the name always leads to a complete one.

Linux exchanges two names atomically. Where the file system cannot (NFS), two renames are used. A run killed between
them leaves the old folder as `<name>.replaced`, and `recover_swap` renames it back.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
from contextlib import suppress
from pathlib import Path

from regionspot.cache.storage.atomic_files import sync_folder

_AT_FDCWD = -100  # a path means itself (linux/fcntl.h)
_RENAME_EXCHANGE = 2  # linux/fs.h
_NOT_SUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP)  # by this file system or this kernel


def replace_folder(new: Path, old: Path) -> None:
    """Rename the folder `new` to `old` and remove the former `old`. Both have the same parent.

    Raises OSError when the system refuses; `old` is then unchanged.
    """
    old_folder = new if _exchange(new, old) else _rename_twice(new, old)
    sync_folder(old.parent)
    shutil.rmtree(old_folder, ignore_errors=True)  # the next run removes what is left


def swapped_out_path(path: Path) -> Path:
    """Path of the old folder between the two renames."""
    return path.with_name(f"{path.name}.replaced")


def recover_swap(path: Path) -> None:
    """Undo or finish a replacement that was killed between the two renames."""
    if not swapped_out_path(path).exists():
        return
    if path.exists():
        shutil.rmtree(swapped_out_path(path))
    else:
        os.rename(swapped_out_path(path), path)
        sync_folder(path.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names atomically; False where this system cannot."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)  # Linux, glibc from 2.28
    if renameat2 is None:
        return False
    if not renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE):
        return True
    if (code := ctypes.get_errno()) in _NOT_SUPPORTED:
        return False
    raise OSError(code, os.strerror(code), str(one))


def _rename_twice(new: Path, old: Path) -> Path:
    """Rename `new` to `old`; the path that the former `old` has now."""
    os.rename(old, swapped_out_path(old))
    try:
        os.rename(new, old)
    except OSError:
        with suppress(FileNotFoundError):  # another run recovered it meanwhile
            os.rename(swapped_out_path(old), old)
        raise
    return swapped_out_path(old)
