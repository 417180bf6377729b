"""AP by the `lvis` package, exactly its numbers, in a memory that does not grow with its bookkeeping.

`lvis` keeps a Python object for every (image, class) pair whether anything is there or not: 24 million for LVIS
val. A class's AP depends only on the images where it is annotated or listed as absent, so this module hands the
package a few classes at a time with only those images, and lets it average the joined precisions itself.

`lvis` 0.5.3 also needs two things put right while it runs, and only then: `np.float`, which numpy 1.24 removed, and
opencv, which it imports for drawing alone.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import sys
import types
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from regionspot.cache.errors import InputError
from regionspot.evaluation.metrics.detections import DETECTIONS_PER_IMAGE, Detections
from regionspot.evaluation.metrics.ground_truth import GroundTruth, read_ground_truth

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "APr", "APc", "APf")
CLASSES_AT_ONCE = 32  # bounds the memory: lvis makes a few hundred bytes for each class times image
IouType = Literal["bbox", "segm"]


@dataclass(frozen=True)
class LvisAp:
    """AP of one kind of overlap. `values` has every name of METRICS, from 0 to 1, None where there is no truth."""

    iou_type: IouType
    images: int
    detections: int  # after the limit of 300 an image
    values: dict[str, float | None]

    def __getitem__(self, metric: str) -> float | None:
        return self.values[metric]


def lvis_ap(
    annotations: Path | GroundTruth,
    detections: Detections,
    iou_type: IouType,
    image_ids: NDArray[np.int64] | None = None,
) -> LvisAp:
    """Standard LVIS AP (federated, best 300 detections an image) of `detections`.

    `image_ids` restricts truth and detections alike to those images. For "segm" a detection's area, which puts it
    among small, medium or large, is that of its mask.

    Raises AnnotationError for a file that `lvis` could not evaluate, InputError for detections of images or
    classes that the file does not hold, or without the masks that "segm" needs.
    """
    truth = annotations if isinstance(annotations, GroundTruth) else read_ground_truth(annotations)
    _check(truth, detections, iou_type)
    truth = truth.restrict(image_ids)
    kept = best_per_image(detections.take(np.isin(detections.image_ids, truth.image_ids)))
    values = _evaluate(truth, kept.take(truth.counts(kept.image_ids, kept.category_ids)), iou_type)
    return LvisAp(iou_type, len(truth.images), len(kept), values)


def best_per_image(detections: Detections, limit: int = DETECTIONS_PER_IMAGE) -> Detections:
    """The best `limit` detections of every image, as LVISResults.limit_dets_per_image keeps them."""
    order = np.lexsort((-detections.scores, detections.image_ids))
    ids = detections.image_ids[order]
    starts = np.flatnonzero(np.r_[True, ids[1:] != ids[:-1]]) if len(ids) else np.empty(0, np.int64)
    rank = np.arange(len(ids)) - np.repeat(starts, np.diff(np.r_[starts, len(ids)]))
    # Back into the given order: lvis breaks ties between equal scores by position.
    return detections.take(np.sort(order[rank < limit]))


def _check(truth: GroundTruth, detections: Detections, iou_type: IouType) -> None:
    if iou_type not in ("bbox", "segm"):
        raise InputError(f'iou_type is {iou_type!r}, expected "bbox" or "segm"')
    if iou_type == "segm":
        truth.require_masks()
    if iou_type == "segm" and len(detections) and detections.masks is None:
        raise InputError("mask AP was asked for, but the detections have no masks; evaluate from images, not a cache")
    for what, found, known in (
        ("image", detections.image_ids, truth.image_ids),
        ("class", detections.category_ids, truth.category_ids),
    ):
        unknown = np.setdiff1d(found, known)
        if len(unknown):
            raise InputError(f"{truth.path}: detections name {what} id {unknown[0]}, which the file does not hold")


def _evaluate(truth: GroundTruth, detections: Detections, iou_type: IouType) -> dict[str, float | None]:
    ids = np.sort(truth.category_ids)
    with _lvis() as lvis:
        blocks = [
            _precision(lvis, truth, detections, iou_type, ids[start : start + CLASSES_AT_ONCE])
            for start in range(0, len(ids), CLASSES_AT_ONCE)
        ]
        summary = _evaluator(lvis, {"images": [], "annotations": [], "categories": truth.categories}, [], iou_type)
        summary.freq_groups = summary._prepare_freq_group()
        summary.eval = {
            "precision": np.concatenate([precision for precision, _ in blocks], axis=2),
            "recall": np.concatenate([recall for _, recall in blocks], axis=1),
        }
        summary.summarize()
    found = {metric: float(summary.results[metric]) for metric in METRICS}
    return {metric: None if value < 0 else value for metric, value in found.items()}


def _precision(
    lvis: Any, truth: GroundTruth, detections: Detections, iou_type: IouType, category_ids: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """lvis's precision (T, R, classes, areas) and recall (T, classes, areas) of a few classes."""
    block = detections.take(np.isin(detections.category_ids, category_ids))
    dataset = truth.block(category_ids, block.image_ids)
    # Without its box, lvis takes a detection's area from the mask.
    dicts = list(block.as_dicts(with_box=iou_type == "bbox", with_mask=iou_type == "segm"))
    evaluator = _evaluator(lvis, dataset, dicts, iou_type)
    evaluator.evaluate()
    evaluator.accumulate()
    return evaluator.eval["precision"], evaluator.eval["recall"]


class _InMemory:
    """Mixed into the package's classes, which read a path, to take a dataset that is in memory already."""

    def _load_json(self, dataset: dict[str, Any]) -> dict[str, Any]:
        return dataset


def _evaluator(lvis: Any, dataset: dict[str, Any], dicts: list[dict[str, Any]], iou_type: IouType) -> Any:
    in_memory = type("Truth", (_InMemory, lvis.LVIS), {})
    images = {**dataset, "annotations": []}
    if dicts:
        results = lvis.LVISResults(in_memory(images), dicts, max_dets=-1)
    else:
        # LVISResults stumbles over an empty list; it would have become an LVIS without annotations.
        results = type("Nothing", (_InMemory, lvis.LVISResults), {"__init__": lvis.LVIS.__init__})(images)
    return lvis.LVISEval(in_memory(dataset), results, iou_type)


@contextlib.contextmanager
def _lvis() -> Iterator[types.ModuleType]:
    """The `lvis` package, in working order inside and nothing of numpy or logging changed outside."""
    lvis = _import_lvis()
    logger = logging.getLogger("lvis")
    level = logger.level
    logger.setLevel(logging.ERROR)
    absent = not hasattr(np, "float")
    if absent:
        vars(np)["float"] = float
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # it calls Logger.warn
            yield lvis
    finally:
        logger.setLevel(level)
        if absent:
            del vars(np)["float"]


def _import_lvis() -> types.ModuleType:
    """Import `lvis` without its needing opencv and without the root log handler that it installs."""
    if "lvis" in sys.modules:
        return sys.modules["lvis"]
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    try:
        with _stand_in_for_opencv():
            return importlib.import_module("lvis")
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)


@contextlib.contextmanager
def _stand_in_for_opencv() -> Iterator[None]:
    try:
        importlib.import_module("cv2")
    except ImportError:  # not installed, or without the system libraries it wants
        sys.modules["cv2"] = types.ModuleType("cv2")
        try:
            yield
        finally:
            del sys.modules["cv2"]
    else:
        yield
