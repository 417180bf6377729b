"""The bytes of a shard, wherever it lies: three ways to one `read_into`.

    MappedShard   a local file through a memory map: one copy in user space, the fastest where the pages are cached
    PreadShard    a local file by positioned reads: the kernel copies, and nothing of it counts as this process's memory
    StoredShard   a file of any other storage, by byte ranges

A file that is cut short under a map kills the process that copies from it (SIGBUS). So its size is looked at before
every copy, which leaves the microseconds of the copy itself, a disk that fails to read a page, and a file that another
machine removed from a network folder: where that may happen, read with access="pread", which raises an error instead.

A map keeps no descriptor, for a cache may have more parts than a process may have files. The descriptors of positioned
reads are a few at a time; a file that another one has replaced when it is opened again is told from the first one.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import resource
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from regionspot.cache.storage.base import ReplacedError, ShardFile, Storage

_MAP_FAILED = ctypes.c_void_p(-1).value
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


class MappedShard:
    """A local shard as memory. Python's own map would keep a descriptor open (until 3.13's `trackfd`)."""

    is_snapshot = True

    def __init__(self, path: Path) -> None:
        self._path = os.fsencode(path)
        self._address = 0
        fd = os.open(self._path, os.O_RDONLY)
        try:
            status = os.fstat(fd)
            self.size, self._inode = status.st_size, (status.st_dev, status.st_ino)
            if not self.size:
                raise ValueError("is empty")
            address = _libc.mmap(None, self.size, mmap.PROT_READ, mmap.MAP_SHARED, fd, 0)
        finally:
            os.close(fd)
        if address == _MAP_FAILED:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(path))
        self._address = int(address)
        self._bytes = np.ctypeslib.as_array((ctypes.c_ubyte * self.size).from_address(self._address))
        # Without it the kernel reads on after each record, four times what was asked for on a cold disk.
        _libc.madvise(self._address, self.size, mmap.MADV_RANDOM)

    def __del__(self) -> None:
        if self._address:
            _libc.munmap(self._address, self.size)

    def read_into(self, offset: int, out: NDArray[np.uint8]) -> None:
        try:
            status = os.stat(self._path)
        except OSError:
            pass  # removed: what is mapped stays as it is until it is let go of
        else:
            if status.st_size < self.size and (status.st_dev, status.st_ino) == self._inode:
                raise EOFError(f"the file was cut short to {status.st_size} bytes")
        out[:] = self._bytes[offset : offset + out.size]

    def prefetch(self, offset: int, size: int) -> None:
        page = offset // mmap.PAGESIZE * mmap.PAGESIZE
        _libc.madvise(self._address + page, offset + size - page, mmap.MADV_WILLNEED)


class _OpenFile:
    """A descriptor closed when nobody holds it any more, so that one thread may forget it while another reads."""

    def __init__(self, path: Path) -> None:
        self.fd = -1
        self.fd = os.open(path, os.O_RDONLY)
        status = os.fstat(self.fd)
        self.size = status.st_size
        self.identity = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
        if hasattr(os, "posix_fadvise"):  # macOS has none, and guesses by itself
            os.posix_fadvise(self.fd, 0, 0, os.POSIX_FADV_RANDOM)

    def __del__(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)


class PreadShard:
    """A local shard by positioned reads, which share no file position."""

    is_snapshot = True

    def __init__(self, path: Path, files: Callable[[Path], _OpenFile]) -> None:
        self._path, self._files = path, files
        file = files(path)
        self.size, self._identity = file.size, file.identity

    def read_into(self, offset: int, out: NDArray[np.uint8]) -> None:
        file = self._file()  # held here until the read is over
        while (done := os.preadv(file.fd, [out.data], offset)) < out.size:
            if not done:
                raise EOFError(f"the file ends at byte {offset}")
            out, offset = out[done:], offset + done

    def prefetch(self, offset: int, size: int) -> None:
        if hasattr(os, "posix_fadvise"):
            file = self._file()
            os.posix_fadvise(file.fd, offset, size, os.POSIX_FADV_WILLNEED)

    def _file(self) -> _OpenFile:
        try:
            file = self._files(self._path)
        except FileNotFoundError:
            raise ReplacedError from None
        if file.identity != self._identity:
            raise ReplacedError
        return file


class StoredShard:
    """A shard by byte ranges of a storage, for which several threads read at a time."""

    is_snapshot = False  # each range is looked up by the file's name

    def __init__(self, storage: Storage, name: str, size: int) -> None:
        self._storage, self._name, self.size = storage, name, size

    def read_into(self, offset: int, out: NDArray[np.uint8]) -> None:
        self._storage.read_into(self._name, offset, out.data)

    def prefetch(self, offset: int, size: int) -> None:
        pass


class ShardOpener:
    """Opens shards of a storage by name; local ones are mapped, or share a few descriptors."""

    def __init__(self, storage: Storage, mapped: bool) -> None:
        self._storage, self._mapped = storage, mapped
        self._files = lru_cache(maxsize=most_open_files())(_OpenFile)

    def __call__(self, name: str, size: int) -> ShardFile:
        """The shard of which `size` bytes were written.

        Raises FileNotFoundError where it is missing, ValueError, saying so, where it has another size.
        """
        path = self._storage.local_path(name)
        shard: ShardFile
        if path is None:
            shard = self._storage.open_shard(name) or StoredShard(self._storage, name, size)
        else:
            shard = MappedShard(path) if self._mapped else PreadShard(path, self._files)
        if shard.size != size:
            raise ValueError(f"has {shard.size} bytes, {size} were written")
        return shard

    def forget_files(self) -> None:
        """Close the descriptors that are kept: other files may have taken the place of theirs."""
        self._files.cache_clear()


def most_open_files() -> int:
    """Descriptors that one feature set may hold: 64 where a process may have the usual 1,024, so that training on six
    caches at once stays under that."""
    return min(1024, max(64, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 16))
