"""Prefetching batches with threads into a ring of reused buffers.

No thread ever waits for the consumer: a batch is submitted only when its buffer is free. So a consumer that stops
early, raises or is garbage-collected leaves no blocked thread. Threads start with the first requested batch, in the
requesting process, so that an object that holds such an iterator may be forked or pickled before.

In a worker process of torch's DataLoader every batch has memory of its own: there a thread sends the batch some time
later, when a reused buffer would already hold the next one.
"""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from regionspot.cache.errors import CacheError
from regionspot.cache.reading.batch import Batch
from regionspot.cache.reading.batch_reader import BatchReader, split

AHEAD = 2  # one being filled and one ready: more only helps if the time per batch varies

Read = tuple[BatchReader, NDArray[np.int64]]  # the reader and the rows of one batch


def read_ahead(
    reads: Iterable[Read],
    threads: int,
    ahead: int = AHEAD,
    pinned: bool = False,
    ring: list[Batch] | None = None,
) -> Generator[Batch]:
    """The batches of `reads`, in order; each is valid until the next one is requested.

    threads   that share the images of a batch
    ahead     batches that are read before they are requested
    pinned    page-locked memory; the caller ensures that there is a GPU
    ring      buffers of a finished pass; new ones are added to it

    An error while reading a batch is raised when that batch is requested, and ends the iteration.
    """
    reusable = dataloader_worker() is None
    ring = ring if ring is not None and reusable else []
    ring += [Batch(pinned=pinned, reusable=reusable) for _ in range(ahead + 1 - len(ring))]
    free = list(ring)
    pending: deque[_PendingBatch] = deque()
    process, remaining = os.getpid(), iter(reads)
    pool = ThreadPoolExecutor(threads, thread_name_prefix="regionspot-read")
    try:
        while True:
            while free and (read := next(remaining, None)) is not None:
                pending.append(_PendingBatch(pool, threads, free.pop(), *read))
            if not pending:
                return
            batch = pending.popleft().result()
            yield batch
            if os.getpid() != process:
                raise CacheError("loader: this pass was started in another process; start one here with iter()")
            free.append(batch if reusable else Batch())
    finally:
        if os.getpid() == process:  # a forked process does not have these threads
            pool.shutdown(cancel_futures=True)


class _PendingBatch:
    """A batch being read: one thread allocates it, then that one and others fill it."""

    def __init__(
        self, pool: ThreadPoolExecutor, threads: int, batch: Batch, reader: BatchReader, rows: NDArray[np.int64]
    ) -> None:
        self._pool, self._threads, self._batch, self._reader, self._rows = pool, threads, batch, reader, rows
        self._others: list[Future[None]] = []
        self._first = pool.submit(self._allocate_and_fill)

    def _allocate_and_fill(self) -> None:
        self._reader.allocate(self._rows, self._batch)
        own, *others = split(len(self._rows), self._threads) or [(0, 0)]
        self._others = [self._pool.submit(self._reader.fill, self._batch, *images) for images in others]
        self._reader.fill(self._batch, *own)

    def result(self) -> Batch:
        self._first.result()
        for other in self._others:
            other.result()
        return self._batch


def dataloader_worker() -> tuple[int, int] | None:
    """(worker number, number of workers) in a worker process of torch's DataLoader; None elsewhere."""
    # A worker process has already imported torch; this function must not import it.
    data = sys.modules.get("torch.utils.data")
    worker = data.get_worker_info() if data is not None else None
    return None if worker is None else (worker.id, worker.num_workers)
