"""Boxes into columns: ids looked up, boxes clipped, unusable ones dropped and counted, grouped by picture.

Every reader ends here, so that one rule decides which boxes a manifest holds, whatever file they came from.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from regionspot.cache.manifest import NO_CATEGORY, Category, Manifest, Ragged

MIN_SIDE = 1.0  # pixels; a smaller box has no picture of its own at any input size
# x + w - x is not w in floating point: a box stated as one pixel wide must not be lost to rounding.
SIDE_SLACK = 1e-3

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
    """The regions of the pictures of a manifest, added in any order and any number of pieces."""

    def __init__(self, pictures: Manifest) -> None:
        self._pictures = pictures
        self._limits = np.stack([pictures.widths, pictures.heights] * 2, axis=1).astype(np.float64)
        self._rows: list[NDArray[np.int32]] = []
        self._boxes: list[NDArray[np.float32]] = []
        self._categories: list[NDArray[np.int32]] = []
        self._ids: list[Ints] = []
        self._scores: list[NDArray[np.float32]] = []
        self._report: Counter[str] = Counter()

    def add(
        self,
        rows: Ints,
        boxes_xyxy: Floats,
        category_index: Ints,
        annotation_ids: Ints | None = None,
        scores: Floats | None = None,
        drop: Mapping[str, Bools] | None = None,
    ) -> None:
        """Clip boxes (M, 4) to their pictures and keep the usable ones.

        A box is dropped for the first reason that holds: those of `drop` (a name for the report and a mask), then a
        coordinate or score that is not finite, then less than one pixel of width or height inside the picture.
        """
        clipped = np.clip(boxes_xyxy, 0.0, self._limits[rows])
        finite = np.asarray(np.isfinite(boxes_xyxy).all(axis=1))
        if scores is not None:
            finite &= np.isfinite(scores)
        sides = clipped[:, 2:] - clipped[:, :2]
        small = np.minimum(sides[:, 0], sides[:, 1]) < MIN_SIDE - SIDE_SLACK
        keep = self._kept({**(drop or {}), "dropped_not_finite": ~finite, "dropped_under_1_px": small}, len(rows))
        self._rows.append(rows[keep].astype(np.int32))
        self._boxes.append(clipped[keep].astype(np.float32))
        self._categories.append(category_index[keep].astype(np.int32))
        self._ids.append(np.full(keep.sum(), -1, np.int64) if annotation_ids is None else annotation_ids[keep])
        if scores is not None:
            self._scores.append(scores[keep].astype(np.float32))

    def finish(self) -> Manifest:
        """The manifest with these regions, in the order added within each picture, instead of those it had."""
        rows = _joined(self._rows, np.int32)
        order = np.argsort(rows, kind="stable")
        counts = np.bincount(rows, minlength=len(self._pictures))
        boxes = _joined(self._boxes, np.float32).reshape(-1, 4)
        return replace(
            self._pictures,
            offsets=_offsets(counts),
            boxes_xyxy=boxes[order],
            category_index=_joined(self._categories, np.int32)[order],
            annotation_ids=_joined(self._ids, np.int64)[order],
            scores=_joined(self._scores, np.float32)[order] if self._scores else None,
            report={**self._pictures.report, **+self._report},
        )

    def _kept(self, unusable: Mapping[str, Bools], count: int) -> Bools:
        keep = np.ones(count, np.bool_)
        for reason, mask in unusable.items():
            self._report[reason] += int((mask & keep).sum())
            keep &= ~mask
        return keep


def manifest_of_pictures(
    dataset: str,
    split: str,
    image_ids: Ints,
    paths: Sequence[str],
    heights: Ints,
    widths: Ints,
    categories: tuple[Category, ...],
    **rest: Any,
) -> Manifest:
    """A manifest without regions yet, for RegionTable. `rest` goes on: negatives, source, report."""
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
    """One list a picture, as columns."""
    counts = np.array([len(values) for values in lists], np.int64)
    flat = [value for values in lists for value in values]
    return Ragged(_offsets(counts), np.array(flat, np.int32))


def _offsets(counts: Ints) -> Ints:
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)


def _joined(pieces: list[NDArray[Any]], dtype: type[np.generic]) -> NDArray[Any]:
    return np.concatenate(pieces) if pieces else np.zeros(0, dtype)
