"""Parts committed behind the encoders, by one thread, so that flushing a file never holds up a GPU."""

from __future__ import annotations

import os
import queue
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence

from regionspot.cache.schema import PictureFeatures
from regionspot.cache.store import FeatureCache


class CommitThread:
    """Commits parts in a thread of its own, one after the other, fed by `put` in row order.

    Leaving the `with` block waits for the last part; leaving it by an error drops the part in flight, which then
    has no record and is done again by the next run.
    """

    def __init__(self, cache: FeatureCache, lacking: Mapping[int, Sequence[str]]) -> None:
        self._cache, self._lacking = cache, lacking
        self._queue: queue.Queue[PictureFeatures] = queue.Queue(maxsize=64)
        self._abandoned = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="write", daemon=True)

    def __enter__(self) -> CommitThread:
        self._thread.start()
        return self

    def put(self, picture: PictureFeatures) -> None:
        """Hand over the next picture. Raises what stopped the writer, if something did."""
        while True:
            if self._error is not None:
                raise self._error
            try:
                return self._queue.put(picture, timeout=0.2)
            except queue.Full:
                continue

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._abandoned.set()
        self._thread.join()
        if kind is None and self._error is not None:
            raise self._error

    def _run(self) -> None:
        worker = f"{socket.gethostname()}:{os.getpid()}"
        try:
            for part, names in self._lacking.items():
                self._cache.write_part(part, self._pictures(len(self._cache.part_rows(part))), names, worker)
        except BaseException as error:
            self._error = error

    def _pictures(self, count: int) -> Iterator[PictureFeatures]:
        for _ in range(count):
            yield self._next()

    def _next(self) -> PictureFeatures:
        while not self._abandoned.is_set():
            try:
                return self._queue.get(timeout=0.2)
            except queue.Empty:
                continue
        raise _Abandoned


class _Abandoned(Exception):
    """The run is stopping; the part in flight is not committed."""
