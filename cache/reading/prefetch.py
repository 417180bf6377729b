"""Batches read ahead by threads, into a ring of buffers that are used again and again.

Nothing in here ever waits for the consumer: a batch's work is handed to the threads only once its buffer is free. So a
consumer that stops early, raises or is forgotten leaves no thread waiting for it. Threads are started by the first
batch that is asked for, in the process that asks, so that whatever holds such an iterator may be forked or sent on.

Inside a worker process of torch's DataLoader every batch gets memory of its own: there a batch is sent on by a thread
that looks at it some time later, when a buffer used again would hold another batch's numbers.
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

AHEAD = 2  # one being filled and one ready: more only helps where the time that a batch takes varies

Read = tuple[BatchReader, NDArray[np.int64]]  # what to read by, and the rows


def read_ahead(
    reads: Iterable[Read],
    threads: int,
    ahead: int = AHEAD,
    pinned: bool = False,
    ring: list[Batch] | None = None,
) -> Generator[Batch]:
    """The batches of `reads`, in order; each is whole until the next one is asked for.

    threads   among which the images of a batch are divided
    ahead     batches that are read before they are asked for
    pinned    page-locked memory; the caller makes sure that there is a GPU
    ring      the buffers of an earlier pass, which is over; those that this one makes are added

    Raises what reading a batch raised when that batch is asked for, and then ends.
    """
    reusable = dataloader_worker() is None
    ring = ring if ring is not None and reusable else []
    ring += [Batch(pinned=pinned, reusable=reusable) for _ in range(ahead + 1 - len(ring))]
    free = list(ring)
    filling: deque[_Filling] = deque()
    process, waiting = os.getpid(), iter(reads)
    pool = ThreadPoolExecutor(threads, thread_name_prefix="regionspot-read")
    try:
        while True:
            while free and (read := next(waiting, None)) is not None:
                filling.append(_Filling(pool, threads, free.pop(), *read))
            if not filling:
                return
            batch = filling.popleft().result()
            yield batch
            if os.getpid() != process:
                raise CacheError("loader: this pass began in another process; begin one here, with iter()")
            free.append(batch if reusable else Batch())
    finally:
        if os.getpid() == process:  # a fork has no such threads to wait for
            pool.shutdown(cancel_futures=True)


class _Filling:
    """A batch on its way: laid out by one thread, then filled by that one and the others."""

    def __init__(
        self, pool: ThreadPoolExecutor, threads: int, batch: Batch, reader: BatchReader, rows: NDArray[np.int64]
    ) -> None:
        self._pool, self._threads, self._batch, self._reader, self._rows = pool, threads, batch, reader, rows
        self._others: list[Future[None]] = []
        self._begun = pool.submit(self._begin)

    def _begin(self) -> None:
        self._reader.allocate(self._rows, self._batch)
        ours, *others = split(len(self._rows), self._threads) or [(0, 0)]
        self._others = [self._pool.submit(self._reader.fill, self._batch, *stretch) for stretch in others]
        self._reader.fill(self._batch, *ours)

    def result(self) -> Batch:
        self._begun.result()
        for other in self._others:
            other.result()
        return self._batch


def dataloader_worker() -> tuple[int, int] | None:
    """This worker's number and how many there are, in a worker process of torch's DataLoader; None elsewhere."""
    # Such a process has imported it; asking must not be what imports torch.
    data = sys.modules.get("torch.utils.data")
    worker = data.get_worker_info() if data is not None else None
    return None if worker is None else (worker.id, worker.num_workers)
