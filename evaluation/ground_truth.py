"""LVIS annotations as the `lvis` package wants them, read once, checked, and cut to pictures and classes.

The package looks fields up as it goes, and one that is missing ends in a KeyError an hour later. Here every field it
will touch is checked at the start.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from regionspot.cache.errors import AnnotationError, InputError

FREQUENCIES = ("r", "c", "f")  # rare, common, frequent: in under 10, under 100, 100 and more training pictures
NEEDED = {
    "images": ("id", "neg_category_ids", "not_exhaustive_category_ids"),
    "categories": ("id", "frequency"),
    "annotations": ("id", "image_id", "category_id", "bbox", "area"),
}


@dataclass(frozen=True)
class GroundTruth:
    """The three lists of an LVIS file. Their dicts are shared between cuts of the same truth, never copied."""

    path: Path
    images: list[dict[str, Any]]
    categories: list[dict[str, Any]]
    annotations: list[dict[str, Any]]

    @cached_property
    def image_ids(self) -> NDArray[np.int64]:
        return _column(self.images, "id")

    @cached_property
    def category_ids(self) -> NDArray[np.int64]:
        return _column(self.categories, "id")

    @cached_property
    def _annotated(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        return _column(self.annotations, "image_id"), _column(self.annotations, "category_id")

    @cached_property
    def _judged(self) -> NDArray[np.int64]:
        """int64 (n, 2): the (picture, class) pairs on which a detection is right or wrong; elsewhere it is unknown."""
        absent = [(image["id"], category) for image in self.images for category in image["neg_category_ids"]]
        pairs = np.stack(self._annotated, axis=1)
        return np.unique(np.concatenate([pairs, np.asarray(absent, np.int64).reshape(-1, 2)]), axis=0)

    def counts(self, image_ids: NDArray[np.int64], category_ids: NDArray[np.int64]) -> NDArray[np.bool_]:
        """bool (K,): whether lvis would count a detection of this class in this picture at all."""
        base = 1 + max([0, *self.category_ids.tolist()])
        return np.isin(image_ids * base + category_ids, self._judged[:, 0] * base + self._judged[:, 1])

    def restrict(self, image_ids: NDArray[np.int64] | None) -> GroundTruth:
        """The truth about `image_ids` only; all classes stay. Raises InputError for an id that is not here."""
        if image_ids is None:
            return self
        unknown = np.setdiff1d(image_ids, self.image_ids)
        if len(unknown):
            raise InputError(f"{self.path}: holds no picture with id {unknown[0]}, on which AP was asked for")
        wanted = set(image_ids.tolist())
        return GroundTruth(
            self.path,
            [image for image in self.images if image["id"] in wanted],
            self.categories,
            [annotation for annotation in self.annotations if annotation["image_id"] in wanted],
        )

    def block(self, category_ids: NDArray[np.int64], detected_in: NDArray[np.int64]) -> dict[str, Any]:
        """A dataset of these classes alone, with the pictures that show or are said to show one of them."""
        images, categories = self._annotated
        chosen = np.flatnonzero(np.isin(categories, category_ids))
        pictures = set(np.union1d(images[chosen], detected_in).tolist())
        classes = set(category_ids.tolist())
        return {
            "images": [image for image in self.images if image["id"] in pictures],
            "categories": [category for category in self.categories if category["id"] in classes],
            "annotations": [self.annotations[index] for index in chosen.tolist()],
        }

    def require_masks(self) -> None:
        """Raise AnnotationError unless every annotation has a mask and every picture its size."""
        _require(self.path, "annotations", self.annotations, ("segmentation",))
        _require(self.path, "images", self.images, ("height", "width"))


def read_ground_truth(path: Path) -> GroundTruth:
    """Read an LVIS annotation file. Raises AnnotationError where `lvis` would later fail or silently miscount."""
    dataset = _decode(path)
    for name, fields in NEEDED.items():
        if not isinstance(dataset, dict) or not isinstance(dataset.get(name), list):
            raise AnnotationError(f'{path}: has no list "{name}"; expected LVIS annotations such as lvis_v1_val.json')
        _require(path, name, dataset[name], fields)
    truth = GroundTruth(path, dataset["images"], dataset["categories"], dataset["annotations"])
    _check(truth)
    return truth


def _decode(path: Path) -> Any:
    try:
        return msgspec.json.decode(path.read_bytes())
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise AnnotationError(f"{path}: cannot be read ({reason}); expected an LVIS annotation file") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise AnnotationError(f"{path}: is not whole JSON ({error}); fetch the file again") from None


def _require(path: Path, name: str, entries: Iterable[Any], fields: tuple[str, ...]) -> None:
    for row, entry in enumerate(entries):
        missing = [field for field in fields if not isinstance(entry, dict) or field not in entry]
        if missing:
            raise AnnotationError(f'{path}: {name}[{row}] has no "{missing[0]}", which LVIS AP needs')


def _check(truth: GroundTruth) -> None:
    if not truth.categories:
        raise AnnotationError(f"{truth.path}: categories is empty; expected at least one class")
    for row, category in enumerate(truth.categories):
        if category["frequency"] not in FREQUENCIES:
            found = category["frequency"]
            raise AnnotationError(f'{truth.path}: categories[{row}] has frequency {found!r}, expected "r", "c" or "f"')
    for row, annotation in enumerate(truth.annotations):
        # lvis marks a match by the annotation's id and reads 0 as "none": a hit would count as a miss.
        if annotation["id"] == 0:
            raise AnnotationError(f"{truth.path}: annotations[{row}] has id 0, which lvis counts as a miss; start at 1")
    images, categories = truth._annotated
    for field, found, known in (
        ("image_id", images, truth.image_ids),
        ("category_id", categories, truth.category_ids),
    ):
        stray = np.flatnonzero(~np.isin(found, known))
        if len(stray):
            raise AnnotationError(
                f"{truth.path}: annotations[{stray[0]}] has {field} {found[stray[0]]}, which the file does not define"
            )


def _column(entries: list[dict[str, Any]], field: str) -> NDArray[np.int64]:
    return np.asarray([entry[field] for entry in entries], np.int64).reshape(-1)
