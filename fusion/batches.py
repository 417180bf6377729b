"""Which images make up which batch, and reading them ahead.

A batch follows from the seed and the step alone: a run that was stopped goes on with the very batches that it would
have had, without reading those before. Within a cache the images of one epoch after another, each epoch shuffled
anew, form one endless row that is cut into batches, so none is left out.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import lru_cache
from itertools import tee

import numpy as np
from numpy.typing import NDArray

from regionspot.cache.errors import InputError
from regionspot.cache.reading import prefetch as ring
from regionspot.cache.reading.batch import Batch
from regionspot.fusion.sources import Source

# Fractional part of the golden ratio: its multiples modulo 1 fill every stretch of [0, 1) more evenly than random
# numbers do, so the caches' ratios hold over short stretches of a run too.
GOLDEN = 0.6180339887498949


class BatchPlan:
    """For every step the source it reads from and the positions in that source's rows.

    sizes       usable rows of each source
    ratios      share of the batches that each source gives, in any unit; default: by its size
    """

    def __init__(self, sizes: Sequence[int], batch_size: int, seed: int, ratios: Sequence[float] | None = None) -> None:
        self.sizes, self.batch_size, self.seed = tuple(sizes), batch_size, seed
        weights = np.asarray(sizes if ratios is None else ratios, dtype=np.float64)
        if weights.shape != (len(sizes),) or not (np.isfinite(weights).all() and (weights > 0).all()):
            raise InputError(f"ratios {weights.tolist()}: expected {len(sizes)} numbers above 0, one a cache")
        self.shares = weights / weights.sum()
        # Two epochs a source are alive at once, where a batch spans the end of one.
        self._order = lru_cache(maxsize=2 * len(sizes))(self._shuffle)

    def steps(self, first: int, last: int) -> Iterator[tuple[int, NDArray[np.int64]]]:
        """(source, positions) of the steps first to last - 1."""
        sources = self._sources(last)
        done = np.bincount(sources[:first], minlength=len(self.sizes))
        for source in sources[first:].tolist():
            yield source, self._positions(source, int(done[source]))
            done[source] += 1

    def _sources(self, steps: int) -> NDArray[np.int64]:
        edges = np.cumsum(self.shares)[:-1]
        return np.searchsorted(edges, np.arange(steps) * GOLDEN % 1.0, side="right").astype(np.int64)

    def _positions(self, source: int, batch: int) -> NDArray[np.int64]:
        epochs, places = np.divmod(batch * self.batch_size + np.arange(self.batch_size), self.sizes[source])
        orders = [self._order(source, int(epoch))[places[epochs == epoch]] for epoch in np.unique(epochs)]
        return np.concatenate(orders)

    def _shuffle(self, source: int, epoch: int) -> NDArray[np.int64]:
        return np.random.default_rng([self.seed, source, epoch]).permutation(self.sizes[source])


@dataclass(frozen=True, eq=False)
class Planned:
    """The batch of one step. Its memory is used again once the next one is asked for."""

    step: int
    source: int
    batch: Batch


def read_ahead(
    sources: Sequence[Source], plan: BatchPlan, first: int, last: int, pinned: bool = False
) -> Generator[Planned, None, None]:
    """The batches of steps first to last - 1, the next ones being read meanwhile.

    pinned   in page-locked memory, for copies to a GPU

    Raises what reading raised, at the step whose batch could not be read.
    """
    steps, planned = tee(plan.steps(first, last))
    reads = ((sources[source].reader, sources[source].rows[positions]) for source, positions in planned)
    threads = max(source.reader.threads for source in sources)
    with closing(ring.read_ahead(reads, threads, pinned=pinned)) as batches:
        for step, ((source, _), batch) in enumerate(zip(steps, batches, strict=True), start=first):
            yield Planned(step, source, batch)
