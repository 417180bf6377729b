"""hotcoco returns the arrays of the official packages bit for bit, in every case that decides a match.

`WORLD_HAS` are the cases; every world is counted for them. `make stress` runs more and larger worlds.
"""

import contextlib
import io
import json
import time
from collections import Counter

import hotcoco
import numpy as np
import pytest
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from regionspot.evaluation.metrics import lvis_package
from regionspot.evaluation.metrics.average_precision import average_precision, coco_ap
from regionspot.evaluation.metrics.detections import Detections, Masks
from regionspot.evaluation.metrics.ground_truth import read_ground_truth

SIDE = 64
CLASSES = (-3, 0, 4, 2**40)
WORLD_HAS = (
    "images above 300 detections",
    "detections with an equal score",
    "detections of area 0",
    "detections with an empty mask",
    "detections of unlisted classes",
    "annotations of area 0",
    "annotations with an empty mask",
    "ignored annotations",
    "crowd annotations",
    "absent classes",
    "not exhaustive classes",
)


def make_world(folder, seed, images):
    """Path of LVIS annotations with crowds, detections in random order, and counts of WORLD_HAS."""
    rng = np.random.default_rng(seed)
    records, annotations, rows = [], [], []
    for number, image_id in enumerate((rng.permutation(3 * images)[:images] - images).tolist()):
        absent, not_exhaustive = (rng.choice(CLASSES, rng.integers(3)).tolist() for _ in range(2))
        sizes = {"height": SIDE, "width": SIDE}
        lists = {"neg_category_ids": absent, "not_exhaustive_category_ids": not_exhaustive}
        records.append({"id": image_id, **sizes, **lists})
        present = [random_annotation(rng, image_id) for _ in range(rng.integers(1, 9))]
        annotations += present
        rows += [random_detection(rng, present) for _ in range(310 if number == 0 else rng.integers(40))]
    annotations = [annotations[index] for index in rng.permutation(len(annotations))]
    for number, annotation in enumerate(annotations, start=1):
        annotation["id"] = number
    rows = [rows[index] for index in rng.permutation(len(rows))]
    frequencies = ("r", "c", "f", "f")
    categories = [{"id": n, "name": str(n), "frequency": f} for n, f in zip(CLASSES, frequencies, strict=True)]
    path = folder / f"world{seed}.json"
    path.write_text(json.dumps({"images": records, "categories": categories, "annotations": annotations}))
    columns = [np.array(column) for column in zip(*rows, strict=True)]
    detections = Detections(*columns[:3], columns[3].astype(np.float32), np.arange(len(rows)), Masks.encode(columns[4]))
    return path, detections, count(records, annotations, detections)


def random_annotation(rng, image_id):
    box, mask = random_box(rng), np.zeros((SIDE, SIDE), bool)
    if rng.random() < 0.5:
        x, y, w, h = box
        corners = rng.uniform([x - 3, y - 3], [x + w + 3, y + h + 3], (rng.integers(3, 7), 2))
        segmentation = [corners.reshape(-1).tolist()]
    else:
        mask = mask_of(box, empty=rng.random() < 0.1)
        segmentation = Masks.encode(mask[None])[0]
        segmentation["counts"] = segmentation["counts"].decode()
    return {
        "image_id": image_id,
        "category_id": int(rng.choice(CLASSES[:3])),
        "bbox": box,
        "area": float(rng.choice([box[2] * box[3], 32**2, 96**2, 0], p=[0.7, 0.1, 0.1, 0.1])),
        "segmentation": segmentation,
        "ignore": int(rng.random() < 0.2),
        "iscrowd": int(rng.random() < 0.2),
    }


def random_detection(rng, annotations):
    """Image, class, box, score and mask; near an annotation, or elsewhere."""
    near = annotations[rng.integers(len(annotations))]
    category, box = near["category_id"], np.array(near["bbox"]) + rng.integers(-4, 5, 4) / rng.choice([1, 3])
    if rng.random() < 0.4:
        category, box = rng.choice(CLASSES), np.array(random_box(rng))
    box = np.clip(box, 0, SIDE)
    score = np.round(rng.normal(0.3, 0.3), 1)  # with -0.0 and negative ones, as of cosines
    return near["image_id"], category, box, score, mask_of(box, empty=rng.random() < 0.1)


def random_box(rng):
    corner = rng.uniform(0, 48, 2)
    size = rng.uniform(2, 40, 2) * (rng.random(2) > 0.05)
    return [*corner.tolist(), *np.minimum(size, SIDE - corner).tolist()]


