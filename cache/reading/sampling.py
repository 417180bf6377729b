"""The rows of each batch of an epoch on each rank: a pure function of its arguments, so that any run can resume.

An epoch is one sequence of all rows, split into one contiguous slice per rank, each split into batches. So no row is
lost or repeated, and ranks that share a cache read different parts of it.

    full    any order
    block   parts in random order, then each row delayed by a random distance of less than `block_parts` parts: about
            that many parts are read at a time, each for a short while
    none    the given order

`pack` sorts windows of PACK_BATCHES batches by the number of regions of their images, so that the images of a batch
have similar numbers and little padding, and shuffles the batches of a window. `share_batches` gives every rank a part
of each batch, so that the images of a training step do not depend on the number of ranks.

Without `drop_last` every row is given exactly once and every rank has the same number of batches (with torch's
DistributedDataParallel, a rank with more batches would wait forever), for which the last two batches of a rank may be
short. Exceptions: with fewer rows than ranks, or batches of one row, some ranks have one batch less. With `drop_last`
every batch is full, and less than one batch per rank is dropped from each epoch.

Random numbers are the raw 64-bit output of PCG64, which is the same in every numpy version and on every machine, and
are used by sorting integers; so the batches of a seed never change.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, overload

import numpy as np
from numpy.typing import NDArray

from regionspot.cache.errors import InputError

Shuffle = Literal["full", "block", "none"]

_ORDER, _DELAY, _PACK = 0, 1, 2  # uses of random numbers, each with its own stream

# Rows of a padded batch of 16 for each region, with the numbers of regions of COCO's images: 3.8 without packing; with
# windows of 8, 32 and 128 batches 1.38, 1.08 and 1.02.
PACK_BATCHES = 32


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Everything that determines the batches of an epoch, except the rows. Raises InputError for invalid values."""

    batch_size: int
    shuffle: Shuffle = "full"
    seed: int = 0
    rank: int = 0
    world_size: int = 1
    drop_last: bool = False
    block_parts: int = 8
    pack: bool = False
    share_batches: bool = False

    def __post_init__(self) -> None:
        if self.shuffle not in ("full", "block", "none"):
            raise InputError(f"loader: shuffle is {self.shuffle!r}, expected full, block or none")
        for name, least in (("batch_size", 1), ("seed", 0), ("world_size", 1), ("block_parts", 1)):
            if getattr(self, name) < least:
                raise InputError(f"loader: {name} is {getattr(self, name)}, expected at least {least}")
        if not 0 <= self.rank < self.world_size:
            raise InputError(f"loader: rank is {self.rank}, expected 0 to {self.world_size - 1} (world_size - 1)")

    def batches(
        self, rows: NDArray[np.int64], part_size: int, epoch: int, counts: NDArray[np.int64] | None = None
    ) -> Batches:
        """This rank's batches of an epoch over `rows`; a part has `part_size` consecutive rows.

        counts   number of regions of every row of the manifest; only `pack` needs it

        Three million rows take a tenth of a second (`block`: three tenths) and at most four times their own memory.
        """
        if self.share_batches:
            whole = replace(self, rank=0, world_size=1, share_batches=False)
            return whole.batches(rows, part_size, epoch, counts).shared(self.rank, self.world_size)
        own = self._slice(self._sequence(rows, part_size, epoch))
        if self.shuffle == "block":
            # Count the changes from part to part: `rows` may hold only some rows of a part.
            parts = 1 + int(np.count_nonzero(np.diff(own // part_size)))
            own = own[_delayed(len(own), len(own) * self.block_parts // parts, [self.seed, epoch, _DELAY])]
        if self.pack and counts is not None:
            own = _packed(own, counts[own], self.batch_size, [self.seed, epoch, _PACK])
        edges = self._edges(len(rows), len(own))
        return Batches(own, edges[:-1], edges[1:])

    def count(self, rows: int) -> int:
        """This rank's number of batches in an epoch over that many rows."""
        if self.share_batches:
            return replace(self, rank=0, world_size=1, share_batches=False).count(rows)
        return len(self._edges(rows, len(self._slice(range(rows))))) - 1

    def _sequence(self, rows: NDArray[np.int64], part_size: int, epoch: int) -> NDArray[np.int64]:
        """The order of all rows of the epoch."""
        if self.shuffle == "none":
            return rows
        key = [self.seed, epoch, _ORDER]
        if self.shuffle == "full":
            return rows[_permutation(len(rows), key)]
        part = rows // part_size
        position = np.zeros(part.max(initial=-1) + 1, dtype=np.int64)
        position[part] = 1
        used = np.flatnonzero(position)
        position[used] = _permutation(len(used), key)
        return rows[np.argsort(position[part], kind="stable")]

    @overload
    def _slice(self, sequence: NDArray[np.int64]) -> NDArray[np.int64]: ...
    @overload
    def _slice(self, sequence: range) -> range: ...
    def _slice(self, sequence: NDArray[np.int64] | range) -> NDArray[np.int64] | range:
        """This rank's slice of a sequence; lengths differ by at most one among ranks."""
        length = len(sequence)
        return sequence[length * self.rank // self.world_size : length * (self.rank + 1) // self.world_size]

    def _edges(self, rows: int, own: int) -> NDArray[np.int64]:
        """Start of each of this rank's batches, and the end of the last; `rows` in total, `own` on this rank."""
        size = self.batch_size
        if self.drop_last:
            return np.arange(rows // self.world_size // size + 1) * size
        longest = -(-rows // self.world_size)
        edges = np.minimum(np.arange(-(-longest // size) + 1) * size, own)
        if own < longest and own % size == 0:
            # This rank's rows fill whole batches, while another rank has one row more and so one more batch.
            if size == 1 or not own:
                return edges[:-1]
            edges[-2] -= size // 2  # split the last batch in two
        return edges


class Batches:
    """The rows of each batch, by batch number."""

    def __init__(self, rows: NDArray[np.int64], starts: NDArray[np.int64], ends: NDArray[np.int64]) -> None:
        self.rows, self._starts, self._ends = rows, starts, ends

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, number: int) -> NDArray[np.int64]:
        if not 0 <= number < len(self):
            raise IndexError(f"batch {number} does not exist; there are {len(self)}")
        return self.rows[self._starts[number] : self._ends[number]]

    def shared(self, rank: int, world_size: int) -> Batches:
        """The rank's slice of every batch; empty where a batch has fewer rows than there are ranks."""
        lengths = self._ends - self._starts
        starts, ends = (self._starts + lengths * number // world_size for number in (rank, rank + 1))
        return Batches(self.rows, starts, ends)


def _permutation(length: int, key: Sequence[int]) -> NDArray[np.int64]:
    """A random order of 0 to length - 1."""
    bits = np.uint64(length.bit_length())
    # Each index is packed into the low bits of its random key: 5 times as fast as an argsort.
    keys = _random(length, key) << bits
    keys |= np.arange(length, dtype=np.uint64)
    keys.sort()
    keys &= (np.uint64(1) << bits) - np.uint64(1)
    return keys.view(np.int64)


def _delayed(length: int, longest: int, key: Sequence[int]) -> NDArray[np.int64]:
    """The order of 0 to length - 1 after delaying each by a random distance below `longest`."""
    fraction = np.uint64(20)  # bits after the binary point, so that ties are rare; leaves room for 2^43 rows
    position = np.arange(length, dtype=np.uint64) << fraction
    position += _random(length, key) % (np.uint64(max(1, longest)) << fraction)
    return np.argsort(position, kind="stable")


def _packed(
    rows: NDArray[np.int64], counts: NDArray[np.int64], batch_size: int, key: Sequence[int]
) -> NDArray[np.int64]:
    """`rows` sorted by `counts` within windows of PACK_BATCHES batches, then the whole batches of a window shuffled."""
    rows = rows[np.lexsort((counts, np.arange(len(rows)) // (batch_size * PACK_BATCHES)))]
    whole = len(rows) // batch_size
    order = np.lexsort((_random(whole, key), np.arange(whole) // PACK_BATCHES))
    rows[: whole * batch_size] = rows[: whole * batch_size].reshape(whole, batch_size)[order].ravel()
    return rows


def _random(length: int, key: Sequence[int]) -> NDArray[np.uint64]:
    return np.random.PCG64(np.random.SeedSequence(key)).random_raw(length)
