import json
import subprocess
import sys

import numpy as np
import pytest

from regionspot.cache.errors import AnnotationError, InputError
from regionspot.evaluation import lvis_ap as module
from regionspot.evaluation.detections import (
    Detections,
    Masks,
    concatenate_masks,
    detections_of_picture,
    from_columns,
    to_columns,
)
from regionspot.evaluation.ground_truth import read_ground_truth
from regionspot.evaluation.lvis_ap import METRICS, best_per_picture, lvis_ap

SIDE = 128


def annotation(number, image_id, category_id, box):
    x, y, w, h = box
    polygon = [x, y, x + w, y, x + w, y + h, x, y + h]
    area = w * h
    fields = {"image_id": image_id, "category_id": category_id, "bbox": box, "area": area, "segmentation": [polygon]}
    return {"id": number, **fields}


def write_truth(path, annotations, images=(1, 2), negatives=None):
    frequencies = {7: "r", 3: "c", 5: "f"}
    pictures = [
        {"id": i, "height": SIDE, "width": SIDE, "neg_category_ids": (negatives or {}).get(i, [])} for i in images
    ]
    dataset = {
        "images": [{**picture, "not_exhaustive_category_ids": []} for picture in pictures],
        "categories": [{"id": i, "name": str(i), "frequency": f} for i, f in frequencies.items()],
        "annotations": annotations,
    }
    path.write_text(json.dumps(dataset))
    return path


def detections(rows):
    """Rows of (image_id, category_id, box, score), each with the mask of its box."""
    masks = np.zeros((len(rows), SIDE, SIDE), bool)
    for mask, (_, _, (x, y, w, h), _) in zip(masks, rows, strict=True):
        mask[y : y + h, x : x + w] = True
    return Detections(
        np.array([row[0] for row in rows], np.int64),
        np.array([row[1] for row in rows], np.int64),
        np.array([row[2] for row in rows], float).reshape(-1, 4),
        np.array([row[3] for row in rows], np.float32),
        np.arange(len(rows)),
        Masks.encode(masks),
    )


@pytest.fixture
def truth(tmp_path):
    boxes = [annotation(1, 1, 7, [10, 10, 20, 20]), annotation(2, 1, 3, [40, 40, 50, 50])]
    boxes += [annotation(3, 2, 5, [0, 0, 100, 100]), annotation(4, 2, 3, [5, 5, 30, 30])]
    return write_truth(tmp_path / "truth.json", boxes)


PERFECT = [
    (1, 7, [10, 10, 20, 20], 0.9),
    (1, 3, [40, 40, 50, 50], 0.8),
    (2, 5, [0, 0, 100, 100], 0.7),
    (2, 3, [5, 5, 30, 30], 0.6),
]


@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
def test_perfect_detections_have_an_ap_of_one_in_every_group(truth, iou_type):
    assert lvis_ap(truth, detections(PERFECT), iou_type).values == pytest.approx(dict.fromkeys(METRICS, 1.0))


def test_a_wrong_detection_before_the_right_one_halves_the_precision(truth):
    rows = [*PERFECT[:1], (1, 3, [90, 90, 30, 30], 0.95), *PERFECT[1:]]
    found = lvis_ap(truth, detections(rows), "bbox")
    # Class 3: the wrong one first, then both right ones: precision 1/2, 2/3, so 2/3 at every recall.
    assert found["APc"] == pytest.approx(2 / 3)
    assert found["AP"] == pytest.approx((1 + 2 / 3 + 1) / 3)


def test_a_loose_box_counts_up_to_its_overlap_only(truth):
    # 20 x 16 of 20 x 20: an overlap of 0.8 passes the thresholds 0.5 to 0.8, seven of ten.
    rows = [(1, 7, [10, 10, 20, 16], 0.9), *PERFECT[1:]]
    found = lvis_ap(truth, detections(rows), "bbox")
    assert (found["APr"], found["AP75"]) == (pytest.approx(0.7), pytest.approx(1))


