"""Every protocol by which an evaluation counts, and what its results state about it."""

import csv
import hashlib
import json
import re

import numpy as np
import pytest
import torch

from regionspot.cache.errors import InputError
from regionspot.cache.format.manifest import Category
from regionspot.evaluation.evaluate import EvaluationOptions, evaluate
from regionspot.evaluation.inference.scoring import RegionScores
from regionspot.evaluation.metrics.average_precision import average_precision, coco_ap
from regionspot.evaluation.metrics.detections import Detections
from regionspot.evaluation.metrics.ground_truth import read_ground_truth
from regionspot.evaluation.metrics.seen_classes import seen_classes
from regionspot.evaluation.metrics.selection import Selection
from regionspot.evaluation.report.protocol import Protocol
from regionspot.evaluation.report.results import evaluate_method
from regionspot.evaluation.report.tables import results_text
from regionspot.pipeline.datasets.registry import read_dataset


class HalfRight:
    """Scores without models: the right class of an image's regions is the best, a good, the best and a bad one."""

    name, device = "half right", torch.device("cpu")

    def __init__(self, manifest):
        self.manifest, self.identity = manifest, {}
        self.features = {"toy_clip": {"preprocess": "direct", "dtype": "float32", "exif": "auto"}}

    def score(self, parts, stats):
        for row in [row for part in parts for row in part]:
            classes = self.manifest.category_index[self.manifest.regions(row)]
            probabilities = np.random.default_rng(row).uniform(0, 0.3, (len(classes), len(self.manifest.categories)))
            probabilities[np.arange(len(classes)), classes] = np.resize([0.6, 0.292, 0.6, 0.01], len(classes))
            yield RegionScores(probabilities.astype(np.float32))


@pytest.fixture(scope="module")
def manifest(world):
    return read_dataset("toy", world, "val")


@pytest.fixture(scope="module")
def results(world, manifest, tmp_path_factory):
    """`results(**fields)` evaluates by the protocol with these fields, and returns its results and their folder."""

    def run(**fields):
        out = tmp_path_factory.mktemp("results")
        ground_truth = read_ground_truth(world / "toy_val.json", federated=fields.get("metric") != "coco")
        protocol = Protocol(sha256=manifest.source["files"], **fields)
        return evaluate_method(HalfRight(manifest), ground_truth, out, protocol), out

    return run


@pytest.fixture(scope="module")
def standard(results, manifest):
    """LVIS AP; the head was trained on the first 60 classes, in other spellings."""
    trained = tuple(category.name.upper().replace(" ", "_") for category in manifest.categories[:60])
    return results(trained_classes=trained, fixed=True, selection=Selection(limit=3000))


def detections_of(out):
    found = json.loads((out / "detections.json").read_text())
    columns = ([each[key] for each in found] for key in ("image_id", "category_id", "bbox", "score"))
    image_ids, category_ids, boxes, scores = map(np.array, columns)
    return Detections(image_ids, category_ids, boxes, scores.astype(np.float32), np.arange(len(found)))


def test_results_state_the_whole_protocol_and_the_hashes_of_all_files(standard, world, manifest):
    result, out = standard
    assert json.loads((out / "results.json").read_text()) == result
    record = dict(result["protocol"])
    hashes = record.pop("sha256")
    for file, folder in (("toy_val.json", world), ("detections.json", out)):
        assert hashes[file] == hashlib.sha256((folder / file).read_bytes()).hexdigest()
    assert record.pop("engine").startswith("hotcoco ")
    assert record == {
        "ap": "LVIS AP, federated, best 300 detections of an image",
        "fixed_ap": "LVIS AP of the best 10,000 detections of a class over all images, without a limit per image; "
        "3,000 of an image are kept",
        "dataset": "toy",
        "split": "val",
        "annotations": "toy_val.json",
        "images": 8,
        "unreadable_images": "count as images without detections",
        "boxes": "ground truth",
        "boxes_per_image": round(len(manifest.boxes_xyxy) / 8, 2),
        "box": "as given, not refined",
        "candidates_per_box": "all 192 classes",
        "score": "softmax over all classes of the scaled cosine between region and class name",
        "selection": "the 3,000 best scores",
        "detections_per_image": 3000,
        "preprocess": "direct",
        "dtype": "float32",
        "exif": "auto",
        "templates": 0,
        "prompts_from": "name",
    }
    text = results_text(result)
    assert re.search(rf"^sha256 of toy_val.json +{hashes['toy_val.json']}$", text, re.MULTILINE)
    assert "half right, boxes, fixed AP" in text


def test_more_detections_change_fixed_ap_and_not_lvis_ap(standard, results):
    result, plain = standard[0], results()[0]
    assert (plain["detections"], plain["fixed_bbox"]) == (8 * 300, None)
    assert plain["bbox"] == result["bbox"]
    assert result["fixed_bbox"]["AP"] > result["bbox"]["AP"] > 0.3
    assert "AR" in result["fixed_bbox"]  # without a limit in its name


