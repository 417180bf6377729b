"""Read COCO annotation files: one JSON object with `images`, `annotations` and `categories`.

Objects365, V3Det, LVIS and COCO differ only in the field of an image's path and a few extra fields, which a
`CocoVariant` describes. Images and the regions of an image keep the file's order. Categories are sorted by id, because
Objects365 lists them in a different order for each split.

Only the fields that a manifest needs are read. Unreadable images and annotations are skipped and counted. An unreadable
category is an error: skipping it would shift the index of all later categories.
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

NO_ID = -1  # the annotation has no numeric id; ids are optional
XYWH = "4 numbers: x, y, width, height"
_LISTS = ("images", "annotations", "categories")
_FREQUENCIES = ("r", "c", "f")  # LVIS: rare, common, frequent
# Other kinds of COCO annotations, by a field that only they have.
_OTHER_KINDS = {"caption": "captions", "segments_info": "panoptic segments"}


class _Annotation(msgspec.Struct, gc=False):
    image_id: Id
    category_id: Id
    bbox: tuple[Number, Number, Number, Number]  # x, y, width, height
    id: Id = NO_ID
    iscrowd: int | bool = False
    isfake: int | bool = False


def read_coco(
    path: Path, dataset: str, split: str, variant: CocoVariant, max_failures: FailureLimit = EXTRACTION_LIMIT
) -> Manifest:
    """Read one file. Up to `max_failures` of its images, and of its annotations, may be unreadable.

    Raises AnnotationError if the file is not a COCO annotation file or has too many unreadable records.
    """
    file = AnnotationFile(path)
    if file.is_list:
        raise file.error(f"is a list, expected an object with {', '.join(_LISTS)}")
    lists = file.decode(dict[str, msgspec.Raw])
    for name in _LISTS:
        if name not in lists:
            keys = ", ".join(list(lists)[:8]) or "nothing"
            raise file.error(f"has no list `{name}`, which COCO annotations have; it has {keys}")
    skipped = SkippedRecords(file.path, max_failures)
    categories, category_report = _categories(file, lists["categories"], variant)
    images = CocoImageTable(file, variant, categories)
    images.read(lists["images"], skipped)
    skipped.check("images")
    manifest = _with_regions(file, lists["annotations"], images, images.manifest(dataset, split), skipped)
    skipped.check("annotations")
    report = {**category_report, **skipped.report, **manifest.report}
    return replace(manifest, report=report, remarks=(*skipped.remarks, *manifest.remarks))


def select_listed_images(manifest: Manifest, path: Path, split: str) -> Manifest:
    """The images of `manifest` that the COCO file at `path` lists, in the manifest's order.

    The report still has the counts of the whole `manifest`.
    """
    file = AnnotationFile(path)
    listed = np.unique(np.array([image.id for image in file.decode(_ImageList).images], np.int64))
    rows = Lookup(manifest.image_ids).find(listed)
    if len(unknown := listed[rows < 0]):
        sources = " and ".join(manifest.source["files"])
        raise file.error(f"{len(unknown)} of its images are not in {sources}, the first has id {unknown[0]}")
    files = {**manifest.source["files"], **file.source["files"]}
    return replace(manifest.select(np.sort(rows)), split=split, source={"files": files})


class _ImageId(msgspec.Struct):
    id: Id


class _ImageList(msgspec.Struct):
    images: list[_ImageId]


def xyxy(boxes_xywh: Floats) -> Floats:
    """Convert boxes (M, 4) from x, y, width, height to corners."""
    with np.errstate(over="ignore", invalid="ignore"):  # an overflow is infinite, and the box is dropped
        return np.concatenate([boxes_xywh[:, :2], boxes_xywh[:, :2] + boxes_xywh[:, 2:]], axis=1)


def boxes_of(items: Sequence[Any]) -> Floats:
    """float64 (M, 4): the field `bbox` of decoded objects, NaN for null."""
    return np.array([item.bbox for item in items], np.float64).reshape(-1, 4)


def _categories(
    file: AnnotationFile, raw: msgspec.Raw, variant: CocoVariant
) -> tuple[tuple[Category, ...], dict[str, int]]:
    """The categories sorted by id, and counts for the report."""
    records = file.decode_part(raw)
    if not isinstance(records, list):
        raise file.error(f"`categories` is {parse.shorten(records)}, expected a list")
    categories = []
    for index, record in enumerate(records):
        try:
            categories.append(_category(parse.json_object(record), variant))
        except FieldError as error:
            raise file.error(f"categories[{index}]{error}") from None
    categories.sort(key=attrgetter("id"))
    for first, second in pairwise(categories):
        if first.id == second.id:
            raise file.error(
                f"`categories` has id {first.id} more than once, as {first.name!r} and as {second.name!r}; give each "
                "class its own id"
            )
    misspelt = [name for record in records if (name := record["name"].strip()) in variant.spelling]
    if misspelt:
        log.info("%s: corrected the spelling of %s", file.path.name, ", ".join(misspelt))
    # V3Det has classes of the same name on purpose; in other datasets it may be a mistake.
    repeated = len(categories) - len({category.name for category in categories})
    report = {"corrected_names": len(misspelt), "repeated_category_names": repeated}
    return tuple(categories), {name: count for name, count in report.items() if count}


def _category(record: Mapping[str, Any], variant: CocoVariant) -> Category:
    """Raises FieldError for an id that is not an integer and for an empty name; wrong optional fields become empty."""
    name = parse.text("name", parse.required(record, "name")).strip()
    if not name:
        raise parse.wrong_value("name", record["name"], "the name of the class")
    synonyms, frequency = record.get("synonyms"), record.get("frequency")
    return Category(
        id=parse.integer("id", parse.required(record, "id")),
        name=variant.spelling.get(name, name),
        synset=_text_or_none(record.get("synset")),
        frequency=frequency if frequency in _FREQUENCIES else None,
        synonyms=tuple(item for item in synonyms if isinstance(item, str)) if isinstance(synonyms, list) else (),
        definition=_text_or_none(record.get("def")) or _first_text(record.get("cat_info")),  # cat_info: V3Det
    )


def _text_or_none(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _first_text(value: Any) -> str | None:
    """A text, or the first of a list: V3Det's `cat_info` is one or the other."""
    return _text_or_none(value[0] if isinstance(value, list) and value else value)


