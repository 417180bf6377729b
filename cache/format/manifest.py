"""What is to be extracted from one dataset split: images and their regions, as columns.

A split may hold ten million boxes, so nothing here is a list of dicts: every field is one numpy array, and the
regions of image `row` are the slice `offsets[row]:offsets[row + 1]` of the region columns.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from regionspot.cache.errors import InputError

NO_CATEGORY = -1  # category index of a region whose class is unknown, e.g. a detector's proposal


@dataclass(frozen=True)
class Category:
    """One class of a dataset, in the dataset's own order.

    `frequency` is LVIS's r/c/f (rare, common, frequent); what a dataset does not state is None or empty.
    """

    id: int
    name: str
    synset: str | None = None
    frequency: str | None = None
    synonyms: tuple[str, ...] = ()
    definition: str | None = None


@dataclass(frozen=True)
class Ragged:
    """A list of category indices for every image; that of `row` is `values[offsets[row]:offsets[row + 1]]`."""

    offsets: NDArray[np.int64]  # (N + 1,)
    values: NDArray[np.int32]


@dataclass(frozen=True)
class Manifest:
    """One dataset split: N images, M regions.

    image_ids       int64   (N,)      the dataset's id (OpenImages: its 16 hex digits read as a signed 64-bit number)
    paths           string  (N,)      relative to the image folder, with forward slashes (numpy StringDType)
    heights, widths int32   (N,)      pixels of the original image, as the annotations state them
    offsets         int64   (N + 1,)  regions of row n are offsets[n]:offsets[n + 1]
    boxes_xyxy      float32 (M, 4)    x1, y1, x2, y2 in pixels of the original image, clipped to it
    category_index  int32   (M,)      position in `categories`, NO_CATEGORY where unknown
    annotation_ids  int64   (M,)      the dataset's id of the region, -1 where it has none
    scores          float32 (M,)      a detector's score of its own box; None for ground truth
    categories                        ordered; an index into this tuple is what the cache stores
    negatives, not_exhaustive         LVIS's federated lists per image, as category indices; None elsewhere
    source                            JSON-able: {"files": {annotation file name: its SHA-256}}
    report                            what reading dropped or found odd, counts by reason; no part of the digest
    remarks                           what a user should be told of the files, one line each; no part of a cache

    Raises InputError where the columns do not fit each other.
    """

    dataset: str
    split: str
    image_ids: NDArray[np.int64]
    paths: NDArray[Any]
    heights: NDArray[np.int32]
    widths: NDArray[np.int32]
    offsets: NDArray[np.int64]
    boxes_xyxy: NDArray[np.float32]
    category_index: NDArray[np.int32]
    annotation_ids: NDArray[np.int64]
    categories: tuple[Category, ...]
    scores: NDArray[np.float32] | None = None
    negatives: Ragged | None = None
    not_exhaustive: Ragged | None = None
    source: dict[str, Any] = field(default_factory=dict)
    report: dict[str, int] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        images, regions = len(self.image_ids), len(self.boxes_xyxy)
        lengths = {
            "paths": (len(self.paths), images),
            "heights": (len(self.heights), images),
            "widths": (len(self.widths), images),
            "offsets": (len(self.offsets), images + 1),
            "category_index": (len(self.category_index), regions),
            "annotation_ids": (len(self.annotation_ids), regions),
            "scores": (regions if self.scores is None else len(self.scores), regions),
        }
        for name, (found, expected) in lengths.items():
            if found != expected:
                raise InputError(
                    f"manifest {self.dataset}/{self.split}: {name} has {found} entries, expected {expected}"
                )
        if self.offsets[0] != 0 or self.offsets[-1] != regions or (np.diff(self.offsets) < 0).any():
            raise InputError(
                f"manifest {self.dataset}/{self.split}: offsets must rise from 0 to {regions}, the number of boxes"
            )
        if regions and not -1 <= self.category_index.min() <= self.category_index.max() < len(self.categories):
            raise InputError(
                f"manifest {self.dataset}/{self.split}: category_index leaves 0..{len(self.categories) - 1}"
            )

    def __len__(self) -> int:
        return len(self.image_ids)

    @property
    def region_count(self) -> NDArray[np.int64]:
        """int64 (N,): number of regions of each image."""
        return np.diff(self.offsets)

    def regions(self, row: int) -> slice:
        """The slice of the region columns that holds the regions of image `row`."""
        return slice(int(self.offsets[row]), int(self.offsets[row + 1]))

    def row_of(self, image_id: int) -> int:
        """The row of an image. Raises InputError when the split does not hold it."""
        found = np.flatnonzero(self.image_ids == image_id)
        if not len(found):
            raise InputError(f"{self.dataset}/{self.split} holds no image with id {image_id}")
        return int(found[0])

    def select(self, rows: NDArray[np.int64]) -> Manifest:
        """The same split cut to the images at `rows`, in that order; categories stay whole."""
        offsets, pick = _take(self.offsets, rows)
        return Manifest(
            dataset=self.dataset,
            split=self.split,
            image_ids=self.image_ids[rows],
            paths=self.paths[rows],
            heights=self.heights[rows],
            widths=self.widths[rows],
            offsets=offsets,
            boxes_xyxy=self.boxes_xyxy[pick],
            category_index=self.category_index[pick],
            annotation_ids=self.annotation_ids[pick],
            categories=self.categories,
            scores=None if self.scores is None else self.scores[pick],
            negatives=_select_ragged(self.negatives, rows),
            not_exhaustive=_select_ragged(self.not_exhaustive, rows),
            source=self.source,
            report=self.report,
            remarks=self.remarks,
        )

    def head(self, images: int | None) -> Manifest:
        """The first images of the split; all of it for None. Raises InputError for less than one."""
        if images is None or images >= len(self):
            return self
        if images < 1:
            raise InputError(f"the first {images} images were asked for, expected at least 1")
        return self.select(np.arange(images))

    @classmethod
    def concatenate(cls, manifests: Sequence[Manifest]) -> Manifest:
        """The images of all, one manifest after another; their names are joined by `+` where they differ.

        Raises InputError where an image's id is in two of them, or where one states what another leaves open:
        categories, scores, the federated lists.
        """
        _require_alike(manifests)
        return cls(
            dataset="+".join(dict.fromkeys(one.dataset for one in manifests)),
            split="+".join(dict.fromkeys(one.split for one in manifests)),
            image_ids=np.concatenate([one.image_ids for one in manifests]),
            paths=np.concatenate([one.paths for one in manifests]),
            heights=np.concatenate([one.heights for one in manifests]),
            widths=np.concatenate([one.widths for one in manifests]),
            offsets=_joined_offsets([one.offsets for one in manifests]),
            boxes_xyxy=np.concatenate([one.boxes_xyxy for one in manifests]),
            category_index=np.concatenate([one.category_index for one in manifests]),
            annotation_ids=np.concatenate([one.annotation_ids for one in manifests]),
            categories=manifests[0].categories,
            scores=_joined([one.scores for one in manifests]),
            negatives=_joined_ragged([one.negatives for one in manifests]),
            not_exhaustive=_joined_ragged([one.not_exhaustive for one in manifests]),
            source={"files": {name: digest for one in manifests for name, digest in _files(one).items()}},
            report=dict(sum((Counter(one.report) for one in manifests), Counter())),
            remarks=tuple(dict.fromkeys(line for one in manifests for line in one.remarks)),
        )

    def digest(self) -> str:
        """SHA-256 over everything that decides what extraction computes: images, boxes, classes, in order."""
        digest = hashlib.sha256()
        for column in (self.image_ids, self.heights, self.widths, self.offsets, self.boxes_xyxy, self.category_index):
            digest.update(np.ascontiguousarray(column).tobytes())
        digest.update(np.ascontiguousarray(self.annotation_ids).tobytes())
        if self.scores is not None:
            digest.update(np.ascontiguousarray(self.scores).tobytes())
        digest.update("\0".join(self.paths.tolist()).encode())
        digest.update(repr([(category.id, category.name) for category in self.categories]).encode())
        return digest.hexdigest()


def _take(offsets: NDArray[np.int64], rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Offsets of the ragged rows taken, and where each of their values stood before."""
    counts = np.diff(offsets)[rows]
    taken = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    return taken, np.arange(taken[-1]) + np.repeat(offsets[rows] - taken[:-1], counts)


