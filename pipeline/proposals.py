"""A detector's boxes in place of a split's own regions.

Two forms are read: `{image_id: {"boxes": XYXY, "scores", "labels"}}`, and the list of results that detectors write for
COCO and LVIS, `[{"image_id", "bbox": XYWH, "score", "category_id"}]`. Both in pixels of the original picture; labels
are the dataset's category ids, and may be left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import numpy as np

from regionspot.cache.errors import AnnotationError
from regionspot.cache.manifest import NO_CATEGORY, Manifest
from regionspot.pipeline.annotation_file import AnnotationFile
from regionspot.pipeline.coco_form import Id, Number, boxes_of, column, xyxy
from regionspot.pipeline.columns import Floats, Ints, Lookup, RegionTable

GROUND_TRUTH = "gt"  # in place of a proposals file: the annotated boxes
_NAMED = 3  # unknown pictures that a message names
_NO_LABEL = 2**63 - 1  # no dataset's category id


class _Detections(msgspec.Struct):
    boxes: list[tuple[Number, Number, Number, Number]]
    scores: list[Number]
    labels: list[Id] | None = None


class _Result(msgspec.Struct, gc=False):
    image_id: Id
    bbox: tuple[Number, Number, Number, Number]
    score: Number
    category_id: Id = _NO_LABEL


@dataclass(frozen=True)
class _Boxes:
    """M boxes as columns, and every picture that the file speaks of, be it without a box."""

    image_ids: Ints  # (M,)
    boxes_xyxy: Floats  # (M, 4)
    scores: Floats  # (M,)
    labels: Ints  # (M,) category ids, _NO_LABEL where there is none
    pictures: Ints


def with_boxes(manifest: Manifest, boxes: str | Path) -> Manifest:
    """`manifest` itself for "gt", its ground truth, else with the boxes of the proposals file named."""
    if boxes == GROUND_TRUTH:
        return manifest
    # Minival is a part of val, and its boxes come in the file of all val.
    return read_proposals(Path(boxes), manifest, allow_unknown=manifest.split == "minival")


def read_proposals(path: Path, manifest: Manifest, allow_unknown: bool = False) -> Manifest:
    """The pictures of `manifest` with the detector's boxes as regions, scores set, in the file's order.

    A label that is no category id of the manifest gives NO_CATEGORY, counted. Pictures without proposals stay, with
    no region, counted. Proposals for pictures that the manifest does not hold are refused, unless `allow_unknown`
    leaves them out, counted: the proposals of a whole split with a part of it.

    Raises AnnotationError, one line, where the file is not what it should be.
    """
    file = AnnotationFile(Path(path))
    found = _read_results(file) if file.is_list else _read_by_picture(file)
    picture_of = Lookup(manifest.image_ids)
    unknown = found.pictures[picture_of.find(found.pictures) < 0]
    if len(unknown) and not allow_unknown:
        raise _unknown_pictures(file, manifest, unknown)
    rows = picture_of.find(found.image_ids)
    labels = Lookup(np.array([category.id for category in manifest.categories], np.int64)).find(found.labels)
    known = rows >= 0
    source = {**manifest.source, "files": {**manifest.source.get("files", {}), **file.source["files"]}}
    report = {
        "unknown_pictures": len(unknown),
        "unknown_labels": int(((labels == NO_CATEGORY) & (found.labels != _NO_LABEL) & known).sum()),
        "pictures_without_proposals": len(manifest) - len(np.unique(rows[known])),
    }
    report = {name: count for name, count in report.items() if count}
    table = RegionTable(replace(manifest, source=source, report=report))
    table.add(rows[known], found.boxes_xyxy[known], labels[known], scores=found.scores[known])
    return table.finish()


def _read_by_picture(file: AnnotationFile) -> _Boxes:
    """Each picture is decoded and turned into columns on its own, so that its objects do not pile up."""
    found = [_picture_boxes(file, key, raw) for key, raw in file.decode(dict[str, msgspec.Raw]).items()]
    return _joined(found)


def _picture_boxes(file: AnnotationFile, key: str, raw: msgspec.Raw) -> _Boxes:
    try:
        image_id, detections = np.int64(int(key)), msgspec.json.decode(raw, type=_Detections)
    except msgspec.ValidationError as error:
        raise file.refuse(f"picture {key}: {error}") from None
    except (ValueError, OverflowError):
        raise file.refuse(f"{key!r} is not an image id, which is a whole number of 64 bits") from None
    boxes, scores, labels = detections.boxes, detections.scores, detections.labels
    count = len(boxes)
    if len(scores) != count or (labels is not None and len(labels) != count):
        told = "" if labels is None else f", {len(labels)} labels"
        raise file.refuse(f"picture {key} has {count} boxes, {len(scores)} scores{told}; expected one of each a box")
    return _Boxes(
        np.full(count, image_id),
        np.array(boxes, np.float64).reshape(-1, 4),
        np.array(scores, np.float64),
        np.full(count, _NO_LABEL, np.int64) if labels is None else np.array(labels, np.int64),
        np.array([image_id]),
    )


def _read_results(file: AnnotationFile) -> _Boxes:
    return _joined([_result_boxes(results) for results in file.slices("", file.decode(msgspec.Raw), _Result)])


def _result_boxes(results: list[_Result]) -> _Boxes:
    image_ids = column(results, "image_id", np.int64)
    scores = np.array([result.score for result in results], np.float64)  # null becomes NaN
    return _Boxes(
        image_ids, xyxy(boxes_of(results)), scores, column(results, "category_id", np.int64), np.unique(image_ids)
    )


def _joined(pieces: Sequence[_Boxes]) -> _Boxes:
    none = np.zeros(0, np.int64)
    pieces = pieces or [_Boxes(none, np.zeros((0, 4)), np.zeros(0), none, none)]
    return _Boxes(
        np.concatenate([piece.image_ids for piece in pieces]),
        np.concatenate([piece.boxes_xyxy for piece in pieces]),
        np.concatenate([piece.scores for piece in pieces]),
        np.concatenate([piece.labels for piece in pieces]),
        np.unique(np.concatenate([piece.pictures for piece in pieces])),
    )


def _unknown_pictures(file: AnnotationFile, manifest: Manifest, unknown: Ints) -> AnnotationError:
    named = ", ".join(str(image_id) for image_id in unknown[:_NAMED])
    more = ", ..." if len(unknown) > _NAMED else ""
    return AnnotationError(
        f"{file.path}: {len(unknown)} of its pictures are not in {manifest.dataset} {manifest.split} ({named}{more}); "
        "take the proposals of this split, or allow unknown pictures to leave theirs out"
    )
