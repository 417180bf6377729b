"""The forms in which detectors write their boxes, all read into the same columns.

    {"139": {"boxes": [[x1, y1, x2, y2], ...], "scores": [...], "labels": [...]}}         by image
    [{"image_id": 139, "bbox": [x, y, width, height], "score": 0.9, "category_id": 1}]    COCO, LVIS, Ultralytics
    {"ids": [139], "boxes": [[[x1, y1, x2, y2], ...]], "objectness_logits": [[...]]}      Detectron2: proposals
    [{"image_id": 139, "instances": [{"bbox": ..., ...}]}]                                Detectron2: predictions
    [{"img_id": 139, "pred_instances": {"bboxes": ..., "scores": ..., "labels": ...}}]    MMDetection 3
    [[[[x1, y1, x2, y2, score], ...], ... a list a class], ... a list an image]           MMDetection before 3

Boxes are in pixels of the original image. An image is named by its id, its path or its file's name, with or without the
ending; in the last form by its place. Scores and labels may be left out. A label is a category id or a category's name;
in Detectron2's `pred_classes` and MMDetection's forms it is a place among the categories.
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

NO_LABEL, UNKNOWN_LABEL = -2, -1  # in place of a category index
_NO_CATEGORY_ID, _UNKNOWN_ID = 2**63 - 1, -(2**63)  # in place of a category id; no dataset's
_XYXY = "4 numbers: x1, y1, x2, y2, or 5 with the score"
_PLAIN_ID = re.compile("0|-?[1-9][0-9]{0,17}")
_ENTRIES_AT_ONCE = 1000  # made into columns together
_NAMING = ("file_name", "img_path", "image_id", "img_id")  # the first that is there names the image
_NESTED = ("instances", "pred_instances", "proposals")
_BOXES = ("boxes", "bboxes", "pred_boxes", "proposal_boxes")
_SCORES = ("scores", "objectness_logits")
_LABELS = ("labels", "pred_classes")
ImageEntry: TypeAlias = tuple[
    str, Any, Any
]  # an image's place for messages, what names it (None: a field of it), and it


@dataclass(frozen=True)
class ProposedBoxes:
    """M boxes as columns.

    image_ids   int64 (M,)      the image's id, or what `id_of_name` makes of its name
    boxes       float64 (M, 4)  as they stand in the file
    scores      float64 (M,)    NaN where null, 1 where there is none
    scored      bool (M,)       whether there is a score
    categories  int64 (M,)      category index, UNKNOWN_LABEL or NO_LABEL
    entries     int64           image id of every entry that is about one image, be it without a box
    """

    image_ids: Ints
    boxes: Floats
    scores: Floats
    scored: Bools
    categories: Ints
    entries: Ints

    @classmethod
    def joined(cls, pieces: Sequence[ProposedBoxes]) -> ProposedBoxes:
        if not pieces:
            none = np.zeros(0, np.int64)
            return cls(none, np.zeros((0, 4)), np.zeros(0), np.zeros(0, np.bool_), none, none)
        return cls(*(np.concatenate([getattr(piece, each.name) for piece in pieces]) for each in fields(cls)))


class _Result(msgspec.Struct, gc=False):
    image_id: Id
    bbox: tuple[Number, Number, Number, Number]  # x, y, width, height
    score: Number | msgspec.UnsetType = msgspec.UNSET
    category_id: Id = _NO_CATEGORY_ID
    file_name: str | None = None


class _OfImage(msgspec.Struct, gc=False):
    boxes: list[tuple[Number, Number, Number, Number]]  # x1, y1, x2, y2
    scores: list[Number]
    labels: list[Id] | None = None


class ProposalReader:
    """Reads the boxes of one file, for images whose ids (N,) are `image_ids` in the dataset's order.

    names     of images that the file does not give as plain numbers, by what stands for them in `image_ids`
    form      how its boxes are written; None before there is one
    by_place  images are known by their place alone
    """

    def __init__(
        self, file: AnnotationFile, categories: Sequence[Category], image_ids: Ints, skipped: SkippedRecords
    ) -> None:
        self._file, self._image_ids, self._skipped = file, image_ids, skipped
        self._classes = len(categories)
        self._index_of_id = Lookup(np.array([category.id for category in categories], np.int64))
        self._index_of_name = {category.name: index for index, category in reversed(list(enumerate(categories)))}
        self._plain = msgspec.json.Decoder(_OfImage)
        self.names: dict[int, str] = {}
        self.form: BoxFormat | None = None
        self.by_place = False

    def read(self) -> ProposedBoxes:
        """Raises AnnotationError for what is none of the forms, or has too many records that cannot be read."""
        if not self._file.is_list:
            boxes = self._read_entries(self._entries_of_object())
        else:
            raw = self._file.decode(msgspec.Raw)
            first = self._file.first_item(raw)
            if isinstance(first, list):
                boxes = self._read_entries(self._entries_by_place())
            elif isinstance(first, dict) and "bbox" not in first and first.keys() & {*_NESTED, *_BOXES}:
                listed = self._file.decode(list[msgspec.Raw])
                boxes = self._read_entries((f"[{place}]", None, each) for place, each in enumerate(listed))
            else:
                self._use("xywh")
                slices = self._file.slices("", raw, _Result, self._read_result, self._skipped)
                pieces = [self._of_results(piece.items) for piece in slices]
                self._skipped.add_usable("records", sum(len(piece.image_ids) for piece in pieces))
                boxes = ProposedBoxes.joined(pieces)
        self._skipped.check("records")
        return boxes

    def _entries_of_object(self) -> Iterable[ImageEntry]:
        pairs = self._file.pairs()
        keys = {key for key, _ in pairs}
        if {"images", "annotations"} <= keys:
            raise self._file.refuse("holds annotations, not a detector's boxes; name it by --annotations")
        if "boxes" in keys and keys & {"ids", "indexes"}:
            return self._entries_of_detectron2()
        return ((f'["{key}"]', key, raw) for key, raw in pairs)

    def _entries_of_detectron2(self) -> Iterable[ImageEntry]:
        """A list of images, and for each image a list of boxes and one of scores."""
        lists = self._file.decode(dict[str, Any])
        ids: Any = lists.get("ids", lists.get("indexes"))
        columns = {name: lists[name] for name in ("boxes", *_SCORES) if name in lists}
        for name, listed in {"ids": ids, **columns}.items():
            if not isinstance(listed, list) or len(listed) != len(ids):
                raise self._file.refuse(f"`{name}` is no list with one entry for each of `ids`")
        for place, image in enumerate(ids):
            record = {name: listed[place] for name, listed in columns.items()}
            yield f".boxes[{place}]", image, {**record, "bbox_mode": lists.get("bbox_mode")}

    def _entries_by_place(self) -> Iterable[ImageEntry]:
        """MMDetection's lists: of each image its boxes, or those of each class."""
        images = self._file.decode(list[Any])
        if len(images) != len(self._image_ids):
            raise self._file.refuse(
                f"holds boxes of {len(images):,} images by their place, the dataset has {len(self._image_ids):,} images"
            )
        self.by_place = True
        for place, (image, boxes) in enumerate(zip(self._image_ids.tolist(), images, strict=True)):
            if not isinstance(boxes, list) or not all(isinstance(each, list) for each in boxes):
                raise self._file.refuse(f"[{place}] is {parse.shorten(boxes)}, expected the boxes of an image")
            record = {"boxes": boxes}
            if any(not each or isinstance(each[0], list) for each in boxes):  # a list for each class
                record = {
                    "boxes": [box for of_class in boxes for box in of_class],
                    "pred_classes": [index for index, of_class in enumerate(boxes) for _ in of_class],
                }
            yield f"[{place}]", image, record

    def _read_entries(self, entries: Iterable[ImageEntry]) -> ProposedBoxes:
        """Decoded one by one, and made into columns some at a time, so that objects do not pile up."""
        pieces: list[ProposedBoxes] = []
        plain: list[tuple[int, _OfImage]] = []
        for place, key, value in entries:
            try:
                if of_image := self._plain_entry(key, value):
                    self._use("xyxy")
                    plain.append((self._image("", key), of_image))
                    if len(plain) < _ENTRIES_AT_ONCE:
                        continue
                pieces.append(self._of_plain(plain))
                plain.clear()
                if not of_image:
                    content = self._file.decode_part(value) if isinstance(value, msgspec.Raw) else value
                    pieces.append(self._read_entry(key, content))
            except FieldError as error:
                self._skipped.add("records", f"{place}{error}")
        pieces.append(self._of_plain(plain))
        self._skipped.add_usable("records", sum(len(piece.entries) for piece in pieces))
        return ProposedBoxes.joined(pieces)

    def _plain_entry(self, key: Any, value: Any) -> _OfImage | None:
        """An image's boxes in the form that nearly all files have; None for another one."""
        if key is None or not isinstance(value, msgspec.Raw):
            return None
        try:
            of_image = self._plain.decode(value)
        except msgspec.ValidationError:
            return None
        lengths = {len(of_image.boxes), len(of_image.scores), len(of_image.labels or of_image.boxes)}
        return of_image if len(lengths) == 1 else None

    def _of_plain(self, entries: Sequence[tuple[int, _OfImage]]) -> ProposedBoxes:
        images = np.array([image for image, _ in entries], np.int64)
        counts = np.array([len(each.boxes) for _, each in entries], np.int64)
        stated = np.array([box for _, each in entries for box in each.boxes], np.float64).reshape(-1, 4)
        scores = np.array([score for _, each in entries for score in each.scores], np.float64)
        none = [_NO_CATEGORY_ID]
        labels = [label for _, each in entries for label in each.labels or none * len(each.boxes)]
        return ProposedBoxes(
            image_ids=np.repeat(images, counts),
            boxes=stated,
            scores=scores,
            scored=np.ones(len(stated), np.bool_),
            categories=self._categories(np.array(labels, np.int64)),
            entries=images,
        )

    def _categories(self, ids: Ints) -> Ints:
        return np.where(ids == _NO_CATEGORY_ID, NO_LABEL, self._index_of_id.find(ids))

    def _read_entry(self, key: Any, value: Any) -> ProposedBoxes:
        record = {"boxes": value} if isinstance(value, list) else parse.json_object(value)
        image = self._image_of(record) if key is None else self._image("", key)
        nested = next((record[name] for name in _NESTED if name in record), record)
        if not isinstance(nested, list):
            return self._of_image(image, parse.json_object(nested), by_class="pred_instances" in record)
        self._use("xywh")
        results = [
            self._read_result({**parse.json_object(each), "file_name": None, "image_id": image}) for each in nested
        ]
        return self._of_results(results, [image])

    def _of_image(self, image: int, record: Mapping[str, Any], by_class: bool) -> ProposedBoxes:
        """One image's boxes, scores and labels, a list of each. `by_class`: a label is a place among the categories."""
        name = _first(record, _BOXES)
        if name is None:
            raise FieldError(f" has no `boxes`; it has {', '.join(record) or 'nothing'}")
        stated, scores = _boxes(name, record[name])
        count, mode = len(stated), record.get("bbox_mode") or 0  # detectron2.structures.BoxMode
        mode = parse.integer("bbox_mode", mode, 0, 1, "0 (x1, y1, x2, y2) or 1 (x, y, width, height)")
        self._use("xywh" if mode == 1 else "xyxy")
        if field := _first(record, _SCORES):
            listed = _list_of(field, record[field], count)
            scores = np.array([parse.number(f"{field}[{at}]", each) for at, each in enumerate(listed)], np.float64)
            if field == "objectness_logits":
                scores = _sigmoid(scores)
        labels = np.full(count, NO_LABEL)
        if field := _first(record, _LABELS):
            by_class |= name == "bboxes" or field == "pred_classes"
            labels = self._labels(_list_of(field, record[field], count), by_class)
        return ProposedBoxes(
            image_ids=np.full(count, image, np.int64),
            boxes=stated,
            scores=np.ones(count) if scores is None else scores,
            scored=np.full(count, scores is not None),
            categories=labels,
            entries=np.array([image], np.int64),
        )

    def _labels(self, labels: Sequence[Any], by_class: bool) -> Ints:
        whole = [parse.integer_or_none(each) for each in labels]
        numbers = np.array([_UNKNOWN_ID if each is None else each for each in whole], np.int64)
        if by_class:
            return np.where((numbers >= 0) & (numbers < self._classes), numbers, UNKNOWN_LABEL)
        found = self._index_of_id.find(numbers)
        for at, label in enumerate(labels):
            if found[at] < 0 and isinstance(label, str):
                found[at] = self._index_of_name.get(label, UNKNOWN_LABEL)
        return found

    def _read_result(self, value: Any) -> _Result:
        record = parse.json_object(value)
        label = record.get("category_id")
        number = parse.integer_or_none(label)
        category = number if number is not None else _NO_CATEGORY_ID if label is None else _UNKNOWN_ID
        score = parse.number("score", record["score"]) if "score" in record else msgspec.UNSET
        return _Result(self._image_of(record), parse.box("bbox", parse.required(record, "bbox"), XYWH), score, category)

    def _of_results(self, results: list[_Result], entries: Sequence[int] = ()) -> ProposedBoxes:
        stated, image_ids = boxes_of(results), column(results, "image_id", np.int64)
        if any(map(attrgetter("file_name"), results)):  # it names the image better than what stands for an id there
            for at, result in enumerate(results):
                if result.file_name:
                    image_ids[at] = self._image("", result.file_name)
        scores = [result.score for result in results]
        scored = np.ones(len(results), np.bool_)
        if msgspec.UNSET in scores:
            scored = np.array([score is not msgspec.UNSET for score in scores])
            scores = [1.0 if score is msgspec.UNSET else score for score in scores]
        return ProposedBoxes(
            image_ids=image_ids,
            boxes=stated,
            scores=np.array(scores, np.float64),
            scored=scored,
            categories=self._categories(column(results, "category_id", np.int64)),
            entries=np.array(entries, np.int64),
        )

    def _use(self, form: BoxFormat) -> None:
        """Raises FieldError where boxes before these were written in another form."""
        if self.form not in (None, form):
            raise FieldError(f" has boxes as {form}, those before it are {self.form}; expected one form in a file")
        self.form = form

    def _image_of(self, record: Mapping[str, Any]) -> int:
        for name in _NAMING:
            if record.get(name) is not None:
                return self._image(name, record[name])
        raise FieldError(" has no `image_id`")

    def _image(self, field: str, stated: Any) -> int:
        """What stands for an image in the columns."""
        if isinstance(stated, str) and not _PLAIN_ID.fullmatch(stated):
            image = parse.id_of_name(stated)  # "000139" and "139.0" may be files' names as well as numbers
        else:
            image = parse.image_id(field, stated)
        if image >= parse.FIRST_NAME_ID and image != stated:
            self.names[image] = str(stated)
        return image


