"""Precision and recall by the official `lvis` package, with the same numbers but less memory.

`lvis` creates Python objects for every (image, class) pair, even if it is empty: 24 million for LVIS val. The AP of a
class depends only on the images where it is annotated or listed as absent. So this module evaluates a few classes at a
time on those images only, and concatenates their arrays.

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
from typing import Any

import numpy as np
from numpy.typing import NDArray

from regionspot.evaluation.metrics.detections import Detections
from regionspot.evaluation.metrics.ground_truth import GroundTruth

CLASS_BATCH = 32  # limits the memory: lvis uses a few hundred bytes for each (class, image) pair


def precision_and_recall(
    ground_truth: GroundTruth, detections: Detections, iou_type: str
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """LVISEval's precision (10, 101, K, 4) and recall (10, K, 4), without any limit of detections.

    `detections` are only of pairs (image, class) that the ground truth lists; lvis would ignore others.
    """
    ids = np.sort(ground_truth.category_ids)
    with _lvis() as lvis:
        blocks = [
            _block(lvis, ground_truth, detections, iou_type, ids[start : start + CLASS_BATCH])
            for start in range(0, len(ids), CLASS_BATCH)
        ]
    precisions, recalls = zip(*blocks, strict=True)
    return np.concatenate(precisions, axis=2), np.concatenate(recalls, axis=1)


def _block(
    lvis: Any, ground_truth: GroundTruth, detections: Detections, iou_type: str, category_ids: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Precision (10, 101, classes, 4) and recall (10, classes, 4) of a few classes."""
    block = detections.take(np.isin(detections.category_ids, category_ids))
    truth = ground_truth.of_classes(category_ids, block.image_ids)
    dataset = {"images": truth.images, "categories": truth.categories, "annotations": truth.annotations}
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


def _evaluator(lvis: Any, dataset: dict[str, Any], dicts: list[dict[str, Any]], iou_type: str) -> Any:
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
