"""hotcoco in LVIS and COCO mode, with the numbers of the official packages bit for bit.

Its LVIS mode differs from `lvis` in four cases, which are removed before:

* `lvis` drops annotations and detections of area 0 when it selects by class; hotcoco keeps them. So they are left out.
* hotcoco does not know `ignore`. `lvis` treats such an annotation like one whose area is outside of the evaluated
  range. So it gets an area outside of all ranges; the area is used for nothing else.
* `lvis` has a limit of detections per image and none per image and class; hotcoco has one of 300 there too, which
  fixed AP meets. So it is raised.
* Ids are rounded to float64 in the array of detections. So it gets the positions of the ids among the sorted ids.
"""

from __future__ import annotations

from typing import Any

import hotcoco
import numpy as np
from numpy.typing import NDArray

from regionspot.evaluation.metrics.detections import Detections
from regionspot.evaluation.metrics.ground_truth import GroundTruth

BLOCK = 1_000_000  # detections at a time, which limits the memory: 300 bytes for a box, 2 KB for a mask
NO_LIMIT = 10**9  # detections per image and class
IGNORED_AREA = 2e10  # beyond 1e10, the upper bound of all areas (Params in lvis/eval.py)


def precision_and_recall(
    ground_truth: GroundTruth, detections: Detections, iou_type: str
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Precision (10, 101, K, 4) and recall (10, K, 4) as `lvis` computes them, without any limit of detections."""
    blocks = []
    for category_ids in _class_blocks(ground_truth, detections):
        block = detections.take(np.isin(detections.category_ids, category_ids))
        evaluation = evaluate(ground_truth.of_classes(category_ids, block.image_ids), block, iou_type)
        evaluation.accumulate()
        arrays: Any = evaluation.eval
        blocks.append((arrays["precision"][..., 0], arrays["recall"][..., 0]))
    precisions, recalls = zip(*blocks, strict=True)
    return np.concatenate(precisions, axis=2), np.concatenate(recalls, axis=1)


def _class_blocks(ground_truth: GroundTruth, detections: Detections) -> list[NDArray[np.int64]]:
    """The sorted ids of all classes, in blocks of about BLOCK detections."""
    ids = np.sort(ground_truth.category_ids)
    counts = np.bincount(np.searchsorted(ids, detections.category_ids), minlength=len(ids))
    block_of = np.cumsum(counts) // BLOCK
    return np.split(ids, np.flatnonzero(np.diff(block_of)) + 1)


def coco_precision_and_recall(
    ground_truth: GroundTruth, detections: Detections, iou_type: str
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Precision (10, 101, K, 4, 3) and recall (10, K, 4, 3) as pycocotools; last axis: 1, 10, 100 detections."""
    evaluation = evaluate(ground_truth, detections, iou_type, federated=False)
    evaluation.accumulate()
    arrays: Any = evaluation.eval
    return arrays["precision"], arrays["recall"]


def evaluate(
    ground_truth: GroundTruth, detections: Detections, iou_type: str, federated: bool = True
) -> hotcoco.COCOeval:
    """hotcoco's evaluator after matching, before `accumulate`; its class ids are positions among the sorted ids.

    With `federated` as LVIS, else as COCO.
    """
    truth = _dataset(ground_truth, iou_type, federated)
    results = _results(truth, ground_truth, detections, iou_type, federated)
    evaluation = hotcoco.COCOeval(truth, results, iou_type, lvis_style=federated)
    if federated:
        evaluation.params.max_dets = [NO_LIMIT]
    evaluation.evaluate()
    return evaluation


def _dataset(ground_truth: GroundTruth, iou_type: str, federated: bool) -> hotcoco.COCO:
    image_ids, category_ids = np.sort(ground_truth.image_ids), np.sort(ground_truth.category_ids)
    position = {category: index for index, category in enumerate(category_ids.tolist())}
    images = []
    for image, index in zip(
        ground_truth.images, np.searchsorted(image_ids, ground_truth.image_ids).tolist(), strict=True
    ):
        record = {"id": index, "height": image.get("height", 0), "width": image.get("width", 0)}
        if federated:
            for name in ("neg_category_ids", "not_exhaustive_category_ids"):
                record[name] = [position[category] for category in image[name] if category in position]
        images.append(record)
    categories = [
        {"id": position[category["id"]], "name": str(category["id"]), "frequency": category.get("frequency")}
        for category in ground_truth.categories
    ]
    annotations = ground_truth.annotations
    if federated:
        annotations = [annotation for annotation in annotations if annotation["area"] > 0]
    areas = [IGNORED_AREA if federated and each.get("ignore") else each["area"] for each in annotations]
    crowds = [0 if federated else each.get("iscrowd", 0) for each in annotations]
    return hotcoco.COCO.from_arrays(
        images,
        categories,
        np.searchsorted(image_ids, [each["image_id"] for each in annotations]),
        np.searchsorted(category_ids, [each["category_id"] for each in annotations]),
        np.asarray([each["bbox"] for each in annotations], np.float64).reshape(-1, 4),
        area=np.asarray(areas, np.float64),
        iscrowd=np.asarray(crowds, np.int64),
        segmentation=[each["segmentation"] for each in annotations] if iou_type == "segm" else None,
    )


def _results(
    truth: hotcoco.COCO, ground_truth: GroundTruth, detections: Detections, iou_type: str, federated: bool
) -> hotcoco.COCO:
    masks: list[Any] | None = None
    areas = detections.boxes_xywh[:, 2] * detections.boxes_xywh[:, 3]
    if iou_type == "segm" and detections.masks is not None:
        regions, of_region = np.unique(detections.regions, return_inverse=True)
        distinct = [detections.masks[index] for index in regions.tolist()]
        areas = hotcoco.mask.area(distinct)[of_region].astype(np.float64)
        masks = [distinct[index] for index in of_region.tolist()]
    if federated:
        counted = np.flatnonzero(areas > 0)
        if len(counted) < len(areas):
            detections, areas = detections.take(counted), areas[counted]
            masks = masks and [masks[index] for index in counted.tolist()]
    rows = np.empty((len(detections), 7))
    rows[:, 0] = np.searchsorted(np.sort(ground_truth.image_ids), detections.image_ids)
    rows[:, 1:5] = detections.boxes_xywh
    rows[:, 5] = detections.scores
    rows[:, 6] = np.searchsorted(np.sort(ground_truth.category_ids), detections.category_ids)
    results = truth.load_res(rows, segmentation=masks)
    if masks is not None:
        results.update_anns(ids=np.arange(1, len(rows) + 1), area=areas)
    # LVIS mode would keep 300 detections per image, but the caller has selected already.
    return results.cap_detections_per_image(None) if federated else results
