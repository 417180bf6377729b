"""The images on which an evaluation does best and worst, with its boxes, masks and names.

Judged are annotated objects only: the box nearest to an object, at an IoU of at least 0.5, must have the right name as
its best one. Other boxes may be objects that nobody annotated.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as rle

from regionspot.cache.errors import ImageError
from regionspot.evaluation.report.drawing import LabelledRegion, draw_regions
from regionspot.evaluation.report.runs import Run, Split
from regionspot.evaluation.report.sheet import CORRECT, WRONG
from regionspot.pipeline.images.decode import Exif, read_image

MIN_IOU = 0.5
IMAGES = 6  # best ones, and worst ones
DRAWN_OBJECTS = 16  # labels of more do not fit
SIDE, QUALITY = 640, 78  # pixels and JPEG quality of an embedded image: 30 to 100 KB
MISSED = (150, 150, 150)


@dataclass(frozen=True)
class JudgedImage:
    """The annotated objects of an image, and the detection of each.

    objects     K indices into the annotations of the ground truth, largest first
    detections  int64 (K,): row of the best name of the nearest box; -1 if no box is near
    right       bool (K,)
    """

    image_id: int
    objects: list[int]
    detections: NDArray[np.int64]
    right: NDArray[np.bool_]


@dataclass(frozen=True)
class Example:
    """An image of the page. `sources` are data URIs, of the run and of the one that it is compared with."""

    name: str
    captions: list[str]
    sources: list[str]


def judge(run: Run, split: Split) -> dict[int, JudgedImage]:
    """Every image with an object, by its id."""
    annotations, detections = split.ground_truth.annotations, run.detections
    objects: dict[int, list[int]] = {}
    for index, annotation in enumerate(annotations):
        if not annotation.get("iscrowd"):
            objects.setdefault(annotation["image_id"], []).append(index)
    # Best first: of the detections that share a box, and so an overlap, the first one has its best name.
    order = np.lexsort((-detections.scores, detections.image_ids))
    ids = detections.image_ids[order]
    judged = {}
    for image_id, indices in objects.items():
        indices.sort(key=lambda index: -annotations[index]["area"])
        rows = order[np.searchsorted(ids, image_id) : np.searchsorted(ids, image_id, "right")]
        nearest = np.full(len(indices), -1, np.int64)
        if len(rows):
            boxes = np.array([annotations[index]["bbox"] for index in indices], np.float64)
            overlaps = rle.iou(boxes, detections.boxes_xywh[rows], np.zeros(len(rows), np.uint8))
            nearest = np.where(overlaps.max(axis=1) >= MIN_IOU, rows[overlaps.argmax(axis=1)], -1)
        classes = np.array([annotations[index]["category_id"] for index in indices], np.int64)
        right = (nearest >= 0) & (detections.category_ids[nearest] == classes) if len(rows) else nearest >= 0
        judged[image_id] = JudgedImage(image_id, indices, nearest, right)
    return judged


def best_and_worst(runs: Sequence[Run], split: Split) -> tuple[list[Example], list[Example]]:
    """Examples of the first run: by the share of its objects that have the right name, of equals those with more.

    With a second run: by how much the share is above that of the second.
    """
    judged = [judge(run, split) for run in runs]
    scores = {image_id: _share(image) for image_id, image in judged[0].items()}
    if len(runs) > 1:
        scores = {image_id: share - _share(judged[1][image_id]) for image_id, share in scores.items()}
    counts = {image_id: len(image.objects) for image_id, image in judged[0].items()}
    best = sorted(scores, key=lambda image_id: (-scores[image_id], -counts[image_id], image_id))
    worst = sorted(scores, key=lambda image_id: (scores[image_id], -counts[image_id], image_id))
    chosen: list[list[Example]] = []
    used: set[int] = set()
    for order in (best, worst):
        examples: list[Example] = []
        for image_id in order:
            if len(examples) == IMAGES:
                break
            if len(runs) > 1 and (scores[image_id] <= 0 if order is best else scores[image_id] >= 0):
                break
            if image_id in used:
                continue
            used.add(image_id)
            if example := _example(runs, split, [each[image_id] for each in judged]):
                examples.append(example)
        chosen.append(examples)
    return chosen[0], chosen[1]


def _share(image: JudgedImage) -> float:
    return float(image.right.mean())


def _example(runs: Sequence[Run], split: Split, judged: Sequence[JudgedImage]) -> Example | None:
    """None if the image cannot be read."""
    manifest = split.manifest
    row = manifest.row_of(judged[0].image_id)
    size = (int(manifest.heights[row]), int(manifest.widths[row]))
    exif = runs[0].results["protocol"].get("exif")
    try:
        image = read_image(
            split.image_folder / str(manifest.paths[row]), size, exif if exif in get_args(Exif) else "auto"
        )
    except ImageError:
        return None
    sources = [_data_uri(_drawn(image, run, split, each)) for run, each in zip(runs, judged, strict=True)]
    captions = [f"{each.right.sum()} of {len(each.objects)} right" for each in judged]
    return Example(str(manifest.paths[row]), captions, sources)


def _drawn(image: Image.Image, run: Run, split: Split, judged: JudgedImage) -> Image.Image:
    names = split.category_names
    detections = run.detections
    regions = []
    for index, row, right in list(zip(judged.objects, judged.detections.tolist(), judged.right, strict=True))[
        :DRAWN_OBJECTS
    ]:
        annotation = split.ground_truth.annotations[index]
        true_name = names[annotation["category_id"]]
        mask, colour = None, CORRECT if right else WRONG
        if row < 0:
            box, label, colour = annotation["bbox"], f"no box: {true_name}", MISSED
        else:
            box, name = detections.boxes_xywh[row], names[int(detections.category_ids[row])]
            label = f"{name} {detections.scores[row]:.2f}" + ("" if right else f" (is {true_name})")
            if detections.masks is not None:
                mask = detections.masks.decode(int(detections.regions[row]))
        x, y, width, height = box
        regions.append(LabelledRegion(np.array([x, y, x + width, y + height], np.float32), label, mask, colour))
    return draw_regions(image, regions, opacity=0)


def _data_uri(image: Image.Image) -> str:
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    content = io.BytesIO()
    image.save(content, "JPEG", quality=QUALITY, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}"
