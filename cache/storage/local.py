"""A cache in a folder of a local disk or a network file system."""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from regionspot.cache.errors import CacheError
from regionspot.cache.storage.atomic_files import DurableFile, remove_abandoned, write_file
from regionspot.cache.storage.base import Storage

_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS)  # exFAT, some network and user-space file systems (link(2))


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

    def list_files(self, folder: str) -> list[str]:
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
