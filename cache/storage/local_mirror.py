"""A remote cache whose files are kept in a local folder as they are read: the first pass at the network's rate, the
next ones at the disk's.

    DIR/<name of the cache>-<hash of its address>/features/clip/feature_map/c.42.0.0@5d41402abc4b2a76
                                                  parts/clip/00042.json@7d793037a0760186

A shard is fetched whole on its first use. The mark behind a file's name stands for its size and the store's etag, so a
file that was replaced there is another file here: what is in the copy is never out of date, only unused. A shard is
looked up in the store once by each cache that is opened, a small file whenever its last look is ten seconds old.

Shards in the copy are checked by the checksums of their records as everywhere; a reader that finds one wrong has it
dropped and fetched once more (`forget`). All other files carry a checksum of their own here and mend themselves.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from regionspot.cache.errors import InputError
from regionspot.cache.storage.base import NewFile, Storage
from regionspot.cache.storage.lru_folder import LruFolder
from regionspot.cache.storage.remote import RemoteStorage, Version
from regionspot.cache.storage.zarr_shard import with_crc, without_crc

log = logging.getLogger(__name__)

_Write = Callable[[str, Version, int], None]  # puts a version of a file into an open descriptor

NO_LIMIT = 2**63 - 1  # bytes

_CRC_BYTES = 4  # behind every copy that is no shard
_TRIES = 3  # of a file that is replaced while it is fetched
_FRESH = 10.0  # seconds for which a listed file needs no further look: a listing of 10,000 parts, then their records
_AT_THE_SAME_TIME = 60.0  # seconds in which threads may find one copy wrong
_DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "p": 10**15}
_BINARY_UNITS = {"k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40, "p": 2**50}


class LocalMirror(Storage):
    """A remote storage and the folder with copies of its files."""

    readers = 4  # most reads are the disk's, but a few shards are fetched at once

    def __init__(self, remote: RemoteStorage, folder: Path, limit: int) -> None:
        self.address, self._remote, self._copies = remote.address, remote, LruFolder(folder, limit)
        name = re.sub(r"[^\w.-]+", "_", remote.address.rpartition("/")[2]) or "cache"
        self._place = f"{name}-{_hash(remote.address)}"
        self._seen: dict[str, tuple[float, Version]] = {}
        self._forgotten: dict[str, float] = {}
        self._is_full = False

    def __reduce__(self) -> tuple[Any, ...]:
        return LocalMirror, (self._remote, self._copies.folder, self._copies.limit)

    def local_path(self, name: str) -> Path | None:
        """The shard in the copy, fetched if it is not there; None for other files, and when the disk is full."""
        if not _is_shard(name):
            return None
        return self._kept(name, self._remote.download)

    def read(self, name: str) -> bytes:
        if not _is_kept(name):
            return self._remote.read(name)
        path = self.local_path(name) if _is_shard(name) else self._kept(name, self._write_sealed)
        try:
            if path is None:
                return self._remote.read(name)
            stored = path.read_bytes()
        except FileNotFoundError:  # it had to make room just now
            return self._remote.read(name)
        if _is_shard(name):
            return stored
        try:
            return without_crc(stored, "the copy")
        except ValueError:
            path.unlink(missing_ok=True)
            return self._remote.read(name)

    def read_into(self, name: str, offset: int, out: memoryview) -> None:
        path = self.local_path(name)
        try:
            fd = -1 if path is None else os.open(path, os.O_RDONLY)
        except FileNotFoundError:  # it had to make room just now
            fd = -1
        if fd < 0:
            self._remote.read_into(name, offset, out)
            return
        try:
            if os.preadv(fd, [out], offset) != out.nbytes:
                raise EOFError(f"{path} ends before byte {offset + out.nbytes}")
        finally:
            os.close(fd)

    def size(self, name: str) -> int:
        version = self._remote.version(name)
        self._seen[name] = time.monotonic(), version
        return version.size

    def list_files(self, folder: str) -> list[str]:
        found, now = self._remote.listing(folder), time.monotonic()
        for name, version in found.items():
            if version is not None:
                self._seen[f"{folder}/{name}" if folder else name] = now, version
        return list(found)

    def create(self, name: str) -> NewFile:
        return _Replacing(self._remote.create(name), self._seen, name)

    def write(self, name: str, data: bytes) -> None:
        self._remote.write(name, data)
        self._seen.pop(name, None)

    def write_new(self, name: str, data: bytes) -> bool:
        self._seen.pop(name, None)
        return self._remote.write_new(name, data)

    def remove(self, name: str) -> None:
        self._remote.remove(name)
        self._seen.pop(name, None)

    def remove_abandoned(self, folder: str) -> None:
        self._remote.remove_abandoned(folder)

    def check_writable(self) -> None:
        self._remote.check_writable()

    def zarr_store(self, read_only: bool = True) -> Any:
        if not read_only:
            return self._remote.zarr_library_store(read_only=False)
        from regionspot.cache.storage.zarr_store import ZarrView  # zarr takes a second to import

        return ZarrView(self, self._remote.zarr_library_store(read_only=True))

    def drop_local_copy(self, name: str) -> bool:
        """As Storage says. A file is fetched anew once: if it is wrong again, it is wrong in the store.

        True also for a while after, for threads that found the old copy wrong at the same time, and for a copy that
        is not there, which may have made room between being looked up and being opened.
        """
        now, (_, version) = time.monotonic(), self._seen.get(name, (0.0, None))
        old = None if version is None else self._copies.folder / self._copy_name(name, version)
        first = self._forgotten.setdefault(name, now)
        if first == now and old is not None:
            self._seen.pop(name, None)
            old.unlink(missing_ok=True)
        return now - first < _AT_THE_SAME_TIME or old is None or not old.exists()

    def _kept(self, name: str, write: _Write) -> Path | None:
        """Path of the copy of a file as it is in the store now; None where the disk has no room for it."""
        for _ in range(_TRIES):
            try:
                return self._fetched(name, self._version_now(name), write)
            except OSError as error:
                if error.errno != errno.ESTALE:
                    raise
                self._seen.pop(name, None)  # replaced since the last look
        return None

    def _fetched(self, name: str, version: Version, write: _Write) -> Path | None:
        copy = self._copy_name(name, version)
        if self._is_full:
            return self._copies.find(copy)
        size = version.size if _is_shard(name) else version.size + _CRC_BYTES
        try:
            return self._copies.fetch(copy, size, lambda fd: write(name, version, fd), name.startswith("features/"))
        except OSError as error:
            if error.errno not in _DISK_IS_FULL:
                raise
            if not self._is_full:  # another thread may have told it meanwhile
                self._is_full = True
                folder, told = self._copies.folder, error.strerror
                log.warning("%s: takes no more copies: %s; the rest is read from %s", folder, told, self.address)
            return None

    def _write_sealed(self, name: str, version: Version, fd: int) -> None:
        data = bytes(self._remote.read_range(name, 0, version.size, version)) if version.size else b""
        left = memoryview(with_crc(data))
        while left:
            left = left[os.write(fd, left) :]

    def _version_now(self, name: str) -> Version:
        when, version = self._seen.get(name, (0.0, None))
        if version is None or not (name.startswith("features/") or time.monotonic() - when < _FRESH):
            version = self._remote.version(name)
            self._seen[name] = time.monotonic(), version
        return version

    def _copy_name(self, name: str, version: Version) -> str:
        # What was fetched again is another file, for a reader may hold the wrong one open under its path.
        again = "~" if name in self._forgotten else ""
        return f"{self._place}/{name}@{_hash(f'{version.size} {version.mark}')}{again}"


class _Replacing:
    """A file being written into the store: when it is there, what was known of its name is so no more."""

    def __init__(self, file: NewFile, seen: dict[str, Any], name: str) -> None:
        self.write, self.finish, self.discard = file.write, file.finish, file.discard
        self._publish, self._seen, self._name = file.publish, seen, name

    def publish(self) -> None:
        self._publish()
        self._seen.pop(self._name, None)


def with_local_mirror(storage: Storage, folder: str | Path | None, limit: str | int | None = None) -> Storage:
    """The same storage, whose files are kept under `folder`, at most `limit` bytes of all caches together.

    A storage on a local disk is returned as it is. Raises InputError for a limit that is no size or has no folder, and
    where the folder cannot be written.
    """
    if folder is None:
        raise InputError(
            f"{storage.address}: a local limit of {limit} without a folder; name one with local_copy (--local-copy)"
        )
    limit_bytes = NO_LIMIT if limit is None else parse_bytes(str(limit))
    if not isinstance(storage, RemoteStorage):
        log.warning("%s: is a local cache; --local-copy %s is ignored", storage.address, folder)
        return storage
    return LocalMirror(storage, Path(folder), limit_bytes)


def parse_bytes(text: str) -> int:
    """A size as people write it: `500GB`, `1.5 TB`, `64GiB`, `2e9`. Raises InputError for anything else."""
    match = re.fullmatch(r"\s*([\d.]+(?:e\d+)?)\s*([kmgtp]?)(i?)b?\s*", text, re.IGNORECASE)
    try:
        number, unit, binary = match.groups() if match else ("", "", "")
        size = int(float(number) * (_BINARY_UNITS if binary else _UNITS)[unit.lower()])
    except (ValueError, KeyError, OverflowError):
        size = 0
    if size < 1:
        raise InputError(f"local limit {text!r} is no size; write it as 500GB, 1.5TB or 64GiB")
    return size


def _is_shard(name: str) -> bool:
    """Whether this is one of the large files of a part: features/<set>/<array>/c.42.0.0."""
    folders = name.split("/")
    return len(folders) == 4 and folders[0] == "features" and folders[2] != "crc32c" and folders[3].startswith("c.")


def _is_kept(name: str) -> bool:
    # Whatever else is written beside, such as claims, is alive and read where it lies.
    return name.startswith(("features/", "images/", "regions/", "parts/")) or name == "zarr.json"


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
