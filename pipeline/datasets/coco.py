"""Annotation files in COCO's form: one JSON object with `images`, `annotations` and `categories`.

Objects365, V3Det, LVIS and COCO itself differ only in where an image's path stands and in a few extra fields, which
a `CocoVariant` states as data. Images keep the file's order, so do the regions of an image; categories are sorted by
id, because Objects365 lists them in another order for each split.

Only the fields that a manifest needs are read, and those as programs write them (json_values.py). A record that cannot
be read is skipped and counted; but not a category, for every index behind it would then mean another class.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from operator import attrgetter
from pathlib import Path
from typing import Any, TypeAlias

import msgspec
import numpy as np

from regionspot.cache.format.manifest import Category, Manifest
from regionspot.pipeline.datasets import field_parsing as parse
from regionspot.pipeline.datasets.coco_image_table import CocoImageTable, CocoVariant, Id
from regionspot.pipeline.datasets.failure_limit import EXTRACTION_LIMIT, FailureLimit, SkippedRecords
from regionspot.pipeline.datasets.field_parsing import FieldError
from regionspot.pipeline.datasets.json_stream import AnnotationFile
from regionspot.pipeline.datasets.region_table import Floats, Lookup, RegionTable, column

log = logging.getLogger(__name__)

Number: TypeAlias = float | None  # null: a coordinate that is not finite

NO_ID = -1  # of an annotation that has none, or a name: nothing needs it
XYWH = "4 numbers: x, y, width, height"
_LISTS = ("images", "annotations", "categories")
_FREQUENCIES = ("r", "c", "f")  # LVIS: rare, common, frequent
# Annotations of other kinds, by a field that only they have.
_OTHER_KINDS = {"caption": "captions", "segments_info": "panoptic segments"}


class _Annotation(msgspec.Struct, gc=False):
    image_id: Id
    category_id: Id
    bbox: tuple[Number, Number, Number, Number]  # x, y, width, height
    id: Id = NO_ID
    iscrowd: int | bool = False
    isfake: int | bool = False


def read_coco(
    path: Path, dataset: str, split: str, form: CocoVariant, max_failures: FailureLimit = EXTRACTION_LIMIT
) -> Manifest:
    """Read one file, of whose images and of whose annotations `max_failures` may be unreadable.

    Raises AnnotationError, one line, where it is not what it should be.
    """
    file = AnnotationFile(path)
    if file.is_list:
        raise file.refuse(f"is a list, expected an object with {', '.join(_LISTS)}")
    lists = file.decode(dict[str, msgspec.Raw])
    for name in _LISTS:
        if name not in lists:
            there = ", ".join(list(lists)[:8]) or "nothing"
            raise file.refuse(f"has no list `{name}`, which annotations in COCO's form have; it has {there}")
    skipped = SkippedRecords(file.path, max_failures)
    categories, names = _categories(file, lists["categories"], form)
    images = CocoImageTable(file, form, categories)
    images.read(lists["images"], skipped)
    skipped.check("images")
    manifest = _with_regions(file, lists["annotations"], images, images.manifest(dataset, split), skipped)
    skipped.check("annotations")
    report = {**names, **skipped.report, **manifest.report}
    return replace(manifest, report=report, remarks=(*skipped.remarks, *manifest.remarks))


def select_listed_images(manifest: Manifest, path: Path, split: str) -> Manifest:
    """The images of `manifest` that the COCO-form file at `path` lists, in the manifest's order.

    The report still counts what reading the whole of `manifest` dropped.
    """
    file = AnnotationFile(path)
    listed = np.unique(np.array([image.id for image in file.decode(_ImageList).images], np.int64))
    rows = Lookup(manifest.image_ids).find(listed)
    if len(unknown := listed[rows < 0]):
        whole = " and ".join(manifest.source["files"])
        raise file.refuse(f"{len(unknown)} of its images are not in {whole}, the first has id {unknown[0]}")
    files = {**manifest.source["files"], **file.source["files"]}
    return replace(manifest.select(np.sort(rows)), split=split, source={"files": files})


class _ImageId(msgspec.Struct):
    id: Id


class _ImageList(msgspec.Struct):
    images: list[_ImageId]


def xyxy(boxes_xywh: Floats) -> Floats:
    """Corners of boxes (M, 4) given as x, y, width, height."""
    with np.errstate(over="ignore", invalid="ignore"):  # what overflows is infinite, and dropped as such
        return np.concatenate([boxes_xywh[:, :2], boxes_xywh[:, :2] + boxes_xywh[:, 2:]], axis=1)


def boxes_of(items: Sequence[Any]) -> Floats:
    """float64 (M, 4): the field `bbox` of decoded objects, NaN where it is null."""
    return np.array([item.bbox for item in items], np.float64).reshape(-1, 4)


def _categories(
    file: AnnotationFile, raw: msgspec.Raw, form: CocoVariant
) -> tuple[tuple[Category, ...], dict[str, int]]:
    """The categories by rising id, and what is to be reported of their names."""
    listed = file.decode_part(raw)
    if not isinstance(listed, list):
        raise file.refuse(f"`categories` is {parse.shorten(listed)}, expected a list")
    categories = []
    for place, entry in enumerate(listed):
        try:
            categories.append(_category(parse.json_object(entry), form))
        except FieldError as error:
            raise file.refuse(f"categories[{place}]{error}") from None
    categories.sort(key=attrgetter("id"))
    for one, other in pairwise(categories):
        if one.id == other.id:
            raise file.refuse(
                f"`categories` holds id {one.id} more than once, as {one.name!r} and as {other.name!r}; give each "
                "class an id of its own"
            )
    wrong = [name for entry in listed if (name := entry["name"].strip()) in form.spelling]
    if wrong:
        log.info("%s: corrected the spelling of %s", file.path.name, ", ".join(wrong))
    # V3Det has classes of one name on purpose; elsewhere that is worth a look: a name is all that tells them apart.
    repeated = len(categories) - len({category.name for category in categories})
    report = {"corrected_names": len(wrong), "repeated_category_names": repeated}
    return tuple(categories), {name: count for name, count in report.items() if count}


def _category(record: Mapping[str, Any], form: CocoVariant) -> Category:
    """Raises FieldError for an id that is no number and for an empty name; what else is odd is left open."""
    name = parse.text("name", parse.required(record, "name")).strip()
    if not name:
        raise parse.wrong_value("name", record["name"], "the class in words, by which regions are recognised")
    synonyms, frequency = record.get("synonyms"), record.get("frequency")
    return Category(
        id=parse.integer("id", parse.required(record, "id")),
        name=form.spelling.get(name, name),
        synset=_text_or_none(record.get("synset")),
        frequency=frequency if frequency in _FREQUENCIES else None,
        synonyms=tuple(each for each in synonyms if isinstance(each, str)) if isinstance(synonyms, list) else (),
        definition=_text_or_none(record.get("def")) or _text_or_none(record.get("cat_info")),  # the latter: V3Det
    )


def _text_or_none(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _with_regions(
    file: AnnotationFile, raw: msgspec.Raw, images: CocoImageTable, manifest: Manifest, skipped: SkippedRecords
) -> Manifest:
    """`manifest` with the regions of the list `raw`; those of images that were skipped go with them."""
    row_of = Lookup(manifest.image_ids)
    category_of = Lookup(np.array([category.id for category in manifest.categories], np.int64))
    left_out = np.array(sorted(images.left_out), np.int64)
    table = RegionTable(manifest, file.path, "xywh")
    for piece in file.slices("annotations", raw, _Annotation, _read_record, skipped):
        image_ids = column(piece.items, "image_id", np.int64)
        rows, categories = row_of.find(image_ids), category_of.find(column(piece.items, "category_id", np.int64))
        without_image = (rows < 0) & np.isin(image_ids, left_out)
        known = ((rows >= 0) | without_image) & (categories >= 0)
        for at in np.flatnonzero(~known).tolist():
            skipped.add("annotations", f"annotations[{piece.places[at]}]{_unknown(piece.items[at], rows[at] < 0)}")
        skipped.add_usable("annotations", int(known.sum()))
        boxes = boxes_of(piece.items)[known]
        table.add(
            np.maximum(rows, 0)[known],
            xyxy(boxes),
            categories[known],
            column(piece.items, "id", np.int64)[known],
            stated=boxes,
            drop={
                "dropped_image_skipped": without_image[known],
                "dropped_crowd": column(piece.items, "iscrowd", np.bool_)[known],
                "dropped_fake": column(piece.items, "isfake", np.bool_)[known],
            },
        )
    return table.finish()


def _unknown(annotation: _Annotation, lacks_image: bool) -> str:
    name, of = ("image_id", "images") if lacks_image else ("category_id", "categories")
    return f".{name} is {getattr(annotation, name)}, which `{of}` lacks"


def _read_record(value: Any) -> _Annotation:
    record = parse.json_object(value)
    if "bbox" not in record:
        for key, kind in _OTHER_KINDS.items():
            if key in record:
                raise FieldError(f" has no `bbox`: the file holds {kind}; boxes are in COCO's instances_*.json")
    number = parse.integer_or_none(record.get("id"))
    return _Annotation(
        image_id=parse.image_id("image_id", parse.required(record, "image_id")),
        category_id=parse.integer("category_id", parse.required(record, "category_id")),
        bbox=parse.box("bbox", parse.required(record, "bbox"), XYWH),
        id=NO_ID if number is None else number,
        iscrowd=parse.flag("iscrowd", record.get("iscrowd")),
        isfake=parse.flag("isfake", record.get("isfake")),
    )
