"""Where a cache lies: a tree of files under one address, on a disk or in an object store.

Everything that is read or written goes through `Storage`, so that a cache behaves alike wherever it is. Names are
paths inside the cache with forward slashes. A file appears under its name whole or not at all, and is never changed
afterwards, only replaced; that is all that the cache asks of a store.

    LocalStorage    a folder: disk, NFS                                             (here)
    RemoteStorage   s3://, gs://, az://, http://, any URL of fsspec                 (remote.py)
    LocalCopy       a RemoteStorage whose files are kept in a folder as they are read   (local_copy.py)
    Hdf5Storage     the files in one .h5 file, to be read only                          (hdf5_storage.py)
"""

from __future__ import annotations

import errno
import os
from abc import ABC, abstractmethod
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from regionspot.cache.errors import CacheError
from regionspot.cache.storage.atomic_files import DurableFile, remove_abandoned, write_file

_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS)  # exFAT, some network and user-space file systems (link(2))

if TYPE_CHECKING:  # shard_files.py imports Storage from here
    from regionspot.cache.storage.shard_files import ShardFile

HDF5_ENDINGS = (".h5", ".hdf5")  # of a cache in one file


class NewFile(Protocol):
    """A file being written: `finish` makes its bytes durable, `publish` gives it its name, `discard` gives it up."""

    def write(self, data: Any) -> None: ...
    def finish(self) -> None: ...
    def publish(self) -> None: ...
    def discard(self) -> None: ...


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
    def names(self, folder: str) -> list[str]:
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

    def forget(self, name: str) -> bool:
        """Drop what is kept near here of a file that lies elsewhere, because it turned out to be wrong.

        True says that something was dropped, so that it is worth the while to read the file once more.
        """
        return False

    def mend(self, part: int) -> str:
        """What to do about a damaged part, for messages."""
        return f"`regionspot cache repair` drops part {part}, then the same `regionspot extract` makes it again"

    def exists(self, name: str) -> bool:
        try:
            self.size(name)
        except FileNotFoundError:
            return False
        return True


class LocalStorage(Storage):
    """A folder."""

    readers = 2
    on_disk = True

    def __init__(self, folder: Path) -> None:
        self.folder, self.address = folder, str(folder)
        self._pinned: tuple[int, int] | None = None

    def local_path(self, name: str) -> Path:
        return self.folder / name

    def read(self, name: str) -> bytes:
        return (self.folder / name).read_bytes()

    def read_into(self, name: str, offset: int, out: memoryview) -> None:
        fd = os.open(self.folder / name, os.O_RDONLY)
        try:
            if os.preadv(fd, [out], offset) != out.nbytes:
                raise EOFError(f"{self.folder / name} ends before byte {offset + out.nbytes}")
        finally:
            os.close(fd)

    def size(self, name: str) -> int:
        return os.stat(self.folder / name).st_size

    def names(self, folder: str) -> list[str]:
        try:
            with os.scandir(self.folder / folder) as entries:
                return [entry.name for entry in entries if entry.is_file()]
        except FileNotFoundError:
            return []

    def create(self, name: str) -> DurableFile:
        return DurableFile(self._place(name))

    def write(self, name: str, data: bytes) -> None:
        write_file(self._place(name), data)

    def write_new(self, name: str, data: bytes) -> bool:
        final = self._place(name)
        file = DurableFile(final)
        try:
            file.write(data)
            file.finish()
            os.link(file.partial, final)  # unlike a rename it refuses to replace, also over NFS
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            return _write_exclusively(final, data)
        finally:
            file.discard()
        return True

    def remove(self, name: str) -> None:
        (self.folder / name).unlink(missing_ok=True)

    def remove_abandoned(self, folder: str) -> None:
        remove_abandoned(self.folder / folder)

    def check_writable(self) -> None:
        self._require_pinned()
        if not os.access(self.folder, os.W_OK | os.X_OK):
            raise CacheError(f"{self.folder}: no permission to write; change it, or open the cache for reading")

    def zarr_store(self, read_only: bool = True) -> Any:
        from zarr.storage import LocalStore  # zarr takes a second to import

        return LocalStore(self.folder, read_only=read_only)

    def pin(self) -> None:
        """From now on write nothing when another folder has come to have this name, as it does when a cache grows."""
        with suppress(OSError):  # who reads it next says what is wrong with it
            self._pinned = self._identity()

    def _place(self, name: str) -> Path:
        """Where a new file is to lie; the folder around it is there then."""
        self._require_pinned()
        final = self.folder / name
        final.parent.mkdir(parents=True, exist_ok=True)
        return final

    def _require_pinned(self) -> None:
        if self._pinned is not None and self._identity() != self._pinned:
            told = "it grew, or was put in another one's place, since this run opened it; run this again"
            raise OSError(errno.ESTALE, told, self.address)

    def _identity(self) -> tuple[int, int]:
        status = os.stat(self.folder)
        return status.st_dev, status.st_ino


def _write_exclusively(final: Path, data: bytes) -> bool:
    """`write_new` without links: for a moment others may see a file that is not whole yet."""
    try:
        with final.open("xb") as file:
            file.write(data)
    except FileExistsError:
        return False
    return True


def open_storage(address: str | Path | Storage) -> Storage:
    """The storage at a path or URL, or one that is open already; nothing is read of it yet.

    Raises InputError for a URL of a kind that no installed library knows.
    """
    if isinstance(address, Storage):
        return address
    if "://" not in str(address):
        path = Path(address)
        if path.suffix in HDF5_ENDINGS and not path.is_dir():
            from regionspot.cache.storage.hdf5_storage import Hdf5Storage  # for whoever has such a file

            return Hdf5Storage(path)
        return LocalStorage(path)
    from regionspot.cache.storage.remote import (
        open_remote,  # obstore and fsspec are there where remote caches are wanted
    )

    return open_remote(str(address))
