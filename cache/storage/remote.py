"""Caches in object stores and behind any other URL: what all of them have in common.

    s3:// gs:// az:// abfs:// http://   ObjectStorage (object_storage.py), by obstore, which reads at the network's rate
    any other URL of fsspec             FsspecStorage (fsspec_storage.py): memory://, sftp://, hf://, smb://, ...
    file://                             LocalStorage (storage.py)

A store that does not answer, answers 429 or 5xx, or breaks off is asked again: after 0.1 s, then after twice as long
each time, at most 10 s, all of it shortened by chance up to a half so that many readers do not come back at once. What
still fails after `patience` seconds (60, or REGIONSPOT_PATIENCE) is an OSError with one short line in `strerror`. What
no waiting mends, a wrong bucket or wrong credentials, is one at once.
"""

from __future__ import annotations

import logging
import os
import random
import re
import time
from abc import abstractmethod
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from regionspot.cache.errors import InputError
from regionspot.cache.storage.base import LocalStorage, Storage

log = logging.getLogger(__name__)

T = TypeVar("T")

PATIENCE = 60.0  # seconds; long enough for the restart of a server, short enough that a wrong address is soon seen
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 10.0  # seconds
_RANGE_BYTES = 8 << 20  # of one request of a download: long enough that its latency is small against its transfer
_RANGES = 8  # requests of one download at once, so at most 64 MB of it are in memory

_OBJECT_STORES = ("s3", "s3a", "gs", "az", "adl", "azure", "abfs", "abfss")
_SERVERS = ("http", "https")


@dataclass(frozen=True)
class Version:
    """What tells one content of a file from another: its size, and the store's mark of it, its etag or its time."""

    size: int
    mark: str


@dataclass(frozen=True)
class Trouble:
    """What a store's error means: the error to raise, and whether it may pass by itself."""

    error: OSError
    retryable: bool


class RemoteStorage(Storage):
    """A tree of files that is read by ranges over a network."""

    readers = 16  # a range of 500 KB takes about 20 ms of waiting and 5 ms of transfer: so many keep a line busy

    def __init__(self, address: str, patience: float) -> None:
        self.address, self.patience = address, patience

    def __reduce__(self) -> tuple[Any, ...]:
        return open_remote, (self.address, self.patience)  # a worker process makes connections of its own

    @abstractmethod
    def version(self, name: str) -> Version:
        """What a file holds now. Raises FileNotFoundError where there is none."""

    @abstractmethod
    def listing(self, folder: str) -> dict[str, Version | None]:
        """The files directly in a folder, by name without the folder's; None where a listing does not tell more."""

    @abstractmethod
    def read_range(self, name: str, start: int, stop: int, version: Version | None = None) -> Any:
        """A buffer of bytes start to stop, fewer where the file ends before.

        Raises OSError with errno ESTALE where the file is not `version` any more.
        """

    @abstractmethod
    def zarr_library_store(self, read_only: bool) -> Any:
        """The store of zarr-python itself for this place."""

    @abstractmethod
    def _trouble(self, name: str, error: Exception) -> Trouble:
        """What an error of the library below means."""

    def zarr_store(self, read_only: bool = True) -> Any:
        if not read_only:
            return self.zarr_library_store(read_only=False)
        from regionspot.cache.storage.zarr_store import ZarrView  # zarr takes a second to import

        return ZarrView(self, self.zarr_library_store(read_only=True))

    def local_path(self, name: str) -> None:
        return None

    def read_into(self, name: str, offset: int, out: memoryview) -> None:
        out = out.cast("B")
        data = memoryview(self.read_range(name, offset, offset + out.nbytes)) if out.nbytes else b""
        if len(data) != out.nbytes:
            raise EOFError(f"{self.address}/{name} ends before byte {offset + out.nbytes}")
        out[:] = data

    def size(self, name: str) -> int:
        return self.version(name).size

    def names(self, folder: str) -> list[str]:
        return list(self.listing(folder))

    def remove_abandoned(self, folder: str) -> None:
        """Nothing: a store shows no unfinished file. What uploads of killed writers have sent stays in the store,
        unseen and paid for, until its own lifecycle rule removes it (S3: AbortIncompleteMultipartUpload)."""

    def check_writable(self) -> None:
        """Nothing is known beforehand: the first write tells."""

    def download(self, name: str, version: Version, fd: int) -> None:
        """Write a whole file into an open local one, several ranges at once.

        Raises OSError with errno ESTALE where it is not `version` any more, EOFError where it ends before its size.
        """

        def fetch(start: int) -> None:
            stop = min(start + _RANGE_BYTES, version.size)
            data = memoryview(self.read_range(name, start, stop, version))
            if len(data) != stop - start:
                raise EOFError(f"{self.address}/{name} ends before byte {stop}")
            while data:
                start += (written := os.pwrite(fd, data, start))
                data = data[written:]

        starts = range(0, version.size, _RANGE_BYTES)
        with ThreadPoolExecutor(min(len(starts), _RANGES) or 1) as pool:
            try:
                list(pool.map(fetch, starts))
            except BaseException:
                pool.shutdown(cancel_futures=True)  # the rest of a file that failed is not fetched
                raise

    def with_retries(self, name: str, ask: Callable[[], T]) -> T:
        """What `ask` returns, asked again while the store has a trouble that may pass."""
        began, pause, tries = time.monotonic(), _FIRST_PAUSE, 1
        while True:
            try:
                return ask()
            except Exception as error:
                trouble, waited = self._trouble(name, error), time.monotonic() - began
                if not trouble.retryable:
                    raise trouble.error from error
                if waited >= self.patience:
                    raise _given_up(trouble.error, tries, waited) from error
            wait = min(pause * random.uniform(0.5, 1), max(self.patience - waited, 0))
            log.warning("%s/%s: %s; asking again in %.1f s", self.address, name, trouble.error.strerror, wait)
            time.sleep(wait)
            pause, tries = min(pause * 2, _LONGEST_PAUSE), tries + 1


