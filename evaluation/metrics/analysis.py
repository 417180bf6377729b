"""What AP alone does not tell: whether a difference is real, which errors cost AP, whether scores are probabilities.

hotcoco computes all of it from matched detections. In LVIS only what its annotations allow to judge counts: detections
of classes that the image does not list are left out, and so are wrong ones of classes that are not annotated
exhaustively.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import hotcoco
import numpy as np
from numpy.typing import NDArray

from regionspot.evaluation.metrics import hotcoco_engine
from regionspot.evaluation.metrics.average_precision import IouType, best_per_image, checked
from regionspot.evaluation.metrics.detections import Detections
from regionspot.evaluation.metrics.ground_truth import GroundTruth

SAMPLES = 200  # of images, for intervals: their standard error is then exact to 5 %
CONFIDENCE = 0.95
# hotcoco draws n of n images with replacement, and evaluates the distinct ones once each: this share on average.
DISTINCT = 1 - math.exp(-1)
# tidecv's names of errors (Bolya et al. 2020, "TIDE: A General Toolbox for Identifying Object Detection Errors").
ERRORS = {
    "Cls": "wrong class",
    "Loc": "wrong place",
    "Both": "wrong class and place",
    "Dupe": "duplicate",
    "Bkg": "background",
    "Miss": "missed",
}
_COCO_NAMES = {"AR1": "AR@1", "AR10": "AR@10", "AR100": "AR@100", "ARs": "ARs@100", "ARm": "ARm@100", "ARl": "ARl@100"}


@dataclass(frozen=True)
class Interval:
    """A figure or a difference of figures, and the bounds of its confidence interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class ErrorCost:
    """How many errors of a kind there are at an IoU of 0.5, and how much AP50 (0..1) would rise without them."""

    count: int
    ap50: float


@dataclass(frozen=True)
class CalibrationBin:
    """Detections with a score from `low` to `high`: their number, mean score, and the share that is right."""

    low: float
    high: float
    count: int
    score: float
    right: float


@dataclass(frozen=True)
class Calibration:
    """`error`: expected calibration error, the mean distance of score and share, weighted by the number."""

    error: float
    bins: list[CalibrationBin]


@dataclass(frozen=True)
class Confusion:
    """How many annotations of a class the best detection at that place calls another class."""

    category_id: int
    predicted_id: int
    count: int


class Matches:
    """Detections matched to the ground truth once, for any number of questions.

    As `average_precision` matches them if the ground truth is federated (LVIS), else as `coco_ap`; raises as these do.
    """

    def __init__(
        self,
        ground_truth: GroundTruth,
        detections: Detections,
        iou_type: IouType,
        image_ids: NDArray[np.int64] | None = None,
    ) -> None:
        ground_truth, detections = checked(ground_truth, detections, iou_type, image_ids)
        if ground_truth.federated:
            detections = best_per_image(detections)
            detections = detections.take(ground_truth.is_evaluated(detections.image_ids, detections.category_ids))
        self.ground_truth, self._detections, self._iou_type = ground_truth, detections, iou_type
        self._evaluation = self._evaluate(detections)

    def _evaluate(self, detections: Detections) -> hotcoco.COCOeval:
        return hotcoco_engine.evaluate(self.ground_truth, detections, self._iou_type, self.ground_truth.federated)

    def intervals(self, samples: int = SAMPLES, confidence: float = CONFIDENCE) -> dict[str, Interval | None]:
        """The interval of every figure: what other images of the same kind would give. None without ground truth."""
        nothing = self._evaluate(self._detections.take(np.empty(0, np.int64)))
        return _differences(nothing, self._evaluation, samples, confidence)

    def minus(
        self, other: Matches, samples: int = SAMPLES, confidence: float = CONFIDENCE
    ) -> dict[str, Interval | None]:
        """The difference to `other` in every figure, both on the same samples of the images that they share.

        At this confidence, the two are not distinguishable where the interval contains 0.
        """
        return _differences(other._evaluation, self._evaluation, samples, confidence)

    def errors(self) -> dict[str, ErrorCost]:
        """TIDE: the errors by kind, in the order and with the names of ERRORS."""
        tide: dict[str, Any] = self._evaluation.tide_errors()
        return {name: ErrorCost(tide["counts"][key], tide["delta_ap"][key]) for key, name in ERRORS.items()}

    def calibration(self, bins: int = 10) -> Calibration:
        """How far scores are from the share of detections that are right at an IoU of 0.5; scores must be in 0..1."""
        result: dict[str, Any] = self._evaluation.calibration(n_bins=bins)
        names = ("bin_lower", "bin_upper", "count", "avg_confidence", "avg_accuracy")
        return Calibration(result["ece"], [CalibrationBin(*(each[name] for name in names)) for each in result["bins"]])

    def confusions(self, strongest: int = 50) -> list[Confusion]:
        """The most frequent confusions at an IoU of 0.5.

        In LVIS only between classes that the image lists and that are annotated exhaustively in it: of any other class
        there may be an object that is not annotated.
        """
        detections = self._detections
        if self.ground_truth.federated:
            open_ended = {
                (image["id"], category)
                for image in self.ground_truth.images
                for category in image["not_exhaustive_category_ids"]
            }
            pairs = zip(detections.image_ids.tolist(), detections.category_ids.tolist(), strict=True)
            detections = detections.take(np.array([pair not in open_ended for pair in pairs], bool))
        matrix = self._evaluate(detections).confusion_matrix()["matrix"][:-1, :-1]
        np.fill_diagonal(matrix, 0)
        category_ids = np.sort(self.ground_truth.category_ids).tolist()
        best = np.argsort(-matrix.astype(np.int64), axis=None, kind="stable")[:strongest]
        cells = [(*divmod(cell, len(matrix)), int(matrix.flat[cell])) for cell in best.tolist()]
        return [Confusion(category_ids[row], category_ids[column], count) for row, column, count in cells if count]


def _differences(
    first: hotcoco.COCOeval, second: hotcoco.COCOeval, samples: int, confidence: float
) -> dict[str, Interval | None]:
    """Second minus first. The standard error is that of the delete-d jackknife (Shao and Wu 1989, "A General Theory for
    Jackknife Variance Estimation"): the deviation over random subsets of the images times sqrt(kept / left out).

    hotcoco's own intervals are percentiles over these subsets, which vary less than samples of the same size do, so
    they are too narrow.
    """
    result = hotcoco.compare(first, second, n_bootstrap=samples)
    scale = NormalDist().inv_cdf((1 + confidence) / 2) * math.sqrt(DISTINCT / (1 - DISTINCT))
    intervals: dict[str, Interval | None] = {}
    for name in result["metric_keys"]:
        value, margin = result["deltas"][name], scale * result["ci"][name]["std_err"]
        is_known = result["metrics_a"][name] >= 0
        intervals[_COCO_NAMES.get(name, name)] = Interval(value, value - margin, value + margin) if is_known else None
    return intervals
