"""Synthetic ground truth and detections of the size of LVIS val, for `make bench-eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as rle

from regionspot.evaluation.metrics.detections import Detections, Masks
from regionspot.evaluation.metrics.ground_truth import GroundTruth

LVIS_VAL_IMAGES = 19_809
CLASSES = 1203
FREQUENCIES = np.repeat(["f", "c", "r"], [405, 461, 337])  # LVIS v1's frequent, common and rare classes
BOXES_PER_IMAGE = 12.4  # 244,707 annotations in LVIS v1 val
CLASSES_PER_IMAGE = 4  # 3.4 in Gupta et al. 2019, "LVIS: A Dataset for Large Vocabulary Instance Segmentation"
HEIGHT, WIDTH = 480, 640


def world(
    images: int, per_image: int, masks: bool = False, seed: int = 0, classes: int = CLASSES
) -> tuple[GroundTruth, Detections]:
    """Ground truth of `images` images, and `per_image` detections in each.

    A third of the detections are near an annotated box and of its class, a third are elsewhere and of a class that
    the image lists, a third are of any class. Scores have three digits, so many are equal.
    """
    rng = np.random.default_rng(seed)
    share = 1 / np.arange(1, classes + 1) ** 0.9
    share /= share.sum()
    records: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    columns: list[tuple[Any, ...]] = []
    encoded: list[bytes] = []
    for image_id in range(1, images + 1):
        listed = np.unique(rng.choice(classes, 3 * CLASSES_PER_IMAGE, p=share))
        rng.shuffle(listed)
        present, absent = listed[:CLASSES_PER_IMAGE], listed[CLASSES_PER_IMAGE:]
        records.append(
            {
                "id": image_id,
                "height": HEIGHT,
                "width": WIDTH,
                "neg_category_ids": (absent + 1).tolist(),
                "not_exhaustive_category_ids": (present[:1] + 1).tolist() if rng.random() < 0.3 else [],
            }
        )
        truth = _boxes(rng, max(len(present), rng.poisson(BOXES_PER_IMAGE)))
        truth_classes = np.r_[present, rng.choice(present, len(truth) - len(present))]
        near = rng.integers(0, len(truth), per_image // 3)
        boxes = np.concatenate([_jitter(rng, truth[near]), _boxes(rng, per_image - len(near))])
        labels = np.concatenate(
            [
                truth_classes[near],
                rng.choice(listed, per_image // 3),
                rng.choice(classes, per_image - 2 * (per_image // 3), p=share),
            ]
        )
        scores = np.round(rng.beta(1, 4, per_image), 3).astype(np.float32)
        order = np.argsort(-scores, kind="stable")
        columns.append((np.full(per_image, image_id), labels[order] + 1, boxes[order], scores[order]))
        if masks:
            encoded += _encoded(boxes[order])
        polygons = _ellipses(truth).tolist() if masks else [None] * len(truth)
        for box, category, polygon in zip(truth.tolist(), (truth_classes + 1).tolist(), polygons, strict=True):
            annotation = {"id": len(annotations) + 1, "image_id": image_id, "category_id": category, "bbox": box}
            annotations.append({**annotation, "area": 0.785 * box[2] * box[3], "segmentation": polygon and [polygon]})
    frequencies = FREQUENCIES[np.linspace(0, CLASSES - 1, classes).astype(int)].tolist()
    categories = [{"id": n, "name": str(n), "frequency": each} for n, each in enumerate(frequencies, start=1)]
    image_ids, category_ids, boxes, scores = (np.concatenate(parts) for parts in zip(*columns, strict=True))
    detections = Detections(
        image_ids, category_ids, boxes, scores, np.arange(len(scores)), _masks(encoded) if masks else None
    )
    return GroundTruth(Path("synthetic.json"), records, categories, annotations), detections


def _boxes(rng: np.random.Generator, count: int) -> Any:
    """XYWH float64 (count, 4) within the image, most of them small."""
    size = np.exp(rng.uniform(np.log(8), np.log(400), (count, 2)))
    corner = rng.random((count, 2)) * (np.array([WIDTH, HEIGHT]) - size)
    return np.concatenate([corner, size], axis=1)


def _jitter(rng: np.random.Generator, boxes: Any) -> Any:
    return np.maximum(boxes + rng.normal(0, 0.08, boxes.shape) * np.tile(boxes[:, 2:], 2), 1e-3)


def _ellipses(boxes: Any) -> Any:
    """Polygons of 24 points, float64 (n, 48), as x1, y1, x2, y2, ..."""
    angle = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    circle = np.stack([np.cos(angle), np.sin(angle)], axis=-1)
    center = boxes[:, None, :2] + boxes[:, None, 2:] / 2
    return (center + circle * boxes[:, None, 2:] / 2).reshape(len(boxes), -1)


def _encoded(boxes: Any) -> list[bytes]:
    return [rle.frPyObjects([polygon], HEIGHT, WIDTH)[0]["counts"] for polygon in _ellipses(boxes).tolist()]


def _masks(encoded: list[bytes]) -> Masks:
    return Masks(
        np.tile(np.array([HEIGHT, WIDTH], np.int32), (len(encoded), 1)),
        np.cumsum([0, *map(len, encoded)], dtype=np.int64),
        np.frombuffer(b"".join(encoded), np.uint8),
    )