def _first(record: Mapping[str, Any], names: Sequence[str]) -> str | None:
    """The first of these fields that the record has, and not as null."""
    return next((name for name in names if record.get(name) is not None), None)


def _list_of(name: str, value: Any, count: int) -> list[Any]:
    if not isinstance(value, list) or len(value) != count:
        found = f"has {len(value)} entries" if isinstance(value, list) else f"is {parse.shorten(value)}"
        raise FieldError(f".{name} {found}, expected a list with one entry for each of the {count} boxes")
    return value


def _boxes(name: str, value: Any) -> tuple[Floats, Floats | None]:
    """float64 (n, 4), and the scores (n,) where each box has its own as a fifth number."""
    if not isinstance(value, list):
        raise parse.wrong_value(name, value, f"a list of boxes, {_XYXY}")
    try:
        boxes = np.array(value, np.float64)
    except (TypeError, ValueError, OverflowError):
        boxes = np.zeros(0)
    if boxes.ndim != 2 or boxes.shape[1] not in (4, 5):  # none, ragged, nested, or something else than numbers
        rows = [parse.box_numbers(f"{name}[{at}]", each, _XYXY, most=5) for at, each in enumerate(value)]
        if len({len(row) for row in rows}) > 1:
            raise FieldError(f".{name} has boxes of 4 numbers and boxes of 5, expected all of one kind")
        boxes = np.array(rows, np.float64).reshape(len(rows), -1) if rows else np.zeros((0, 4))
    return boxes[:, :4], boxes[:, 4] if boxes.shape[1] == 5 else None


def _sigmoid(logits: Floats) -> Floats:
    with np.errstate(over="ignore"):
        return np.asarray(1 / (1 + np.exp(-logits)))
