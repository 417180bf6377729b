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
_RANGE_BYTES = 8 << 20  # of one request of a download: long enough that its latency is small against its transfer
_RANGES = 8  # requests of one download at once, so at most 64 MB of it are in memory


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

    def __init__(self, address: str, retry_seconds: float) -> None:
        self.address, self.retry_seconds = address, retry_seconds

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.address, self.retry_seconds)  # a worker process makes connections of its own

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

    def list_files(self, folder: str) -> list[str]:
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
                if waited >= self.retry_seconds:
                    raise _given_up(trouble.error, tries, waited) from error
            wait = min(pause * random.uniform(0.5, 1), max(self.retry_seconds - waited, 0))
            log.warning("%s/%s: %s; asking again in %.1f s", self.address, name, trouble.error.strerror, wait)
            time.sleep(wait)
            pause, tries = min(pause * 2, _LONGEST_PAUSE), tries + 1


def _given_up(error: OSError, tries: int, seconds: float) -> OSError:
    return OSError(error.errno, f"{error.strerror}, asked {tries} times in {seconds:.0f} s", error.filename)
