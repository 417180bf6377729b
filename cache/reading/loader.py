"""Shuffled batches for a training loop, read ahead by threads, and going on in the middle of an epoch.

    loader = cache.loader(64, seed=1)
    for epoch in range(10):
        for batch in loader:             # a Batch, whole until the next one is asked for
            ...
            state = loader.state_dict()  # JSON; load_state_dict(state) goes on with the batch after this one

Which images make up which batch is decided in sampling.py; ring.py reads them ahead.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, replace
from functools import cached_property
from typing import Any, Protocol

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from regionspot.cache.errors import InputError
from regionspot.cache.format.manifest import Manifest
from regionspot.cache.reading.batch import Batch
from regionspot.cache.reading.batch_reader import BatchReader
from regionspot.cache.reading.prefetch import dataloader_worker, read_ahead
from regionspot.cache.reading.sampling import Sampling
from regionspot.cache.storage.atomic_files import IMAGES_KEY


class BatchSource(Protocol):
    """A FeatureCache: pickled as its address, it is opened again where it is unpickled."""

    manifest: Manifest

    @property
    def part_size(self) -> int: ...

    def batch_reader(
        self, map_set: str | None = None, token_set: str | None = None, preload: NDArray[np.int64] | None = None
    ) -> BatchReader: ...


class Loader:
    """The batches of one epoch after another. Iterating is one pass, after which `epoch` is one higher.

    Which images make up which batch follows from the sampling, the rows and the epoch alone; see sampling.py. In the
    workers of a torch DataLoader each worker takes its own share of the rank's batches; what a worker counts its parent
    does not see, so `epoch` is for the caller to set there.

    epoch     of the next pass; may be set
    sampling  what decides the batches
    rows      int64 (n,), the images of an epoch
    """

    def __init__(
        self,
        cache: BatchSource,
        sampling: Sampling,
        rows: NDArray[np.int64],
        *,
        map_set: str | None,
        token_set: str | None,
        epoch: int,
        threads: int | None,
        ahead: int,
        tokens_in_memory: bool,
        pin_memory: bool | None,
    ) -> None:
        for name, value, least in (("epoch", epoch, 0), ("threads", threads, 1), ("ahead", ahead, 1)):
            if value is not None and value < least:
                raise InputError(f"loader: {name} is {value}, expected at least {least}")
        if pin_memory:
            _require_cuda()
        self.cache, self.sampling, self.rows, self.epoch = cache, sampling, rows, epoch
        self._sets = {"map_set": map_set, "token_set": token_set}
        self._threads, self._ahead, self._pin_memory = threads, ahead, pin_memory
        self._preload = rows if tokens_in_memory else None
        self._reader = cache.batch_reader(**self._sets, preload=self._preload)
        self._done = 0  # batches of this epoch that were handed out
        self._begins = 0  # with which batch the next pass begins
        self._rings: list[list[Batch]] = []  # of passes that are over: fresh memory costs more than filling it

    def __len__(self) -> int:
        """Batches of a whole pass."""
        return self._own_sampling().count(len(self.rows))

    def __iter__(self) -> Iterator[Batch]:
        """One pass from its beginning, or from where `load_state_dict` said.

        Raises CacheError and its kinds when a batch cannot be read, once that batch is asked for.
        """
        epoch, begins, self._begins = self.epoch, self._begins, 0
        self._done = begins
        batches = self._own_sampling().batches(self.rows, self.cache.part_size, epoch)
        reads = ((self._reader, batches[number]) for number in range(begins, len(batches)))
        threads = self._threads or self._reader.threads
        ring = self._rings.pop() if self._rings else []
        pinned = ring[0].pinned if ring else self._pins_memory()
        try:
            with closing(read_ahead(reads, threads, self._ahead, pinned, ring)) as ahead:
                for batch in ahead:
                    self._done += 1
                    yield batch
        finally:
            self._rings.append(ring)
        self.epoch, self._done = epoch + 1, 0

    def __getstate__(self) -> dict[str, Any]:
        # A process that is sent a loader reads what it needs itself: the reader holds open files and, maybe, gigabytes.
        return {name: value for name, value in vars(self).items() if name not in ("_reader", "_rings")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._reader = self.cache.batch_reader(**self._sets, preload=self._preload)
        self._rings = []

    def state_dict(self) -> dict[str, Any]:
        """Where this loader is: the epoch and the batches of it handed out, and what decides them; JSON-able."""
        return {"epoch": self.epoch, "batches": self._done, "decided_by": self._decided_by()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the next pass go on where the loader was of which this is the state.

        Raises InputError for a state of another cache, other rows, or another way of making batches of them.
        """
        try:
            epoch, batches, theirs = int(state["epoch"]), int(state["batches"]), dict(state["decided_by"])
        except (KeyError, TypeError, ValueError):
            raise InputError("loader: this is not what state_dict() of a loader gave; begin the epoch anew") from None
        ours = self._decided_by()
        for name in [*ours, *theirs]:
            if theirs.get(name) != ours.get(name):
                raise InputError(
                    f"loader: the state is of another one: its {'images' if name == IMAGES_KEY else name} is {theirs.get(name)}, here it is "
                    f"{ours.get(name)}; make the loader as it was, or begin the epoch anew"
                )
        self.epoch, self._done, self._begins = epoch, batches, batches

    @cached_property
    def _images(self) -> dict[str, Any]:
        """What tells the images of an epoch from others. Kept, for a state may be wanted after every batch."""
        manifest = self.cache.manifest
        return {
            "cache": f"{manifest.dataset}/{manifest.split}",
            IMAGES_KEY: len(self.rows),
            "crc32c of their rows": _crc(self.rows),
            "crc32c of their ids": _crc(manifest.image_ids[self.rows]),
        }

    def _decided_by(self) -> dict[str, Any]:
        """All that decides the batches, by name."""
        decided = {**self._images, **asdict(self._own_sampling())}
        if self.sampling.shuffle == "block":
            return {**decided, "part_size": self.cache.part_size}
        del decided["block_parts"]
        return decided

    def _own_sampling(self) -> Sampling:
        """The sampling of this process: in a DataLoader's workers, a part of the rank's."""
        worker = dataloader_worker()
        if worker is None:
            return self.sampling
        number, of = worker
        rank, world_size = self.sampling.rank * of + number, self.sampling.world_size * of
        return replace(self.sampling, rank=rank, world_size=world_size)

    def _pins_memory(self) -> bool:
        if self._pin_memory is None:
            # By itself only where this process uses a GPU already: pinning would begin to.
            torch = sys.modules.get("torch")
            return torch is not None and bool(torch.cuda.is_initialized())
        return self._pin_memory


def _crc(values: NDArray[np.int64]) -> int:
    return int(google_crc32c.value(np.ascontiguousarray(values)))


def _require_cuda() -> None:
    import torch  # only where it is asked for: this package does without

    if not torch.cuda.is_available():
        raise InputError("loader: pin_memory is for a GPU, and torch finds none here; leave it out")
