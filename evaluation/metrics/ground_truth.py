"""LVIS annotations as the `lvis` package wants them, read once, checked whole, and cut to images and classes.

The package looks fields up as it goes: one that is missing or of another type ends in a traceback after the whole
inference, and an annotation id that is 0 or comes twice in a wrong number. So every field that it will touch is checked
before the first image, and annotations are numbered anew: AP needs no more of an id than that it is its own.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from regionspot.cache.errors import AnnotationError, InputError
from regionspot.pipeline.datasets import field_parsing as parse
from regionspot.pipeline.datasets.coco import XYWH
from regionspot.pipeline.datasets.field_parsing import FieldError
from regionspot.pipeline.datasets.json_stream import AnnotationFile
from regionspot.pipeline.datasets.region_table import Lookup

log = logging.getLogger(__name__)

FREQUENCIES = ("r", "c", "f")  # rare, common, frequent: in under 10, under 100, 100 and more training images
_LISTS = ("images", "categories", "annotations")
_FEDERATED = ("neg_category_ids", "not_exhaustive_category_ids")
_POLYGONS = "polygons of at least 3 points, [[x1, y1, x2, y2, x3, y3, ...], ...], or run lengths"


@dataclass(frozen=True)
class GroundTruth:
    """The three lists of an LVIS file. Their dicts are shared between cuts of the same file, never copied.

    image_names   ids of images that are names in the file, by the number that stands for each
    """

    path: Path
    images: list[dict[str, Any]]
    categories: list[dict[str, Any]]
    annotations: list[dict[str, Any]]
    image_names: dict[int, str] = field(default_factory=dict)

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
        """int64 (n,): the (image, class) pairs on which a detection is right or wrong; elsewhere it is unknown."""
        absent = [(image["id"], category) for image in self.images for category in image["neg_category_ids"]]
        images, categories = np.asarray(absent, np.int64).reshape(-1, 2).T
        annotated, shown = self._annotated
        return np.unique(self._pairs(np.concatenate([annotated, images]), np.concatenate([shown, categories])))

    def _pairs(self, image_ids: NDArray[np.int64], category_ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """A number for each (image, class), made of their places: ids may be negative, or too large to multiply."""
        images, categories = Lookup(self.image_ids).find(image_ids), Lookup(self.category_ids).find(category_ids)
        return images * len(self.categories) + categories

    def counts(self, image_ids: NDArray[np.int64], category_ids: NDArray[np.int64]) -> NDArray[np.bool_]:
        """bool (K,): whether lvis would count a detection of this class in this image at all."""
        return np.isin(self._pairs(image_ids, category_ids), self._judged)

    def restrict(self, image_ids: NDArray[np.int64] | None) -> GroundTruth:
        """The ground truth of `image_ids` only; all classes stay. Raises InputError for an id that is not here."""
        if image_ids is None:
            return self
        unknown = np.setdiff1d(image_ids, self.image_ids)
        if len(unknown):
            raise InputError(f"{self.path}: holds no image with id {unknown[0]}, on which AP was asked for")
        wanted = set(image_ids.tolist())
        return GroundTruth(
            self.path,
            [image for image in self.images if image["id"] in wanted],
            self.categories,
            [annotation for annotation in self.annotations if annotation["image_id"] in wanted],
            self.image_names,
        )

    def block(self, category_ids: NDArray[np.int64], detected_in: NDArray[np.int64]) -> dict[str, Any]:
        """A dataset of these classes alone, with the images that show or are said to show one of them."""
        images, categories = self._annotated
        chosen = np.flatnonzero(np.isin(categories, category_ids))
        image_ids = set(np.union1d(images[chosen], detected_in).tolist())
        classes = set(category_ids.tolist())
        return {
            "images": [image for image in self.images if image["id"] in image_ids],
            "categories": [category for category in self.categories if category["id"] in classes],
            "annotations": [self.annotations[index] for index in chosen.tolist()],
        }

    def require_masks(self) -> None:
        """Raise AnnotationError unless every annotation has a mask that fits its image."""
        return self._masks_are_there

    @cached_property
    def _masks_are_there(self) -> None:
        _each(self.path, "images", self.images, _check_size)
        sizes = {image["id"]: (image["height"], image["width"]) for image in self.images}

        def check(annotation: dict[str, Any]) -> None:
            _check_mask(parse.required(annotation, "segmentation"), sizes[annotation["image_id"]])

        _each(self.path, "annotations", self.annotations, check, "; --no-masks evaluates boxes alone")


def read_ground_truth(path: Path) -> GroundTruth:
    """Read an LVIS annotation file. Raises AnnotationError where `lvis` would later fail or silently miscount."""
    file = AnnotationFile(Path(path))
    dataset: Any = file.decode(object)
    lists: list[Any] = [dataset.get(name) if isinstance(dataset, dict) else None for name in _LISTS]
    for name, listed in zip(_LISTS, lists, strict=True):
        if not isinstance(listed, list):
            raise file.error(f'has no list "{name}"; expected LVIS annotations such as lvis_v1_val.json')
    images, categories, annotations = lists
    if not categories:
        raise file.error("categories is empty; expected at least one class")
    names: dict[int, str] = {}
    _each(path, "categories", categories, _check_category)
    class_ids = _unique_ids(file, "categories", categories)
    _each(path, "images", images, lambda image: _check_image(image, class_ids, names))
    image_ids = _unique_ids(file, "images", images)
    _each(path, "annotations", annotations, lambda annotation: _check_annotation(annotation, image_ids, class_ids))
    _number(path, annotations)
    return GroundTruth(path, images, categories, annotations, names)


def _each(path: Path, name: str, entries: list[Any], check: Callable[[Any], None], mend: str = "") -> None:
    """Raises AnnotationError where `check` raises FieldError: how many entries, and the first of them."""
    wrong = []
    for place, entry in enumerate(entries):
        try:
            parse.json_object(entry)
            check(entry)
        except FieldError as error:
            wrong.append(f"{name}[{place}]{error}")
    if wrong:
        count = f"{len(wrong):,} of {len(entries):,} {name}"
        raise AnnotationError(f"{path}: {count} cannot be evaluated, the first: {wrong[0]}{mend}")


def _check_category(category: dict[str, Any]) -> None:
    category["id"] = parse.integer("id", parse.required(category, "id"))
    if parse.required(category, "frequency") not in FREQUENCIES:
        raise parse.wrong_value("frequency", category["frequency"], '"r", "c" or "f", which LVIS AP needs')


def _check_image(image: dict[str, Any], class_ids: Mapping[int, int], names: dict[int, str]) -> None:
    stated = parse.required(image, "id")
    image["id"] = parse.image_id("id", stated)
    if parse.integer_or_none(stated) is None:
        names[image["id"]] = str(stated)
    for name in _FEDERATED:
        listed = parse.required(image, name)
        if not isinstance(listed, list):
            raise parse.wrong_value(name, listed, "a list of category ids")
        image[name] = [parse.integer(name, each) for each in listed]
        if unknown := [each for each in image[name] if each not in class_ids]:
            raise FieldError(f".{name} names category {unknown[0]}, which the file does not define")


def _check_annotation(annotation: dict[str, Any], image_ids: Mapping[int, int], class_ids: Mapping[int, int]) -> None:
    annotation["image_id"] = parse.image_id("image_id", parse.required(annotation, "image_id"))
    annotation["category_id"] = parse.integer("category_id", parse.required(annotation, "category_id"))
    for name, known in (("image_id", image_ids), ("category_id", class_ids)):
        if annotation[name] not in known:
            raise FieldError(f".{name} is {annotation[name]}, which the file does not define")
    stated = parse.required(annotation, "bbox")
    box = parse.box("bbox", stated, XYWH)
    if not all(map(math.isfinite, box)) or min(box[2:]) < 0:
        raise parse.wrong_value("bbox", stated, f"{XYWH}, none of them infinite or a negative size")
    area = parse.number("area", parse.required(annotation, "area"))
    if not math.isfinite(area) or area < 0:
        raise parse.wrong_value("area", annotation["area"], "a number from 0")
    annotation["bbox"], annotation["area"] = list(box), area


def _check_size(image: dict[str, Any]) -> None:
    for name in ("height", "width"):
        image[name] = parse.integer(name, parse.required(image, name), 1, 2**31 - 1, "pixels, a whole number from 1")


def _check_mask(mask: Any, size: tuple[int, int]) -> None:
    """Raises FieldError for what pycocotools would stumble over or take for another mask; `size`: height, width."""
    if isinstance(mask, dict):
        if list(parse.required(mask, "size")) != list(size):
            raise parse.wrong_value("segmentation.size", mask["size"], f"that of its image, {list(size)}")
        counts = parse.required(mask, "counts")
        if _covered(counts) != math.prod(size):
            raise parse.wrong_value("segmentation.counts", counts, f"runs of {math.prod(size)} pixels in all")
        return
    if not isinstance(mask, list) or not mask:
        raise parse.wrong_value("segmentation", mask, _POLYGONS)
    for polygon in mask:
        numbers = isinstance(polygon, list) and all(type(each) in (int, float) for each in polygon)
        if not numbers or len(polygon) < 6 or len(polygon) % 2:
            raise parse.wrong_value("segmentation", mask, _POLYGONS)


def _covered(counts: Any) -> int | None:
    """Pixels that run lengths cover, as a list or as COCO's text (rleFrString in pycocotools); None for neither."""
    if isinstance(counts, list):
        return sum(counts) if all(type(each) is int and each >= 0 for each in counts) else None
    if not isinstance(counts, str):
        return None
    runs: list[int] = []
    run = shift = 0
    for character in counts:
        bits = ord(character) - 48  # five bits of a number each, and one that says whether more follow
        if not 0 <= bits < 64:
            return None
        run |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            run -= 1 << shift
        runs.append(run + runs[-2] if len(runs) > 2 else run)
        if runs[-1] < 0:
            return None
        run = shift = 0
    return None if shift else sum(runs)


