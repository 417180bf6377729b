"""The results format of COCO and LVIS, written and read as a stream: LVIS val has six million detections.

A JSON list of {"image_id", "category_id", "score", "bbox" (XYWH in pixels)}, with masks also "segmentation":
{"size": [height, width], "counts": COCO's run-length text}.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import hotcoco
import msgspec
import numpy as np

from regionspot.cache.errors import InputError
from regionspot.cache.storage.atomic_files import partial_path
from regionspot.evaluation.metrics.detections import Detections, Masks, concatenate
from regionspot.evaluation.metrics.ground_truth import run_length_pixels
from regionspot.pipeline.datasets import field_parsing as parse
from regionspot.pipeline.datasets.coco import XYWH, Number
from regionspot.pipeline.datasets.coco_image_table import Id
from regionspot.pipeline.datasets.failure_limit import FailureLimit, SkippedRecords
from regionspot.pipeline.datasets.field_parsing import FieldError
from regionspot.pipeline.datasets.json_stream import AnnotationFile, Slice

ROWS = 100_000  # written at a time


class _Mask(msgspec.Struct, gc=False):
    size: tuple[int, int]  # height, width
    counts: str


class _Result(msgspec.Struct, omit_defaults=True, gc=False):
    image_id: Id | str
    category_id: Id
    score: Number
    bbox: tuple[Number, Number, Number, Number] | None = None
    segmentation: _Mask | None = None


def write_results_json(path: Path, detections: Detections, image_names: Mapping[int, str] | None = None) -> None:
    """Write the detections, one per line; float32 scores as float64, so that readers get the same value.

    `image_names`: ids that are strings in the annotations, by the integer that replaces them. Raises InputError for
    scores or boxes that are not finite, which JSON does not allow.
    """
    if not (np.isfinite(detections.scores).all() and np.isfinite(detections.boxes_xywh).all()):
        raise InputError(f"{path}: not written, because scores or boxes of the detections are not finite")
    names, masks, encode = image_names or {}, detections.masks, msgspec.json.Encoder().encode
    partial = partial_path(path)
    with partial.open("wb") as file:
        file.write(b"[")
        for start in range(0, len(detections), ROWS):
            rows = detections.take(np.arange(start, min(start + ROWS, len(detections))))
            encoded = {} if masks is None else {region: _mask(masks, region) for region in set(rows.regions.tolist())}
            columns = (rows.image_ids, rows.category_ids, rows.scores, rows.boxes_xywh, rows.regions)
            lines = [
                encode(_Result(names.get(image, image), category, score, tuple(box), encoded.get(region)))
                for image, category, score, box, region in zip(*(each.tolist() for each in columns), strict=True)
            ]
            file.write((b",\n" if start else b"\n") + b",\n".join(lines))
        file.write(b"\n]\n")
    partial.replace(path)


def _mask(masks: Masks, region: int) -> _Mask:
    mask = masks[region]
    return _Mask(tuple(mask["size"]), mask["counts"].decode("ascii"))


def read_results_json(path: Path) -> Detections:
    """The detections of a results file, in its order; without "bbox", a box is that of the mask.

    Image ids that are names become the integers that `read_ground_truth` gives. Raises AnnotationError if any record
    lacks a field or has an invalid one, and if only some of the records have masks.
    """
    file = AnnotationFile(Path(path))
    if not file.is_list:
        raise file.error("is not a list, expected detections in COCO's results format")
    skipped = SkippedRecords(file.path, FailureLimit(count=0))
    parts: list[Detections] = []
    with_masks = False
    for part in file.slices("detections", file.decode(msgspec.Raw), _Result, _read_result, skipped):
        if part.items and not parts:
            with_masks = part.items[0].segmentation is not None
        parts.append(_columns(part, with_masks, skipped))
        skipped.add_usable("detections", len(parts[-1]))
    skipped.check("detections")
    return concatenate(parts)


def _read_result(record: Any) -> _Result:
    """A record whose types are not those of `_Result`, such as numbers written as text."""
    record = parse.json_object(record)
    box, mask = record.get("bbox"), record.get("segmentation")
    if mask is not None:
        if not isinstance(mask, dict):
            raise parse.wrong_value("segmentation", mask, "run lengths, an object with `size` and `counts`")
        counts = parse.text("segmentation.counts", parse.required(mask, "counts"))
        size = parse.required(mask, "size")
        if not isinstance(size, list) or len(size) != 2:
            raise parse.wrong_value("segmentation.size", size, "height and width")
        mask = _Mask((parse.integer("size[0]", size[0]), parse.integer("size[1]", size[1])), counts)
    return _Result(
        parse.image_id("image_id", parse.required(record, "image_id")),
        parse.integer("category_id", parse.required(record, "category_id")),
        parse.number("score", parse.required(record, "score")),
        None if box is None else parse.box("bbox", box, XYWH),
        mask,
    )


def _columns(part: Slice[_Result], with_masks: bool, skipped: SkippedRecords) -> Detections:
    """The columns of the valid records; the others are added to `skipped`."""
    results: list[_Result] = []
    masks: dict[tuple[int | str, str], int] = {}  # by image and run lengths, because many detections share a mask
    sizes: list[tuple[int, int]] = []
    regions: list[int] = []
    for index, result in zip(part.indices, part.items, strict=True):
        try:
            _check(result, with_masks)
            mask = result.segmentation
            if mask is not None and (result.image_id, mask.counts) not in masks:
                if run_length_pixels(mask.counts) != math.prod(mask.size):
                    expected = f"runs of {math.prod(mask.size)} pixels in all"
                    raise parse.wrong_value("segmentation.counts", mask.counts, expected)
                masks[result.image_id, mask.counts] = len(masks)
                sizes.append(mask.size)
        except FieldError as error:
            skipped.add("detections", f"detections[{index}]{error}")
            continue
        results.append(result)
        regions.append(index if mask is None else masks[result.image_id, mask.counts])
    counts = [text.encode() for _, text in masks]
    encoded = Masks(
        np.array(sizes, np.int32).reshape(-1, 2),
        np.cumsum([0, *map(len, counts)], dtype=np.int64),
        np.frombuffer(b"".join(counts), np.uint8),
    )
    ids = [each.image_id if isinstance(each.image_id, int) else parse.image_id("", each.image_id) for each in results]
    boxes = [each.bbox or hotcoco.mask.to_bbox(encoded[region]) for each, region in zip(results, regions, strict=True)]
    return Detections(
        np.array(ids, np.int64),
        np.array([each.category_id for each in results], np.int64),
        np.array(boxes, np.float64).reshape(-1, 4),
        np.array([each.score for each in results], np.float32),
        np.array(regions, np.int64),
        encoded if masks else None,
    )


def _check(result: _Result, with_masks: bool) -> None:
    if result.score is None or not math.isfinite(result.score):
        raise parse.wrong_value("score", result.score, "a finite number")
    if result.bbox is None and result.segmentation is None:
        raise FieldError(" has no `bbox`")
    if (result.segmentation is not None) != with_masks:
        raise FieldError(f" has {'no' if with_masks else 'a'} `segmentation`, unlike the records before it")
    finite = [number for number in result.bbox or (0, 0, 0, 0) if number is not None and math.isfinite(number)]
    if len(finite) < 4 or min(finite[2:]) < 0:
        raise parse.wrong_value("bbox", result.bbox, f"{XYWH}, finite and without a negative size")
