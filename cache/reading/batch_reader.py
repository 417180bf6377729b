"""Reading batches: region columns, one map set and one token set, with one or several threads.

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


class FeatureSource(Protocol):
    """Provides the features of one set, like `FeatureReader.read`."""

    feature_set: FeatureSet
    threads: int

    def read(self, rows: Sequence[int], outs: Sequence[Bytes], scales: Sequence[Bytes]) -> None: ...


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
