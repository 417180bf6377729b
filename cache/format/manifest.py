"""The images and regions of one dataset split, as numpy columns.

A split may hold ten million boxes, so there are no lists of dicts: every field is one array, and the regions of image
`row` are the slice `offsets[row]:offsets[row + 1]` of the region columns.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from regionspot.cache.errors import InputError

NO_CATEGORY = -1  # category index of a region whose class is unknown, e.g. a detector's proposal
_IMAGE_COLUMNS = ("image_ids", "paths", "heights", "widths")
_REGION_COLUMNS = ("boxes_xyxy", "category_index", "annotation_ids")  # and the optional scores
_PATHS_PER_UPDATE = 65_536  # of the digest: millions of paths as Python strings take hundreds of megabytes


@dataclass(frozen=True)
class Category:
    """One class of a dataset, in the dataset's own order.

    `frequency` is LVIS's r/c/f (rare, common, frequent). Fields that the dataset lacks are None or empty.
    """

    id: int
    name: str
    synset: str | None = None
    frequency: str | None = None
    synonyms: tuple[str, ...] = ()
    definition: str | None = None


@dataclass(frozen=True)
class Ragged:
    """A list of category indices per image: that of `row` is `values[offsets[row]:offsets[row + 1]]`."""

    offsets: NDArray[np.int64]  # (N + 1,)
    values: NDArray[np.int32]


class _Deferred:
    """A field that may be given as a function, which is called when the field is first used."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = f"_{name}"

    def __get__(self, instance: Any, owner: type) -> NDArray[Any]:
        if instance is None:
            raise AttributeError(self._name)  # which tells `dataclass` that there is no default
        values = vars(instance)
        if callable(values[self._name]):
            values[self._name] = values[self._name]()
        column: NDArray[Any] = values[self._name]
        return column

    def __set__(self, instance: Any, value: NDArray[Any] | Callable[[], NDArray[Any]]) -> None:
        vars(instance)[self._name] = value


@dataclass(frozen=True)
class Manifest:
    """One dataset split: N images, M regions.

    image_ids       int64   (N,)      the dataset's id (OpenImages: its 16 hex digits read as a signed 64-bit number)
    paths           string  (N,)      relative to the image folder, with forward slashes (numpy StringDType); may be
                                      given as a function, called on first use
    heights, widths int32   (N,)      pixels of the original image, from the annotations
    offsets         int64   (N + 1,)  regions of row n are offsets[n]:offsets[n + 1]
    boxes_xyxy      float32 (M, 4)    x1, y1, x2, y2 in pixels of the original image, clipped to it
    category_index  int32   (M,)      position in `categories`, NO_CATEGORY where unknown
    annotation_ids  int64   (M,)      the dataset's id of the region, -1 if it has none
    scores          float32 (M,)      a detector's score of its box; None for ground truth
    categories                        ordered; the cache stores indices into this tuple
    negatives, not_exhaustive         LVIS's and OpenImages' federated lists per image, as category indices: classes
                                      verified to be absent, and shown ones without all of their boxes; else None
    source                            JSON-able: {"files": {annotation file name: its SHA-256}}
    report                            counts of dropped and unusual entries, by reason; not part of the digest
    remarks                           notes on the files for the user, one line each; not stored in a cache

    Raises InputError for columns whose lengths or values do not fit together.
    """

    dataset: str
    split: str
    image_ids: NDArray[np.int64]
    heights: NDArray[np.int32]
    widths: NDArray[np.int32]
    offsets: NDArray[np.int64]
    boxes_xyxy: NDArray[np.float32]
    category_index: NDArray[np.int32]
    annotation_ids: NDArray[np.int64]
    categories: tuple[Category, ...]
    paths: _Deferred = _Deferred()  # required: a descriptor that gives no default
    scores: NDArray[np.float32] | None = None
    negatives: Ragged | None = None
    not_exhaustive: Ragged | None = None
    source: dict[str, Any] = field(default_factory=dict)
    report: dict[str, int] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        images, regions = len(self.image_ids), len(self.boxes_xyxy)
        lengths = dict.fromkeys(_IMAGE_COLUMNS, images) | dict.fromkeys((*_REGION_COLUMNS, "scores"), regions)
        for name, expected in (lengths | {"offsets": images + 1}).items():
            column = vars(self)["_paths"] if name == "paths" else getattr(self, name)
            if column is not None and not callable(column) and len(column) != expected:
                raise InputError(
                    f"manifest {self.dataset}/{self.split}: {name} has {len(column)} entries, expected {expected}"
                )
        if self.offsets[0] != 0 or self.offsets[-1] != regions or (self.offsets[1:] < self.offsets[:-1]).any():
            raise InputError(
                f"manifest {self.dataset}/{self.split}: offsets must ascend from 0 to {regions}, the number of boxes"
            )
        if regions and not -1 <= self.category_index.min() <= self.category_index.max() < len(self.categories):
            raise InputError(
                f"manifest {self.dataset}/{self.split}: category_index is outside -1 to {len(self.categories) - 1}"
            )

    def __len__(self) -> int:
        return len(self.image_ids)

    @cached_property
    def region_count(self) -> NDArray[np.int64]:
        """int64 (N,): number of regions of each image."""
        return np.diff(self.offsets)

    def regions(self, row: int) -> slice:
        """The slice of the region columns for image `row`."""
        return slice(int(self.offsets[row]), int(self.offsets[row + 1]))

    def row_of(self, image_id: int) -> int:
        """The row of an image. Raises InputError for an unknown id."""
        rows = np.flatnonzero(self.image_ids == image_id)
        if not len(rows):
            raise InputError(f"{self.dataset}/{self.split} holds no image with id {image_id}")
        return int(rows[0])

    def select(self, rows: NDArray[np.int64]) -> Manifest:
        """The images at `rows`, in that order, with all categories."""
        offsets, index = _take(self.offsets, rows)
        return replace(
            self,
            **{name: getattr(self, name)[rows] for name in _IMAGE_COLUMNS},
            **{name: getattr(self, name)[index] for name in _REGION_COLUMNS},
            offsets=offsets,
            scores=None if self.scores is None else self.scores[index],
            negatives=_select_ragged(self.negatives, rows),
            not_exhaustive=_select_ragged(self.not_exhaustive, rows),
        )

    def head(self, images: int | None) -> Manifest:
        """The first `images` images, or all for None. Raises InputError for less than 1."""
        if images is None or images >= len(self):
            return self
        if images < 1:
            raise InputError(f"the first {images} images were requested, expected at least 1")
        return self.select(np.arange(images))

    @classmethod
    def concatenate(cls, manifests: Sequence[Manifest]) -> Manifest:
        """All images, one manifest after another; dataset and split names are joined by `+` if they differ.

        Raises InputError when two hold the same image id, when categories differ, and when only some have scores or
        federated lists.
        """
        _require_joinable(manifests)
        return cls(
            dataset="+".join(dict.fromkeys(manifest.dataset for manifest in manifests)),
            split="+".join(dict.fromkeys(manifest.split for manifest in manifests)),
            **{
                name: np.concatenate([getattr(manifest, name) for manifest in manifests])
                for name in (*_IMAGE_COLUMNS, *_REGION_COLUMNS)
            },
            offsets=_joined_offsets([manifest.offsets for manifest in manifests]),
            categories=manifests[0].categories,
            scores=_joined([manifest.scores for manifest in manifests]),
            negatives=_joined_ragged([manifest.negatives for manifest in manifests]),
            not_exhaustive=_joined_ragged([manifest.not_exhaustive for manifest in manifests]),
            source={"files": {name: digest for manifest in manifests for name, digest in _files(manifest).items()}},
            report=dict(sum((Counter(manifest.report) for manifest in manifests), Counter())),
            remarks=tuple(dict.fromkeys(line for manifest in manifests for line in manifest.remarks)),
        )

    def digest(self) -> str:
        """SHA-256 over everything that extraction depends on: images, boxes, classes, in order. Computed once."""
        return self._digest

    @cached_property
    def _digest(self) -> str:
        digest = hashlib.sha256()
        columns = [self.image_ids, self.heights, self.widths, self.offsets, self.boxes_xyxy, self.category_index]
        columns += [self.annotation_ids] if self.scores is None else [self.annotation_ids, self.scores]
        for column in columns:
            digest.update(np.ascontiguousarray(column).reshape(-1).view(np.uint8).data)
        for first in range(0, len(self), _PATHS_PER_UPDATE):
            paths = "\0".join(self.paths[first : first + _PATHS_PER_UPDATE].tolist())
            digest.update(f"\0{paths}".encode() if first else paths.encode())
        digest.update(repr([(category.id, category.name) for category in self.categories]).encode())
        return digest.hexdigest()


