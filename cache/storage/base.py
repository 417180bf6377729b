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
    """A file being written: `finish` makes its bytes durable, `publish` gives it its name, `discard` gives it up."""

    def write(self, data: Any) -> None: ...
    def finish(self) -> None: ...
    def publish(self) -> None: ...
    def discard(self) -> None: ...


class ReplacedError(Exception):
    """The file was replaced after its index was read."""


class ShardFile(Protocol):
    """An opened shard. Safe to use from several threads and after a fork.

    stays   whether its bytes stay as they are for as long as it is open, also when another file takes its place
    """

    size: int
    is_snapshot: bool

    def read_into(self, offset: int, out: NDArray[np.uint8]) -> None:
        """Fill the contiguous `out`. Raises EOFError where the file ends before, OSError, ReplacedError."""

    def prefetch(self, offset: int, size: int) -> None:
        """Say that these bytes will be read soon, so that a disk fetches them while others are copied."""


class Storage(ABC):
    """A tree of files. Safe to use from several threads and after a fork.

    address   what messages call it and what opens it again: a path or a URL
    readers   how many reads at once this store is fastest with
    on_disk   whether its bytes lie on a disk of this machine, so that one thread waits for nothing but that
    writable  whether a cache there can be written at all

    Methods raise FileNotFoundError for a name that is not there and OSError for what the store refuses.
    """

    address: str
    readers: int
    on_disk = False
    writable = True

    @abstractmethod
    def local_path(self, name: str) -> Path | None:
        """The file on a local disk, where it can be opened and mapped; None where the store has no such thing."""

    @abstractmethod
    def read(self, name: str) -> bytes:
        """A whole file."""

    @abstractmethod
    def read_into(self, name: str, offset: int, out: memoryview) -> None:
        """Fill `out` from `offset` of a file. Raises EOFError where the file ends before."""

    @abstractmethod
    def size(self, name: str) -> int:
        """Bytes of a file."""

    @abstractmethod
    def list_files(self, folder: str) -> list[str]:
        """Names of the files directly in a folder, without the folder's; none where it does not exist."""

    @abstractmethod
    def create(self, name: str) -> NewFile:
        """Begin a file that replaces `name` once it is published. Its folder comes into being when it has to."""

    @abstractmethod
    def write(self, name: str, data: bytes) -> None:
        """Write a small file, replacing it if it exists."""

    @abstractmethod
    def write_new(self, name: str, data: bytes) -> bool:
        """Write a small file unless it exists already; whether it was written. Of several at once one wins."""

    @abstractmethod
    def remove(self, name: str) -> None:
        """Remove a file; does nothing where there is none."""

    @abstractmethod
    def remove_abandoned(self, folder: str) -> None:
        """Remove what killed writers left unfinished in a folder."""

    @abstractmethod
    def check_writable(self) -> None:
        """Raises CacheError where it is known beforehand that nothing may be written."""

    @abstractmethod
    def zarr_store(self, read_only: bool = True) -> Any:
        """What zarr-python opens this tree by."""

    def open_shard(self, name: str) -> ShardFile | None:
        """A way to read a file again and again that is shorter than by its name; None where there is none."""
        return None

    def drop_local_copy(self, name: str) -> bool:
        """Drop what is kept near here of a file that lies elsewhere, because it turned out to be wrong.

        True says that something was dropped, so that it is worth the while to read the file once more.
        """
        return False

    def repair_hint(self, part: int) -> str:
        """What to do about a damaged part, for messages."""
        return f"`regionspot cache repair` drops part {part}, then the same `regionspot extract` makes it again"

    def exists(self, name: str) -> bool:
        try:
            self.size(name)
        except FileNotFoundError:
            return False
        return True
