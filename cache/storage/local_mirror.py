"""A remote storage with a local mirror: the first epoch reads at network speed, later ones at disk speed.

    DIR/<name of the cache>-<hash of its address>/features/clip/feature_map/c.42.0.0@5d41402abc4b2a76
                                                  parts/clip/00042.json@7d793037a0760186

A shard is downloaded whole on first use. The suffix of a copy's name is a hash of the file's size and ETag, so a file
that is replaced in the store gets another copy, and a copy is never stale. The version of a shard is looked up once per
opened cache, that of a small file when the last look-up is more than ten seconds old.

Shards are checked by their records' checksums; a reader that finds a damaged one has it downloaded again
(`drop_local_copy`). All other copies carry their own checksum and are re-read from the store when it does not match.
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

_Download = Callable[[str, Version, int], None]  # writes a version of a file to an open descriptor

NO_LIMIT = 2**63 - 1  # bytes

_CRC_BYTES = 4  # appended to every copy that is not a shard
_TRIES = 3  # of a file that is replaced during its download
_VERSION_SECONDS = 10.0  # a looked-up version is reused: listing 10,000 parts, then reading their records
_DAMAGE_SECONDS = 60.0  # several threads may find the same copy damaged within this time
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "p": 10**15}
_BINARY_UNITS = {"k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40, "p": 2**50}


class LocalMirror(Storage):
    """A remote storage and a local folder with copies of its files."""

    readers = 4  # most reads are local, but a few shards are downloaded in parallel

    def __init__(self, remote: RemoteStorage, folder: Path, limit: int) -> None:
        self.address, self._remote, self._copies = remote.address, remote, LruFolder(folder, limit)
        name = re.sub(r"[^\w.-]+", "_", remote.address.rpartition("/")[2]) or "cache"
        self._subfolder = f"{name}-{_hash(remote.address)}"
        self._versions: dict[str, tuple[float, Version]] = {}
        self._dropped: dict[str, float] = {}  # when a damaged copy was dropped
        self._is_full = False

    def __reduce__(self) -> tuple[Any, ...]:
        return LocalMirror, (self._remote, self._copies.folder, self._copies.limit)

    def local_path(self, name: str) -> Path | None:
        """Path of a shard's copy, downloaded if needed; None for other files, and when the disk is full."""
        if not _is_shard(name):
            return None
        return self._local_copy(name, self._remote.download)

    def read(self, name: str) -> bytes:
        if not _is_mirrored(name):
            return self._remote.read(name)
        path = self.local_path(name) if _is_shard(name) else self._local_copy(name, self._download_with_crc)
        try:
            if path is None:
                return self._remote.read(name)
            stored = path.read_bytes()
        except FileNotFoundError:  # evicted just now
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
        except FileNotFoundError:  # evicted just now
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
        self._versions[name] = time.monotonic(), version
        return version.size

    def list_files(self, folder: str) -> list[str]:
        versions, now = self._remote.list_versions(folder), time.monotonic()
        for name, version in versions.items():
            if version is not None:
                self._versions[f"{folder}/{name}" if folder else name] = now, version
        return list(versions)

    def create(self, name: str) -> NewFile:
        return _MirroredFile(self._remote.create(name), self._versions, name)

    def write(self, name: str, data: bytes) -> None:
        self._remote.write(name, data)
        self._versions.pop(name, None)

    def write_new(self, name: str, data: bytes) -> bool:
        self._versions.pop(name, None)
        return self._remote.write_new(name, data)

    def remove(self, name: str) -> None:
        self._remote.remove(name)
        self._versions.pop(name, None)

    def remove_abandoned(self, folder: str) -> None:
        self._remote.remove_abandoned(folder)

    def check_writable(self) -> None:
        self._remote.check_writable()

    def zarr_store(self, read_only: bool = True) -> Any:
        if not read_only:
            return self._remote.zarr_library_store(read_only=False)
        from regionspot.cache.storage.zarr_store import ReadOnlyZarrStore  # importing zarr takes a second

        return ReadOnlyZarrStore(self, self._remote.zarr_library_store(read_only=True))

    def drop_local_copy(self, name: str) -> bool:
        """A file is downloaded again only once: if it is still damaged, it is damaged in the store.

        Also True for other threads that found the same copy damaged within _DAMAGE_SECONDS, and for a missing copy,
        which may have been evicted between look-up and open.
        """
        now, (_, version) = time.monotonic(), self._versions.get(name, (0.0, None))
        old = None if version is None else self._copies.folder / self._copy_name(name, version)
        first = self._dropped.setdefault(name, now)
        if first == now and old is not None:
            self._versions.pop(name, None)
            old.unlink(missing_ok=True)
        return now - first < _DAMAGE_SECONDS or old is None or not old.exists()

    def _local_copy(self, name: str, download: _Download) -> Path | None:
        """Path of the copy of a file's current version; None when the disk is full."""
        for _ in range(_TRIES):
            try:
                return self._fetch(name, self._current_version(name), download)
            except OSError as error:
                if error.errno != errno.ESTALE:
                    raise
                self._versions.pop(name, None)  # replaced since the last look-up
        return None

    def _fetch(self, name: str, version: Version, download: _Download) -> Path | None:
        copy = self._copy_name(name, version)
        if self._is_full:
            return self._copies.find(copy)
        size = version.size if _is_shard(name) else version.size + _CRC_BYTES
        try:
            return self._copies.fetch(copy, size, lambda fd: download(name, version, fd), name.startswith("features/"))
        except OSError as error:
            if error.errno not in _DISK_FULL:
                raise
            if not self._is_full:  # another thread may have logged it
                self._is_full = True
                folder, reason = self._copies.folder, error.strerror
                log.warning("%s: no more local copies: %s; the rest is read from %s", folder, reason, self.address)
            return None

    def _download_with_crc(self, name: str, version: Version, fd: int) -> None:
        data = bytes(self._remote.read_range(name, 0, version.size, version)) if version.size else b""
        left = memoryview(with_crc(data))
        while left:
            left = left[os.write(fd, left) :]

    def _current_version(self, name: str) -> Version:
        when, version = self._versions.get(name, (0.0, None))
        if version is None or not (name.startswith("features/") or time.monotonic() - when < _VERSION_SECONDS):
            version = self._remote.version(name)
            self._versions[name] = time.monotonic(), version
        return version

    def _copy_name(self, name: str, version: Version) -> str:
        # A repeated download gets another name, because a reader may have the damaged copy open.
        again = "~" if name in self._dropped else ""
        return f"{self._subfolder}/{name}@{_hash(f'{version.size} {version.etag}')}{again}"