def _take(offsets: NDArray[np.int64], rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Offsets of the selected ragged rows, and the index of each of their values in the original."""
    counts = np.diff(offsets)[rows]
    selected = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    return selected, np.arange(selected[-1]) + np.repeat(offsets[rows] - selected[:-1], counts)


def _select_ragged(ragged: Ragged | None, rows: NDArray[np.int64]) -> Ragged | None:
    if ragged is None:
        return None
    offsets, index = _take(ragged.offsets, rows)
    return Ragged(offsets, ragged.values[index])


def _require_joinable(manifests: Sequence[Manifest]) -> None:
    if not manifests:
        raise InputError("no manifest to concatenate; give at least one")
    first = manifests[0]
    for other in manifests[1:]:
        both = f"{first.dataset}/{first.split} and {other.dataset}/{other.split}"
        if [(each.id, each.name) for each in first.categories] != [(each.id, each.name) for each in other.categories]:
            raise InputError(
                f"{both}: their categories differ ({len(first.categories)} and {len(other.categories)}), so a category "
                "index would be ambiguous; merge only caches with the same categories"
            )
        for name in ("scores", "negatives", "not_exhaustive"):
            if (getattr(first, name) is None) != (getattr(other, name) is None):
                raise InputError(
                    f"{both}: only one of them has {name}, which are unknown for the other; merge only caches that all "
                    "have them or all lack them"
                )
    ids, counts = np.unique(np.concatenate([manifest.image_ids for manifest in manifests]), return_counts=True)
    if len(duplicates := ids[counts > 1]):
        names = ", ".join(f"{manifest.dataset}/{manifest.split}" for manifest in manifests)
        raise InputError(
            f"{names}: {len(duplicates)} images are in more than one of them, the first has id "
            f"{duplicates[0]}; remove them from all but one with `regionspot cache subset`"
        )


def _files(manifest: Manifest) -> dict[str, str]:
    files: dict[str, str] = manifest.source.get("files", {})
    return files


def _joined_offsets(offsets: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
    counts = np.concatenate([np.diff(part) for part in offsets])
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)


def _joined(columns: Sequence[NDArray[np.float32] | None]) -> NDArray[np.float32] | None:
    present = [column for column in columns if column is not None]
    return np.concatenate(present) if present else None


def _joined_ragged(lists: Sequence[Ragged | None]) -> Ragged | None:
    present = [ragged for ragged in lists if ragged is not None]
    if not present:
        return None
    offsets = _joined_offsets([ragged.offsets for ragged in present])
    return Ragged(offsets, np.concatenate([ragged.values for ragged in present]))
