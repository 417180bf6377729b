"""AP of detections: LVIS AP, LVIS AP without a limit per image (fixed AP), and COCO AP.

hotcoco (Rust) computes precision and recall; the official `lvis` package is the other engine, and the reference: both
return the same arrays, bit for bit (tests/evaluation/test_engine_parity.py). The figures are means of these arrays,
computed here for both.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from importlib.metadata import version
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from regionspot.cache.errors import AnnotationError, InputError, unknown_name
from regionspot.evaluation.metrics import hotcoco_engine, lvis_package
from regionspot.evaluation.metrics.detections import DETECTIONS_PER_IMAGE, Detections
from regionspot.evaluation.metrics.ground_truth import FREQUENCIES, GroundTruth
from regionspot.pipeline.datasets.region_table import Lookup

log = logging.getLogger(__name__)

IouType = Literal["bbox", "segm"]
Engine = Literal["hotcoco", "lvis"]

AP_METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "APr", "APc", "APf")
METRICS = (*AP_METRICS, "AR@300", "ARs@300", "ARm@300", "ARl@300")  # the names that `lvis` prints
COCO_LIMITS = (1, 10, 100)  # detections per image and class (Params.setDetParams in pycocotools/cocoeval.py)
COCO_METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR@1", "AR@10", "AR@100", "ARs@100", "ARm@100", "ARl@100")
DETECTIONS_PER_CLASS = 10_000  # fixed AP, Dave et al. 2021, "Evaluating Large-Vocabulary Object Detectors", section 4


@dataclass(frozen=True, eq=False)
class ClassResults:
    """One row per class, by ascending category id.

    category_ids  int64   (K,)
    ap, ap50      float64 (K,)  0..1, NaN without ground truth
    boxes         int64   (K,)  annotations
    frequencies   str     (K,)  "r", "c" or "f"; "" in COCO's annotations, which have none
    """

    category_ids: NDArray[np.int64]
    ap: NDArray[np.float64]
    ap50: NDArray[np.float64]
    boxes: NDArray[np.int64]
    frequencies: NDArray[np.str_]


@dataclass(frozen=True, eq=False)
class ApResult:
    """AP of boxes or masks.

    images, detections  evaluated images, and detections in them after the limit per image or class
    values              every metric, 0..1, or None without ground truth
    classes             the figures of each class
    engine              the package that computed it, with its version
    precision           float64 (10, 101, K, 4): IoU threshold 0.5 to 0.95, recall 0 to 1, class by ascending id, area
                        (all, small, medium, large); -1 without ground truth
    recall              float64 (10, K, 4): the highest recall
    """

    iou_type: IouType
    images: int
    detections: int
    values: dict[str, float | None]
    classes: ClassResults
    engine: str
    precision: NDArray[np.float64]
    recall: NDArray[np.float64]

    def __getitem__(self, metric: str) -> float | None:
        return self.values[metric]


def average_precision(
    ground_truth: GroundTruth,
    detections: Detections,
    iou_type: IouType,
    image_ids: NDArray[np.int64] | None = None,
    engine: Engine = "hotcoco",
) -> ApResult:
    """Standard LVIS AP: federated, best 300 detections per image. `values` holds METRICS.

    `image_ids` restricts ground truth and detections to those images. For "segm", the area of a detection (small,
    medium or large) is that of its mask.

    Raises InputError for detections of unknown images or classes, with scores or boxes that are not finite, or, for
    "segm", without masks or with masks of another size than the image; AnnotationError for "segm" if the ground truth
    has no valid masks.
    """
    ground_truth, detections = checked(ground_truth, detections, iou_type, image_ids)
    return _lvis_result(ground_truth, best_per_image(detections), iou_type, engine, "@300")


def fixed_ap(
    ground_truth: GroundTruth,
    detections: Detections,
    iou_type: IouType,
    image_ids: NDArray[np.int64] | None = None,
    engine: Engine = "hotcoco",
) -> ApResult:
    """Fixed AP: the best 10,000 detections of each class over all images, without a limit per image.

    From Dave et al. 2021, "Evaluating Large-Vocabulary Object Detectors". `values` holds METRICS, but the recalls have
    no limit in their names: AR, ARs, ARm, ARl. `detections` must not have been limited per image before. Raises as
    `average_precision`.
    """
    ground_truth, detections = checked(ground_truth, detections, iou_type, image_ids)
    return _lvis_result(ground_truth, best_per_class(detections), iou_type, engine, "")


def coco_ap(
    ground_truth: GroundTruth,
    detections: Detections,
    iou_type: IouType,
    image_ids: NDArray[np.int64] | None = None,
) -> ApResult:
    """COCO AP: all classes count in all images, best 100 detections per image and class. `values` holds COCO_METRICS.

    Computed by hotcoco in its COCO mode, with the arrays of pycocotools bit for bit. `ground_truth` may be of LVIS; its
    lists of absent classes are then not used. Raises as `average_precision`.
    """
    ground_truth, detections = checked(ground_truth, detections, iou_type, image_ids)
    precision, recall = hotcoco_engine.coco_precision_and_recall(ground_truth, detections, iou_type)
    values = _ap_values(precision[..., -1])
    values |= {f"AR@{limit}": recall[:, :, 0, index] for index, limit in enumerate(COCO_LIMITS)}
    values |= {f"AR{name}@{COCO_LIMITS[-1]}": recall[:, :, area, -1] for area, name in enumerate("sml", start=1)}
    return _result(ground_truth, detections, iou_type, "hotcoco", (precision[..., -1], recall[..., -1]), values)


def best_per_image(detections: Detections, limit: int = DETECTIONS_PER_IMAGE) -> Detections:
    """The best `limit` detections of every image, like LVISResults.limit_dets_per_image."""
    return _best_per_group(detections, detections.image_ids, limit)


def best_per_class(detections: Detections, limit: int = DETECTIONS_PER_CLASS) -> Detections:
    """The best `limit` detections of every class, over all images."""
    return _best_per_group(detections, detections.category_ids, limit)


def _best_per_group(detections: Detections, groups: NDArray[np.int64], limit: int) -> Detections:
    """In the original order, since lvis breaks ties between equal scores by position."""
    _, group_of, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    if not len(sizes) or sizes.max() <= limit:
        return detections
    kept = np.ones(len(detections), bool)
    rows = np.flatnonzero(sizes[group_of] > limit)
    rows = rows[np.lexsort((-detections.scores[rows], group_of[rows]))]
    ids = group_of[rows]
    starts = np.flatnonzero(np.r_[True, ids[1:] != ids[:-1]])
    rank = np.arange(len(rows)) - np.repeat(starts, np.diff(np.r_[starts, len(rows)]))
    kept[rows[rank >= limit]] = False
    return detections.take(kept)


def _lvis_result(
    ground_truth: GroundTruth, detections: Detections, iou_type: IouType, engine: Engine, limit: str
) -> ApResult:
    if engine not in get_args(Engine):
        raise unknown_name("engine", engine, get_args(Engine))
    if not ground_truth.federated:
        raise AnnotationError(f"{ground_truth.path}: lists no absent classes, which LVIS AP needs; use COCO AP")
    evaluated = detections.take(ground_truth.is_evaluated(detections.image_ids, detections.category_ids))
    package = hotcoco_engine if engine == "hotcoco" else lvis_package
    precision, recall = package.precision_and_recall(ground_truth, evaluated, iou_type)
    values = _ap_values(precision)
    values |= {f"AP{name}": precision[:, :, ground_truth.frequencies == name, 0] for name in FREQUENCIES}
    values |= {f"AR{name}{limit}": recall[..., area] for area, name in enumerate(("", "s", "m", "l"))}
    return _result(ground_truth, detections, iou_type, engine, (precision, recall), values)


def _ap_values(precision: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
    """What the figures that LVIS and COCO share are means of."""
    values = {"AP": precision[..., 0], "AP50": precision[0, ..., 0], "AP75": precision[5, ..., 0]}
    return values | {f"AP{name}": precision[..., area] for area, name in enumerate("sml", start=1)}


def _result(
    ground_truth: GroundTruth,
    detections: Detections,
    iou_type: IouType,
    engine: Engine,
    arrays: tuple[NDArray[np.float64], NDArray[np.float64]],
    values: dict[str, NDArray[np.float64]],
) -> ApResult:
    return ApResult(
        iou_type,
        len(ground_truth.images),
        len(detections),
        {name: _mean(array) for name, array in values.items()},
        _class_results(ground_truth, arrays[0]),
        f"{engine} {version(engine)}",
        *arrays,
    )


def _mean(array: NDArray[np.float64]) -> float | None:
    counted = array[array > -1]
    return float(np.mean(counted)) if counted.size else None


def _class_results(ground_truth: GroundTruth, precision: NDArray[np.float64]) -> ClassResults:
    category_ids = np.sort(ground_truth.category_ids)
    by_class = np.where(precision[..., 0] > -1, precision[..., 0], np.nan)
    annotated = [annotation["category_id"] for annotation in ground_truth.annotations]
    return ClassResults(
        category_ids,
        ap=by_class.mean(axis=(0, 1)),
        ap50=by_class[0].mean(axis=0),
        boxes=np.bincount(np.searchsorted(category_ids, annotated), minlength=len(category_ids)),
        frequencies=ground_truth.frequencies,
    )


def checked(
    ground_truth: GroundTruth, detections: Detections, iou_type: IouType, image_ids: NDArray[np.int64] | None
) -> tuple[GroundTruth, Detections]:
    """Both restricted to `image_ids`, after all checks."""
    if iou_type not in get_args(IouType):
        raise unknown_name("iou_type", iou_type, get_args(IouType))
    if iou_type == "segm":
        ground_truth.require_masks()
    _check_detections(ground_truth, detections, iou_type)
    if image_ids is None:
        return ground_truth, detections
    ground_truth = ground_truth.restrict(image_ids)
    return ground_truth, detections.take(np.isin(detections.image_ids, image_ids))


def _check_detections(ground_truth: GroundTruth, detections: Detections, iou_type: IouType) -> None:
    path = ground_truth.path
    if not len(detections):
        log.warning("%s: there are no detections to evaluate; every AP is 0", path)
        return
    for kind, ids, known in (
        ("image", detections.image_ids, ground_truth.image_ids),
        ("class", detections.category_ids, ground_truth.category_ids),
    ):
        is_known = np.isin(ids, known)
        if not is_known.all():
            raise InputError(
                f"{path}: does not define {kind} id {ids[~is_known][0]} of the detections ({(~is_known).sum():,} of "
                f"{len(ids):,} have an unknown {kind}); evaluate with the annotations that they were made for"
            )
    boxes = detections.boxes_xywh
    for name, valid, expected in (
        ("score", np.isfinite(detections.scores), "a finite number"),
        (
            "box",
            np.all(np.isfinite(boxes), axis=1) & np.all(boxes[:, 2:] >= 0, axis=1),
            "finite, without a negative size",
        ),
    ):
        if not np.all(valid):
            first = int(np.argmin(valid))
            value = detections.scores[first] if name == "score" else boxes[first].tolist()
            raise InputError(
                f"detections: {(~valid).sum():,} of {len(valid):,} cannot be evaluated, the first: "
                f"detections[{first}] of image {detections.image_ids[first]} has {name} {value}, expected {expected}"
            )
    if iou_type == "segm":
        _check_masks(ground_truth, detections)


def _check_masks(ground_truth: GroundTruth, detections: Detections) -> None:
    if detections.masks is None:
        raise InputError("mask AP needs masks, but the detections have none; evaluate from images, not from a cache")
    image_sizes = np.asarray([(image["height"], image["width"]) for image in ground_truth.images], np.int32)
    expected = image_sizes[Lookup(ground_truth.image_ids).find(detections.image_ids)]
    sizes = detections.masks.sizes[detections.regions]
    valid = np.all(sizes == expected, axis=1)
    if not valid.all():
        first = int(np.argmin(valid))
        raise InputError(
            f"detections: {(~valid).sum():,} of {len(valid):,} masks do not fit their image, the first: "
            f"detections[{first}] of image {detections.image_ids[first]} has height and width {sizes[first].tolist()}, "
            f"expected {expected[first].tolist()}"
        )
