"""What all remote storages share: retries, reads by byte range, parallel downloads.

A request that gets no answer, a broken connection or status 429 or 5xx is retried with exponential backoff: 0.1 s,
doubled each time up to 10 s, each shortened by a random factor of up to one half so that many readers do not retry in
step. After `retry_seconds` (60, or REGIONSPOT_PATIENCE) it raises OSError with a one-line `strerror`. An error that no
retry can fix, such as a wrong bucket or wrong credentials, is raised at once.
"""

from __future__ import annotations

import logging
import os
import random
import time
from abc import abstractmethod
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from regionspot.cache.storage.base import Storage

log = logging.getLogger(__name__)

T = TypeVar("T")

_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 10.0  # seconds
_RANGE_BYTES = 8 << 20  # of one download request: large enough that latency is small compared to transfer
_RANGES = 8  # concurrent requests of one download, so at most 64 MB of it are in memory


@dataclass(frozen=True)
class Version:
    """Identifies the content of a remote file: size, and ETag or modification time."""

    size: int
    etag: str


@dataclass(frozen=True)
class ClassifiedError:
    """An error of a store's client library as the OSError to raise, and whether a retry may help."""

    error: OSError
    retryable: bool


class RemoteStorage(Storage):
    """A tree of files that is read by byte ranges over a network."""

    readers = 16  # a 500 KB range takes about 20 ms of latency and 5 ms of transfer: 16 keep the network busy

    def __init__(self, address: str, retry_seconds: float) -> None:
        self.address, self.retry_seconds = address, retry_seconds

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.address, self.retry_seconds)  # a worker process opens its own connections

    @abstractmethod
    def version(self, name: str) -> Version:
        """The current version of a file. Raises FileNotFoundError."""

    @abstractmethod
    def list_versions(self, folder: str) -> dict[str, Version | None]:
        """Versions of the files directly in a folder, by base name; None where a listing does not give them."""

    @abstractmethod
    def read_range(self, name: str, start: int, stop: int, version: Version | None = None) -> Any:
        """A buffer of the bytes `start` to `stop`, fewer if the file is shorter.

        Raises OSError with errno ESTALE if the file is not `version` any more.
        """

    @abstractmethod
    def zarr_library_store(self, read_only: bool) -> Any:
        """zarr-python's own store for this address."""

    @abstractmethod
    def _classify(self, name: str, error: Exception) -> ClassifiedError:
        """Classify an error of the client library."""

    def zarr_store(self, read_only: bool = True) -> Any:
        if not read_only:
            return self.zarr_library_store(read_only=False)
        from regionspot.cache.storage.zarr_store import ReadOnlyZarrStore  # importing zarr takes a second

        return ReadOnlyZarrStore(self, self.zarr_library_store(read_only=True))

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

    def list_files(self, folder: str) -> list[str]:
        return list(self.list_versions(folder))

    def remove_abandoned(self, folder: str) -> None:
        """Does nothing: a store shows no unfinished file. Parts of unfinished uploads stay invisible, and are billed,
        until the store's lifecycle rule removes them (S3: AbortIncompleteMultipartUpload)."""

    def check_writable(self) -> None:
        """Does nothing: only a write shows whether it is allowed."""

    def download(self, name: str, version: Version, fd: int) -> None:
        """Download a file into an open local one, several ranges in parallel.

        Raises OSError with errno ESTALE if it is not `version` any more, EOFError if it is shorter than its size.
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
                pool.shutdown(cancel_futures=True)  # do not fetch the rest of a failed download
                raise

    def with_retries(self, name: str, request: Callable[[], T]) -> T:
        """The result of `request`, retried while its error is retryable."""
        start, pause, tries = time.monotonic(), _FIRST_PAUSE, 1
        while True:
            try:
                return request()
            except Exception as error:
                failure, waited = self._classify(name, error), time.monotonic() - start
                if not failure.retryable:
                    raise failure.error from error
                if waited >= self.retry_seconds:
                    reason = f"{failure.error.strerror}, after {tries} tries in {waited:.0f} s"
                    raise OSError(failure.error.errno, reason, failure.error.filename) from error
            wait = min(pause * random.uniform(0.5, 1), max(self.retry_seconds - waited, 0))
            log.warning("%s/%s: %s; retry in %.1f s", self.address, name, failure.error.strerror, wait)
            time.sleep(wait)
            pause, tries = min(pause * 2, _LONGEST_PAUSE), tries + 1
