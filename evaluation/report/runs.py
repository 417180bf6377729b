"""Evaluations that are done: their results and detections, and the dataset split that they are of."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from regionspot.cache.errors import InputError
from regionspot.cache.format.manifest import Manifest
from regionspot.evaluation.metrics.analysis import Matches
from regionspot.evaluation.metrics.average_precision import IouType
from regionspot.evaluation.metrics.detections import Detections
from regionspot.evaluation.metrics.ground_truth import GroundTruth, read_ground_truth
from regionspot.evaluation.metrics.results_file import read_results_json
from regionspot.evaluation.report.results import CLASSES, DETECTIONS, RESULTS
from regionspot.pipeline.datasets.registry import annotation_file_of, image_folder_of, read_split


@dataclass(frozen=True, eq=False)
class Run:
    """A folder of results.

    results   content of results.json
    classes   rows of classes.csv, as text
    """

    folder: Path
    results: dict[str, Any]
    classes: list[dict[str, str]]

    @cached_property
    def detections(self) -> Detections:
        return read_results_json(self.folder / DETECTIONS)

    @property
    def iou_types(self) -> list[IouType]:
        return [iou_type for iou_type in get_args(IouType) if self.results[iou_type]]

    @property
    def is_lvis(self) -> bool:
        """Whether AP was computed as in LVIS, by its federated annotations; else as in COCO."""
        return "APr" in self.results["bbox"]


def read_run(folder: Path) -> Run:
    """Raises InputError if `folder` holds no results of an evaluation."""
    for name in (RESULTS, CLASSES, DETECTIONS):
        if not (folder / name).is_file():
            raise InputError(
                f"{folder}: has no {name}; expected the --out folder of `regionspot eval-lvis`, or evaluate again"
            )
    try:
        results = json.loads((folder / RESULTS).read_text())
        protocol = results["protocol"]
        complete = {"bbox", "segm", "images"} <= results.keys() and {
            "dataset",
            "split",
            "annotations",
        } <= protocol.keys()
    except (ValueError, KeyError, TypeError, AttributeError):
        complete = False
    if not complete:
        raise InputError(f"{folder / RESULTS}: is not the result of an evaluation; run the evaluation again")
    with (folder / CLASSES).open(newline="") as file:
        return Run(folder, results, list(csv.DictReader(file)))


@dataclass(frozen=True, eq=False)
class Split:
    """The evaluated images: ground truth of them alone, and where they are.

    manifest     may hold more images than were evaluated
    """

    ground_truth: GroundTruth
    manifest: Manifest
    image_folder: Path

    @cached_property
    def category_names(self) -> dict[int, str]:
        return {category.id: category.name for category in self.manifest.categories}

    def matches(self, run: Run, iou_type: IouType) -> Matches:
        return Matches(self.ground_truth, run.detections, iou_type)


def read_split_of(runs: Sequence[Run], data: Path, annotations: Path | None = None) -> Split:
    """The split that all `runs` were evaluated on, from the dataset's folder `data`.

    Raises InputError if the runs are not of the same images and classes, or the annotations are not those that they
    were evaluated with.
    """
    first, protocol = runs[0], runs[0].results["protocol"]
    for other in runs[1:]:
        for field in ("dataset", "split", "annotations", "images"):
            if other.results["protocol"][field] != protocol[field]:
                raise InputError(
                    f"{other.folder}: {field} is {other.results['protocol'][field]}, and {protocol[field]} in "
                    f"{first.folder}; only evaluations of the same images can be compared"
                )
        if other.is_lvis != first.is_lvis:
            raise InputError(f"{other.folder}: one of it and {first.folder} has LVIS AP, the other COCO AP")
    manifest = read_split(protocol["dataset"], data, protocol["split"], annotations)
    path = annotations or annotation_file_of(data, manifest)
    expected, found = protocol["sha256"].get(path.name), manifest.source["files"].get(path.name)
    if expected != found:
        raise InputError(
            f"{path}: is not the file that {first.folder} was evaluated with (SHA-256 {found}, expected {expected}); "
            "name that one with --annotations"
        )
    ground_truth = read_ground_truth(path, federated=first.is_lvis).restrict(_image_ids(runs, manifest))
    return Split(ground_truth, manifest, image_folder_of(protocol["dataset"], data, protocol["split"], manifest))


def _image_ids(runs: Sequence[Run], manifest: Manifest) -> NDArray[np.int64]:
    """The evaluated images: all, or with --limit the first ones."""
    image_ids = manifest.image_ids[: runs[0].results["images"]]
    for run in runs:
        if not np.isin(run.detections.image_ids, image_ids).all():
            raise InputError(
                f"{run.folder}: is of {len(image_ids):,} of the {len(manifest):,} images, but not of the first ones; "
                "evaluate all, or the first ones by --limit"
            )
    return image_ids