def _given_up(error: OSError, tries: int, seconds: float) -> OSError:
    return OSError(error.errno, f"{error.strerror}, asked {tries} times in {seconds:.0f} s", error.filename)


def open_remote(address: str, patience: float | None = None) -> Storage:
    """The storage at a URL; nothing is read of it yet.

    patience   seconds for which a failing store is asked again (default: REGIONSPOT_PATIENCE, else 60)

    Credentials and endpoints are those that every tool of the store takes from the environment: AWS_ACCESS_KEY_ID,
    AWS_SECRET_ACCESS_KEY, AWS_REGION, AWS_ENDPOINT_URL, AWS_SKIP_SIGNATURE=true for public buckets, ~/.aws;
    GOOGLE_APPLICATION_CREDENTIALS; AZURE_STORAGE_ACCOUNT_NAME and _KEY. Raises InputError, in one line, for a URL
    that no installed library knows.
    """
    address = re.sub(r"(?<![:/])/+$", "", address)  # memory:// and file:/// keep theirs
    scheme = urlsplit(address).scheme
    seconds = _patience() if patience is None else patience
    if scheme == "file":
        return LocalStorage(Path(urlsplit(address).path))
    if scheme in _OBJECT_STORES:
        from regionspot.cache.storage.object_store import (
            ObjectStorage,  # obstore is there where remote caches are wanted
        )

        return ObjectStorage(address, seconds)
    if scheme in _SERVERS:
        from regionspot.cache.storage.http_storage import HttpStorage

        return HttpStorage(address, seconds)
    from regionspot.cache.storage.fsspec_storage import FsspecStorage

    return FsspecStorage(address, seconds)


def _patience() -> float:
    given = os.environ.get("REGIONSPOT_PATIENCE") or str(PATIENCE)
    try:
        seconds = float(given)
    except ValueError:
        seconds = -1.0
    if not seconds >= 0:  # NaN neither
        raise InputError(f"REGIONSPOT_PATIENCE is {given!r}, expected a number of seconds, 0 or more")
    return seconds
