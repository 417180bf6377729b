"""Read the JSON formats of detectors into columns.

    {"139": {"boxes": [[x1, y1, x2, y2], ...], "scores": [...], "labels": [...]}}         by image
    [{"image_id": 139, "bbox": [x, y, width, height], "score": 0.9, "category_id": 1}]    COCO, LVIS, Ultralytics
    {"ids": [139], "boxes": [[[x1, y1, x2, y2], ...]], "objectness_logits": [[...]]}      Detectron2: proposals
    [{"image_id": 139, "instances": [{"bbox": ..., ...}]}]                                Detectron2: predictions
    [{"img_id": 139, "pred_instances": {"bboxes": ..., "scores": ..., "labels": ...}}]    MMDetection 3
    [[[[x1, y1, x2, y2, score], ...], ... per class], ... per image]                      MMDetection before 3

Boxes are in pixels of the original image. An image is identified by its id, its path or its file name, with or without
the extension; in the last format by its index. Scores and labels are optional. A label is a category id or a category
name; in Detectron2's `pred_classes` and in MMDetection's formats it is an index into the categories.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from operator import attrgetter
from typing import Any, TypeAlias

import msgspec
import numpy as np

from regionspot.cache.format.manifest import Category
from regionspot.pipeline.datasets import field_parsing as parse
from regionspot.pipeline.datasets.box_format_check import BoxFormat
from regionspot.pipeline.datasets.coco import XYWH, Number, boxes_of
from regionspot.pipeline.datasets.coco_image_table import Id
from regionspot.pipeline.datasets.failure_limit import SkippedRecords
from regionspot.pipeline.datasets.field_parsing import FieldError
from regionspot.pipeline.datasets.json_stream import AnnotationFile
from regionspot.pipeline.datasets.region_table import Bools, Floats, Ints, Lookup, column

NO_LABEL, UNKNOWN_LABEL = -2, -1  # instead of a category index
_NO_CATEGORY_ID, _UNKNOWN_ID = 2**63 - 1, -(2**63)  # instead of a category id; no dataset uses these
_XYXY = "4 numbers: x1, y1, x2, y2, or 5 with the score"
_PLAIN_ID = re.compile("0|-?[1-9][0-9]{0,17}")
_ENTRIES_PER_CHUNK = 1000
_IMAGE_FIELDS = ("file_name", "img_path", "image_id", "img_id")  # the first one present identifies the image
_NESTED_FIELDS = ("instances", "pred_instances", "proposals")
_BOX_FIELDS = ("boxes", "bboxes", "pred_boxes", "proposal_boxes")
_SCORE_FIELDS = ("scores", "objectness_logits")
_LABEL_FIELDS = ("labels", "pred_classes")
# One image's position in the file (for messages), its id or name (None: in a field of the content), and the content.
ImageEntry: TypeAlias = tuple[str, Any, Any]


@dataclass(frozen=True)
class ProposedBoxes:
    """M boxes as columns.

    image_ids   int64 (M,)      the image's id, or `id_of_name` of its name
    boxes       float64 (M, 4)  as in the file
    scores      float64 (M,)    NaN for null, 1 if there is none
    has_score   bool (M,)
    categories  int64 (M,)      category index, UNKNOWN_LABEL or NO_LABEL
    entries     int64           image id of every entry for one image, with or without boxes
    """

    image_ids: Ints
    boxes: Floats
    scores: Floats
    has_score: Bools
    categories: Ints
    entries: Ints

    @classmethod
    def concatenate(cls, chunks: Sequence[ProposedBoxes]) -> ProposedBoxes:
        if not chunks:
            empty = np.zeros(0, np.int64)
            return cls(empty, np.zeros((0, 4)), np.zeros(0), np.zeros(0, np.bool_), empty, empty)
        return cls(*(np.concatenate([getattr(chunk, field.name) for chunk in chunks]) for field in fields(cls)))


class _CocoResult(msgspec.Struct, gc=False):
    image_id: Id
    bbox: tuple[Number, Number, Number, Number]  # x, y, width, height
    score: Number | msgspec.UnsetType = msgspec.UNSET
    category_id: Id = _NO_CATEGORY_ID
    file_name: str | None = None


class _ImageBoxes(msgspec.Struct, gc=False):
    boxes: list[tuple[Number, Number, Number, Number]]  # x1, y1, x2, y2
    scores: list[Number]
    labels: list[Id] | None = None


class ProposalReader:
    """Reads the boxes of one file, for the images whose ids, in the dataset's order, are `image_ids` (N,).

    After `read`:
    names       names of the images whose id in the columns is `id_of_name`, by that id
    box_format  of the file's boxes; None if there are none
    by_index    whether images are identified only by their index
    """

    def __init__(
        self, file: AnnotationFile, categories: Sequence[Category], image_ids: Ints, skipped: SkippedRecords
    ) -> None:
        self._file, self._image_ids, self._skipped = file, image_ids, skipped
        self._classes = len(categories)
        self._index_of_id = Lookup(np.array([category.id for category in categories], np.int64))
        self._index_of_name = {category.name: index for index, category in reversed(list(enumerate(categories)))}
        self._image_boxes = msgspec.json.Decoder(_ImageBoxes)
        self.names: dict[int, str] = {}
        self.box_format: BoxFormat | None = None
        self.by_index = False

    def read(self) -> ProposedBoxes:
        """Raises AnnotationError if the file has none of the formats, or too many unreadable records."""
        if not self._file.is_list:
            boxes = self._read_entries(self._entries_of_object())
        else:
            raw = self._file.decode(msgspec.Raw)
            first = self._file.first_item(raw)
            if isinstance(first, list):
                boxes = self._read_entries(self._entries_by_index())
            elif isinstance(first, dict) and "bbox" not in first and first.keys() & {*_NESTED_FIELDS, *_BOX_FIELDS}:
                records = self._file.decode(list[msgspec.Raw])
                boxes = self._read_entries((f"[{index}]", None, record) for index, record in enumerate(records))
            else:
                self._set_box_format("xywh")
                slices = self._file.slices("", raw, _CocoResult, self._read_result, self._skipped)
                chunks = [self._columns_of_results(part.items) for part in slices]
                self._skipped.add_usable("records", sum(len(chunk.image_ids) for chunk in chunks))
                boxes = ProposedBoxes.concatenate(chunks)
        self._skipped.check("records")
        return boxes

    def _entries_of_object(self) -> Iterable[ImageEntry]:
        pairs = self._file.pairs()
        keys = {key for key, _ in pairs}
        if {"images", "annotations"} <= keys:
            raise self._file.error("holds annotations, not a detector's boxes; give it by --annotations")
        if "boxes" in keys and keys & {"ids", "indexes"}:
            return self._entries_of_detectron2()
        return ((f'["{key}"]', key, raw) for key, raw in pairs)

    def _entries_of_detectron2(self) -> Iterable[ImageEntry]:
        """A list of images, and for each image a list of boxes and one of scores."""
        lists = self._file.decode(dict[str, Any])
        ids: Any = lists.get("ids", lists.get("indexes"))
        columns = {name: lists[name] for name in ("boxes", *_SCORE_FIELDS) if name in lists}
        for name, values in {"ids": ids, **columns}.items():
            if not isinstance(values, list) or len(values) != len(ids):
                raise self._file.error(f"`{name}` is not a list with one entry for each of `ids`")
        for index, image in enumerate(ids):
            record = {name: values[index] for name, values in columns.items()}
            yield f".boxes[{index}]", image, {**record, "bbox_mode": lists.get("bbox_mode")}

    def _entries_by_index(self) -> Iterable[ImageEntry]:
        """MMDetection's lists: for each image its boxes, or its boxes per class."""
        images = self._file.decode(list[Any])
        if len(images) != len(self._image_ids):
            raise self._file.error(
                f"holds boxes of {len(images):,} images without ids, the dataset has {len(self._image_ids):,} images"
            )
        self.by_index = True
        for index, (image, boxes) in enumerate(zip(self._image_ids.tolist(), images, strict=True)):
            if not isinstance(boxes, list) or not all(isinstance(item, list) for item in boxes):
                raise self._file.error(f"[{index}] is {parse.shorten(boxes)}, expected the boxes of an image")
            record = {"boxes": boxes}
            if any(not item or isinstance(item[0], list) for item in boxes):  # a list per class
                record = {
                    "boxes": [box for of_class in boxes for box in of_class],
                    "pred_classes": [category for category, of_class in enumerate(boxes) for _ in of_class],
                }
            yield f"[{index}]", image, record

    def _read_entries(self, entries: Iterable[ImageEntry]) -> ProposedBoxes:
        """Decode entries one by one and convert them to columns in chunks, to release their objects early."""
        chunks: list[ProposedBoxes] = []
        pending: list[tuple[int, _ImageBoxes]] = []
        for position, key, value in entries:
            try:
                if image_boxes := self._decode_image_boxes(key, value):
                    self._set_box_format("xyxy")
                    pending.append((self._image_id("", key), image_boxes))
                    if len(pending) < _ENTRIES_PER_CHUNK:
                        continue
                chunks.append(self._columns_of_images(pending))
                pending.clear()
                if not image_boxes:
                    content = self._file.decode_part(value) if isinstance(value, msgspec.Raw) else value
                    chunks.append(self._read_entry(key, content))
            except FieldError as error:
                self._skipped.add("records", f"{position}{error}")
        chunks.append(self._columns_of_images(pending))
        self._skipped.add_usable("records", sum(len(chunk.entries) for chunk in chunks))
        return ProposedBoxes.concatenate(chunks)

    def _decode_image_boxes(self, key: Any, value: Any) -> _ImageBoxes | None:
        """An image's boxes in the most common format; None for other formats."""
        if key is None or not isinstance(value, msgspec.Raw):
            return None
        try:
            image_boxes = self._image_boxes.decode(value)
        except msgspec.ValidationError:
            return None
        lengths = {len(image_boxes.boxes), len(image_boxes.scores), len(image_boxes.labels or image_boxes.boxes)}
        return image_boxes if len(lengths) == 1 else None

    def _columns_of_images(self, entries: Sequence[tuple[int, _ImageBoxes]]) -> ProposedBoxes:
        images = np.array([image for image, _ in entries], np.int64)
        counts = np.array([len(content.boxes) for _, content in entries], np.int64)
        boxes = np.array([box for _, content in entries for box in content.boxes], np.float64).reshape(-1, 4)
        scores = np.array([score for _, content in entries for score in content.scores], np.float64)
        no_label = [_NO_CATEGORY_ID]
        labels = [label for _, content in entries for label in content.labels or no_label * len(content.boxes)]
        return ProposedBoxes(
            image_ids=np.repeat(images, counts),
            boxes=boxes,
            scores=scores,
            has_score=np.ones(len(boxes), np.bool_),
            categories=self._categories(np.array(labels, np.int64)),
            entries=images,
        )

    def _categories(self, ids: Ints) -> Ints:
        return np.where(ids == _NO_CATEGORY_ID, NO_LABEL, self._index_of_id.find(ids))

    def _read_entry(self, key: Any, value: Any) -> ProposedBoxes:
        record = {"boxes": value} if isinstance(value, list) else parse.json_object(value)
        image = self._record_image_id(record) if key is None else self._image_id("", key)
        nested = next((record[name] for name in _NESTED_FIELDS if name in record), record)
        if not isinstance(nested, list):
            return self._read_lists(image, parse.json_object(nested), by_index="pred_instances" in record)
        self._set_box_format("xywh")
        results = [
            self._read_result({**parse.json_object(item), "file_name": None, "image_id": image}) for item in nested
        ]
        return self._columns_of_results(results, [image])

    def _read_lists(self, image: int, record: Mapping[str, Any], by_index: bool) -> ProposedBoxes:
        """One image's lists of boxes, scores and labels. `by_index`: a label is an index into the categories."""
        name = _first_present(record, _BOX_FIELDS)
        if name is None:
            raise FieldError(f" has no `boxes`; it has {', '.join(record) or 'nothing'}")
        boxes, scores = _boxes_and_scores(name, record[name])
        count, mode = len(boxes), record.get("bbox_mode") or 0  # detectron2.structures.BoxMode
        mode = parse.integer("bbox_mode", mode, 0, 1, "0 (x1, y1, x2, y2) or 1 (x, y, width, height)")
        self._set_box_format("xywh" if mode == 1 else "xyxy")
        if field := _first_present(record, _SCORE_FIELDS):
            values = _list_of(field, record[field], count)
            scores = np.array([parse.number(f"{field}[{at}]", value) for at, value in enumerate(values)], np.float64)
            if field == "objectness_logits":
                scores = _sigmoid(scores)
        labels = np.full(count, NO_LABEL)
        if field := _first_present(record, _LABEL_FIELDS):
            by_index |= name == "bboxes" or field == "pred_classes"
            labels = self._labels(_list_of(field, record[field], count), by_index)
        return ProposedBoxes(
            image_ids=np.full(count, image, np.int64),
            boxes=boxes,
            scores=np.ones(count) if scores is None else scores,
            has_score=np.full(count, scores is not None),
            categories=labels,
            entries=np.array([image], np.int64),
        )

    def _labels(self, labels: Sequence[Any], by_index: bool) -> Ints:
        integers = [parse.integer_or_none(label) for label in labels]
        numbers = np.array([_UNKNOWN_ID if integer is None else integer for integer in integers], np.int64)
        if by_index:
            return np.where((numbers >= 0) & (numbers < self._classes), numbers, UNKNOWN_LABEL)
        categories = self._index_of_id.find(numbers)
        for at, label in enumerate(labels):
            if categories[at] < 0 and isinstance(label, str):
                categories[at] = self._index_of_name.get(label, UNKNOWN_LABEL)
        return categories

    def _read_result(self, value: Any) -> _CocoResult:
        record = parse.json_object(value)
        label = record.get("category_id")
        number = parse.integer_or_none(label)
        category = number if number is not None else _NO_CATEGORY_ID if label is None else _UNKNOWN_ID
        score = parse.number("score", record["score"]) if "score" in record else msgspec.UNSET
        box = parse.box("bbox", parse.required(record, "bbox"), XYWH)
        return _CocoResult(self._record_image_id(record), box, score, category)

    def _columns_of_results(self, results: list[_CocoResult], entries: Sequence[int] = ()) -> ProposedBoxes:
        boxes, image_ids = boxes_of(results), column(results, "image_id", np.int64)
        if any(map(attrgetter("file_name"), results)):  # a file name identifies the image better than its id
            for at, result in enumerate(results):
                if result.file_name:
                    image_ids[at] = self._image_id("", result.file_name)
        scores = [result.score for result in results]
        has_score = np.ones(len(results), np.bool_)
        if msgspec.UNSET in scores:
            has_score = np.array([score is not msgspec.UNSET for score in scores])
            scores = [1.0 if score is msgspec.UNSET else score for score in scores]
        return ProposedBoxes(
            image_ids=image_ids,
            boxes=boxes,
            scores=np.array(scores, np.float64),
            has_score=has_score,
            categories=self._categories(column(results, "category_id", np.int64)),
            entries=np.array(entries, np.int64),
        )

    def _set_box_format(self, box_format: BoxFormat) -> None:
        """Raises FieldError if earlier boxes have another format."""
        if self.box_format not in (None, box_format):
            raise FieldError(
                f" has boxes as {box_format}, those before it are {self.box_format}; expected one format in a file"
            )
        self.box_format = box_format

    def _record_image_id(self, record: Mapping[str, Any]) -> int:
        for name in _IMAGE_FIELDS:
            if record.get(name) is not None:
                return self._image_id(name, record[name])
        raise FieldError(" has no `image_id`")

    def _image_id(self, field: str, value: Any) -> int:
        if isinstance(value, str) and not _PLAIN_ID.fullmatch(value):
            image = parse.id_of_name(value)  # "000139" and "139.0" may be file names
        else:
            image = parse.image_id(field, value)
        if image >= parse.FIRST_NAME_ID and image != value:
            self.names[image] = str(value)
        return image