def _select_ragged(ragged: Ragged | None, rows: NDArray[np.int64]) -> Ragged | None:
    if ragged is None:
        return None
    offsets, pick = _take(ragged.offsets, rows)
    return Ragged(offsets, ragged.values[pick])


def _require_alike(manifests: Sequence[Manifest]) -> None:
    if not manifests:
        raise InputError("no manifest was given to concatenate; give at least one")
    first = manifests[0]
    for other in manifests[1:]:
        both = f"{first.dataset}/{first.split} and {other.dataset}/{other.split}"
        if [(each.id, each.name) for each in first.categories] != [(each.id, each.name) for each in other.categories]:
            raise InputError(
                f"{both}: their categories differ ({len(first.categories)} and {len(other.categories)}), so an index "
                "would mean two things; put together only what shares its categories"
            )
        for name in ("scores", "negatives", "not_exhaustive"):
            if (getattr(first, name) is None) != (getattr(other, name) is None):
                raise InputError(
                    f"{both}: only one of them has {name}, and what the other leaves open is not known; put together "
                    "only what states the same"
                )
    ids, counts = np.unique(np.concatenate([one.image_ids for one in manifests]), return_counts=True)
    if len(twice := ids[counts > 1]):
        names = ", ".join(f"{one.dataset}/{one.split}" for one in manifests)
        raise InputError(
            f"{names}: {len(twice)} images are in more than one of them, the first has id {twice[0]}; "
            "leave them out of all but one with `regionspot cache subset`"
        )


def _files(manifest: Manifest) -> dict[str, str]:
    files: dict[str, str] = manifest.source.get("files", {})
    return files


def _joined_offsets(offsets: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
    counts = np.concatenate([np.diff(one) for one in offsets])
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)


def _joined(columns: Sequence[NDArray[np.float32] | None]) -> NDArray[np.float32] | None:
    there = [one for one in columns if one is not None]
    return np.concatenate(there) if there else None


def _joined_ragged(lists: Sequence[Ragged | None]) -> Ragged | None:
    there = [one for one in lists if one is not None]
    if not there:
        return None
    return Ragged(_joined_offsets([one.offsets for one in there]), np.concatenate([one.values for one in there]))
