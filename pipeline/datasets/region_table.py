"""Boxes into columns: ids looked up, boxes clipped, unusable ones dropped and counted, grouped by image.

Every reader ends here, so that one rule decides which boxes a manifest holds, whatever file they came from.
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

MIN_SIDE = 1.0  # pixels; a smaller box has no image of its own at any input size
# x + w - x is not w in floating point: a box stated as one pixel wide must not be lost to rounding.
SIDE_SLACK = 1e-3
_SUSPICIOUS = 0.1  # share of boxes that are clipped or too small, from which on they are looked at
_SAMPLE = 2000  # boxes of each piece that are kept as they stand in the file, to see what they look like

Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


class Lookup:
    """Positions of ids in a list of unique ids."""

    def __init__(self, ids: Ints) -> None:
        self._order = np.argsort(ids, kind="stable")
        self._sorted = ids[self._order]

    def find(self, wanted: Ints) -> Ints:
        """int64, as `wanted`: position of each id, -1 where the list does not hold it."""
        if not len(self._sorted):
            return np.full(len(wanted), -1, np.int64)
        at = np.minimum(np.searchsorted(self._sorted, wanted), len(self._sorted) - 1)
        return np.where(self._sorted[at] == wanted, self._order[at], -1)

    def repeated(self) -> Ints:
        """The ids that the list holds more than once."""
        return np.unique(self._sorted[1:][self._sorted[1:] == self._sorted[:-1]])


class RegionTable:
    """The regions of the images of a manifest, added in any order and any number of pieces.

    path   of the file that the boxes are from, for what is told of them
    form   how its boxes are written
    """

    def __init__(self, images: Manifest, path: Path, form: BoxFormat) -> None:
        self._images, self._path, self._form = images, path, form
        self._limits = np.stack([images.widths, images.heights] * 2, axis=1).astype(np.float64)
        self._rows: list[NDArray[np.int32]] = []
        self._boxes: list[NDArray[np.float32]] = []
        self._categories: list[NDArray[np.int32]] = []
        self._ids: list[Ints] = []
        self._scores: list[NDArray[np.float32]] = []
        self._report: Counter[str] = Counter()
        self._considered = 0  # boxes that were not dropped for a reason of their own
        self._sample: list[tuple[Floats, Floats]] = []  # boxes as stated, width and height of their images

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

        A box is dropped for the first reason that holds: those of `drop` (a name for the report and a mask), then a
        coordinate or score that is not finite, then less than one pixel of width or height inside the image. A box
        that is kept but reaches out of its image counts as clipped.

        stated  (M, 4) the boxes as the file has them; default: their corners
        """
        limits = self._limits[rows]
        clipped = np.clip(boxes_xyxy, 0.0, limits)
        finite = np.asarray(np.isfinite(boxes_xyxy).all(axis=1))
        if scores is not None:
            finite &= np.isfinite(scores)
        sides = clipped[:, 2:] - clipped[:, :2]
        small = np.minimum(sides[:, 0], sides[:, 1]) < MIN_SIDE - SIDE_SLACK
        wanted = self._kept(drop or {}, np.ones(len(rows), np.bool_))
        keep = self._kept({"dropped_not_finite": ~finite, "dropped_under_1_px": small}, wanted)
        with np.errstate(invalid="ignore"):
            self._report["clipped"] += int((np.abs(boxes_xyxy - clipped).max(axis=1) > SIDE_SLACK)[keep].sum())
        self._look_at(boxes_xyxy if stated is None else stated, limits[:, :2], wanted)
        self._rows.append(rows[keep].astype(np.int32))
        self._boxes.append(clipped[keep].astype(np.float32))
        self._categories.append(category_index[keep].astype(np.int32))
        self._ids.append(np.full(keep.sum(), -1, np.int64) if annotation_ids is None else annotation_ids[keep])
        if scores is not None:
            self._scores.append(scores[keep].astype(np.float32))

    def finish(self) -> Manifest:
        """The manifest with these regions, in the order added within each image, instead of those it had."""
        rows = _joined(self._rows, np.int32)
        order = np.argsort(rows, kind="stable")
        counts = np.bincount(rows, minlength=len(self._images))
        boxes = _joined(self._boxes, np.float32).reshape(-1, 4)
        ids = _joined(self._ids, np.int64)
        categories = _joined(self._categories, np.int32)[order]
        self._report["repeated_boxes"] = _repeated(_box_keys(rows[order], boxes[order], categories))
        self._report["repeated_annotation_ids"] = _repeated(ids[ids != -1])
        return replace(
            self._images,
            offsets=_offsets(counts),
            boxes_xyxy=boxes[order],
            category_index=categories,
            annotation_ids=ids[order],
            scores=_joined(self._scores, np.float32)[order] if self._scores else None,
            report={**self._images.report, **+self._report},
            remarks=(*self._images.remarks, *self._remarks()),
        )

    def _kept(self, unusable: Mapping[str, Bools], keep: Bools) -> Bools:
        for reason, mask in unusable.items():
            self._report[reason] += int((mask & keep).sum())
            keep = keep & ~mask
        return keep

    def _look_at(self, stated: Floats, sizes: Floats, wanted: Bools) -> None:
        places = np.flatnonzero(wanted)
        self._considered += len(places)
        sample = places[:: max(1, len(places) // _SAMPLE)]
        self._sample.append((stated[sample], sizes[sample]))

    def _remarks(self) -> list[str]:
        """What is told where most boxes do not fit their images, or many do not and would in another form."""
        clipped, small = self._report["clipped"], self._report["dropped_under_1_px"]
        if clipped + small < _SUSPICIOUS * max(1, self._considered):
            return []
        stated, sizes = (np.concatenate(columns) for columns in zip(*self._sample, strict=True))
        odd = diagnose_boxes(stated, sizes, self._form)
        if odd is None or (odd == "" and 2 * (clipped + small) < self._considered):
            return []
        told = (
            f"{clipped:,} of {self._considered:,} boxes are clipped and {small:,} dropped: they do not fit their images"
        )
        return [f"{self._path}: {told}{odd and '; '}{odd}"]


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
    """A manifest without regions yet, for RegionTable. `rest`: negatives, not_exhaustive, source, report."""
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
    """One list an image, as columns."""
    counts = np.array([len(values) for values in lists], np.int64)
    flat = [value for values in lists for value in values]
    return Ragged(_offsets(counts), np.array(flat, np.int32))


def _offsets(counts: Ints) -> Ints:
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)


def _box_keys(rows: NDArray[np.int32], boxes: NDArray[np.float32], categories: NDArray[np.int32]) -> Ints:
    """int64 (M,): a number for each box, which only boxes of one image, class and place have in common."""
    keys = np.zeros(len(rows), np.uint64)
    for column in (rows, categories, *np.ascontiguousarray(boxes.T).view(np.int32)):
        keys = (keys ^ column.astype(np.uint64)) * np.uint64(0x9E3779B97F4A7C15)  # an odd number: one to one
        keys ^= keys >> np.uint64(29)
    return keys.view(np.int64)


def _repeated(ids: Ints) -> int:
    """How many of the ids were there before."""
    if (ids[1:] > ids[:-1]).all():  # as they are in most files, and sorting takes a while
        return 0
    ordered = np.sort(ids)
    return int((ordered[1:] == ordered[:-1]).sum())


def column(items: Sequence[Any], name: str, dtype: type[np.generic]) -> NDArray[Any]:
    """One field of decoded objects as an array."""
    return np.fromiter(map(attrgetter(name), items), dtype, len(items))


def _joined(pieces: list[NDArray[Any]], dtype: type[np.generic]) -> NDArray[Any]:
    return np.concatenate(pieces) if pieces else np.zeros(0, dtype)
