"""Collect boxes as columns: clip them to their images, drop and count unusable ones, group them by image.

Every reader ends here, so one rule decides for all file formats which boxes a manifest contains.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from regionspot.cache.format.manifest import NO_CATEGORY, Category, Manifest, Ragged
from regionspot.pipeline.datasets.box_format_check import BoxFormat, diagnose_boxes

MIN_SIDE = 1.0  # pixels; smaller boxes are dropped
# x + w - x is not w in floating point: a box one pixel wide must not be dropped because of rounding.
SIDE_TOLERANCE = 1e-3
_SUSPICIOUS_SHARE = 0.1  # of boxes that are clipped or too small; from this share on their format is diagnosed
_SAMPLE = 2000  # boxes of each chunk that are kept for the diagnosis, as in the file

Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


class Lookup:
    """Finds the positions of ids in a list of unique ids."""

    def __init__(self, ids: Ints) -> None:
        self._order = np.argsort(ids, kind="stable")
        self._sorted = ids[self._order]

    def find(self, ids: Ints) -> Ints:
        """int64 (len(ids),): the position of each id, -1 if the list does not contain it."""
        if not len(self._sorted):
            return np.full(len(ids), -1, np.int64)
        position = np.minimum(np.searchsorted(self._sorted, ids), len(self._sorted) - 1)
        return np.where(self._sorted[position] == ids, self._order[position], -1)

    def repeated(self) -> Ints:
        """The ids that the list contains more than once."""
        return np.unique(self._sorted[1:][self._sorted[1:] == self._sorted[:-1]])


class RegionTable:
    """The regions of a manifest's images, added in any order and any number of chunks.

    path        of the file with the boxes, for messages
    box_format  of the boxes in the file
    """

    def __init__(self, images: Manifest, path: Path, box_format: BoxFormat) -> None:
        self._images, self._path, self._box_format = images, path, box_format
        self._limits = np.stack([images.widths, images.heights] * 2, axis=1).astype(np.float64)
        self._rows: list[NDArray[np.int32]] = []
        self._boxes: list[NDArray[np.float32]] = []
        self._categories: list[NDArray[np.int32]] = []
        self._ids: list[Ints] = []
        self._scores: list[NDArray[np.float32]] = []
        self._report: Counter[str] = Counter()
        self._considered = 0  # boxes that the reader did not drop
        self._sample: list[tuple[Floats, Floats]] = []  # boxes as in the file, width and height of their images

    def add(
        self,
        rows: Ints,
        boxes_xyxy: Floats,
        category_index: Ints,
        annotation_ids: Ints | None = None,
        scores: Floats | None = None,
        drop: Mapping[str, Bools] | None = None,
        stated: Floats | None = None,
    ) -> None:
        """Clip boxes (M, 4) to their images and keep the usable ones.

        A box is dropped for the first reason that applies: those in `drop` (a name for the report and a mask), then a
        non-finite coordinate or score, then a width or height under one pixel inside the image. A kept box that
        reaches out of its image is counted as clipped.

        stated  (M, 4) the boxes as in the file; default: `boxes_xyxy`
        """
        limits = self._limits[rows]
        clipped = np.clip(boxes_xyxy, 0.0, limits)
        finite = np.asarray(np.isfinite(boxes_xyxy).all(axis=1))
        if scores is not None:
            finite &= np.isfinite(scores)
        sides = clipped[:, 2:] - clipped[:, :2]
        small = np.minimum(sides[:, 0], sides[:, 1]) < MIN_SIDE - SIDE_TOLERANCE
        considered = self._drop(drop or {}, np.ones(len(rows), np.bool_))
        keep = self._drop({"dropped_not_finite": ~finite, "dropped_under_1_px": small}, considered)
        with np.errstate(invalid="ignore"):
            self._report["clipped"] += int((np.abs(boxes_xyxy - clipped).max(axis=1) > SIDE_TOLERANCE)[keep].sum())
        self._add_sample(boxes_xyxy if stated is None else stated, limits[:, :2], considered)
        self._rows.append(rows[keep].astype(np.int32))
        self._boxes.append(clipped[keep].astype(np.float32))
        self._categories.append(category_index[keep].astype(np.int32))
        self._ids.append(np.full(keep.sum(), -1, np.int64) if annotation_ids is None else annotation_ids[keep])
        if scores is not None:
            self._scores.append(scores[keep].astype(np.float32))

    def finish(self) -> Manifest:
        """The manifest with these regions instead of its own; each image's regions stay in the order of adding."""
        rows = _concatenate(self._rows, np.int32)
        order = np.argsort(rows, kind="stable")
        counts = np.bincount(rows, minlength=len(self._images))
        boxes = _concatenate(self._boxes, np.float32).reshape(-1, 4)
        ids = _concatenate(self._ids, np.int64)
        categories = _concatenate(self._categories, np.int32)[order]
        self._report["repeated_boxes"] = _count_repeated(_box_keys(rows[order], boxes[order], categories))
        self._report["repeated_annotation_ids"] = _count_repeated(ids[ids != -1])
        return replace(
            self._images,
            offsets=_offsets(counts),
            boxes_xyxy=boxes[order],
            category_index=categories,
            annotation_ids=ids[order],
            scores=_concatenate(self._scores, np.float32)[order] if self._scores else None,
            report={**self._images.report, **+self._report},
            remarks=(*self._images.remarks, *self._remarks()),
        )

    def _drop(self, reasons: Mapping[str, Bools], keep: Bools) -> Bools:
        for reason, mask in reasons.items():
            self._report[reason] += int((mask & keep).sum())
            keep = keep & ~mask
        return keep

    def _add_sample(self, stated: Floats, sizes: Floats, considered: Bools) -> None:
        indices = np.flatnonzero(considered)
        self._considered += len(indices)
        sample = indices[:: max(1, len(indices) // _SAMPLE)]
        self._sample.append((stated[sample], sizes[sample]))

    def _remarks(self) -> list[str]:
        """A warning if most boxes do not fit their images, or if many do not and another format fits."""
        clipped, small = self._report["clipped"], self._report["dropped_under_1_px"]
        if clipped + small < _SUSPICIOUS_SHARE * max(1, self._considered):
            return []
        stated, sizes = (np.concatenate(columns) for columns in zip(*self._sample, strict=True))
        diagnosis = diagnose_boxes(stated, sizes, self._box_format)
        if diagnosis is None or (diagnosis == "" and 2 * (clipped + small) < self._considered):
            return []
        warning = (
            f"{clipped:,} of {self._considered:,} boxes are clipped and {small:,} dropped: they do not fit their images"
        )
        return [f"{self._path}: {warning}{diagnosis and '; '}{diagnosis}"]


def manifest_of_images(
    dataset: str,
    split: str,
    image_ids: Ints,
    paths: Sequence[str],
    heights: Ints,
    widths: Ints,
    categories: tuple[Category, ...],
    **rest: Any,
) -> Manifest:
    """A manifest without regions, for RegionTable. `rest`: negatives, not_exhaustive, source, report, remarks."""
    return Manifest(
        dataset=dataset,
        split=split,
        image_ids=image_ids,
        paths=np.array(paths, dtype=np.dtypes.StringDType()),
        heights=heights.astype(np.int32),
        widths=widths.astype(np.int32),
        offsets=np.zeros(len(image_ids) + 1, np.int64),
        boxes_xyxy=np.zeros((0, 4), np.float32),
        category_index=np.full(0, NO_CATEGORY, np.int32),
        annotation_ids=np.zeros(0, np.int64),
        categories=categories,
        **rest,
    )


def ragged(lists: Sequence[Sequence[int]]) -> Ragged:
    """One list per image, as columns."""
    counts = np.array([len(values) for values in lists], np.int64)
    flat = [value for values in lists for value in values]
    return Ragged(_offsets(counts), np.array(flat, np.int32))


def _offsets(counts: Ints) -> Ints:
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)


def _box_keys(rows: NDArray[np.int32], boxes: NDArray[np.float32], categories: NDArray[np.int32]) -> Ints:
    """int64 (M,): a hash of each box's image, category and coordinates."""
    keys = np.zeros(len(rows), np.uint64)
    for column in (rows, categories, *np.ascontiguousarray(boxes.T).view(np.int32)):
        keys = (keys ^ column.astype(np.uint64)) * np.uint64(0x9E3779B97F4A7C15)  # an odd factor is invertible
        keys ^= keys >> np.uint64(29)
    return keys.view(np.int64)


def _count_repeated(ids: Ints) -> int:
    """How many ids are repetitions of an earlier one."""
    if (ids[1:] > ids[:-1]).all():  # true for most files, and faster than sorting
        return 0
    ordered = np.sort(ids)
    return int((ordered[1:] == ordered[:-1]).sum())


def column(items: Sequence[Any], name: str, dtype: type[np.generic]) -> NDArray[Any]:
    """One field of decoded objects as an array."""
    return np.fromiter(map(attrgetter(name), items), dtype, len(items))


def _concatenate(chunks: list[NDArray[Any]], dtype: type[np.generic]) -> NDArray[Any]:
    return np.concatenate(chunks) if chunks else np.zeros(0, dtype)
