import json
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import version

import numpy as np
import pytest

from regionspot.cache.errors import AnnotationError, InputError
from regionspot.evaluation.metrics import hotcoco_engine, lvis_package
from regionspot.evaluation.metrics.average_precision import (
    METRICS,
    average_precision,
    best_per_class,
    best_per_image,
    fixed_ap,
)
from regionspot.evaluation.metrics.detections import Detections, Masks, concatenate_masks
from regionspot.evaluation.metrics.ground_truth import read_ground_truth
from regionspot.pipeline.datasets.field_parsing import image_id

SIDE = 128


def lvis_ap(path, *arguments, **options):
    return average_precision(read_ground_truth(path), *arguments, **options)


def annotation(number, image_id, category_id, box):
    x, y, w, h = box
    polygon = [x, y, x + w, y, x + w, y + h, x, y + h]
    area = w * h
    fields = {"image_id": image_id, "category_id": category_id, "bbox": box, "area": area, "segmentation": [polygon]}
    return {"id": number, **fields}


def write_ground_truth(path, annotations, images=(1, 2), negatives=None):
    frequencies = {7: "r", 3: "c", 5: "f"}
    records = [
        {"id": i, "height": SIDE, "width": SIDE, "neg_category_ids": (negatives or {}).get(i, [])} for i in images
    ]
    dataset = {
        "images": [{**record, "not_exhaustive_category_ids": []} for record in records],
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
def ground_truth(tmp_path):
    boxes = [annotation(1, 1, 7, [10, 10, 20, 20]), annotation(2, 1, 3, [40, 40, 50, 50])]
    boxes += [annotation(3, 2, 5, [0, 0, 100, 100]), annotation(4, 2, 3, [5, 5, 30, 30])]
    return write_ground_truth(tmp_path / "truth.json", boxes)


PERFECT = [
    (1, 7, [10, 10, 20, 20], 0.9),
    (1, 3, [40, 40, 50, 50], 0.8),
    (2, 5, [0, 0, 100, 100], 0.7),
    (2, 3, [5, 5, 30, 30], 0.6),
]


@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
def test_perfect_detections_have_ap_1_in_every_group(ground_truth, iou_type):
    assert lvis_ap(ground_truth, detections(PERFECT), iou_type).values == pytest.approx(dict.fromkeys(METRICS, 1.0))


def test_a_false_positive_with_the_best_score_lowers_the_precision(ground_truth):
    rows = [*PERFECT[:1], (1, 3, [90, 90, 30, 30], 0.95), *PERFECT[1:]]
    result = lvis_ap(ground_truth, detections(rows), "bbox")
    # Class 3: a false positive, then two true ones: precision 1/2, 2/3, so 2/3 at every recall.
    assert result["APc"] == pytest.approx(2 / 3)
    assert result["AP"] == pytest.approx((1 + 2 / 3 + 1) / 3)


def test_a_loose_box_is_correct_up_to_its_iou(ground_truth):
    # 20 x 16 of 20 x 20: an IoU of 0.8 passes the thresholds 0.5 to 0.8, seven of ten.
    rows = [(1, 7, [10, 10, 20, 16], 0.9), *PERFECT[1:]]
    result = lvis_ap(ground_truth, detections(rows), "bbox")
    assert (result["APr"], result["AP75"]) == (pytest.approx(0.7), pytest.approx(1))


def test_detections_of_classes_that_the_image_does_not_list_are_ignored(tmp_path):
    boxes = [annotation(1, 1, 3, [10, 10, 20, 20]), annotation(2, 2, 5, [0, 0, 50, 50])]
    rows = [(1, 3, [10, 10, 20, 20], 0.5), (2, 3, [60, 60, 20, 20], 0.9)]
    unlisted = write_ground_truth(tmp_path / "unlisted.json", boxes)
    listed = write_ground_truth(tmp_path / "listed.json", boxes, negatives={2: [3]})
    assert lvis_ap(unlisted, detections(rows), "bbox")["APc"] == pytest.approx(1)
    assert lvis_ap(listed, detections(rows), "bbox")["APc"] == pytest.approx(0.5)


def test_the_ap_of_a_group_without_ground_truth_is_none(tmp_path):
    path = write_ground_truth(tmp_path / "truth.json", [annotation(1, 1, 3, [10, 10, 20, 20])])
    result = lvis_ap(path, detections([(1, 3, [10, 10, 20, 20], 0.5)]), "bbox")
    assert (result["APr"], result["APf"], result["APl"]) == (None, None, None)
    assert (result["APc"], result["APs"]) == (pytest.approx(1), pytest.approx(1))


@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
def test_ap_without_detections_is_0(ground_truth, iou_type):
    assert lvis_ap(ground_truth, detections([]), iou_type).values == dict.fromkeys(METRICS, 0.0)


def test_a_subset_of_images_is_evaluated_like_a_file_of_these(ground_truth, tmp_path):
    result = lvis_ap(ground_truth, detections([*PERFECT, (2, 3, [90, 90, 9, 9], 0.99)]), "bbox", np.array([1]))
    kept = [entry for entry in json.loads(ground_truth.read_text())["annotations"] if entry["image_id"] == 1]
    alone = lvis_ap(write_ground_truth(tmp_path / "alone.json", kept, images=(1,)), detections(PERFECT[:2]), "bbox")
    assert (result.images, result.detections) == (1, 2)
    assert (result.values, result.engine) == (alone.values, alone.engine)


def test_the_best_300_of_an_image_are_kept_and_ties_keep_their_order():
    scores = np.repeat([0.5, 0.9, 0.5], [200, 50, 200])
    many = detections([(1, 3, [index % 100, 0, 9, 9], score) for index, score in enumerate(scores)])
    kept = best_per_image(many)
    assert kept.regions.tolist() == [*range(250), *range(250, 300)]


def test_fixed_ap_has_a_limit_per_class_instead_of_per_image(ground_truth):
    many = detections([(1, 3, [90, 90, 30, 30], 0.99)] * 310 + PERFECT)
    assert lvis_ap(ground_truth, many, "bbox")["APr"] == 0
    fixed, official = (fixed_ap(read_ground_truth(ground_truth), many, "bbox", engine=e) for e in ("hotcoco", "lvis"))
    assert (fixed["APr"], fixed["AR"], fixed.detections) == (pytest.approx(1), pytest.approx(1), 314)
    assert np.array_equal(fixed.precision, official.precision)
    assert fixed.values == official.values
    kept = best_per_class(many, limit=3)
    assert kept.category_ids.tolist() == [3, 3, 3, 7, 5]
    assert kept.regions.tolist() == [0, 1, 2, 310, 312]


def test_every_class_has_a_row_of_figures(ground_truth):
    rows = [PERFECT[0], (2, 3, [5, 5, 30, 30], 0.6), (2, 5, [0, 0, 100, 80], 0.5)]
    classes = lvis_ap(ground_truth, detections(rows), "bbox").classes
    assert classes.category_ids.tolist() == [3, 5, 7]
    assert classes.ap50.tolist() == pytest.approx([51 / 101, 1, 1])  # one of the two boxes of class 3
    assert classes.ap.tolist() == pytest.approx([51 / 101, 0.7, 1])
    assert (classes.boxes.tolist(), classes.frequencies.tolist()) == ([2, 1, 1], ["c", "f", "r"])


def random_detections(ground_truth, seed=0):
    """Boxes near the annotated ones and random ones of any class, so that every threshold matters."""
    rng = np.random.default_rng(seed)
    ids = ground_truth.category_ids
    images, boxes = (np.array([entry[key] for entry in ground_truth.annotations]) for key in ("image_id", "bbox"))
    classes = np.array([entry["category_id"] for entry in ground_truth.annotations])
    rows = []
    for image in ground_truth.images:
        in_image = images == image["id"]
        for _ in range(350 if image is ground_truth.images[3] else 10):
            if in_image.any() and rng.random() < 0.5:
                pick = rng.choice(np.flatnonzero(in_image))
                rows.append((image["id"], classes[pick], boxes[pick] + rng.normal(0, 6, 4)))
            else:
                rows.append((image["id"], rng.choice(ids), rng.uniform(5, 200, 4)))
    scores = np.round(rng.random(len(rows)), 2).astype(np.float32)  # rounded, to have ties
    xywh = np.maximum(np.array([row[2] for row in rows]), 0)
    sizes = {image["id"]: (image["height"], image["width"]) for image in ground_truth.images}
    masks = [mask_of_box(sizes[row[0]], box) for row, box in zip(rows, xywh, strict=True)]
    columns = (np.array([row[0] for row in rows]), np.array([row[1] for row in rows]), xywh, scores)
    return Detections(*columns, np.arange(len(rows)), concatenate_masks(masks))


def mask_of_box(size, box):
    mask = np.zeros((1, *size), bool)
    x, y, w, h = box.astype(int)
    mask[:, y : y + h, x : x + w] = True
    return Masks.encode(mask)


@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
def test_classes_in_blocks_give_the_numbers_of_lvis_for_all_at_once(coco_mini, monkeypatch, iou_type):
    path = coco_mini / "annotations/lvis_mini_val.json"
    result = random_detections(read_ground_truth(path))
    with lvis_package._lvis() as lvis:
        boxes_or_masks = result.as_dicts(with_box=iou_type == "bbox", with_mask=iou_type == "segm")
        whole = lvis.LVISEval(str(path), list(boxes_or_masks), iou_type)
        whole.run()
    expected = {metric: whole.results[metric] for metric in METRICS}
    monkeypatch.setattr(lvis_package, "CLASS_BATCH", 7)
    monkeypatch.setattr(hotcoco_engine, "BLOCK", len(result) // 9)
    assert 0.01 < expected["AP"] < 0.9
    for engine in ("hotcoco", "lvis"):
        ap = lvis_ap(path, result, iou_type, engine=engine)
        assert ap.values == expected
        assert ap.engine == f"{engine} {version(engine)}"


def test_numpy_and_logging_are_restored_and_opencv_is_not_needed(ground_truth):
    program = f"""
import logging, pathlib, sys
sys.modules["cv2"] = None  # its import fails then
import numpy as np
from regionspot.evaluation.metrics.detections import concatenate
from regionspot.evaluation.metrics.average_precision import average_precision
from regionspot.evaluation.metrics.ground_truth import read_ground_truth
ground_truth = read_ground_truth(pathlib.Path({str(ground_truth)!r}))
print(average_precision(ground_truth, concatenate([]), "bbox", engine="lvis")["AP"])
print(hasattr(np, "float"), sys.modules.get("cv2"), logging.getLogger().handlers, logging.getLogger("lvis").level)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["0.0", "False None [] 0"]
    assert done.stderr.endswith("there are no detections to evaluate; every AP is 0\n")
    assert done.stderr.count("\n") == 1


def test_numpy_is_restored_when_lvis_fails():
    with pytest.raises(ZeroDivisionError), lvis_package._lvis():
        vars(np)["float"](1 / 0)
    assert not hasattr(np, "float")


def broken(ground_truth, change):
    dataset = json.loads(ground_truth.read_text())
    change(dataset)
    return json.dumps(dataset)


def changed(change):
    return lambda ground_truth: broken(ground_truth, change)


def annotation_3(**fields):
    return changed(lambda d: d["annotations"][3].update(fields))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda ground_truth: ground_truth.read_text()[:-40], "is truncated"),
        (lambda ground_truth: "[]", 'has no list "images"'),
        (
            changed(lambda d: d["images"][1].pop("neg_category_ids")),
            "images[1] has no `neg_",
        ),
        (
            changed(lambda d: d["images"][1].update(neg_category_ids=[4])),
            "names category 4",
        ),
        (
            changed(lambda d: d["images"][1].update(id=1)),
            "images[0] and images[1] have the same id 1",
        ),
        (
            changed(lambda d: d["images"][1].pop("height")),
            "images[1] has no `height`",
        ),
        (
            changed(lambda d: d["categories"][0].pop("frequency")),
            "categories[0] has no `frequency`",
        ),
        (
            changed(lambda d: d["categories"][2].update(frequency="x")),
            '.frequency is "x"',
        ),
        (changed(lambda d: d["categories"][2].update(id=3)), "have the same id 3"),
        (annotation_3(image_id=9), ".image_id is 9, which the file does not define"),
        (annotation_3(category_id=4), ".category_id is 4"),
        (
            annotation_3(area="large"),
            '1 of 4 annotations cannot be evaluated, the first: annotations[3].area is "large"',
        ),
        (annotation_3(area=-1), ".area is -1, expected a number of at least 0"),
        (annotation_3(bbox=[1, 2, float("nan"), 4]), ".bbox is [1, 2, null, 4]"),
        (annotation_3(bbox=[1, 2, -3, 4]), ".bbox is [1, 2, -3, 4]"),
        (
            changed(lambda d: d["annotations"][3].pop("segmentation")),
            "has no `segmentation`; use --no-masks",
        ),
        (annotation_3(segmentation=None), ".segmentation is null"),
        (annotation_3(segmentation=[]), ".segmentation is [], expected polygons of at least 3 points"),
        (annotation_3(segmentation=[[5, 5, 30, 5, 30, 30], [1, 2]]), ".segmentation is [[5, 5"),
        (annotation_3(segmentation=[[5, 5, 30, 5, 30, 30, 7]]), ".segmentation is [[5, 5"),
        (annotation_3(segmentation=[[5, 5, 30, "5", 30, 30]]), ".segmentation is [[5, 5"),
        (annotation_3(segmentation=[5, 5, 30, 5, 30, 30]), ".segmentation is [5, 5"),
        (annotation_3(segmentation={"size": [SIDE, SIDE]}), " has no `counts`"),
        (annotation_3(segmentation={"size": [9, 9], "counts": [81]}), ".segmentation.size is [9, 9]"),
        (annotation_3(segmentation={"size": [SIDE, SIDE], "counts": [0, 10]}), ".segmentation.counts is [0, 10]"),
        (annotation_3(segmentation={"size": [SIDE, SIDE], "counts": "abc"}), '.segmentation.counts is "abc"'),
    ],
)
def test_invalid_annotations_are_refused_in_one_line(ground_truth, tmp_path, content, message):
    path = tmp_path / "broken.json"
    path.write_text(content(ground_truth))
    with pytest.raises(AnnotationError) as caught:
        lvis_ap(path, detections(PERFECT), "segm")
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("ids", [[7, 7, 7, 7], [0, 1, 2, 3], [-4, -3, -2, -1], ["a", "b", None, 2**70], [1, 2, 2, 0]])
@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
def test_invalid_annotation_ids_do_not_change_ap_and_log_a_warning(ground_truth, tmp_path, caplog, ids, iou_type):
    def change(dataset):
        for entry, number in zip(dataset["annotations"], ids, strict=True):
            entry["id"] = number

    path = tmp_path / "ids.json"
    path.write_text(broken(ground_truth, change))
    assert lvis_ap(path, detections(PERFECT), iou_type).values == pytest.approx(dict.fromkeys(METRICS, 1.0))
    assert "annotation ids are missing, repeated, 0 or less; renumbered" in caplog.text


def test_ids_of_images_and_classes_may_be_0_negative_huge_or_strings(tmp_path, caplog):
    boxes = [annotation(1, 1, 7, [10, 10, 20, 20]), annotation(2, 2, 3, [40, 40, 50, 50])]
    path = write_ground_truth(tmp_path / "truth.json", boxes, negatives={1: [3], 2: [7]})
    rows = [(1, 7, [10, 10, 20, 20], 0.9), (2, 3, [40, 40, 50, 50], 0.8), (1, 3, [0, 0, 9, 9], 0.99)]
    expected = lvis_ap(path, detections(rows), "bbox").values
    for images, classes in (((0, -5), (-1, 0, -2)), ((2**62, -(2**63)), (2**40, 5, 2**41)), (("a", "b"), (1, 2, 3))):
        image_of, class_of = dict(zip((1, 2), images, strict=True)), dict(zip((7, 3, 5), classes, strict=True))

        def change(dataset, image_of=image_of, class_of=class_of):
            for image in dataset["images"]:
                image["id"] = image_of[image["id"]]
                image["neg_category_ids"] = [class_of[category] for category in image["neg_category_ids"]]
            for category in dataset["categories"]:
                category["id"] = class_of[category["id"]]
            for entry in dataset["annotations"]:
                entry["image_id"], entry["category_id"] = image_of[entry["image_id"]], class_of[entry["category_id"]]

        other = tmp_path / "other.json"
        other.write_text(broken(path, change))
        numbers = {image: image_id("", image) for image in images}
        moved = [(numbers[image_of[image]], class_of[kind], box, score) for image, kind, box, score in rows]
        assert lvis_ap(other, detections(moved), "bbox").values == expected
    assert not caplog.text


def test_numbers_as_strings_are_parsed(ground_truth, tmp_path):
    def change(dataset):
        for entry in dataset["annotations"]:
            entry.update(area=str(entry["area"]), image_id=float(entry["image_id"]), bbox=list(map(str, entry["bbox"])))

    path = tmp_path / "text.json"
    path.write_text("\ufeff" + broken(ground_truth, change))
    assert lvis_ap(path, detections(PERFECT), "bbox").values == pytest.approx(dict.fromkeys(METRICS, 1.0))


def test_annotations_of_area_0_log_a_warning(ground_truth, tmp_path, caplog):
    path = tmp_path / "flat.json"
    path.write_text(broken(ground_truth, lambda d: d["annotations"][3].update(area=0)))
    read_ground_truth(path)
    assert "1 annotations have area 0; lvis ignores them" in caplog.text


@pytest.mark.parametrize("as_text", [True, False])
def test_run_length_masks_are_accepted(ground_truth, tmp_path, as_text):
    def change(dataset):
        for entry, mask in zip(dataset["annotations"], masks, strict=True):
            entry["segmentation"] = mask

    result = detections(PERFECT).masks
    masks = [result[index] for index in range(4)]
    if as_text:
        masks = [{**mask, "counts": mask["counts"].decode()} for mask in masks]
    else:
        masks = [{"size": mask["size"], "counts": runs_of(result.decode(index))} for index, mask in enumerate(masks)]
    path = tmp_path / "runs.json"
    path.write_text(broken(ground_truth, change))
    assert lvis_ap(path, detections(PERFECT), "segm").values == pytest.approx(dict.fromkeys(METRICS, 1.0))


def runs_of(mask):
    flat = mask.T.reshape(-1)
    edges = np.flatnonzero(np.diff(flat)) + 1
    runs = np.diff([0, *edges, len(flat)]).tolist()
    return [0, *runs] if flat[0] else runs


def test_the_error_for_a_missing_annotation_file_names_it(tmp_path):
    with pytest.raises(AnnotationError, match=r"absent.json: does not exist"):
        lvis_ap(tmp_path / "absent.json", detections([]), "bbox")


def test_detections_of_unknown_images_and_classes_are_refused(ground_truth):
    with pytest.raises(InputError, match="image id 9"):
        lvis_ap(ground_truth, detections([(9, 3, [0, 0, 9, 9], 0.5)]), "bbox")
    with pytest.raises(InputError, match="class id 4"):
        lvis_ap(ground_truth, detections([(1, 4, [0, 0, 9, 9], 0.5)]), "bbox")
    with pytest.raises(InputError, match="no image with id 9"):
        lvis_ap(ground_truth, detections(PERFECT), "bbox", np.array([9]))
    without = Detections(*(getattr(detections(PERFECT), name) for name in list(Detections.__dataclass_fields__)[:5]))
    with pytest.raises(InputError, match="mask AP needs masks"):
        lvis_ap(ground_truth, without, "segm")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"scores": np.float32([0.9, np.nan, 0.7, np.inf])}, "2 of 4 cannot be evaluated, the first: detections[1]"),
        ({"boxes_xywh": np.array([[0, 0, -9, 9.0]] * 4)}, "has box [0.0, 0.0, -9.0, 9.0], expected finite"),
        ({"image_ids": np.array([1, 8, 2, 9])}, "image id 8 of the detections (2 of 4 have an unknown image)"),
        (
            {"masks": Masks.encode(np.zeros((4, 9, 9), bool))},
            "4 of 4 masks do not fit their image, the first: detections[0] of image 1 has height and width [9, 9]",
        ),
    ],
)
def test_detections_that_cannot_be_evaluated_are_refused_in_one_line(ground_truth, changed, message):
    with pytest.raises(InputError) as caught:
        lvis_ap(ground_truth, replace(detections(PERFECT), **changed), "segm")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_detections_log_a_warning(ground_truth, caplog):
    lvis_ap(ground_truth, detections([]), "bbox")
    assert "there are no detections to evaluate; every AP is 0" in caplog.text


def test_annotations_without_lists_of_absent_classes_have_no_lvis_ap(ground_truth):
    with pytest.raises(AnnotationError, match="lists no absent classes, which LVIS AP needs; use COCO AP"):
        average_precision(read_ground_truth(ground_truth, federated=False), detections(PERFECT), "bbox")
    with pytest.raises(InputError, match="engine 'coco'"):
        lvis_ap(ground_truth, detections(PERFECT), "bbox", engine="coco")
