"""Which pairs of region and class become detections, and how often the right class is among the best."""

from dataclasses import replace

import numpy as np
import pytest

from regionspot.evaluation.metrics.accuracy import UNKNOWN, accuracies, class_ranks
from regionspot.evaluation.metrics.detections import Masks, from_columns, to_columns
from regionspot.evaluation.metrics.selection import Selection, detections_of_image

BOXES = np.array([[0, 0, 10, 20], [5, 5, 8, 9]], np.float32)


def test_the_best_pairs_of_region_and_class_include_the_box_score():
    probabilities = np.array([[0.6, 0.4], [0.1, 0.9]], np.float32)
    box_scores = np.float32([1, 0.5])
    result = detections_of_image(8, BOXES, probabilities, np.array([30, 10]), box_scores, Selection(limit=3))
    assert result.category_ids.tolist() == [30, 10, 10]
    assert result.regions.tolist() == [0, 1, 0]
    assert result.scores.tolist() == pytest.approx([0.6, 0.45, 0.4])
    assert result.boxes_xywh.tolist() == [[0, 0, 10, 20], [5, 5, 3, 4], [0, 0, 10, 20]]
    result = replace(result, masks=Masks.encode(np.ones((2, 4, 4), bool)))
    back = from_columns(to_columns(result))
    assert list(back.as_dicts()) == list(result.as_dicts())


def test_the_square_root_of_the_score_keeps_the_order():
    probabilities = np.random.default_rng(0).random((2, 6), np.float32)
    plain, root = (Selection(score=score, limit=5).pairs(probabilities, BOXES, None) for score in ("product", "sqrt"))
    assert all(np.array_equal(one, other) for one, other in zip(plain[:2], root[:2], strict=True))
    assert root[2] == pytest.approx(np.sqrt(plain[2]))


def test_the_rule_of_the_authors_chooses_by_class_before_it_multiplies_by_the_box_score():
    """A box of score 0.01 with 1,000 likely classes takes all of the 900 places, and one of score 1 takes none."""
    probabilities = np.repeat(np.array([[0.02], [0.01]], np.float32), 1000, axis=1)
    box_scores = np.array([0.01, 1], np.float32)
    ours = Selection("best").pairs(probabilities, BOXES, box_scores)
    theirs = Selection("reference").pairs(probabilities, BOXES, box_scores)
    assert (set(ours[0]), set(theirs[0])) == ({1}, {0})
    assert theirs[2] == pytest.approx([0.0002] * 300)
    assert len(Selection("reference", limit=5000).pairs(probabilities, BOXES, box_scores)[0]) == 900


def test_the_rule_of_tokenize_anything_keeps_one_of_overlapping_boxes_of_a_class():
    boxes = np.array([[0, 0, 10, 10], [0, 0, 10, 9], [0, 0, 10, 4], [50, 50, 60, 60]], np.float32)
    probabilities = np.array([[0.5, 0.0004], [0.4, 0.3], [0.3, 0.2], [0.2, 0.0011]], np.float32)
    regions, classes, scores = Selection("tokenize-anything", "sqrt").pairs(probabilities, boxes, None)
    # Of class 0, box 1 covers 0.9 of box 0; box 2 covers 0.4. Of class 1, box 0 is below the least probability.
    assert list(zip(regions, classes, strict=True)) == [(0, 0), (1, 1), (2, 0), (2, 1), (3, 0), (3, 1)]
    assert scores == pytest.approx(np.sqrt([0.5, 0.3, 0.3, 0.2, 0.2, 0.0011]))


@pytest.mark.parametrize("rule", ["best", "reference", "tokenize-anything"])
def test_an_image_without_regions_has_no_detections(rule):
    empty = np.zeros((0, 4), np.float32)
    assert [len(column) for column in Selection(rule).pairs(np.zeros((0, 7), np.float32), empty, None)] == [0, 0, 0]


def test_ranks_count_the_classes_before_the_right_one_and_ties_go_to_the_first():
    probabilities = np.array([[0.1, 0.6, 0.3], [0.4, 0.4, 0.2], [0.4, 0.4, 0.2], [1, 0, 0]], np.float32)
    assert class_ranks(probabilities, np.int32([2, 0, 1, -1])).tolist() == [1, 0, 1, UNKNOWN]


def test_accuracies_leave_out_regions_of_unknown_class_and_of_images_that_failed():
    ranks, classes = np.int32([0, 0, 3, 7, 0, UNKNOWN, UNKNOWN]), np.int32([2, 2, 2, 2, 5, -1, 5])
    assert accuracies(ranks, classes) == pytest.approx(
        {"top1": 3 / 5, "top5": 4 / 5, "class_accuracy": (2 / 4 + 1) / 2}
    )
    assert accuracies(ranks[5:], classes[5:]) == {}
