"""AP by the `lvis` package with the same numbers but less memory.

`lvis` creates Python objects for every (image, class) pair, even if it is empty: 24 million for LVIS val. The AP of a
class depends only on the images where it is annotated or listed as absent. So this module evaluates a few classes at a
time on those images only, and lets the package average the concatenated precisions.

`lvis` 0.5.3 needs two patches, which are active only while it runs: `np.float`, which numpy 1.24 removed, and opencv,
which it imports only for drawing.
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
CLASS_BATCH = 32  # limits the memory: lvis uses a few hundred bytes for each (class, image) pair
IouType = Literal["bbox", "segm"]


@dataclass(frozen=True)
class LvisAp:
    """AP of boxes or masks. `values` holds every name of METRICS, from 0 to 1, None without ground truth."""

    iou_type: IouType
    images: int
    detections: int  # after the limit of 300 per image
    values: dict[str, float | None]

    def __getitem__(self, metric: str) -> float | None:
        return self.values[metric]


def lvis_ap(
    annotations: Path | GroundTruth,
    detections: Detections,
    iou_type: IouType,
    image_ids: NDArray[np.int64] | None = None,
) -> LvisAp:
    """Standard LVIS AP (federated, best 300 detections per image) of `detections`.

    `image_ids` restricts ground truth and detections to those images. For "segm", the area of a detection (small,
    medium or large) is that of its mask.

    Raises AnnotationError for a file that `lvis` cannot evaluate, InputError for detections of unknown images or
    classes, and for "segm" without masks.
    """
    ground_truth = annotations if isinstance(annotations, GroundTruth) else read_ground_truth(annotations)
    _check(ground_truth, detections, iou_type)
    ground_truth = ground_truth.restrict(image_ids)
    best = best_per_image(detections.take(np.isin(detections.image_ids, ground_truth.image_ids)))
    evaluated = best.take(ground_truth.is_evaluated(best.image_ids, best.category_ids))
    return LvisAp(iou_type, len(ground_truth.images), len(best), _evaluate(ground_truth, evaluated, iou_type))


def best_per_image(detections: Detections, limit: int = DETECTIONS_PER_IMAGE) -> Detections:
    """The best `limit` detections of every image, like LVISResults.limit_dets_per_image."""
    order = np.lexsort((-detections.scores, detections.image_ids))
    ids = detections.image_ids[order]
    starts = np.flatnonzero(np.r_[True, ids[1:] != ids[:-1]]) if len(ids) else np.empty(0, np.int64)
    rank = np.arange(len(ids)) - np.repeat(starts, np.diff(np.r_[starts, len(ids)]))
    # In the original order: lvis breaks ties between equal scores by position.
    return detections.take(np.sort(order[rank < limit]))


def _check(ground_truth: GroundTruth, detections: Detections, iou_type: IouType) -> None:
    if iou_type not in ("bbox", "segm"):
        raise InputError(f'iou_type is {iou_type!r}, expected "bbox" or "segm"')
    if iou_type == "segm":
        ground_truth.require_masks()
    if iou_type == "segm" and len(detections) and detections.masks is None:
        raise InputError("mask AP needs masks, but the detections have none; evaluate from images, not from a cache")
    for kind, ids, known in (
        ("image", detections.image_ids, ground_truth.image_ids),
        ("class", detections.category_ids, ground_truth.category_ids),
    ):
        unknown = np.setdiff1d(ids, known)
        if len(unknown):
            raise InputError(f"{ground_truth.path}: does not define {kind} id {unknown[0]} of the detections")


def _evaluate(ground_truth: GroundTruth, detections: Detections, iou_type: IouType) -> dict[str, float | None]:
    ids = np.sort(ground_truth.category_ids)
    with _lvis() as lvis:
        blocks = [
            _precision(lvis, ground_truth, detections, iou_type, ids[start : start + CLASS_BATCH])
            for start in range(0, len(ids), CLASS_BATCH)
        ]
        no_images = {"images": [], "annotations": [], "categories": ground_truth.categories}
        summary = _evaluator(lvis, no_images, [], iou_type)
        summary.freq_groups = summary._prepare_freq_group()
        summary.eval = {
            "precision": np.concatenate([precision for precision, _ in blocks], axis=2),
            "recall": np.concatenate([recall for _, recall in blocks], axis=1),
        }
        summary.summarize()
    values = {metric: float(summary.results[metric]) for metric in METRICS}
    return {metric: None if value < 0 else value for metric, value in values.items()}


def _precision(
    lvis: Any, ground_truth: GroundTruth, detections: Detections, iou_type: IouType, category_ids: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Precision (T, R, classes, areas) and recall (T, classes, areas) of a few classes, by lvis."""
    block = detections.take(np.isin(detections.category_ids, category_ids))
    dataset = ground_truth.block(category_ids, block.image_ids)
    # Without a box, lvis computes the area of a detection from its mask.
    dicts = list(block.as_dicts(with_box=iou_type == "bbox", with_mask=iou_type == "segm"))
    evaluator = _evaluator(lvis, dataset, dicts, iou_type)
    evaluator.evaluate()
    evaluator.accumulate()
    return evaluator.eval["precision"], evaluator.eval["recall"]


class _InMemory:
    """Mixin for the package's classes, which load a file, to use a dataset in memory."""

    def _load_json(self, dataset: dict[str, Any]) -> dict[str, Any]:
        return dataset


def _evaluator(lvis: Any, dataset: dict[str, Any], dicts: list[dict[str, Any]], iou_type: IouType) -> Any:
    in_memory = type("GroundTruth", (_InMemory, lvis.LVIS), {})
    images = {**dataset, "annotations": []}
    if dicts:
        results = lvis.LVISResults(in_memory(images), dicts, max_dets=-1)
    else:
        # LVISResults fails for an empty list, so use an LVIS without annotations.
        results = type("NoResults", (_InMemory, lvis.LVISResults), {"__init__": lvis.LVIS.__init__})(images)
    return lvis.LVISEval(in_memory(dataset), results, iou_type)


@contextlib.contextmanager
def _lvis() -> Iterator[types.ModuleType]:
    """The patched `lvis` package; the changes of numpy and logging are undone at exit."""
    lvis = _import_lvis()
    logger = logging.getLogger("lvis")
    level = logger.level
    logger.setLevel(logging.ERROR)
    missing = not hasattr(np, "float")
    if missing:
        vars(np)["float"] = float
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # it calls Logger.warn
            yield lvis
    finally:
        logger.setLevel(level)
        if missing:
            del vars(np)["float"]


def _import_lvis() -> types.ModuleType:
    """Import `lvis` without opencv, and remove the root log handler that it installs."""
    if "lvis" in sys.modules:
        return sys.modules["lvis"]
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    try:
        with _fake_opencv():
            return importlib.import_module("lvis")
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)


@contextlib.contextmanager
def _fake_opencv() -> Iterator[None]:
    try:
        importlib.import_module("cv2")
    except ImportError:  # not installed, or without its system libraries
        sys.modules["cv2"] = types.ModuleType("cv2")
        try:
            yield
        finally:
            del sys.modules["cv2"]
    else:
        yield
