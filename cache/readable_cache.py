"""The reading side of a cache: batches of chosen images, and loaders of them, over whatever holds their features."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from regionspot.cache.errors import InputError
from regionspot.cache.format.manifest import Manifest
from regionspot.cache.format.schema import FeatureSet
from regionspot.cache.reading.batch import Batch
from regionspot.cache.reading.batch_reader import BatchReader, Features
from regionspot.cache.reading.in_memory_tokens import HeldTokens
from regionspot.cache.reading.loader import Loader
from regionspot.cache.reading.prefetch import AHEAD, dataloader_worker
from regionspot.cache.reading.sampling import Sampling, Shuffle


class ReadableCache(ABC):
    """What is read by row; `len(cache)` is its number of images.

    path          where it lies, for messages and to open it again
    manifest      images and regions
    feature_sets  by name
    """

    path: str | Path
    manifest: Manifest
    feature_sets: dict[str, FeatureSet]
    _readers: Mapping[str, Features]
    _threads = 1  # of one `read`

    def __len__(self) -> int:
        return len(self.manifest)

    @property
    @abstractmethod
    def part_size(self) -> int:
        """Images that lie together, which shuffling by blocks keeps so."""

    @abstractmethod
    def valid_rows(self, feature_sets: Sequence[str] | None = None) -> NDArray[np.int64]:
        """int64, rising: rows written in all of the feature sets (default: all), without images that failed."""

    def read(
        self, rows: ArrayLike, *, map_set: str | None = None, token_set: str | None = None, out: Batch | None = None
    ) -> Batch:
        """Read the images at `rows`, in that order and as often as they are named, into one padded batch.

        map_set, token_set   feature sets to read (default: the only one of that kind, none where there is none)
        out                  a batch whose memory is used again; it is changed and returned, so what was read into it
                             before is gone. Not in the workers of a torch DataLoader, which send a batch on only some
                             time after it was given to them

        Raises InputError for rows that do not exist, NotExtractedError for a row whose part is not committed or whose
        image could not be read, CorruptPartError for one whose bytes do not match their checksum.
        """
        if out is not None and dataloader_worker() is not None:
            raise InputError(
                f"{self.path}: read(out=) in a worker of a DataLoader would overwrite batches that are on their way; "
                "leave `out` out there"
            )
        wanted = self._checked_rows(rows)
        return self.batch_reader(map_set, token_set).read(wanted, Batch() if out is None else out, self._threads)

    def loader(
        self,
        batch_size: int,
        *,
        shuffle: Shuffle = Sampling.shuffle,
        seed: int = 0,
        epoch: int = 0,
        rows: ArrayLike | None = None,
        map_set: str | None = None,
        token_set: str | None = None,
        rank: int = 0,
        world_size: int = 1,
        drop_last: bool = False,
        threads: int | None = None,
        ahead: int = AHEAD,
        block_parts: int = Sampling.block_parts,
        tokens_in_memory: bool = False,
        pin_memory: bool | None = None,
    ) -> Loader:
        """Batches for a training loop, read ahead by threads; each is whole until the next one is asked for.

        shuffle     full: any order; block: parts in random order, and rows mixed over `block_parts` of them, for disks
                    and networks that are slow at jumping about; none: as `rows` are
        seed, epoch decide the order; the epoch advances by itself at the end of each pass
        rows        images to take (default: the valid ones)
        rank, world_size   this process's share: over all ranks every row of an epoch is given exactly once, and all
                    have the same number of batches; sampling.py says how
        drop_last   leave out what fills no whole batch on every rank
        threads     that read (default: what suits where the cache lies); ahead: batches that they are ahead
        tokens_in_memory   read the tokens of all `rows` now and keep them
        pin_memory  page-locked batches, for copies to a GPU (default: where this process uses one already). A copy with
                    non_blocking=True must be over before the next batch is asked for

        Raises InputError for options that make no batches, and for a cache without an image to read.
        """
        sampling = Sampling(
            batch_size=batch_size,
            shuffle=shuffle,
            seed=seed,
            rank=rank,
            world_size=world_size,
            drop_last=drop_last,
            block_parts=block_parts,
        )
        sets = [each.name for each in (self._only_set("map", map_set), self._only_set("token", token_set)) if each]
        wanted = self.valid_rows(sets) if rows is None else self._checked_rows(rows)
        if not len(wanted):
            raise InputError(f"{self.path}: there is no image to load; run `regionspot extract`, or give other rows")
        return Loader(
            self,
            sampling,
            wanted,
            map_set=map_set,
            token_set=token_set,
            epoch=epoch,
            threads=threads,
            ahead=ahead,
            tokens_in_memory=tokens_in_memory,
            pin_memory=pin_memory,
        )

    def batch_reader(
        self, map_set: str | None = None, token_set: str | None = None, held_rows: NDArray[np.int64] | None = None
    ) -> BatchReader:
        """What reads batches of two feature sets; the tokens of `held_rows` are read now and kept in memory."""
        maps, tokens = self._only_set("map", map_set), self._only_set("token", token_set)
        token_reader = None if tokens is None else self._readers[tokens.name]
        if token_reader is not None and held_rows is not None:
            token_reader = HeldTokens(token_reader, self.manifest, held_rows)
        return BatchReader(self.manifest, None if maps is None else self._readers[maps.name], token_reader)

    def _checked_rows(self, rows: ArrayLike) -> NDArray[np.int64]:
        wanted = np.asarray(rows)
        if wanted.ndim != 1 or (wanted.size and not np.issubdtype(wanted.dtype, np.integer)):
            raise InputError(
                f"{self.path}: rows are {wanted.dtype} of shape {wanted.shape}, expected a list of integers"
            )
        outside = wanted[(wanted < 0) | (wanted >= len(self))]
        if len(outside):
            raise InputError(f"{self.path}: there is no row {outside[0]}: this cache has rows 0 to {len(self) - 1}")
        return wanted.astype(np.int64)

    def _only_set(self, kind: str, name: str | None) -> FeatureSet | None:
        of_kind = {each.name: each for each in self.feature_sets.values() if each.kind == kind}
        if name is None and len(of_kind) <= 1:
            return next(iter(of_kind.values()), None)
        if name not in of_kind:
            asked = f"{name!r} is none of them" if name else "say which one"
            raise InputError(f"{self.path}: {kind} feature sets are {', '.join(of_kind) or 'none'}; {asked}")
        return of_kind[name]
