"""Tokens kept in memory: they are small compared to the maps, and this saves one read per image."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from regionspot.cache.format.manifest import Manifest
from regionspot.cache.reading.batch_reader import FeatureSource
from regionspot.cache.reading.part_reader import SCALE_BYTES, Bytes

_IMAGES = 4096  # per read: enough to keep a disk busy


class InMemoryTokens:
    """A FeatureSource that reads the tokens of the images at `rows` when created, and keeps them.

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
            slices = [slice(first, first + _IMAGES) for first in range(0, len(self._rows), _IMAGES)]
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