class _MirroredFile:
    """A file being written to the store; publishing it drops its cached version."""

    def __init__(self, file: NewFile, versions: dict[str, Any], name: str) -> None:
        self.write, self.finish, self.discard = file.write, file.finish, file.discard
        self._publish, self._versions, self._name = file.publish, versions, name

    def publish(self) -> None:
        self._publish()
        self._versions.pop(self._name, None)


def with_local_mirror(storage: Storage, folder: str | Path | None, limit: str | int | None = None) -> Storage:
    """Mirror a remote storage in `folder`, which holds at most `limit` bytes of all caches together.

    A local storage is returned as is, with a warning. Raises InputError for a limit that is not a size or has no
    folder, and if the folder cannot be written.
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
    """Parse a size such as `500GB`, `1.5 TB`, `64GiB`, `2e9`. Raises InputError for anything else."""
    match = re.fullmatch(r"\s*([\d.]+(?:e\d+)?)\s*([kmgtp]?)(i?)b?\s*", text, re.IGNORECASE)
    try:
        number, unit, binary = match.groups() if match else ("", "", "")
        size = int(float(number) * (_BINARY_UNITS if binary else _UNITS)[unit.lower()])
    except (ValueError, KeyError, OverflowError):
        size = 0
    if size < 1:
        raise InputError(f"local limit {text!r} is not a size; write it as 500GB, 1.5TB or 64GiB")
    return size


def _is_shard(name: str) -> bool:
    """Whether this is a shard: features/<set>/<array>/c.42.0.0."""
    folders = name.split("/")
    return len(folders) == 4 and folders[0] == "features" and folders[2] != "crc32c" and folders[3].startswith("c.")


def _is_mirrored(name: str) -> bool:
    # Other files, such as claims, change all the time and are read from the store.
    return name.startswith(("features/", "images/", "regions/", "parts/")) or name == "zarr.json"


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