def _with_regions(
    file: AnnotationFile, raw: msgspec.Raw, images: CocoImageTable, manifest: Manifest, skipped: SkippedRecords
) -> Manifest:
    """`manifest` with the regions in the list `raw`; regions of skipped images are dropped."""
    row_of = Lookup(manifest.image_ids)
    category_of = Lookup(np.array([category.id for category in manifest.categories], np.int64))
    skipped_images = np.array(sorted(images.skipped_ids), np.int64)
    table = RegionTable(manifest, file.path, "xywh")
    for part in file.slices("annotations", raw, _Annotation, _read_record, skipped):
        image_ids = column(part.items, "image_id", np.int64)
        rows, categories = row_of.find(image_ids), category_of.find(column(part.items, "category_id", np.int64))
        image_skipped = (rows < 0) & np.isin(image_ids, skipped_images)
        known = ((rows >= 0) | image_skipped) & (categories >= 0)
        for at in np.flatnonzero(~known).tolist():
            skipped.add("annotations", f"annotations[{part.indices[at]}]{_unknown_id(part.items[at], rows[at] < 0)}")
        skipped.add_usable("annotations", int(known.sum()))
        boxes = boxes_of(part.items)[known]
        table.add(
            np.maximum(rows, 0)[known],
            xyxy(boxes),
            categories[known],
            column(part.items, "id", np.int64)[known],
            stated=boxes,
            drop={
                "dropped_image_skipped": image_skipped[known],
                "dropped_crowd": column(part.items, "iscrowd", np.bool_)[known],
                "dropped_fake": column(part.items, "isfake", np.bool_)[known],
            },
        )
    return table.finish()


def _unknown_id(annotation: _Annotation, lacks_image: bool) -> str:
    name, list_name = ("image_id", "images") if lacks_image else ("category_id", "categories")
    return f".{name} is {getattr(annotation, name)}, which `{list_name}` lacks"


def _read_record(value: Any) -> _Annotation:
    record = parse.json_object(value)
    if "bbox" not in record:
        for key, kind in _OTHER_KINDS.items():
            if key in record:
                raise FieldError(f" has no `bbox`: the file holds {kind}; boxes are in COCO's instances_*.json")
    annotation_id = parse.integer_or_none(record.get("id"))
    return _Annotation(
        image_id=parse.image_id("image_id", parse.required(record, "image_id")),
        category_id=parse.integer("category_id", parse.required(record, "category_id")),
        bbox=parse.box("bbox", parse.required(record, "bbox"), XYWH),
        id=NO_ID if annotation_id is None else annotation_id,
        iscrowd=parse.flag("iscrowd", record.get("iscrowd")),
        isfake=parse.flag("isfake", record.get("isfake")),
    )
