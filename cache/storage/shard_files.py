"""Three ways to read a shard.

    MappedShard   a local file by memory map: one copy in user space, the fastest when its pages are cached
    PreadShard    a local file by `pread`: its pages do not count as memory of this process
    RemoteShard   a file of any other storage, by byte ranges

Copying from the map of a truncated file kills the process (SIGBUS). So the file's size is checked before every copy.
That does not cover a truncation during the copy itself, a disk error, or a file that another machine removed from a
network folder: in those cases use access="pread", which raises an error instead.

A map holds no file descriptor, because a cache may have more parts than a process may open files. PreadShard shares a
few descriptors; when it reopens a file that was replaced meanwhile, it detects that and raises ReplacedError.
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
    """A memory-mapped local shard. `mmap.mmap` would keep a descriptor open (before Python 3.13's `trackfd`)."""

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
        # Without it the kernel reads ahead after each record: four times the bytes on a cold disk.
        _libc.madvise(self._address, self.size, mmap.MADV_RANDOM)

    def __del__(self) -> None:
        if self._address:
            _libc.munmap(self._address, self.size)

    def read_into(self, offset: int, out: NDArray[np.uint8]) -> None:
        try:
            status = os.stat(self._path)
        except OSError:
            pass  # removed: the mapped pages stay valid
        else:
            if status.st_size < self.size and (status.st_dev, status.st_ino) == self._inode:
                raise EOFError(f"the file was truncated to {status.st_size} bytes")
        out[:] = self._bytes[offset : offset + out.size]

    def prefetch(self, offset: int, size: int) -> None:
        page = offset // mmap.PAGESIZE * mmap.PAGESIZE
        _libc.madvise(self._address + page, offset + size - page, mmap.MADV_WILLNEED)


class PreadFile:
    """A file read by `pread`. The last reference closes it, so another thread may drop it during a read."""

    is_snapshot = True

    def __init__(self, path: Path) -> None:
        self.fd = -1
        self.fd = os.open(path, os.O_RDONLY)
        status = os.fstat(self.fd)
        self.size = status.st_size
        self.identity = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
        if hasattr(os, "posix_fadvise"):  # not on macOS
            os.posix_fadvise(self.fd, 0, 0, os.POSIX_FADV_RANDOM)

    def __del__(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)

    def read_into(self, offset: int, out: NDArray[np.uint8]) -> None:
        while out.size:
            count = os.preadv(self.fd, [out.data], offset)
            if not count:
                raise EOFError(f"the file ends at byte {offset}")
            out, offset = out[count:], offset + count

    def prefetch(self, offset: int, size: int) -> None:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self.fd, offset, size, os.POSIX_FADV_WILLNEED)


class PreadShard:
    """A local shard by `pread`, from descriptors that a limited cache of open files shares."""

    is_snapshot = True

    def __init__(self, path: Path, files: Callable[[Path], PreadFile]) -> None:
        self._path, self._files = path, files
        file = files(path)
        self.size, self._identity = file.size, file.identity

    def read_into(self, offset: int, out: NDArray[np.uint8]) -> None:
        self._file().read_into(offset, out)

    def prefetch(self, offset: int, size: int) -> None:
        self._file().prefetch(offset, size)

    def _file(self) -> PreadFile:
        try:
            file = self._files(self._path)
        except FileNotFoundError:
            raise ReplacedError from None
        if file.identity != self._identity:
            raise ReplacedError
        return file


class RemoteShard:
    """A shard read by byte ranges of a storage."""

    is_snapshot = False  # each request opens the file by name

    def __init__(self, storage: Storage, name: str, size: int) -> None:
        self._storage, self._name, self.size = storage, name, size

    def read_into(self, offset: int, out: NDArray[np.uint8]) -> None:
        self._storage.read_into(self._name, offset, out.data)

    def prefetch(self, offset: int, size: int) -> None:
        pass


class ShardOpener:
    """Opens shards of a storage by name; local ones are mapped or share a few descriptors."""

    def __init__(self, storage: Storage, mapped: bool) -> None:
        self._storage, self._mapped = storage, mapped
        self._files = lru_cache(maxsize=max_open_files())(PreadFile)

    def __call__(self, name: str, size: int) -> ShardFile:
        """Open the shard that was written with `size` bytes.

        Raises FileNotFoundError if it is missing, ValueError if it has another size.
        """
        path = self._storage.local_path(name)
        shard: ShardFile
        if path is None:
            shard = self._storage.open_shard(name) or RemoteShard(self._storage, name, size)
        else:
            shard = MappedShard(path) if self._mapped else PreadShard(path, self._files)
        if shard.size != size:
            raise ValueError(f"has {shard.size} bytes, {size} were written")
        return shard

    def close_files(self) -> None:
        """Close the cached descriptors, because their files may have been replaced."""
        self._files.cache_clear()


def max_open_files() -> int:
    """Descriptors that one feature set may hold: 64 of the usual 1,024, so that training on six caches fits."""
    return min(1024, max(64, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 16))
