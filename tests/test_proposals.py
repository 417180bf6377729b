"""Proposals: a detector's boxes in place of the ground truth, both forms of file, and what is refused."""

import json
from dataclasses import replace

import numpy as np
import pytest

from regionspot.cache.errors import AnnotationError
from regionspot.cache.manifest import NO_CATEGORY
from regionspot.pipeline.datasets import read_dataset
from regionspot.pipeline.proposals import read_proposals, with_boxes


@pytest.fixture
def manifest(tmp_path):
    """Pictures 5 and 3 of 200 x 100 with a box each; categories 10 and 20."""
    path = tmp_path / "boxes.json"
    images = [{"id": image_id, "height": 100, "width": 200, "file_name": f"{image_id}.jpg"} for image_id in (5, 3)]
    boxes = [{"image_id": image_id, "category_id": 10, "bbox": [1, 2, 30, 40]} for image_id in (5, 3)]
    categories = [{"id": 10, "name": "cat"}, {"id": 20, "name": "dog"}]
    path.write_text(json.dumps({"images": images, "annotations": boxes, "categories": categories}))
    return read_dataset("coco", tmp_path, "val", annotations=path)


@pytest.fixture
def read(manifest, tmp_path):
    def read(content, **options):
        path = tmp_path / "proposals.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return read_proposals(path, manifest, **options)

    return read


def detections(boxes, scores, **labels):
    return {"boxes": boxes, "scores": scores, **labels}


def test_regions_are_replaced_by_the_detectors_in_its_order_with_scores_and_labels(read, manifest):
    found = read(
        {
            "3": detections([[1, 2, 30, 40], [5, 6, 70, 80]], [0.25, 0.75], labels=[20, 10]),
            "5": detections([[0, 0, 50, 50]], [0.5], labels=[20]),
        }
    )
    assert found.image_ids.tolist() == manifest.image_ids.tolist()
    assert found.boxes_xyxy.tolist() == [[0, 0, 50, 50], [1, 2, 30, 40], [5, 6, 70, 80]]
    assert found.scores.tolist() == [0.5, 0.25, 0.75]
    assert found.category_index.tolist() == [1, 1, 0]
    assert found.annotation_ids.tolist() == [-1, -1, -1]
    assert found.report == {}


def test_the_results_form_of_detectors_gives_the_same(read):
    by_picture = read({"3": detections([[1, 2, 31, 42]], [0.25], labels=[20]), "5": detections([], [], labels=[])})
    results = read([{"image_id": 3, "bbox": [1, 2, 30, 40], "score": 0.25, "category_id": 20}])
    assert results.digest() == by_picture.digest()


def test_pictures_without_proposals_stay_and_are_counted(read):
    found = read({"3": detections([[1, 2, 30, 40]], [0.25])})
    assert found.region_count.tolist() == [0, 1]
    assert found.report == {"pictures_without_proposals": 1}


def test_no_proposals_at_all_leave_every_picture(read):
    for nothing in ({}, []):
        found = read(nothing)
        assert (len(found), len(found.boxes_xyxy), found.report) == (2, 0, {"pictures_without_proposals": 2})


def test_a_label_that_is_no_category_is_counted_and_an_absent_one_is_not(read):
    found = read({"3": detections([[1, 2, 30, 40]], [0.5], labels=[99]), "5": detections([[1, 2, 30, 40]], [0.5])})
    assert found.category_index.tolist() == [NO_CATEGORY, NO_CATEGORY]
    assert found.report == {"unknown_labels": 1}


def test_the_rules_for_boxes_are_those_of_the_annotations(read):
    boxes = [[-5, -5, 300, 300], [10, 10, 10.5, 50], [float("nan"), 0, 9, 9], [0, 0, 9, 9]]
    found = read({"3": detections(boxes, [0.1, 0.2, 0.3, float("nan")]), "5": detections([[0, 0, 9, 9]], [1])})
    assert found.boxes_xyxy[1:].tolist() == [[0, 0, 200, 100]]
    assert found.report == {"dropped_under_1_px": 1, "dropped_not_finite": 2}


def test_proposals_for_unknown_pictures_are_refused_by_name_unless_allowed(read):
    boxes = {str(image_id): detections([[0, 0, 9, 9]], [1], labels=[77]) for image_id in (3, 5, 6, 7, 8, 9)}
    with pytest.raises(AnnotationError, match=r"4 of its pictures are not in coco val \(6, 7, 8, \.\.\.\)"):
        read(boxes)
    found = read(boxes, allow_unknown=True)
    assert len(found.boxes_xyxy) == 2
    assert found.report == {"unknown_pictures": 4, "unknown_labels": 2}


def test_gt_asks_for_the_annotated_boxes_and_a_path_for_a_file_of_which_minival_may_take_a_part(manifest, tmp_path):
    assert with_boxes(manifest, "gt") is manifest
    path = tmp_path / "proposals.json"
    path.write_text(json.dumps({image_id: detections([[0, 0, 9, 9]], [1]) for image_id in ("3", "99")}))
    with pytest.raises(AnnotationError, match="1 of its pictures are not in coco val"):
        with_boxes(manifest, str(path))
    assert len(with_boxes(replace(manifest, split="minival"), str(path)).boxes_xyxy) == 1


def test_the_source_gains_the_proposals_beside_the_annotations(read, manifest):
    found = read({})
    assert set(found.source["files"]) == {"boxes.json", "proposals.json"}
    assert set(manifest.source["files"]) == {"boxes.json"}


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ('{"3": {"boxes": [[1, 2', "not whole JSON"),
        ('"boxes"', "Expected `object`, got `str`"),
        ({"3": {"boxes": []}}, "picture 3: Object missing required field `scores`"),
        ({"3": detections([[1, 2, 3, 4]], [])}, "picture 3 has 1 boxes, 0 scores; expected one"),
        ({"3": detections([[1, 2, 3, 4]], [1], labels=[1, 2])}, "picture 3 has 1 boxes, 1 scores, 2 labels"),
        ({"3": detections([[1, 2, 3]], [1])}, "picture 3: Expected `array` of length 4 - at `$.boxes[0]`"),
        ({"3": detections([[1, 2, 3, 4]], ["high"])}, "got `str` - at `$.scores[0]`"),
        ({"cat.jpg": detections([], [])}, "'cat.jpg' is not an image id"),
        ({str(2**70): detections([], [])}, "is not an image id"),
        ([{"image_id": 3, "bbox": [1, 2, 3, 4]}], "missing required field `score` - at `$[0]`"),
    ],
)
def test_a_broken_file_is_refused_with_one_line(read, tmp_path, content, told):
    with pytest.raises(AnnotationError) as caught:
        read(content)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'proposals.json'}: ")
    assert told in message
    assert "\n" not in message


def test_real_proposals_keep_their_boxes_scores_and_labels(coco_mini):
    path = coco_mini / "annotations" / "lvis_mini_val.json"
    manifest = read_dataset("lvis", coco_mini, "val", annotations=path)
    file = coco_mini / "proposals" / "detector_boxes_lvis_mini_val.json"
    found = read_proposals(file, manifest)
    assert len(found.boxes_xyxy) + sum(n for name, n in found.report.items() if name.startswith("dropped")) == 1605
    stated = json.loads(file.read_text())["139"]
    here = found.regions(found.row_of(139))
    assert found.boxes_xyxy[here] == pytest.approx(np.array(stated["boxes"]), abs=1e-3)
    assert found.scores[here].tolist() == pytest.approx(stated["scores"])
    assert [found.categories[index].id for index in found.category_index[here]] == stated["labels"]
    assert found.negatives is manifest.negatives
