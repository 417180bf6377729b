"""A padded batch of cached images, with reusable memory.

Allocating a batch costs more than reading it, because the kernel has to map and clear every page. So a batch keeps one
growing buffer per field, and its fields are views of the buffers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from regionspot.cache.errors import CacheError
from regionspot.cache.format.manifest import NO_CATEGORY, Manifest
from regionspot.cache.format.schema import FeatureSet

_INTERNAL = ("pinned", "reusable", "_buffers")  # every other field is data


@dataclass(eq=False)
class Batch:
    """B images, R = the largest region count among them (at least 1), T map tokens of width D, tokens of width C.

    rows            int64   (B,)        rows of the manifest
    image_ids       int64   (B,)        the dataset's ids
    tokens          float16 (B, R, C)   location tokens; padding is 0
    token_scale     float16 (B, R)      int8 only: factor of a region's codes; padding is 0
    region_mask     bool    (B, R)      True for regions, False for padding
    feature_map     float16 (B, T, D)   class token first, then patches in row-major order
    map_scale       float16 (B, T)      int8 only: factor of a map token's codes
    categories      int32   (B, R)      index into the cache's categories, -1 for padding and unknown classes
    boxes_xyxy      float32 (B, R, 4)   pixels of the original image; padding is 0
    annotation_ids  int64   (B, R)      -1 for padding and regions without an id
    scores          float32 (B, R)      a detector's score of its box; 1 for ground truth and padding

    Features have the stored dtype of their set (bfloat16: uint16 bits); `regionspot.cache.format.encodings` decodes
    them. A kind of features that was not read has width 0, and so has the scale of a set that is not int8.

    pinned     allocate page-locked buffers, for fast copies to a GPU
    reusable   the memory belongs to a loader, which will overwrite it; such a batch cannot be pickled
    """

    rows: NDArray[np.int64] = field(default_factory=lambda: np.empty((0,), np.int64))
    image_ids: NDArray[np.int64] = field(default_factory=lambda: np.empty((0,), np.int64))
    tokens: NDArray[Any] = field(default_factory=lambda: np.empty((0, 1, 0), np.float16))
    token_scale: NDArray[np.float16] = field(default_factory=lambda: np.empty((0, 0), np.float16))
    region_mask: NDArray[np.bool_] = field(default_factory=lambda: np.empty((0, 1), np.bool_))
    feature_map: NDArray[Any] = field(default_factory=lambda: np.empty((0, 0, 0), np.float16))
    map_scale: NDArray[np.float16] = field(default_factory=lambda: np.empty((0, 0), np.float16))
    categories: NDArray[np.int32] = field(default_factory=lambda: np.empty((0, 1), np.int32))
    boxes_xyxy: NDArray[np.float32] = field(default_factory=lambda: np.empty((0, 1, 4), np.float32))
    annotation_ids: NDArray[np.int64] = field(default_factory=lambda: np.empty((0, 1), np.int64))
    scores: NDArray[np.float32] = field(default_factory=lambda: np.empty((0, 1), np.float32))
    pinned: bool = field(default=False, repr=False)
    reusable: bool = field(default=False, repr=False)
    _buffers: dict[str, NDArray[Any]] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.rows)

    def __reduce__(self) -> Any:
        # A queue pickles in its own thread, some time later: the receiver would get the values of another batch.
        if self.reusable:
            raise CacheError(
                "batch: cannot be sent to another process, because the loader will overwrite its memory; "
                "send batch.copy()"
            )
        return Batch, tuple(getattr(self, field.name) for field in fields(self) if field.name not in _INTERNAL)

    def copy(self) -> Batch:
        """A batch with its own memory."""
        names = [field.name for field in fields(self) if field.name not in _INTERNAL]
        return Batch(**{name: getattr(self, name).copy() for name in names})

    def shape_features(self, tokens: FeatureSet | None, maps: FeatureSet | None) -> None:
        """Set the shapes of the feature fields, after `fill_regions`; their values are undefined."""
        images, regions = self.region_mask.shape
        self._shape("tokens", "token_scale", (images, regions), tokens)
        # The shape of a map starts with its number of tokens, that of a token is its width only.
        self._shape("feature_map", "map_scale", (images, *maps.shape[:1]) if maps else (images, 0), maps)

    def _shape(self, name: str, scale: str, rows: tuple[int, ...], feature_set: FeatureSet | None) -> None:
        """Set the shapes of one kind of features, `rows` of the set's width, and of their scales."""
        width, dtype = (feature_set.shape[-1], feature_set.stored) if feature_set else (0, np.dtype(np.float16))
        self._view(name, (*rows, width), dtype)
        self._view(scale, rows if feature_set and feature_set.has_scales else (rows[0], 0), np.dtype(np.float16))

    def fill_regions(self, manifest: Manifest, rows: NDArray[np.int64]) -> None:
        """Set everything except the features, for the images at `rows`."""
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
        """Set a field to a contiguous view of its buffer, which grows if needed."""
        size = math.prod(shape)
        buffer = self._buffers.get(name)
        if buffer is None or buffer.dtype != dtype or buffer.size < size:
            buffer = self._buffers[name] = self._allocate(size, np.dtype(dtype))
        view = buffer[:size].reshape(shape)
        setattr(self, name, view)
        return view

    def _allocate(self, size: int, dtype: np.dtype[Any]) -> NDArray[Any]:
        if not self.pinned:
            return np.empty(size, dtype)
        import torch  # only with a GPU: this package works without torch

        memory: NDArray[np.uint8] = torch.empty(size * dtype.itemsize, dtype=torch.uint8, pin_memory=True).numpy()
        return memory.view(dtype)
