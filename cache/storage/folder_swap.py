"""Putting a folder in the place of another so that at every moment a whole one lies under the name.

Linux exchanges two names in one step. Where the file system cannot (NFS), two renames do it, and for a moment between
them nothing has the name: a run killed there leaves the old folder beside it as `<name>.replaced`, and `put_back` gives
it its name again.
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
_NOT_OFFERED = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP)  # by this file system or this kernel


def replace_folder(new: Path, old: Path) -> None:
    """Give the folder `new` the name of the folder `old`, and remove what had it. Both lie in one folder.

    Raises OSError when the system refuses; `old` is then as it was.
    """
    replaced = new if _exchange(new, old) else _rename_twice(new, old)
    sync_folder(old.parent)
    shutil.rmtree(replaced, ignore_errors=True)  # what cannot be removed now, the next run removes


def aside(path: Path) -> Path:
    """Where the old folder lies between the two renames."""
    return path.with_name(f"{path.name}.replaced")


def put_back(path: Path) -> None:
    """Undo or finish what a run killed between the renames left."""
    if not aside(path).exists():
        return
    if path.exists():
        shutil.rmtree(aside(path))
    else:
        os.rename(aside(path), path)
        sync_folder(path.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names in one step; False where this system has no such call."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)  # Linux, glibc from 2.28
    if renameat2 is None:
        return False
    if not renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE):
        return True
    if (code := ctypes.get_errno()) in _NOT_OFFERED:
        return False
    raise OSError(code, os.strerror(code), str(one))


def _rename_twice(new: Path, old: Path) -> Path:
    """Give `new` the name of `old`; where the old one lies now."""
    os.rename(old, aside(old))
    try:
        os.rename(new, old)
    except OSError:
        with suppress(FileNotFoundError):  # another run has put it back meanwhile
            os.rename(aside(old), old)
        raise
    return aside(old)
