"""Reading batches: region columns, one map set and one token set, from disk or memory, with one or several threads.

A batch is first allocated, then filled; several threads may fill different images.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from regionspot.cache.format.manifest import Manifest
from regionspot.cache.format.schema import FeatureSet
from regionspot.cache.reading.batch import Batch
from regionspot.cache.reading.part_reader import SCALE_BYTES, Bytes

_IMAGES_PER_READ = 4096  # enough to keep a disk busy


class FeatureSource(Protocol):
    """Provides the features of one set, like `FeatureReader.read`."""

    feature_set: FeatureSet
    threads: int

    def read(self, rows: Sequence[int], outs: Sequence[Bytes], scales: Sequence[Bytes]) -> None: ...


class InMemoryTokens:
    """A FeatureSource that reads the tokens of the images at `rows` when created, and keeps them in memory.

    Tokens are small compared to maps, and this saves one read per image.

    Raises what `tokens` raises when an image cannot be read.
    """

    threads = 1  # copying from memory needs no more

    def __init__(self, tokens: FeatureSource, manifest: Manifest, rows: NDArray[np.int64]) -> None:
        self.feature_set = tokens.feature_set
        self._width = self.feature_set.shape[-1] * self.feature_set.stored.itemsize
        self._scale_width = SCALE_BYTES if self.feature_set.has_scales else 0
        self._rows = np.unique(rows)
        counts = manifest.offsets[self._rows + 1] - manifest.offsets[self._rows]
        self._ends = np.cumsum(counts)
        self._starts = self._ends - counts
        regions = int(counts.sum())
        self._tokens, self._scales = (np.empty(regions * width, np.uint8) for width in (self._width, self._scale_width))
        with ThreadPoolExecutor(tokens.threads, thread_name_prefix="regionspot-read") as pool:
            slices = [slice(first, first + _IMAGES_PER_READ) for first in range(0, len(self._rows), _IMAGES_PER_READ)]
            for _ in pool.map(lambda images: tokens.read(self._rows[images].tolist(), *self._bytes(images)), slices):
                pass

    def read(self, rows: Sequence[int], outs: Sequence[Bytes], scales: Sequence[Bytes]) -> None:
        """Copy the tokens of images, and their scales; see FeatureReader.read."""
        for targets, sources in zip((outs, scales), self._bytes(np.searchsorted(self._rows, rows)), strict=True):
            for target, source in zip(targets, sources, strict=True):
                target[:] = source

    def _bytes(self, images: slice | NDArray[np.int64]) -> tuple[list[Bytes], list[Bytes]]:
        """The bytes of the tokens and of the scales of some images, by their index in `rows`."""
        spans = list(zip(self._starts[images].tolist(), self._ends[images].tolist(), strict=True))
        return (
            [self._tokens[start * self._width : end * self._width] for start, end in spans],
            [self._scales[start * self._scale_width : end * self._scale_width] for start, end in spans],
        )


class BatchReader:
    """Reads batches of one cache. Thread-safe, with one batch per thread.

    threads   that can usefully fill a batch at once
    """

    def __init__(self, manifest: Manifest, maps: FeatureSource | None, tokens: FeatureSource | None) -> None:
        self._manifest, self._maps, self._tokens = manifest, maps, tokens
        self.threads = max([1, *(source.threads for source in (maps, tokens) if source is not None)])

    def read(self, rows: NDArray[np.int64], out: Batch, threads: int = 1) -> Batch:
        """Fill `out` with the images at `rows`, which must exist, and return it."""
        self.allocate(rows, out)
        ranges = split(len(rows), threads)
        if len(ranges) <= 1:
            self.fill(out, 0, len(rows))
        else:
            with ThreadPoolExecutor(len(ranges), thread_name_prefix="regionspot-read") as pool:
                for future in [pool.submit(self.fill, out, *images) for images in ranges]:
                    future.result()
        return out

    def allocate(self, rows: NDArray[np.int64], out: Batch) -> None:
        """Set the shapes of `out` and everything except the features."""
        out.fill_regions(self._manifest, rows)
        out.shape_features(
            None if self._tokens is None else self._tokens.feature_set,
            None if self._maps is None else self._maps.feature_set,
        )

    def fill(self, out: Batch, first: int, last: int) -> None:
        """Read the features of images first to last - 1 of an allocated batch."""
        if first == last:
            return
        rows = out.rows[first:last].tolist()
        if self._maps is not None:
            self._maps.read(rows, [*_bytes(out.feature_map[first:last])], [*_bytes(out.map_scale[first:last])])
        if self._tokens is not None:
            tokens, scales = out.tokens[first:last], out.token_scale[first:last]
            mask = out.region_mask[first:last]
            counts = mask.sum(axis=1).tolist()
            width, scale_width = tokens.itemsize * tokens.shape[-1], SCALE_BYTES if scales.shape[1] else 0
            self._tokens.read(rows, _cut(tokens, counts, width), _cut(scales, counts, scale_width))
            tokens[~mask] = 0
            if scale_width:
                scales[~mask] = 0


def split(length: int, pieces: int) -> list[tuple[int, int]]:
    """(first, last) of at most `pieces` ranges of nearly equal length, none of them empty."""
    pieces = min(length, pieces)
    return [(length * piece // pieces, length * (piece + 1) // pieces) for piece in range(pieces)]


def _bytes(array: NDArray[np.generic]) -> Bytes:
    """uint8 (B, ...) of a contiguous array (B, ...)."""
    return array.reshape(len(array), -1).view(np.uint8) if array.size else np.empty((len(array), 0), np.uint8)


def _cut(array: NDArray[np.generic], counts: list[int], width: int) -> list[Bytes]:
    """The bytes of each image's first `counts` rows of `width` bytes."""
    return [row[: count * width] for row, count in zip(_bytes(array), counts, strict=True)]
