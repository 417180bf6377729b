"""The interface of every storage: a tree of files under one address, on a disk or in an object store.

The cache reads and writes only through `Storage`, so it behaves the same everywhere. File names are paths inside the
cache with forward slashes. A file appears whole or not at all; it is never changed in place, only replaced.

    LocalStorage    a folder: disk, NFS                                         (local.py)
    RemoteStorage   s3://, gs://, az://, http://, any URL of fsspec             (remote.py)
    LocalMirror       a RemoteStorage with a local mirror of the files it reads   (local_mirror.py)
    Hdf5Storage     read-only, all files in one .h5 file                        (hdf5_storage.py)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

Access = Literal["auto", "map", "pread"]  # how a local shard is read; "auto" maps what fits into memory


class NewFile(Protocol):
    """A file being written: `finish` flushes it to disk, `publish` renames it into place, `discard` removes it."""

    def write(self, data: Any) -> None: ...
    def finish(self) -> None: ...
    def publish(self) -> None: ...
    def discard(self) -> None: ...


class ReplacedError(Exception):
    """The file was replaced after its index was read."""


class ShardFile(Protocol):
    """An opened shard. Safe to use from several threads and after a fork.

    stays   whether it keeps the same bytes while it is open, also when the file is replaced
    """

    size: int
    is_snapshot: bool

    def read_into(self, offset: int, out: NDArray[np.uint8]) -> None:
        """Fill the contiguous `out`. Raises EOFError when the file is too short, OSError, ReplacedError."""

    def prefetch(self, offset: int, size: int) -> None:
        """Hint that these bytes will be read soon, so that the disk fetches them in the background."""


class Storage(ABC):
    """A tree of files. Safe to use from several threads and after a fork.

    address   path or URL, for messages and for opening it again
    readers   number of concurrent reads with the best throughput
    on_disk   whether the files are on a local disk, where one reader thread is enough
    writable  whether this kind of storage can be written

    Methods raise FileNotFoundError for a missing file and OSError for other failures.
    """

    address: str
    readers: int
    on_disk = False
    writable = True

    @abstractmethod
    def local_path(self, name: str) -> Path | None:
        """Path of the file on a local disk; None where the storage has no local files."""

    @abstractmethod
    def read(self, name: str) -> bytes:
        """Read a whole file."""

    @abstractmethod
    def read_into(self, name: str, offset: int, out: memoryview) -> None:
        """Fill `out` from `offset` of a file. Raises EOFError when the file is too short."""

    @abstractmethod
    def size(self, name: str) -> int:
        """Size of a file in bytes."""

    @abstractmethod
    def list_files(self, folder: str) -> list[str]:
        """Base names of the files directly in a folder; an empty list when it does not exist."""

    @abstractmethod
    def create(self, name: str) -> NewFile:
        """Start a file that replaces `name` when it is published. Creates its folder if needed."""

    @abstractmethod
    def write(self, name: str, data: bytes) -> None:
        """Write a small file atomically, replacing an existing one."""

    @abstractmethod
    def write_new(self, name: str, data: bytes) -> bool:
        """Create a small file; False if it exists already. Of several concurrent writers one wins."""

    @abstractmethod
    def remove(self, name: str) -> None:
        """Remove a file if it exists."""

    @abstractmethod
    def remove_abandoned(self, folder: str) -> None:
        """Remove unfinished files of killed writers from a folder."""

    @abstractmethod
    def check_writable(self) -> None:
        """Raises CacheError if the storage is known to be read-only."""

    @abstractmethod
    def zarr_store(self, read_only: bool = True) -> Any:
        """A zarr-python store of this tree."""

    def open_shard(self, name: str) -> ShardFile | None:
        """Open a shard for repeated reads; None where `read_into` by name is as good."""
        return None

    def drop_local_copy(self, name: str) -> bool:
        """Drop the local copy of a remote file because it is damaged. True if reading the file again is worthwhile."""
        return False

    def repair_hint(self, part: int) -> str:
        """How to fix a damaged part, for error messages."""
        return f"`regionspot cache repair` drops part {part}, then the same `regionspot extract` writes it again"

    def exists(self, name: str) -> bool:
        try:
            self.size(name)
        except FileNotFoundError:
            return False
        return True
