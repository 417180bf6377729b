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
    """Files in a folder."""

    readers = 2
    on_disk = True

    def __init__(self, folder: Path) -> None:
        self.folder, self.address = folder, str(folder)
        self._pinned_inode: tuple[int, int] | None = None

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
        return DurableFile(self._prepare_folder(name))

    def write(self, name: str, data: bytes) -> None:
        write_file(self._prepare_folder(name), data)

    def write_new(self, name: str, data: bytes) -> bool:
        final = self._prepare_folder(name)
        file = DurableFile(final)
        try:
            file.write(data)
            file.finish()
            os.link(file.partial, final)  # unlike rename, fails if the name exists, also on NFS
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
        """Refuse writes from now on if the folder is replaced, as `extend` does."""
        with suppress(OSError):  # the next read reports it
            self._pinned_inode = self._inode()

    def _prepare_folder(self, name: str) -> Path:
        """Path of a new file, whose folder is created if needed."""
        self._require_pinned()
        final = self.folder / name
        final.parent.mkdir(parents=True, exist_ok=True)
        return final

    def _require_pinned(self) -> None:
        if self._pinned_inode is not None and self._inode() != self._pinned_inode:
            reason = "it was extended or replaced after this run opened it; run this again"
            raise OSError(errno.ESTALE, reason, self.address)

    def _inode(self) -> tuple[int, int]:
        status = os.stat(self.folder)
        return status.st_dev, status.st_ino


def _write_exclusively(final: Path, data: bytes) -> bool:
    """`write_new` without hard links: other processes may briefly see an incomplete file."""
    try:
        with final.open("xb") as file:
            file.write(data)
    except FileExistsError:
        return False
    return True
