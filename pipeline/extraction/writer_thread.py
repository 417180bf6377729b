"""WriterThread: writes parts in the background, so that flushing a file never stalls the GPU."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator

from regionspot.cache.format.schema import ImageFeatures
from regionspot.cache.store import FeatureCache
from regionspot.pipeline.extraction.part_queue import PartQueue
from regionspot.pipeline.reporting.run_stats import RunStats


class WriterThread:
    """Writes parts one after the other; `put` takes all images of each part in row order.

    Leaving the `with` block waits for the last part. Leaving it with an error drops the part in progress, which then
    has no record, so the next run extracts it again.
    """

    def __init__(self, cache: FeatureCache, parts: PartQueue, stats: RunStats) -> None:
        self._cache, self._parts, self._stats = cache, parts, stats
        self._queue: queue.Queue[ImageFeatures | None] = queue.Queue(maxsize=64)
        self._aborted = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="write", daemon=True)

    def __enter__(self) -> WriterThread:
        self._thread.start()
        return self

    def put(self, image: ImageFeatures | None) -> None:
        """Queue the next image, None after the last. Raises the writer's error if it failed."""
        while True:
            if self._error is not None:
                raise self._error
            try:
                return self._queue.put(image, timeout=0.2)
            except queue.Full:
                continue

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.put(None)
        else:
            self._aborted.set()
        with self._stats.timed("write"):
            self._thread.join()
        if kind is None and self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            while (first := self._next()) is not None:
                part = first.row // self._cache.part_size
                self._parts.write(part, self._images(first, len(self._cache.part_rows(part))))
        except BaseException as error:
            self._error = error

    def _images(self, first: ImageFeatures, count: int) -> Iterator[ImageFeatures]:
        yield first
        for _ in range(count - 1):
            if (image := self._next()) is None:
                return  # the part is incomplete, which `write_part` reports
            yield image

    def _next(self) -> ImageFeatures | None:
        while not self._aborted.is_set():
            try:
                return self._queue.get(timeout=0.2)
            except queue.Empty:
                continue
        raise _Aborted


class _Aborted(Exception):
    """The run is stopping; the part in progress is not written."""