def mask_of(box, empty):
    x, y, w, h = np.round(box).astype(int)
    mask = np.zeros((SIDE, SIDE), bool)
    mask[y : y + h, x : x + w] = not empty
    return mask


def count(records, annotations, detections):
    """How often each case of WORLD_HAS occurs."""
    listed = {(image["id"], category) for image in records for category in image["neg_category_ids"]}
    listed |= {(entry["image_id"], entry["category_id"]) for entry in annotations}
    pairs = zip(detections.image_ids.tolist(), detections.category_ids.tolist(), strict=True)
    scores = Counter(zip(detections.category_ids.tolist(), detections.scores.tolist(), strict=True))
    masks = [entry["segmentation"] for entry in annotations if isinstance(entry["segmentation"], dict)]
    values = (
        (np.unique(detections.image_ids, return_counts=True)[1] > 300).sum(),
        sum(number for number in scores.values() if number > 1),
        (detections.boxes_xywh[:, 2:].min(axis=1) == 0).sum(),
        sum(not detections.masks.decode(index).any() for index in range(len(detections))),
        sum(pair not in listed for pair in pairs),
        sum(entry["area"] == 0 for entry in annotations),
        sum(rle.area(mask) == 0 for mask in masks),
        sum(entry["ignore"] for entry in annotations),
        sum(entry["iscrowd"] for entry in annotations),
        sum(len(image["neg_category_ids"]) for image in records),
        sum(len(image["not_exhaustive_category_ids"]) for image in records),
    )
    return Counter(dict(zip(WORLD_HAS, map(int, values), strict=True)))


def assert_equals_lvis(path, detections, iou_type):
    """`average_precision` and LVISEval on the file, all classes at once, with its own limit of 300 per image."""
    with lvis_package._lvis() as lvis:
        dicts = list(detections.as_dicts(with_box=iou_type == "bbox", with_mask=iou_type == "segm"))
        official = lvis.LVISEval(str(path), dicts, iou_type)
        official.run()
    result = average_precision(read_ground_truth(path), detections, iou_type)
    assert result.engine == f"hotcoco {hotcoco.__version__}"
    assert np.array_equal(result.precision, official.eval["precision"])
    assert np.array_equal(result.recall, official.eval["recall"])
    assert {name: -1 if value is None else value for name, value in result.values.items()} == official.results
    return result.precision.size + result.recall.size


def assert_equals_pycocotools(path, detections, iou_type):
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(path))
        dicts = list(detections.as_dicts(with_box=iou_type == "bbox", with_mask=iou_type == "segm"))
        official = COCOeval(truth, truth.loadRes(dicts), iou_type)
        official.evaluate()
        official.accumulate()
        official.summarize()
    result = coco_ap(read_ground_truth(path, federated=False), detections, iou_type)
    assert np.array_equal(result.precision, official.eval["precision"][..., -1])
    assert np.array_equal(result.recall, official.eval["recall"][..., -1])
    assert [-1 if value is None else value for value in result.values.values()] == official.stats.tolist()
    return result.precision.size + result.recall.size


@pytest.mark.parametrize("seed", range(10))
def test_lvis_ap_has_the_arrays_and_figures_of_the_official_package(tmp_path, seed):
    path, detections, counts = make_world(tmp_path, seed, images=3)
    assert counts["images above 300 detections"] == 1
    for iou_type in ("bbox", "segm"):
        assert_equals_lvis(path, detections, iou_type)


@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
def test_coco_ap_has_the_arrays_and_figures_of_the_official_package(tmp_path, iou_type):
    path, detections, _ = make_world(tmp_path, 0, images=4)
    assert_equals_pycocotools(path, detections, iou_type)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("first", range(0, 100, 25))
def test_parity_over_many_worlds(tmp_path, first, stress_result, stress_size):
    started, counts, compared = time.monotonic(), Counter(), 0
    seeds = range(1000 + first, 1000 + first + stress_size(25))
    for seed in seeds:
        path, detections, world = make_world(tmp_path, seed, images=12)
        counts += world
        for iou_type in ("bbox", "segm"):
            compared += assert_equals_lvis(path, detections, iou_type)
            compared += assert_equals_pycocotools(path, detections, iou_type)
    assert all(counts[case] for case in WORLD_HAS)
    stress_result(seeds=list(seeds), seconds=time.monotonic() - started, compared=compared, **counts)
