"""Detections as columns.

LVIS val has 19,809 images with 300 detections each: six million dicts do not fit into the memory of most machines, six
million rows of five columns are 300 MB. The mask of a region is stored once for all its classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as rle

DETECTIONS_PER_IMAGE = 300  # LVIS's own limit (lvis/results.py, LVISResults.__init__)


@dataclass(frozen=True)
class Masks:
    """Masks of regions in COCO's compressed run-length encoding, concatenated in one buffer.

    sizes    int32 (n, 2)   height, width
    offsets  int64 (n + 1,) mask i is counts[offsets[i]:offsets[i + 1]]
    counts   uint8 (bytes,)
    """

    sizes: NDArray[np.int32]
    offsets: NDArray[np.int64]
    counts: NDArray[np.uint8]

    @classmethod
    def encode(cls, masks: NDArray[np.bool_]) -> Masks:
        """Encode bool masks (n, h, w)."""
        encoded = [rle.encode(np.asfortranarray(mask, dtype=np.uint8))["counts"] for mask in masks]
        return cls(
            sizes=np.tile(np.asarray(masks.shape[1:], np.int32), (len(masks), 1)),
            offsets=np.cumsum([0, *map(len, encoded)], dtype=np.int64),
            counts=np.frombuffer(b"".join(encoded), np.uint8),
        )

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Mask `index` in pycocotools' form: {"size": [h, w], "counts": bytes}."""
        counts = self.counts[self.offsets[index] : self.offsets[index + 1]].tobytes()
        return {"size": self.sizes[index].tolist(), "counts": counts}

    def take(self, rows: NDArray[np.int64]) -> Masks:
        """The masks at `rows`, in that order."""
        counts = [self.counts[self.offsets[row] : self.offsets[row + 1]] for row in rows]
        return Masks(
            sizes=self.sizes[rows],
            offsets=np.cumsum([0, *map(len, counts)], dtype=np.int64),
            counts=np.concatenate([np.empty(0, np.uint8), *counts]),
        )

    def decode(self, index: int) -> NDArray[np.bool_]:
        """Mask `index` as bool (h, w)."""
        return np.asarray(rle.decode(self[index]), np.bool_)


@dataclass(frozen=True)
class Detections:
    """K detections, grouped by image, best first.

    image_ids     int64   (K,)
    category_ids  int64   (K,)    the dataset's ids
    boxes_xywh    float64 (K, 4)  x, y, width, height in pixels of the original image
    scores        float32 (K,)
    regions       int64   (K,)    number of the region; the index into `masks`
    masks         of the regions, or None
    """

    image_ids: NDArray[np.int64]
    category_ids: NDArray[np.int64]
    boxes_xywh: NDArray[np.float64]
    scores: NDArray[np.float32]
    regions: NDArray[np.int64]
    masks: Masks | None = None

    def __len__(self) -> int:
        return len(self.image_ids)

    def take(self, rows: NDArray[Any]) -> Detections:
        """The detections at `rows` (indices or a bool mask), in that order; all masks are kept."""
        return Detections(
            self.image_ids[rows],
            self.category_ids[rows],
            self.boxes_xywh[rows],
            self.scores[rows],
            self.regions[rows],
            self.masks,
        )

    def as_dicts(self, with_box: bool = True, with_mask: bool = True) -> Iterator[dict[str, Any]]:
        """One dict per detection in LVIS's results format; detections of one region share one mask object."""
        encoded: dict[int, dict[str, Any]] = {}
        columns = (self.image_ids, self.category_ids, self.boxes_xywh, self.scores, self.regions)
        for image_id, category_id, box, score, region in zip(*(column.tolist() for column in columns), strict=True):
            detection = {"image_id": image_id, "category_id": category_id, "score": score}
            if with_box:
                detection["bbox"] = box
            if with_mask and self.masks is not None:
                if region not in encoded:
                    encoded[region] = self.masks[region]
                detection["segmentation"] = encoded[region]
            yield detection


def concatenate(parts: Sequence[Detections]) -> Detections:
    """All detections in one object; masks are kept only if every non-empty part has them."""
    parts = [part for part in parts if len(part) or part.masks is not None]
    if not parts:
        empty = np.empty(0, np.int64)
        return Detections(empty, empty, np.empty((0, 4)), np.empty(0, np.float32), empty)
    masks = [part.masks for part in parts if part.masks is not None]
    keep = len(masks) == len(parts)
    starts = np.cumsum([0, *(len(mask) for mask in masks[:-1])]) if keep else np.zeros(len(parts), np.int64)
    return Detections(
        image_ids=np.concatenate([part.image_ids for part in parts]),
        category_ids=np.concatenate([part.category_ids for part in parts]),
        boxes_xywh=np.concatenate([part.boxes_xywh for part in parts]),
        scores=np.concatenate([part.scores for part in parts]),
        regions=np.concatenate([part.regions + start for part, start in zip(parts, starts, strict=True)]),
        masks=concatenate_masks(masks) if keep else None,
    )


def concatenate_masks(masks: Sequence[Masks]) -> Masks:
    """All masks in one buffer, in order."""
    starts = np.cumsum([0, *(len(mask.counts) for mask in masks)])
    shifted = [mask.offsets[:-1] + start for mask, start in zip(masks, starts[:-1], strict=True)]
    return Masks(
        sizes=np.concatenate([mask.sizes for mask in masks]),
        offsets=np.concatenate([*shifted, starts[-1:]]).astype(np.int64),
        counts=np.concatenate([mask.counts for mask in masks]),
    )


def to_columns(detections: Detections) -> dict[str, NDArray[Any]]:
    """Named arrays for `numpy.savez`; the inverse of `from_columns`."""
    columns: dict[str, NDArray[Any]] = {
        "image_ids": detections.image_ids,
        "category_ids": detections.category_ids,
        "boxes_xywh": detections.boxes_xywh,
        "scores": detections.scores,
        "regions": detections.regions,
    }
    if detections.masks is not None:
        columns["mask_sizes"] = detections.masks.sizes
        columns["mask_offsets"] = detections.masks.offsets
        columns["mask_counts"] = detections.masks.counts
    return columns


def from_columns(columns: Any) -> Detections:
    """The inverse of `to_columns`; other arrays are ignored."""
    masks = None
    if "mask_sizes" in columns:
        masks = Masks(columns["mask_sizes"], columns["mask_offsets"], columns["mask_counts"])
    return Detections(
        columns["image_ids"],
        columns["category_ids"],
        columns["boxes_xywh"],
        columns["scores"],
        columns["regions"],
        masks,
    )
