from pathlib import Path

import numpy as np
import pytest

from regionspot.evaluation.metrics.analysis import Confusion, Matches
from regionspot.evaluation.metrics.average_precision import average_precision, coco_ap
from regionspot.evaluation.metrics.detections import Detections
from regionspot.evaluation.metrics.ground_truth import GroundTruth

BOX, ELSEWHERE = [0, 0, 50, 50], [100, 100, 50, 50]


def ground_truth(annotations, images=(1,), absent=(), not_exhaustive=(), federated=True):
    lists = {"neg_category_ids": list(absent), "not_exhaustive_category_ids": list(not_exhaustive)}
    entries = [
        {"id": number, "image_id": image, "category_id": category, "bbox": box, "area": box[2] * box[3]}
        for number, (image, category, box) in enumerate(annotations, start=1)
    ]
    records = [{"id": image, "height": 200, "width": 200, **lists} for image in images]
    categories = [{"id": number, "name": str(number), "frequency": "f"} for number in (4, 5, 6)]
    return GroundTruth(Path("truth.json"), records, categories, entries, federated=federated)


def detections(rows):
    images, categories, boxes, scores = zip(*rows, strict=True)
    columns = np.array(images), np.array(categories), np.array(boxes, float), np.array(scores, np.float32)
    return Detections(*columns, np.arange(len(rows)))


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ((1, 5, BOX, 0.9), "wrong class"),
        ((1, 4, [0, 0, 50, 20], 0.9), "wrong place"),
        ((1, 5, [0, 0, 50, 20], 0.9), "wrong class and place"),
        ((1, 4, ELSEWHERE, 0.9), "background"),
        ((1, 4, BOX, 0.7), "duplicate"),
    ],
)
def test_errors_are_counted_by_kind(row, kind):
    truth = ground_truth([(1, 4, BOX)], absent=[5])
    errors = Matches(truth, detections([(1, 4, BOX, 0.8), row]), "bbox").errors()
    assert {name: error.count for name, error in errors.items() if error.count} == {kind: 1}


def test_the_cost_of_an_error_is_the_ap50_that_it_takes():
    truth = ground_truth([(1, 4, BOX)])
    errors = Matches(truth, detections([(1, 4, BOX, 0.8), (1, 4, ELSEWHERE, 0.9)]), "bbox").errors()
    assert errors["background"].ap50 == pytest.approx(0.5)
    assert errors["missed"].ap50 == 0


def test_what_lvis_annotations_leave_open_is_no_error_and_no_confusion():
    rows = detections([(1, 5, BOX, 0.9), (1, 6, BOX, 0.8), (1, 4, BOX, 0.7)])
    judged = Matches(ground_truth([(1, 4, BOX)], absent=[5]), rows, "bbox")
    assert judged.errors()["wrong class"].count == 1
    assert judged.confusions() == [Confusion(4, 5, 1)]
    unknown = Matches(ground_truth([(1, 4, BOX)], absent=[5], not_exhaustive=[5]), rows, "bbox")
    assert sum(error.count for error in unknown.errors().values()) == 0
    assert unknown.confusions() == []


def test_calibration_compares_scores_with_the_share_that_is_right():
    truth = ground_truth([(image, 4, BOX) for image in range(1, 6)], images=range(1, 6))
    rows = [(image, 4, BOX if image < 5 else ELSEWHERE, 0.55) for image in range(1, 6)]
    calibration = Matches(truth, detections(rows), "bbox").calibration()
    (filled,) = [each for each in calibration.bins if each.count]
    assert (filled.low, filled.high, filled.count) == (0.5, 0.6, 5)
    assert (filled.score, filled.right) == (pytest.approx(0.55), pytest.approx(0.8))
    assert calibration.error == pytest.approx(0.25)


@pytest.fixture(scope="module")
def worlds():
    """Forty images of two boxes each; half of the first detections, three quarters of the second are right."""
    rng = np.random.default_rng(0)
    images = range(1, 41)
    truth = ground_truth([(image, category, BOX) for image in images for category in (4, 5)], images)
    results = []
    for share in (0.5, 0.75):
        right = rng.random((40, 2)) < share
        places = [(image, category, right[image - 1, category - 4]) for image in images for category in (4, 5)]
        results.append(detections([(i, c, BOX if hit else ELSEWHERE, rng.random()) for i, c, hit in places]))
    return truth, *results


def test_intervals_are_those_of_a_bootstrap_over_the_images(worlds):
    truth, first, _ = worlds
    rng, values = np.random.default_rng(1), []
    for _ in range(60):
        drawn = rng.integers(1, 41, 40)
        rows = np.concatenate([np.flatnonzero(first.image_ids == image) for image in drawn])
        entries = [(n, c, BOX) for n in range(40) for c in (4, 5)]
        sample = first.take(rows)
        copies = detections(
            list(zip(np.arange(40).repeat(2), sample.category_ids, sample.boxes_xywh, sample.scores, strict=True))
        )
        values.append(average_precision(ground_truth(entries, range(40)), copies, "bbox")["AP50"])
    interval = Matches(truth, first, "bbox").intervals()["AP50"]
    assert interval.value == pytest.approx(average_precision(truth, first, "bbox")["AP50"])
    assert (interval.high - interval.low) / (2 * 1.96) == pytest.approx(np.std(values), rel=0.25)


def test_a_difference_is_paired_and_of_each_figure(worlds):
    truth, first, second = worlds
    matches, others = Matches(truth, first, "bbox"), Matches(truth, second, "bbox")
    difference = others.minus(matches)["AP50"]
    expected = average_precision(truth, second, "bbox")["AP50"] - average_precision(truth, first, "bbox")["AP50"]
    assert difference.value == pytest.approx(expected)
    assert difference.low > 0
    same = matches.minus(matches)
    assert (same["AP"].low, same["AP"].high) == (0, 0)
    assert same["APr"] is None


def test_runs_with_other_numbers_of_detections_are_compared(worlds):
    truth, first, second = worlds
    many = first.take(np.arange(10 * len(first)) % len(first))
    difference = Matches(truth, second, "bbox").minus(Matches(truth, many, "bbox"), samples=2)["AR@300"]
    assert difference.value > 0


def test_without_lists_of_absent_classes_the_figures_are_those_of_coco(worlds):
    truth, first, _ = worlds
    truth = ground_truth([(1, 4, BOX), (2, 5, BOX)], truth.image_ids.tolist(), federated=False)
    expected = coco_ap(truth, first, "bbox").values
    intervals = Matches(truth, first, "bbox").intervals(samples=2)
    assert {name: interval and interval.value for name, interval in intervals.items()} == pytest.approx(expected)