def test_a_class_that_a_picture_does_not_list_is_not_held_against_the_detector(tmp_path):
    boxes = [annotation(1, 1, 3, [10, 10, 20, 20]), annotation(2, 2, 5, [0, 0, 50, 50])]
    rows = [(1, 3, [10, 10, 20, 20], 0.5), (2, 3, [60, 60, 20, 20], 0.9)]
    unlisted = write_truth(tmp_path / "unlisted.json", boxes)
    listed = write_truth(tmp_path / "listed.json", boxes, negatives={2: [3]})
    assert lvis_ap(unlisted, detections(rows), "bbox")["APc"] == pytest.approx(1)
    assert lvis_ap(listed, detections(rows), "bbox")["APc"] == pytest.approx(0.5)


def test_a_group_without_truth_has_no_ap_rather_than_minus_one(tmp_path):
    path = write_truth(tmp_path / "truth.json", [annotation(1, 1, 3, [10, 10, 20, 20])])
    found = lvis_ap(path, detections([(1, 3, [10, 10, 20, 20], 0.5)]), "bbox")
    assert (found["APr"], found["APf"], found["APl"]) == (None, None, None)
    assert (found["APc"], found["APs"]) == (pytest.approx(1), pytest.approx(1))


@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
def test_no_detections_at_all_is_an_ap_of_zero(truth, iou_type):
    assert lvis_ap(truth, detections([]), iou_type).values == dict.fromkeys(METRICS, 0.0)


def test_a_subset_of_pictures_is_evaluated_as_a_file_of_only_these(truth, tmp_path):
    found = lvis_ap(truth, detections([*PERFECT, (2, 3, [90, 90, 9, 9], 0.99)]), "bbox", np.array([1]))
    kept = [entry for entry in json.loads(truth.read_text())["annotations"] if entry["image_id"] == 1]
    alone = lvis_ap(write_truth(tmp_path / "alone.json", kept, images=(1,)), detections(PERFECT[:2]), "bbox")
    assert (found.pictures, found.detections) == (1, 2)
    assert found == alone


def test_only_the_best_300_of_a_picture_count_and_ties_keep_their_order():
    scores = np.repeat([0.5, 0.9, 0.5], [200, 50, 200])
    many = detections([(1, 3, [index % 100, 0, 9, 9], score) for index, score in enumerate(scores)])
    kept = best_per_picture(many)
    assert kept.regions.tolist() == [*range(250), *range(250, 300)]


def random_detections(truth, seed=0):
    """Boxes shaken about the true ones and boxes of any class, so that every threshold and list matters."""
    rng = np.random.default_rng(seed)
    ids = truth.category_ids
    images, boxes = (np.array([entry[key] for entry in truth.annotations]) for key in ("image_id", "bbox"))
    classes = np.array([entry["category_id"] for entry in truth.annotations])
    rows = []
    for picture in truth.images:
        of_picture = images == picture["id"]
        for _ in range(350 if picture is truth.images[3] else 10):
            if of_picture.any() and rng.random() < 0.5:
                pick = rng.choice(np.flatnonzero(of_picture))
                rows.append((picture["id"], classes[pick], boxes[pick] + rng.normal(0, 6, 4)))
            else:
                rows.append((picture["id"], rng.choice(ids), rng.uniform(5, 200, 4)))
    scores = np.round(rng.random(len(rows)), 2).astype(np.float32)  # rounded: ties are the hard part
    xywh = np.maximum(np.array([row[2] for row in rows]), 0)
    sizes = {picture["id"]: (picture["height"], picture["width"]) for picture in truth.images}
    masks = [mask_of_box(sizes[row[0]], box) for row, box in zip(rows, xywh, strict=True)]
    columns = (np.array([row[0] for row in rows]), np.array([row[1] for row in rows]), xywh, scores)
    return Detections(*columns, np.arange(len(rows)), concatenate_masks(masks))


def mask_of_box(size, box):
    mask = np.zeros((1, *size), bool)
    x, y, w, h = box.astype(int)
    mask[:, y : y + h, x : x + w] = True
    return Masks.encode(mask)


@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
def test_classes_in_blocks_give_the_numbers_that_lvis_gives_for_all_at_once(coco_mini, monkeypatch, iou_type):
    path = coco_mini / "annotations/lvis_mini_val.json"
    found = random_detections(read_ground_truth(path))
    with module._lvis() as lvis:
        boxes_or_masks = found.as_dicts(with_box=iou_type == "bbox", with_mask=iou_type == "segm")
        whole = lvis.LVISEval(str(path), list(boxes_or_masks), iou_type)
        whole.run()
    expected = {metric: whole.results[metric] for metric in METRICS}
    monkeypatch.setattr(module, "CLASSES_AT_ONCE", 7)
    assert 0.01 < expected["AP"] < 0.9
    assert lvis_ap(path, found, iou_type).values == expected