def _unique_ids(file: AnnotationFile, name: str, entries: list[dict[str, Any]]) -> dict[int, int]:
    """Places by id. Raises AnnotationError where two have the same."""
    places: dict[int, int] = {}
    for place, entry in enumerate(entries):
        if entry["id"] in places:
            raise file.error(
                f"{name}[{places[entry['id']]}] and {name}[{place}] have the same id {entry['id']}; give each its own"
            )
        places[entry["id"]] = place
    return places


def _number(path: Path, annotations: list[dict[str, Any]]) -> None:
    """Number the annotations from 1; lvis takes id 0 for no match, and of two with one id it sees the last alone."""
    ids = [parse.integer_or_none(annotation.get("id")) for annotation in annotations]
    proper = {number for number in ids if number is not None and number > 0}
    if odd := len(ids) - len(proper):
        log.warning("%s: %d annotation ids are missing, repeated, 0 or less; they are numbered anew for AP", path, odd)
    for number, annotation in enumerate(annotations, start=1):
        annotation["id"] = number
    if empty := sum(annotation["area"] == 0 for annotation in annotations):
        log.warning("%s: %d annotations have area 0, and lvis leaves those out of AP", path, empty)


def _column(entries: list[dict[str, Any]], name: str) -> NDArray[np.int64]:
    return np.asarray([entry[name] for entry in entries], np.int64).reshape(-1)