def _first_present(record: Mapping[str, Any], names: Sequence[str]) -> str | None:
    """The first of these fields that the record has with a value other than null."""
    return next((name for name in names if record.get(name) is not None), None)


def _list_of(name: str, value: Any, count: int) -> list[Any]:
    if not isinstance(value, list) or len(value) != count:
        actual = f"has {len(value)} entries" if isinstance(value, list) else f"is {parse.shorten(value)}"
        raise FieldError(f".{name} {actual}, expected a list with one entry for each of the {count} boxes")
    return value


def _boxes_and_scores(name: str, value: Any) -> tuple[Floats, Floats | None]:
    """float64 (n, 4), and the scores (n,) if each box has a fifth number."""
    if not isinstance(value, list):
        raise parse.wrong_value(name, value, f"a list of boxes, {_XYXY}")
    try:
        boxes = np.array(value, np.float64)
    except (TypeError, ValueError, OverflowError):
        boxes = np.zeros(0)
    if boxes.ndim != 2 or boxes.shape[1] not in (4, 5):  # empty, ragged, nested, or not numbers
        rows = [parse.box_numbers(f"{name}[{at}]", row, _XYXY, most=5) for at, row in enumerate(value)]
        if len({len(row) for row in rows}) > 1:
            raise FieldError(f".{name} has boxes of 4 numbers and boxes of 5, expected the same for all")
        boxes = np.array(rows, np.float64).reshape(len(rows), -1) if rows else np.zeros((0, 4))
    return boxes[:, :4], boxes[:, 4] if boxes.shape[1] == 5 else None


def _sigmoid(logits: Floats) -> Floats:
    with np.errstate(over="ignore"):
        return np.asarray(1 / (1 + np.exp(-logits)))