def test_numpy_and_logging_are_as_before_and_opencv_is_not_needed(truth):
    program = f"""
import logging, pathlib, sys
sys.modules["cv2"] = None  # what an import of a package that is not there looks like
import numpy as np
from regionspot.evaluation.detections import concatenate
from regionspot.evaluation.lvis_ap import lvis_ap
print(lvis_ap(pathlib.Path({str(truth)!r}), concatenate([]), "bbox")["AP"])
print(hasattr(np, "float"), sys.modules.get("cv2"), logging.getLogger().handlers, logging.getLogger("lvis").level)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["0.0", "False None [] 0"]
    assert done.stderr == ""


def test_numpy_is_put_back_when_lvis_fails():
    with pytest.raises(ZeroDivisionError), module._lvis():
        vars(np)["float"](1 / 0)
    assert not hasattr(np, "float")


def broken(truth, change):
    dataset = json.loads(truth.read_text())
    change(dataset)
    return json.dumps(dataset)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda truth: truth.read_text()[:-40], "is not whole JSON"),
        (lambda truth: "[]", 'has no list "images"'),
        (lambda truth: broken(truth, lambda d: d["images"][1].pop("neg_category_ids")), r"images\[1\] has no \"neg_"),
        (lambda truth: broken(truth, lambda d: d["categories"][0].pop("frequency")), r"categories\[0\] has no \"freq"),
        (lambda truth: broken(truth, lambda d: d["categories"][2].update(frequency="x")), "frequency 'x'"),
        (lambda truth: broken(truth, lambda d: d["annotations"][3].update(id=0)), "counts as a miss"),
        (lambda truth: broken(truth, lambda d: d["annotations"][3].update(image_id=9)), "image_id 9"),
        (lambda truth: broken(truth, lambda d: d["annotations"][3].pop("segmentation")), "segmentation"),
    ],
)
def test_annotations_that_lvis_would_stumble_over_are_named_in_one_line(truth, tmp_path, content, message):
    path = tmp_path / "broken.json"
    path.write_text(content(truth))
    with pytest.raises(AnnotationError, match=message) as caught:
        lvis_ap(path, detections(PERFECT), "segm")
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_annotation_file_is_named(tmp_path):
    with pytest.raises(AnnotationError, match=r"absent.json: cannot be read"):
        lvis_ap(tmp_path / "absent.json", detections([]), "bbox")


def test_detections_that_do_not_belong_to_the_file_are_refused(truth):
    with pytest.raises(InputError, match="picture id 9"):
        lvis_ap(truth, detections([(9, 3, [0, 0, 9, 9], 0.5)]), "bbox")
    with pytest.raises(InputError, match="class id 4"):
        lvis_ap(truth, detections([(1, 4, [0, 0, 9, 9], 0.5)]), "bbox")
    with pytest.raises(InputError, match="no picture with id 9"):
        lvis_ap(truth, detections(PERFECT), "bbox", np.array([9]))
    without = Detections(*(getattr(detections(PERFECT), name) for name in list(Detections.__dataclass_fields__)[:5]))
    with pytest.raises(InputError, match="have no masks"):
        lvis_ap(truth, without, "segm")


def test_the_best_pairs_of_region_and_class_are_kept_with_the_box_score_in_them():
    probabilities = np.array([[0.6, 0.4], [0.1, 0.9]], np.float32)
    boxes = np.array([[0, 0, 10, 20], [5, 5, 8, 9]], np.float32)
    masks = Masks.encode(np.ones((2, 4, 4), bool))
    found = detections_of_picture(8, boxes, probabilities, np.array([30, 10]), np.float32([1, 0.5]), masks, limit=3)
    assert found.category_ids.tolist() == [30, 10, 10]
    assert found.regions.tolist() == [0, 1, 0]
    assert found.scores.tolist() == pytest.approx([0.6, 0.45, 0.4])
    assert found.boxes_xywh.tolist() == [[0, 0, 10, 20], [5, 5, 3, 4], [0, 0, 10, 20]]
    back = from_columns(to_columns(found))
    assert list(back.as_dicts()) == list(found.as_dicts())
