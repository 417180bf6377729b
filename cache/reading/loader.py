"""Shuffled batches for a training loop, prefetched by threads and resumable within an epoch.

    loader = cache.loader(64, seed=1)
    for epoch in range(10):
        for batch in loader:             # a Batch, valid until the next one is requested
            ...
            state = loader.state_dict()  # JSON; load_state_dict(state) resumes with the next batch

sampling.py decides the images of each batch; prefetch.py reads them ahead.
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
    """Iterates over the batches of one epoch, then increments `epoch`.

    The batches depend only on the sampling, the rows and the epoch; see sampling.py. In a torch DataLoader each worker
    takes its share of the rank's batches; the parent does not see a worker's counts, so the caller sets `epoch` there.

    epoch     of the next pass; may be set
    sampling  batch size, order and rank
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
        self._done = 0  # batches of this epoch that were returned
        self._first_batch = 0  # of the next pass
        self._rings: list[list[Batch]] = []  # buffers of finished passes: allocating costs more than filling

    def __len__(self) -> int:
        """Number of batches in a whole pass."""
        return self._own_sampling().count(len(self.rows))

    def __iter__(self) -> Iterator[Batch]:
        """One pass, from its first batch or the one set by `load_state_dict`.

        Raises CacheError or a subclass when the batch that is requested cannot be read.
        """
        epoch, first, self._first_batch = self.epoch, self._first_batch, 0
        self._done = first
        counts = np.diff(self.cache.manifest.offsets) if self.sampling.pack else None
        batches = self._own_sampling().batches(self.rows, self.cache.part_size, epoch, counts)
        reads = ((self._reader, batches[number]) for number in range(first, len(batches)))
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
        # The reader is not pickled: it holds open files and possibly gigabytes of tokens.
        return {name: value for name, value in vars(self).items() if name not in ("_reader", "_rings")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._reader = self.cache.batch_reader(**self._sets, preload=self._preload)
        self._rings = []

    def state_dict(self) -> dict[str, Any]:
        """The epoch, the number of its batches returned so far, and what the batches depend on; JSON-able."""
        return {"epoch": self.epoch, "batches": self._done, "decided_by": self._dependencies()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a `state_dict` in the next pass.

        Raises InputError for a state of another cache, other rows or another sampling.
        """
        try:
            epoch, batches, saved = int(state["epoch"]), int(state["batches"]), dict(state["decided_by"])
        except (KeyError, TypeError, ValueError):
            raise InputError("loader: this is not the state_dict() of a loader; start the epoch again") from None
        own = self._dependencies()
        for key in [*own, *saved]:
            if saved.get(key) != own.get(key):
                name = "images" if key == IMAGES_KEY else key
                raise InputError(
                    f"loader: the state is of another loader: its {name} is {saved.get(key)}, here it is "
                    f"{own.get(key)}; create the loader with the same options, or start the epoch again"
                )
        self.epoch, self._done, self._first_batch = epoch, batches, batches

    @cached_property
    def _images(self) -> dict[str, Any]:
        """Identity of the epoch's images. Cached, because a state may be requested after every batch."""
        manifest = self.cache.manifest
        return {
            "cache": f"{manifest.dataset}/{manifest.split}",
            IMAGES_KEY: len(self.rows),
            "crc32c of their rows": _crc(self.rows),
            "crc32c of their ids": _crc(manifest.image_ids[self.rows]),
        }

    def _dependencies(self) -> dict[str, Any]:
        """Everything that the batches depend on, by name."""
        dependencies = {**self._images, **asdict(self._own_sampling())}
        for option in ("pack", "share_batches"):  # absent from the states of older versions
            if not dependencies[option]:
                del dependencies[option]
        if self.sampling.shuffle == "block":
            return {**dependencies, "part_size": self.cache.part_size}
        del dependencies["block_parts"]
        return dependencies

    def _own_sampling(self) -> Sampling:
        """The sampling of this process: a DataLoader worker takes a share of its rank."""
        worker = dataloader_worker()
        if worker is None:
            return self.sampling
        number, count = worker
        rank, world_size = self.sampling.rank * count + number, self.sampling.world_size * count
        return replace(self.sampling, rank=rank, world_size=world_size)

    def _pins_memory(self) -> bool:
        if self._pin_memory is None:
            # By default only if this process already uses a GPU: pinning would initialise CUDA.
            torch = sys.modules.get("torch")
            return torch is not None and bool(torch.cuda.is_initialized())
        return self._pin_memory


def _crc(values: NDArray[np.int64]) -> int:
    return int(google_crc32c.value(np.ascontiguousarray(values)))


def _require_cuda() -> None:
    import torch  # only here: this package works without torch

    if not torch.cuda.is_available():
        raise InputError("loader: pin_memory needs a GPU, and torch finds none here; omit it")
