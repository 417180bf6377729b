"""A padded batch of cached pictures, whose memory is used again.

Allocating a batch anew costs more than reading it, because the kernel has to hand over and clear every page. So a batch
keeps one buffer a field, which only ever grows, and its fields are views of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from regionspot.cache.manifest import NO_CATEGORY, Manifest
from regionspot.cache.schema import FeatureSet


@dataclass(eq=False)
class Batch:
    """B pictures, R = the largest region count among them (at least 1), T map tokens of width D, tokens of width C.

    rows            int64   (B,)        rows of the manifest
    image_ids       int64   (B,)        the dataset's ids
    tokens          float16 (B, R, C)   location tokens; rows past a picture's count are zero
    region_mask     bool    (B, R)      True where a region is
    feature_map     float16 (B, T, D)   class token first, then patches row by row
    categories      int32   (B, R)      index into the cache's categories, -1 where no region is or its class is unknown
    boxes_xyxy      float32 (B, R, 4)   pixels of the original picture, 0 where no region is
    annotation_ids  int64   (B, R)      -1 where no region is or it has no id
    scores          float32 (B, R)      a detector's score of its box; 1 where there is none

    Features have the dtype of their set. A kind that was not read has width 0.
    """

    rows: NDArray[np.int64] = field(default_factory=lambda: np.empty((0,), np.int64))
    image_ids: NDArray[np.int64] = field(default_factory=lambda: np.empty((0,), np.int64))
    tokens: NDArray[Any] = field(default_factory=lambda: np.empty((0, 1, 0), np.float16))
    region_mask: NDArray[np.bool_] = field(default_factory=lambda: np.empty((0, 1), np.bool_))
    feature_map: NDArray[Any] = field(default_factory=lambda: np.empty((0, 0, 0), np.float16))
    categories: NDArray[np.int32] = field(default_factory=lambda: np.empty((0, 1), np.int32))
    boxes_xyxy: NDArray[np.float32] = field(default_factory=lambda: np.empty((0, 1, 4), np.float32))
    annotation_ids: NDArray[np.int64] = field(default_factory=lambda: np.empty((0, 1), np.int64))
    scores: NDArray[np.float32] = field(default_factory=lambda: np.empty((0, 1), np.float32))
    _buffers: dict[str, NDArray[Any]] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.rows)

    def shape_features(self, tokens: FeatureSet | None, maps: FeatureSet | None) -> None:
        """Give the feature fields their shapes for the regions laid out before; their values are left undefined."""
        pictures, regions = self.region_mask.shape
        if tokens is None:
            self._view("tokens", (pictures, regions, 0), "float16")
        else:
            self._view("tokens", (pictures, regions, *tokens.shape), tokens.stored)
        if maps is None:
            self._view("feature_map", (pictures, 0, 0), "float16")
        else:
            self._view("feature_map", (pictures, *maps.shape), maps.stored)

    def fill_regions(self, manifest: Manifest, rows: NDArray[np.int64]) -> None:
        """Everything but the features, of the pictures at `rows`."""
        counts = manifest.offsets[rows + 1] - manifest.offsets[rows]
        slots = np.arange(max(1, int(counts.max(initial=0))))
        grid = (len(rows), len(slots))
        self._view("rows", (len(rows),), "int64")[:] = rows
        self._view("image_ids", (len(rows),), "int64")[:] = manifest.image_ids[rows]
        mask = self._view("region_mask", grid, "bool")
        mask[:] = slots < counts[:, None]
        regions = (manifest.offsets[rows, None] + slots)[mask]
        self._pad("categories", grid, "int32", NO_CATEGORY)[mask] = manifest.category_index[regions]
        self._pad("boxes_xyxy", (*grid, 4), "float32", 0)[mask] = manifest.boxes_xyxy[regions]
        self._pad("annotation_ids", grid, "int64", -1)[mask] = manifest.annotation_ids[regions]
        scores = self._pad("scores", grid, "float32", 1)
        if manifest.scores is not None:
            scores[mask] = manifest.scores[regions]

    def _pad(self, name: str, shape: tuple[int, ...], dtype: str, value: float) -> NDArray[Any]:
        view = self._view(name, shape, dtype)
        view.fill(value)
        return view

    def _view(self, name: str, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
        """Set a field to a contiguous view of its buffer, which grows when it has to."""
        size = math.prod(shape)
        buffer = self._buffers.get(name)
        if buffer is None or buffer.dtype != dtype or buffer.size < size:
            buffer = self._buffers[name] = np.empty(size, dtype)
        view = buffer[:size].reshape(shape)
        setattr(self, name, view)
        return view