def test_annotated_boxes_have_accuracies_and_a_detectors_boxes_do_not(standard, results, manifest):
    accuracy, boxes = standard[0]["accuracy"], len(manifest.boxes_xyxy)
    scores = [image.probabilities for image in HalfRight(manifest).score([range(len(manifest))], None)]
    best = np.argsort(-np.concatenate(scores), axis=1) == manifest.category_index[:, None]
    assert accuracy["regions"] == boxes
    assert accuracy["top1"] == pytest.approx(sum(-(-int(count) // 2) for count in manifest.region_count) / boxes)
    assert accuracy["top5"] == pytest.approx(best[:, :5].any(axis=1).mean())
    assert accuracy["top1"] < accuracy["top5"] < 1
    of_classes = [best[manifest.category_index == index, 0].mean() for index in np.unique(manifest.category_index)]
    assert accuracy["class_accuracy"] == pytest.approx(np.mean(of_classes))
    assert f"top-1 {100 * accuracy['top1']:.1f} %" in results_text(standard[0])
    other = results(boxes="folder/detector.json")[0]
    assert (other["accuracy"], other["protocol"]["boxes"]) == (None, "detector proposals, detector.json")


def test_the_zero_shot_split_is_the_ap_of_the_classes_that_the_head_has_seen_and_has_not(standard, results, world):
    result, out = standard
    with (out / "classes.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 192
    assert [row["seen_in_training"] for row in rows] == ["yes"] * 60 + ["no"] * 132
    counted = {
        name: [float(row["AP"]) for row in rows if row["AP"] and row["seen_in_training"] == name]
        for name in ("yes", "no")
    }
    for name, is_seen in (("seen", "yes"), ("unseen", "no")):
        group = result["zero_shot_split"][name]
        assert group["classes"] == len(counted[is_seen]) > 0
        assert group["bbox"] == pytest.approx(np.mean(counted[is_seen]), abs=1e-5)
    assert np.mean(counted["yes"] + counted["no"]) == pytest.approx(result["bbox"]["AP"], abs=1e-5)
    boxes = sum(int(row["boxes"]) for row in rows)
    assert boxes == len(json.loads((world / "toy_val.json").read_text())["annotations"])
    assert "classes unseen in training" in results_text(result)
    unknown, out = results()
    assert unknown["zero_shot_split"] is None
    assert (out / "classes.csv").read_text().count("yes") == 0


def test_a_class_is_seen_by_its_name_or_a_synonym_in_any_spelling():
    categories = [
        Category(1, "traffic_light"),
        Category(2, "television_set", synonyms=("television_set", "tv")),
        Category(3, "bow_(weapon)"),
        Category(4, "boot"),
    ]
    trained = ("Traffic Light", "Monitor/TV", "bow", "boots", "")
    assert seen_classes(categories, trained).tolist() == [True, True, False, False]


@pytest.mark.parametrize(
    ("rule", "score", "stated"),
    [
        (
            "reference",
            "product",
            "the 300 best scores of the 900 best class probabilities, as the authors of RegionSpot",
        ),
        (
            "tokenize-anything",
            "sqrt",
            "the 300 best scores of class probabilities over 0.001 after NMS per class at IoU 0.5, as "
            "Tokenize-Anything",
        ),
    ],
)
def test_another_selection_is_stated_and_its_figures_are_those_of_its_detections(results, world, rule, score, stated):
    result, out = results(selection=Selection(rule, score))
    assert result["protocol"]["selection"] == stated
    assert result["protocol"]["score"].startswith("square root of: ") == (score == "sqrt")
    assert result["detections"] <= 8 * 300
    found = detections_of(out)
    assert found.scores.max() == pytest.approx(0.6 if score == "product" else 0.6**0.5, abs=0.01)
    expected = average_precision(read_ground_truth(world / "toy_val.json"), found, "bbox")
    assert result["bbox"] == pytest.approx(expected.values)


def test_coco_ap_is_stated_and_counts_all_classes_in_all_images(results, world):
    result, out = results(metric="coco")
    assert result["protocol"]["ap"] == "COCO AP, all classes in all images, best 100 detections of an image and class"
    ground_truth = read_ground_truth(world / "toy_val.json", federated=False)
    assert result["bbox"] == pytest.approx(coco_ap(ground_truth, detections_of(out), "bbox").values)
    header = results_text(result).split()
    assert "APm" in header
    assert "APr" not in header  # COCO has no frequencies


def test_the_engine_is_that_of_the_protocol(results):
    with pytest.raises(InputError, match="expected one of hotcoco, lvis"):
        results(engine="numpy")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"selection": "first"}, "expected one of best, reference, tokenize-anything"),
        ({"score": "cube"}, "expected one of product, sqrt"),
        ({"mask_threshold": "800"}, "expected one of sam, reference"),
        ({"metric": "coco", "fixed": True}, "fixed AP: is an LVIS AP"),
        ({"detections_per_image": 0}, "expected at least 1"),
    ],
)
def test_options_that_no_protocol_has_are_refused(tmp_path, change, message):
    with pytest.raises(InputError, match=message):
        evaluate(EvaluationOptions(data=tmp_path, out=tmp_path / "out", **change))


def test_eval_and_eval_lvis_differ_in_their_dataset_and_in_what_lvis_alone_has(regionspot):
    command = ("--data", "d", "--out", "o", "--print-config")
    (_, coco, _), (_, lvis, _) = (regionspot(name, *command) for name in ("eval", "eval-lvis"))
    assert set(lvis.splitlines()) - set(coco.splitlines()) == {
        "[eval-lvis]",
        'dataset = "lvis"',
        "fixed-ap = false",
        'engine = "hotcoco"',
    }
    code, _, err = regionspot("eval", "--data", "d", "--out", "o", "--engine", "lvis")
    assert (code, "No such option" in err) == (2, True)
