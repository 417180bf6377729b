"""Which rows make up which batch of an epoch, on which rank: a pure function, so that any run can go on anywhere.

An epoch is one sequence of all rows, cut into as many stretches as there are ranks, each cut into batches. So nothing
is lost or doubled whatever the numbers, and ranks that share a cache read different parts of it.

    full    every row anywhere
    block   parts in random order, then every row put off by a random delay of less than `block_parts` parts: about
            that many parts are read at a time, each for a short while
    none    as the rows were given

The tail: without `drop_last` every row is given exactly once, and every rank has the same number of batches (one that
has fewer waits for the others for ever, in torch's DistributedDataParallel), for which the last two batches of a rank
may be short. That cannot be where there are fewer rows than ranks, nor with batches of one row: some ranks have one
batch less then. With `drop_last` every batch is full, and less than a batch a rank is left out of each epoch.

Randomness is the raw 64-bit output of PCG64, which numpy keeps the same in every version and on every machine, and
enters by sorting integers; so the batches of a seed never change.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, overload

import numpy as np
from numpy.typing import NDArray

from regionspot.cache.errors import InputError

Shuffle = Literal["full", "block", "none"]

_ORDER, _DELAY = 0, 1  # what random numbers are for: each has its own stream


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """All that decides the batches of an epoch but the rows. Raises InputError for values that decide none."""

    batch_size: int
    shuffle: Shuffle = "full"
    seed: int = 0
    rank: int = 0
    world_size: int = 1
    drop_last: bool = False
    block_parts: int = 8

    def __post_init__(self) -> None:
        if self.shuffle not in ("full", "block", "none"):
            raise InputError(f"loader: shuffle is {self.shuffle!r}, expected full, block or none")
        for name, least in (("batch_size", 1), ("seed", 0), ("world_size", 1), ("block_parts", 1)):
            if getattr(self, name) < least:
                raise InputError(f"loader: {name} is {getattr(self, name)}, expected at least {least}")
        if not 0 <= self.rank < self.world_size:
            raise InputError(f"loader: rank is {self.rank}, expected 0 to {self.world_size - 1}, as world_size says")

    def batches(self, rows: NDArray[np.int64], part_size: int, epoch: int) -> Batches:
        """This rank's batches of an epoch over `rows`, of which `part_size` consecutive numbers make a part.

        Three million rows take a tenth of a second (`block`: three tenths) and at most four times their own memory.
        """
        mine = self._stretch(self._sequence(rows, part_size, epoch))
        if self.shuffle == "block":
            # Counted where one part follows another, for not all rows of a part need be wanted.
            parts = 1 + int(np.count_nonzero(np.diff(mine // part_size)))
            mine = mine[_delayed(len(mine), len(mine) * self.block_parts // parts, [self.seed, epoch, _DELAY])]
        return Batches(mine, self._edges(len(rows), len(mine)))

    def count(self, rows: int) -> int:
        """How many batches an epoch over that many rows has for this rank."""
        return len(self._edges(rows, len(self._stretch(range(rows))))) - 1

    def _sequence(self, rows: NDArray[np.int64], part_size: int, epoch: int) -> NDArray[np.int64]:
        """The epoch's order of all rows, before it is cut up."""
        if self.shuffle == "none":
            return rows
        key = [self.seed, epoch, _ORDER]
        if self.shuffle == "full":
            return rows[_permutation(len(rows), key)]
        part = rows // part_size
        place = np.zeros(part.max(initial=-1) + 1, dtype=np.int64)
        place[part] = 1
        touched = np.flatnonzero(place)
        place[touched] = _permutation(len(touched), key)
        return rows[np.argsort(place[part], kind="stable")]

    @overload
    def _stretch(self, sequence: NDArray[np.int64]) -> NDArray[np.int64]: ...
    @overload
    def _stretch(self, sequence: range) -> range: ...
    def _stretch(self, sequence: NDArray[np.int64] | range) -> NDArray[np.int64] | range:
        """This rank's piece of a sequence: lengths of ranks differ by one at most."""
        length = len(sequence)
        return sequence[length * self.rank // self.world_size : length * (self.rank + 1) // self.world_size]

    def _edges(self, rows: int, mine: int) -> NDArray[np.int64]:
        """Where this rank's batches begin and the last one ends, of `rows` in all and `mine` on this rank."""
        size = self.batch_size
        if self.drop_last:
            return np.arange(rows // self.world_size // size + 1) * size
        longest = -(-rows // self.world_size)
        edges = np.minimum(np.arange(-(-longest // size) + 1) * size, mine)
        if mine < longest and mine % size == 0:
            # This rank's rows fill whole batches where another has one row more, and with it one batch more.
            if size == 1 or not mine:
                return edges[:-1]
            edges[-2] -= size // 2
        return edges


class Batches:
    """The rows of each batch, by its number in the epoch."""

    def __init__(self, rows: NDArray[np.int64], edges: NDArray[np.int64]) -> None:
        self.rows, self._edges = rows, edges

    def __len__(self) -> int:
        return len(self._edges) - 1

    def __getitem__(self, number: int) -> NDArray[np.int64]:
        if not 0 <= number < len(self):
            raise IndexError(f"there is no batch {number} of {len(self)}")
        return self.rows[self._edges[number] : self._edges[number + 1]]


def _permutation(length: int, key: Sequence[int]) -> NDArray[np.int64]:
    """A random order of 0 to length - 1."""
    bits = np.uint64(length.bit_length())
    # The number rides in the low bits of its own random key: sorting those is 5 times as fast as sorting by them.
    keys = _random(length, key) << bits
    keys |= np.arange(length, dtype=np.uint64)
    keys.sort()
    keys &= (np.uint64(1) << bits) - np.uint64(1)
    return keys.view(np.int64)


def _delayed(length: int, longest: int, key: Sequence[int]) -> NDArray[np.int64]:
    """The order of 0 to length - 1 after each has waited for a random time below `longest` places."""
    fine = np.uint64(20)  # bits after the point, so that hardly two are due at once; 2^43 rows fit before it
    due = np.arange(length, dtype=np.uint64) << fine
    due += _random(length, key) % (np.uint64(max(1, longest)) << fine)
    return np.argsort(due, kind="stable")


def _random(length: int, key: Sequence[int]) -> NDArray[np.uint64]:
    return np.random.PCG64(np.random.SeedSequence(key)).random_raw(length)
