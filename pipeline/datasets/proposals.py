"""Replace the annotated regions of a split by a detector's boxes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath

import numpy as np

from regionspot.cache.format.manifest import NO_CATEGORY, Manifest
from regionspot.pipeline.datasets.coco import xyxy
from regionspot.pipeline.datasets.detector_formats import NO_LABEL, UNKNOWN_LABEL, ProposalReader, ProposedBoxes
from regionspot.pipeline.datasets.failure_limit import EXTRACTION_LIMIT, FailureLimit, SkippedRecords
from regionspot.pipeline.datasets.field_parsing import integer_or_none
from regionspot.pipeline.datasets.json_stream import AnnotationFile
from regionspot.pipeline.datasets.region_table import Ints, Lookup, RegionTable

GROUND_TRUTH = "gt"  # instead of a proposals file: the annotated boxes
_CHUNK = 100_000  # boxes that are clipped together
_MAX_NAMED = 3  # unknown images that a message names
_MAX_SCORE = 1.001  # a softmax in float16 may round to a little over 1


def with_boxes(manifest: Manifest, boxes: str | Path, max_failures: FailureLimit = EXTRACTION_LIMIT) -> Manifest:
    """The manifest itself for "gt", else the manifest with the boxes of a proposals file."""
    if boxes == GROUND_TRUTH:
        return manifest
    # Minival is a subset of val, and detectors write one file for val.
    return read_proposals(Path(boxes), manifest, max_failures, allow_unknown=manifest.split == "minival")


def read_proposals(
    path: Path, manifest: Manifest, max_failures: FailureLimit = EXTRACTION_LIMIT, allow_unknown: bool = False
) -> Manifest:
    """The images of `manifest` with the detector's boxes as regions, in the file's order.

    The file may have any format in detector_formats.py; scores are set if the file has any. An unknown label becomes
    NO_CATEGORY. Images without proposals keep no region. Up to `max_failures` of the records may be unreadable, and of
    the file's images may be missing in the manifest; they are left out. All these are counted in the report.
    `allow_unknown`: any number of the file's images may be missing in the manifest.

    Raises AnnotationError for any other file.
    """
    file = AnnotationFile(Path(path))
    skipped = SkippedRecords(file.path, max_failures)
    reader = ProposalReader(file, manifest.categories, manifest.image_ids, skipped)
    proposals = reader.read()
    images = np.unique(proposals.entries if len(proposals.entries) else proposals.image_ids)
    rows = _rows(images, reader.names, manifest)
    _check_unknown(file, manifest, images[rows < 0], len(images), reader.names, None if allow_unknown else max_failures)
    _check_scores(file, proposals)
    lookup = Lookup(images)
    row_of_box, row_of_entry = rows[lookup.find(proposals.image_ids)], rows[lookup.find(proposals.entries)]
    known = row_of_box >= 0
    labels = proposals.categories[known]
    without_score = int((~proposals.has_score[known]).sum())
    counts = {
        "unknown_images": int((rows < 0).sum()),
        "repeated_images": int((row_of_entry >= 0).sum() - len(np.unique(row_of_entry[row_of_entry >= 0]))),
        "unknown_labels": int((labels == UNKNOWN_LABEL).sum()),
        "boxes_without_score": without_score if without_score < len(labels) else 0,
        "images_without_proposals": len(manifest) - len(np.unique(row_of_box[known])),
    }
    source = {**manifest.source, "files": {**manifest.source.get("files", {}), **file.source["files"]}}
    report = {**skipped.report, **{name: count for name, count in counts.items() if count}}
    remarks = (*manifest.remarks, *skipped.remarks, *_remarks(file, reader, counts, manifest))
    box_format = reader.box_format or "xyxy"
    table = RegionTable(replace(manifest, source=source, report=report, remarks=remarks), file.path, box_format)
    has_scores = bool(proposals.has_score.any())
    for start in range(0, len(known), _CHUNK):
        indices = start + np.flatnonzero(known[start : start + _CHUNK])
        boxes, scores, categories = proposals.boxes[indices], proposals.scores[indices], proposals.categories[indices]
        table.add(
            row_of_box[indices],
            xyxy(boxes) if box_format == "xywh" else boxes,
            np.where(categories == NO_LABEL, NO_CATEGORY, categories),
            scores=scores if has_scores else None,
            drop={"dropped_score_not_finite": ~np.isfinite(scores)},
            stated=boxes,
        )
    return table.finish()


def _rows(images: Ints, names: Mapping[int, str], manifest: Manifest) -> Ints:
    """int64 (len(images),): the row of each image, -1 if it is not in the manifest.

    A name is looked up among paths, file names and file stems, then as a number among the ids. Plain numbers are image
    ids or numbers in file names (Ultralytics), whichever gives more matches; never both, because a mixture could
    confuse two images.
    """
    ids = Lookup(manifest.image_ids)
    rows = ids.find(images)
    if (rows >= 0).all():
        return rows
    row_of_name = _row_of_name(manifest)
    named = np.array([image in names for image in images.tolist()], np.bool_)
    for index in np.flatnonzero(named & (rows < 0)).tolist():
        name = names[int(images[index])].replace("\\", "/")
        row = row_of_name.get(name, row_of_name.get(name.rpartition("/")[2]))
        number = integer_or_none(name)
        rows[index] = row if row is not None else -1 if number is None else ids.find(np.array([number]))[0]
    plain = np.flatnonzero(~named)
    if (rows[plain] < 0).any():
        row_of_number = {
            number: row for name, row in row_of_name.items() if (number := integer_or_none(name)) is not None
        }
        by_file_name = np.array([row_of_number.get(image, -1) for image in images[plain].tolist()], np.int64)
        if (by_file_name >= 0).sum() > (rows[plain] >= 0).sum():
            rows[plain] = by_file_name
    return rows


def _row_of_name(manifest: Manifest) -> dict[str, int]:
    """Rows by path, file name and file stem, each only if it is unique."""
    paths = manifest.paths.tolist()
    files = [path.rpartition("/")[2] for path in paths]
    rows: dict[str, int] = {}
    for names in (paths, files, [PurePosixPath(file).stem for file in files]):
        counts = Counter(names)
        for row, name in enumerate(names):
            if counts[name] == 1:
                rows.setdefault(name, row)
    return rows


def _check_unknown(
    file: AnnotationFile,
    manifest: Manifest,
    unknown: Ints,
    total: int,
    names: Mapping[int, str],
    limit: FailureLimit | None,
) -> None:
    """Raises AnnotationError if more images than `limit` allows are unknown; None: any number may be."""
    if not len(unknown) or limit is None or limit.allows(len(unknown), total):
        return
    examples = ", ".join(names.get(image, str(image)) for image in unknown[:_MAX_NAMED].tolist())
    more = ", ..." if len(unknown) > _MAX_NAMED else ""
    raise file.error(
        f"{len(unknown):,} of its {total:,} images are not in {manifest.dataset} {manifest.split} ({examples}{more}), "
        f"more than --max-failures {limit} allows; use the proposals of this split, or allow more to leave them out"
    )


def _check_scores(file: AnnotationFile, proposals: ProposedBoxes) -> None:
    """Raises AnnotationError if scores are not probabilities: evaluation multiplies them by class probabilities."""
    scores = proposals.scores[np.isfinite(proposals.scores)]
    lowest, highest = (float(scores.min()), float(scores.max())) if len(scores) else (0.0, 0.0)
    if lowest < 0 or highest > _MAX_SCORE:
        hint = "logits? apply a sigmoid" if lowest < 0 or highest > 100 else "per cent? divide them by 100"
        raise file.error(f"its scores are from {lowest:.4g} to {highest:.4g}, expected 0 to 1 ({hint})")


def _remarks(file: AnnotationFile, reader: ProposalReader, counts: Mapping[str, int], manifest: Manifest) -> list[str]:
    remarks = []
    if reader.by_index:
        remarks.append("has no image ids; images are assumed to be in the order of the annotation file")
    if count := counts["repeated_images"]:
        remarks.append(f"{count:,} entries repeat an image; their boxes are added")
    if count := counts["unknown_labels"]:
        ids = [category.id for category in manifest.categories]
        remarks.append(f"{count:,} labels are not category ids of the dataset, which are from {min(ids)} to {max(ids)}")
    if count := counts["boxes_without_score"]:
        remarks.append(f"{count:,} boxes have no score, which counts as 1; other boxes have one")
    return [f"{file.path}: {line}" for line in remarks]
