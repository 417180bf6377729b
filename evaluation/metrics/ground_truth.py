"""LVIS and COCO annotations for AP: read once, fully checked, and restricted to images and classes.

The official packages fail with a traceback after the whole inference if a field is missing or has another type, and
`lvis` returns wrong AP for annotation ids that are 0 or repeated. So every field that they use is checked before the
first image, and annotations are renumbered: AP only needs unique ids.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
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

FREQUENCIES = ("r", "c", "f")  # rare, common, frequent: in up to 10, up to 100, more than 100 training images
_LISTS = ("images", "categories", "annotations")
_FEDERATED = ("neg_category_ids", "not_exhaustive_category_ids")
_POLYGONS = "polygons of at least 3 points, [[x1, y1, x2, y2, x3, y3, ...], ...], or run lengths"


@dataclass(frozen=True)
class GroundTruth:
    """The three lists of an LVIS or COCO file. Restricted copies share the dicts of the original.

    image_names   image ids that are strings in the file, by the integer that replaces them
    federated     whether images list absent and not exhaustively annotated classes, and classes have a frequency: LVIS
    """

    path: Path
    images: list[dict[str, Any]]
    categories: list[dict[str, Any]]
    annotations: list[dict[str, Any]]
    image_names: dict[int, str] = field(default_factory=dict)
    federated: bool = True

    @cached_property
    def image_ids(self) -> NDArray[np.int64]:
        return _column(self.images, "id")

    @cached_property
    def category_ids(self) -> NDArray[np.int64]:
        return _column(self.categories, "id")

    @cached_property
    def frequencies(self) -> NDArray[np.str_]:
        """str (K,): "r", "c" or "f" of each class, by ascending id; "" where the file has none."""
        categories = sorted(self.categories, key=lambda category: category["id"])
        return np.asarray([category.get("frequency", "") for category in categories], np.str_)

    @cached_property
    def _annotated(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        return _column(self.annotations, "image_id"), _column(self.annotations, "category_id")

    @cached_property
    def _evaluated_pairs(self) -> NDArray[np.int64]:
        """int64 (n,): the (image, class) pairs that are annotated or listed as absent; others are unknown."""
        absent = [(image["id"], category) for image in self.images for category in image["neg_category_ids"]]
        absent_images, absent_categories = np.asarray(absent, np.int64).reshape(-1, 2).T
        images, categories = self._annotated
        return np.unique(
            self._pairs(np.concatenate([images, absent_images]), np.concatenate([categories, absent_categories]))
        )

    def _pairs(self, image_ids: NDArray[np.int64], category_ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """An integer for each (image, class), from their indices: ids may be negative, or too large to multiply."""
        images, categories = Lookup(self.image_ids).find(image_ids), Lookup(self.category_ids).find(category_ids)
        return images * len(self.categories) + categories

    def is_evaluated(self, image_ids: NDArray[np.int64], category_ids: NDArray[np.int64]) -> NDArray[np.bool_]:
        """bool (K,): False where lvis ignores detections of this class in this image."""
        return np.isin(self._pairs(image_ids, category_ids), self._evaluated_pairs)

    def restrict(self, image_ids: NDArray[np.int64] | None) -> GroundTruth:
        """The ground truth of `image_ids` only, with all classes. Raises InputError for an unknown id."""
        if image_ids is None:
            return self
        unknown = np.setdiff1d(image_ids, self.image_ids)
        if len(unknown):
            raise InputError(f"{self.path}: holds no image with id {unknown[0]}, which is to be evaluated")
        selected = set(image_ids.tolist())
        return replace(
            self,
            images=[image for image in self.images if image["id"] in selected],
            annotations=[annotation for annotation in self.annotations if annotation["image_id"] in selected],
        )

    def of_classes(self, category_ids: NDArray[np.int64], detected_in: NDArray[np.int64]) -> GroundTruth:
        """The ground truth of these classes only, with the images where one of them is annotated or detected."""
        images, categories = self._annotated
        selected = np.flatnonzero(np.isin(categories, category_ids))
        image_ids = set(np.union1d(images[selected], detected_in).tolist())
        classes = set(category_ids.tolist())
        return replace(
            self,
            images=[image for image in self.images if image["id"] in image_ids],
            categories=[category for category in self.categories if category["id"] in classes],
            annotations=[self.annotations[index] for index in selected.tolist()],
        )

    def require_masks(self) -> None:
        """Raise AnnotationError unless every annotation has a valid mask of the size of its image."""
        return self._check_masks

    @cached_property
    def _check_masks(self) -> None:  # cached: it takes a while
        _check_all(self.path, "images", self.images, _check_size)
        sizes = {image["id"]: (image["height"], image["width"]) for image in self.images}

        def check(annotation: dict[str, Any]) -> None:
            _check_mask(parse.required(annotation, "segmentation"), sizes[annotation["image_id"]])

        _check_all(self.path, "annotations", self.annotations, check, "; use --no-masks to evaluate boxes only")


def read_ground_truth(path: Path, federated: bool = True) -> GroundTruth:
    """Read the annotation file of LVIS, or with `federated` False of any dataset in COCO's format.

    An annotation of COCO's without an area has that of its box, as tools that write boxes only mean it.

    Raises AnnotationError if the official packages would fail or return wrong numbers.
    """
    file = AnnotationFile(Path(path))
    dataset: Any = file.decode(object)
    lists: list[Any] = [dataset.get(name) if isinstance(dataset, dict) else None for name in _LISTS]
    for name, entries in zip(_LISTS, lists, strict=True):
        if not isinstance(entries, list):
            example = "LVIS annotations such as lvis_v1_val.json" if federated else "COCO annotations"
            raise file.error(f'has no list "{name}"; expected {example}')
    images, categories, annotations = lists
    if not categories:
        raise file.error("categories is empty; expected at least one class")
    names: dict[int, str] = {}
    _check_all(path, "categories", categories, lambda category: _check_category(category, federated))
    class_ids = _unique_ids(file, "categories", categories)
    _check_all(path, "images", images, lambda image: _check_image(image, class_ids if federated else None, names))
    image_ids = _unique_ids(file, "images", images)
    known = {"image_id": image_ids, "category_id": class_ids}
    _check_all(path, "annotations", annotations, lambda annotation: _check_annotation(annotation, known, federated))
    _number(path, annotations)
    return GroundTruth(path, images, categories, annotations, names, federated)


def _check_all(path: Path, name: str, entries: list[Any], check: Callable[[Any], None], hint: str = "") -> None:
    """Raises AnnotationError with the number of entries for which `check` raises FieldError, and the first of them."""
    errors = []
    for index, entry in enumerate(entries):
        try:
            parse.json_object(entry)
            check(entry)
        except FieldError as error:
            errors.append(f"{name}[{index}]{error}")
    if errors:
        count = f"{len(errors):,} of {len(entries):,} {name}"
        raise AnnotationError(f"{path}: {count} cannot be evaluated, the first: {errors[0]}{hint}")


def _check_category(category: dict[str, Any], federated: bool) -> None:
    category["id"] = parse.integer("id", parse.required(category, "id"))
    if federated and parse.required(category, "frequency") not in FREQUENCIES:
        raise parse.wrong_value("frequency", category["frequency"], '"r", "c" or "f", which LVIS AP needs')


def _check_image(image: dict[str, Any], class_ids: Mapping[int, int] | None, names: dict[int, str]) -> None:
    """`class_ids`: those of the file if it must list absent and not exhaustively annotated classes, else None."""
    original_id = parse.required(image, "id")
    image["id"] = parse.image_id("id", original_id)
    if parse.integer_or_none(original_id) is None:
        names[image["id"]] = str(original_id)
    if class_ids is None:
        return
    for name in _FEDERATED:
        ids = parse.required(image, name)
        if not isinstance(ids, list):
            raise parse.wrong_value(name, ids, "a list of category ids")
        image[name] = [parse.integer(name, category_id) for category_id in ids]
        if unknown := [category_id for category_id in image[name] if category_id not in class_ids]:
            raise FieldError(f".{name} names category {unknown[0]}, which the file does not define")


def _check_annotation(annotation: dict[str, Any], known: Mapping[str, Mapping[int, int]], federated: bool) -> None:
    """`known`: the ids of images and classes."""
    annotation["image_id"] = parse.image_id("image_id", parse.required(annotation, "image_id"))
    annotation["category_id"] = parse.integer("category_id", parse.required(annotation, "category_id"))
    for name, ids in known.items():
        if annotation[name] not in ids:
            raise FieldError(f".{name} is {annotation[name]}, which the file does not define")
    original_box = parse.required(annotation, "bbox")
    box = parse.box("bbox", original_box, XYWH)
    if not all(map(math.isfinite, box)) or min(box[2:]) < 0:
        raise parse.wrong_value("bbox", original_box, f"{XYWH}, finite and without a negative size")
    if not federated:
        annotation.setdefault("area", box[2] * box[3])
    area = parse.number("area", parse.required(annotation, "area"))
    if not math.isfinite(area) or area < 0:
        raise parse.wrong_value("area", annotation["area"], "a number of at least 0")
    annotation["bbox"], annotation["area"] = list(box), area


def _check_size(image: dict[str, Any]) -> None:
    for name in ("height", "width"):
        image[name] = parse.integer(name, parse.required(image, name), 1, 2**31 - 1, "pixels, an integer of at least 1")


def _check_mask(mask: Any, size: tuple[int, int]) -> None:
    """Raises FieldError for a mask that pycocotools cannot read or reads differently; `size`: height, width."""
    if isinstance(mask, dict):
        if list(parse.required(mask, "size")) != list(size):
            raise parse.wrong_value("segmentation.size", mask["size"], f"that of its image, {list(size)}")
        counts = parse.required(mask, "counts")
        if run_length_pixels(counts) != math.prod(size):
            raise parse.wrong_value("segmentation.counts", counts, f"runs of {math.prod(size)} pixels in all")
        return
    if not isinstance(mask, list) or not mask:
        raise parse.wrong_value("segmentation", mask, _POLYGONS)
    for polygon in mask:
        is_numeric = isinstance(polygon, list) and all(type(value) in (int, float) for value in polygon)
        if not is_numeric or len(polygon) < 6 or len(polygon) % 2:
            raise parse.wrong_value("segmentation", mask, _POLYGONS)


def run_length_pixels(counts: Any) -> int | None:
    """Sum of run lengths, a list or COCO's string (rleFrString in pycocotools); None if invalid."""
    if isinstance(counts, list):
        return sum(counts) if all(type(count) is int and count >= 0 for count in counts) else None
    if not isinstance(counts, str):
        return None
    runs: list[int] = []
    run = shift = 0
    for character in counts:
        bits = ord(character) - 48  # five bits of a number, and one bit that is set if more follow
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
    """Index of each entry by its id. Raises AnnotationError for a repeated id."""
    indices: dict[int, int] = {}
    for index, entry in enumerate(entries):
        if entry["id"] in indices:
            raise file.error(
                f"{name}[{indices[entry['id']]}] and {name}[{index}] have the same id {entry['id']}; make ids unique"
            )
        indices[entry["id"]] = index
    return indices


def _number(path: Path, annotations: list[dict[str, Any]]) -> None:
    """Renumber the annotations from 1: for lvis, id 0 means no match, and a repeated id hides an annotation."""
    ids = [parse.integer_or_none(annotation.get("id")) for annotation in annotations]
    valid = {number for number in ids if number is not None and number > 0}
    if invalid := len(ids) - len(valid):
        log.warning("%s: %d annotation ids are missing, repeated, 0 or less; renumbered for AP", path, invalid)
    for number, annotation in enumerate(annotations, start=1):
        annotation["id"] = number
    if empty := sum(annotation["area"] == 0 for annotation in annotations):
        log.warning("%s: %d annotations have area 0; lvis ignores them", path, empty)


def _column(entries: list[dict[str, Any]], name: str) -> NDArray[np.int64]:
    return np.asarray([entry[name] for entry in entries], np.int64).reshape(-1)
