"""A detector's boxes in place of a split's own regions."""

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

GROUND_TRUTH = "gt"  # in place of a proposals file: the annotated boxes
_PIECE = 100_000  # boxes that are clipped together
_NAMED = 3  # unknown images that a message names
_MOST_SCORE = 1.001  # a softmax in float16 may round to a little over 1


def with_boxes(manifest: Manifest, boxes: str | Path, max_failures: FailureLimit = EXTRACTION_LIMIT) -> Manifest:
    """`manifest` itself for "gt", its ground truth, else with the boxes of the proposals file named."""
    if boxes == GROUND_TRUTH:
        return manifest
    # Minival is a part of val, and its boxes come in the file of all val.
    return read_proposals(Path(boxes), manifest, max_failures, allow_unknown=manifest.split == "minival")


def read_proposals(
    path: Path, manifest: Manifest, max_failures: FailureLimit = EXTRACTION_LIMIT, allow_unknown: bool = False
) -> Manifest:
    """The images of `manifest` with the detector's boxes as regions, in the file's order, in any form of
    proposal_forms.py; scores are set where the file has any.

    A label that is none of the manifest's categories gives NO_CATEGORY, counted. Images without proposals stay, with
    no region, counted. Of the records, and of the images that the file names, `max_failures` may be unreadable or
    not in the manifest; they are left out, counted. `allow_unknown`: any number of images may be unknown, for the
    proposals of a whole split are used with a part of it.

    Raises AnnotationError, one line, where the file is not what it should be.
    """
    file = AnnotationFile(Path(path))
    skipped = SkippedRecords(file.path, max_failures)
    reader = ProposalReader(file, manifest.categories, manifest.image_ids, skipped)
    found = reader.read()
    images = np.unique(found.entries if len(found.entries) else found.image_ids)
    rows = _rows(images, reader.names, manifest)
    _check_unknown(file, manifest, images[rows < 0], len(images), reader.names, None if allow_unknown else max_failures)
    _check_scores(file, found)
    place = Lookup(images)
    row_of_box, row_of_entry = rows[place.find(found.image_ids)], rows[place.find(found.entries)]
    known = row_of_box >= 0
    labels = found.categories[known]
    unscored = int((~found.scored[known]).sum())
    counts = {
        "unknown_images": int((rows < 0).sum()),
        "repeated_images": int((row_of_entry >= 0).sum() - len(np.unique(row_of_entry[row_of_entry >= 0]))),
        "unknown_labels": int((labels == UNKNOWN_LABEL).sum()),
        "boxes_without_score": unscored if unscored < len(labels) else 0,
        "images_without_proposals": len(manifest) - len(np.unique(row_of_box[known])),
    }
    source = {**manifest.source, "files": {**manifest.source.get("files", {}), **file.source["files"]}}
    report = {**skipped.report, **{name: count for name, count in counts.items() if count}}
    remarks = (*manifest.remarks, *skipped.remarks, *_remarks(file, reader, counts, manifest))
    form = reader.form or "xyxy"
    table = RegionTable(replace(manifest, source=source, report=report, remarks=remarks), file.path, form)
    has_scores = bool(found.scored.any())
    for start in range(0, len(known), _PIECE):
        use = start + np.flatnonzero(known[start : start + _PIECE])
        boxes, scores = found.boxes[use], found.scores[use]
        table.add(
            row_of_box[use],
            xyxy(boxes) if form == "xywh" else boxes,
            np.where(found.categories[use] == NO_LABEL, NO_CATEGORY, found.categories[use]),
            scores=scores if has_scores else None,
            drop={"dropped_score_not_finite": ~np.isfinite(scores)},
            stated=boxes,
        )
    return table.finish()


def _rows(images: Ints, names: Mapping[int, str], manifest: Manifest) -> Ints:
    """int64, as `images`: the row of each image, -1 where the manifest does not hold it.

    A name is looked for among paths, files' names and those without the ending, then as a number among the ids. Plain
    numbers are ids or, where more of them are numbers that files are called by (Ultralytics), those: all of them the
    one or the other, for a mixture would mistake one image for another.
    """
    ids = Lookup(manifest.image_ids)
    rows = ids.find(images)
    if (rows >= 0).all():
        return rows
    row_of_name = _row_of_name(manifest)
    named = np.array([image in names for image in images.tolist()], np.bool_)
    for at in np.flatnonzero(named & (rows < 0)).tolist():
        name = names[int(images[at])].replace("\\", "/")
        row = row_of_name.get(name, row_of_name.get(name.rpartition("/")[2]))
        number = integer_or_none(name)
        rows[at] = row if row is not None else -1 if number is None else ids.find(np.array([number]))[0]
    plain = np.flatnonzero(~named)
    if (rows[plain] < 0).any():
        row_of_number = {
            number: row for name, row in row_of_name.items() if (number := integer_or_none(name)) is not None
        }
        by_file = np.array([row_of_number.get(image, -1) for image in images[plain].tolist()], np.int64)
        if (by_file >= 0).sum() > (rows[plain] >= 0).sum():
            rows[plain] = by_file
    return rows


def _row_of_name(manifest: Manifest) -> dict[str, int]:
    """Rows by path, by file's name and by that without its ending, where only one image has it."""
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
    """Raises AnnotationError where the file is about more other images than `limit` allows; None: any number."""
    if not len(unknown) or limit is None or limit.allows(len(unknown), total):
        return
    named = ", ".join(names.get(image, str(image)) for image in unknown[:_NAMED].tolist())
    more = ", ..." if len(unknown) > _NAMED else ""
    raise file.refuse(
        f"{len(unknown):,} of its {total:,} images are not in {manifest.dataset} {manifest.split} ({named}{more}), "
        f"more than --max-failures {limit} allows; take the proposals of this split, or leave them out by allowing more"
    )


def _check_scores(file: AnnotationFile, found: ProposedBoxes) -> None:
    """Raises AnnotationError for scores that are no probabilities: they are multiplied with those of the classes."""
    scores = found.scores[np.isfinite(found.scores)]
    least, most = (float(scores.min()), float(scores.max())) if len(scores) else (0.0, 0.0)
    if least < 0 or most > _MOST_SCORE:
        guess = "logits? take their sigmoid" if least < 0 or most > 100 else "per cent? divide them by 100"
        raise file.refuse(f"its scores reach from {least:.4g} to {most:.4g}, expected 0 to 1 ({guess})")


def _remarks(file: AnnotationFile, reader: ProposalReader, counts: Mapping[str, int], manifest: Manifest) -> list[str]:
    told = []
    if reader.by_place:
        told.append("images are taken to be in the order of the annotation file, for the boxes name none")
    if count := counts["repeated_images"]:
        told.append(f"{count:,} entries are of images that had one before; their boxes are added")
    if count := counts["unknown_labels"]:
        ids = [category.id for category in manifest.categories]
        told.append(f"{count:,} labels are none of the dataset's category ids, which go from {min(ids)} to {max(ids)}")
    if count := counts["boxes_without_score"]:
        told.append(f"{count:,} boxes have no score and count as 1, others have one")
    return [f"{file.path}: {line}" for line in told]
