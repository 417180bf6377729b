"""Proposals: a detector's boxes in place of the ground truth, both forms of file, and what is refused."""

import json
from dataclasses import replace

import numpy as np
import pytest

from regionspot.cache.errors import AnnotationError
from regionspot.cache.format.manifest import NO_CATEGORY
from regionspot.pipeline.datasets.failure_limit import FailureLimit
from regionspot.pipeline.datasets.proposals import read_proposals, with_boxes
from regionspot.pipeline.datasets.registry import read_dataset


@pytest.fixture
def manifest(tmp_path):
    """Images 5 and 3 of 200 x 100 with a box each; categories 10 and 20."""
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
    by_image = read({"3": detections([[1, 2, 31, 42]], [0.25], labels=[20]), "5": detections([], [], labels=[])})
    results = read([{"image_id": 3, "bbox": [1, 2, 30, 40], "score": 0.25, "category_id": 20}])
    assert results.digest() == by_image.digest()


def test_images_without_proposals_stay_and_are_counted(read):
    found = read({"3": detections([[1, 2, 30, 40]], [0.25])})
    assert found.region_count.tolist() == [0, 1]
    assert found.report == {"images_without_proposals": 1}


def test_no_proposals_at_all_leave_every_image(read):
    for nothing in ({}, []):
        found = read(nothing)
        assert (len(found), len(found.boxes_xyxy), found.report) == (2, 0, {"images_without_proposals": 2})


def test_a_label_that_is_no_category_is_counted_and_an_absent_one_is_not(read):
    found = read({"3": detections([[1, 2, 30, 40]], [0.5], labels=[99]), "5": detections([[1, 2, 30, 40]], [0.5])})
    assert found.category_index.tolist() == [NO_CATEGORY, NO_CATEGORY]
    assert found.report == {"unknown_labels": 1}


def test_the_rules_for_boxes_are_those_of_the_annotations(read):
    boxes = [[-5, -5, 300, 300], [10, 10, 10.5, 50], [float("nan"), 0, 9, 9], [0, 0, 9, 9]]
    found = read({"3": detections(boxes, [0.1, 0.2, 0.3, float("nan")]), "5": detections([[0, 0, 9, 9]], [1])})
    assert found.boxes_xyxy[1:].tolist() == [[0, 0, 200, 100]]
    assert found.report == {
        "clipped": 1,
        "dropped_under_1_px": 1,
        "dropped_not_finite": 1,
        "dropped_score_not_finite": 1,
    }


def test_proposals_for_unknown_images_are_refused_by_name_unless_allowed(read):
    boxes = {str(image_id): detections([[0, 0, 9, 9]], [1], labels=[77]) for image_id in (3, 5, 6, 7, 8, 9)}
    with pytest.raises(AnnotationError, match=r"4 of its 6 images are not in coco val \(6, 7, 8, \.\.\.\)"):
        read(boxes)
    found = read(boxes, allow_unknown=True)
    assert len(found.boxes_xyxy) == 2
    assert found.report == {"unknown_images": 4, "unknown_labels": 2}


def test_gt_asks_for_the_annotated_boxes_and_a_path_for_a_file_of_which_minival_may_take_a_part(manifest, tmp_path):
    assert with_boxes(manifest, "gt") is manifest
    path = tmp_path / "proposals.json"
    path.write_text(json.dumps({image_id: detections([[0, 0, 9, 9]], [1]) for image_id in ("3", "99")}))
    with pytest.raises(AnnotationError, match="1 of its 2 images are not in coco val"):
        with_boxes(manifest, str(path))
    assert len(with_boxes(replace(manifest, split="minival"), str(path)).boxes_xyxy) == 1


def test_the_source_gains_the_proposals_beside_the_annotations(read, manifest):
    found = read({})
    assert set(found.source["files"]) == {"boxes.json", "proposals.json"}
    assert set(manifest.source["files"]) == {"boxes.json"}


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ('{"3": {"boxes": [[1, 2', "is cut off"),
        ('"boxes"', "Expected `object`, got `str`"),
        ('[{"image_id": 3}]\n[{"image_id": 5}]', "goes on behind the end of its JSON"),
        ({"3": {"scores": []}}, '["3"] has no `boxes`; it has scores'),
        (
            {"3": detections([[1, 2, 3, 4]], [])},
            '["3"].scores has 0 entries, expected a list with one entry for each of the 1',
        ),
        ({"3": detections([[1, 2, 3, 4]], [1], labels=[1, 2])}, '["3"].labels has 2 entries'),
        ({"3": detections([[1, 2, 3]], [1])}, '["3"].boxes[0] has 3 numbers'),
        (
            {"3": detections([[1, 2, 3, 4], [1, 2, 3, 4, 1]], [1, 1])},
            '["3"].boxes has boxes of 4 numbers and boxes of 5',
        ),
        ({"3": detections([[1, 2, 3, 4]], ["high"])}, '["3"].scores[0] is "high", expected a number'),
        ({"3": detections([[1, 2, 3, 4]], [90])}, "its scores reach from 90 to 90, expected 0 to 1 (per cent? divide"),
        ({"3": detections([[1, 2, 3, 4]], [-0.5])}, "expected 0 to 1 (logits? take their sigmoid)"),
        ({"cat.jpg": detections([], [])}, "1 of its 1 images are not in coco val (cat.jpg)"),
        ({str(2**70): detections([], [])}, f"are not in coco val ({2**70})"),
        ([{"image_id": 3, "score": 1}], "1 of 1 records cannot be read, the first: [0] has no `bbox`"),
        ([{"bbox": [1, 2, 3, 4], "score": 1}], "[0] has no `image_id`"),
        ({"images": [], "annotations": [], "categories": []}, "holds annotations, not a detector's boxes"),
        ({"ids": [3], "boxes": [[[1, 2, 3, 4]], []]}, "`boxes` is no list with one entry for each of `ids`"),
        ({"ids": [3], "boxes": [[[1, 2, 3, 4]]], "bbox_mode": 4}, "bbox_mode is 4, expected 0 (x1, y1, x2, y2) or 1"),
        ([[[1, 2, 3, 4, 0.5]]], "holds boxes of 1 images by their place, the dataset has 2"),
    ],
)
def test_a_broken_file_is_refused_with_one_line(read, tmp_path, content, told):
    with pytest.raises(AnnotationError) as caught:
        read(content)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'proposals.json'}: ")
    assert told in message
    assert "\n" not in message


ROW, SCORE, LABEL = [1, 2, 31, 42], 0.25, 20  # of image 3; 20 is the second category
SIZES = [1, 2, 30, 40]

SAME = {  # every one of them is one box of image 3, as other programs write it
    "id as text": {"3": detections([ROW], [SCORE], labels=[LABEL])},
    "id with zeros": {"0003": detections([ROW], [SCORE], labels=[LABEL])},
    "id as a float": {"3.0": detections([ROW], [SCORE], labels=[LABEL])},
    "file name": {"3.jpg": detections([ROW], [SCORE], labels=[LABEL])},
    "path": {"/data/val2017/3.jpg": detections([ROW], [SCORE], labels=[LABEL])},
    "path on Windows": {"C:\\val2017\\3.jpg": detections([ROW], [SCORE], labels=[LABEL])},
    "numbers as text and floats": {"3": detections([[str(side) for side in ROW]], [str(SCORE)], labels=["20.0"])},
    "name of the category": {"3": detections([ROW], [SCORE], labels=["dog"])},
    "score in the box": {"3": {"boxes": [[*ROW, SCORE]], "labels": [LABEL]}},
    "COCO": [{"image_id": 3, "bbox": SIZES, "score": SCORE, "category_id": LABEL, "segmentation": {"counts": "x"}}],
    "COCO, all as text": [
        {"image_id": "3", "bbox": [str(side) for side in SIZES], "score": str(SCORE), "category_id": float(LABEL)}
    ],
    "COCO by stem and name": [
        {"image_id": "x", "file_name": "3.jpg", "bbox": SIZES, "score": SCORE, "category_id": LABEL}
    ],
    "Detectron2, instances": {"3": {"pred_boxes": [ROW], "scores": [SCORE], "pred_classes": [1]}},
    "Detectron2, predictions": [
        {"image_id": 3, "instances": [{"image_id": 3, "bbox": SIZES, "score": SCORE, "category_id": LABEL}]}
    ],
    "MMDetection 3": [{"img_id": 3, "pred_instances": {"bboxes": [ROW], "scores": [SCORE], "labels": [1]}}],
    "MMDetection 3 by path": [
        {"img_path": "x/3.jpg", "pred_instances": {"bboxes": [ROW], "scores": [SCORE], "labels": [1]}}
    ],
    "MMDetection before 3": [[[], []], [[], [[*ROW, SCORE]]]],
}


@pytest.mark.parametrize("case", SAME)
def test_boxes_in_the_form_of_any_program_read_the_same(read, case):
    expected = read({"3": detections([ROW], [SCORE], labels=[LABEL]), "5": detections([], [])})
    found = read(SAME[case])
    assert found.digest() == expected.digest()
    assert found.report == {"images_without_proposals": 1}


def test_proposals_of_detectron2_have_logits_and_may_be_sizes(read):
    lists = {"ids": [3, "5"], "boxes": [[SIZES], []], "objectness_logits": [[0.0], []], "bbox_mode": 1}
    found = read(lists)
    assert found.boxes_xyxy.tolist() == [ROW]
    assert found.scores.tolist() == [0.5]


def test_lists_of_mmdetection_without_classes_are_taken_in_the_order_of_the_annotations_and_that_is_told(read):
    found = read([[[*ROW, 0.5]], []])  # image 5 comes first
    assert found.region_count.tolist() == [1, 0]
    assert "in the order of the annotation file" in found.remarks[0]


def test_boxes_without_scores_have_none_and_count_as_1_beside_others(read):
    assert read({"3": {"boxes": [ROW]}, "5": {"boxes": [ROW], "scores": None}}).scores is None
    assert read([{"image_id": 3, "bbox": SIZES}]).scores is None
    some = read({"3": {"boxes": [ROW]}, "5": detections([ROW], [0.5])})
    assert some.scores.tolist() == [0.5, 1.0]
    assert some.report == {"boxes_without_score": 1}
    assert "1 boxes have no score and count as 1" in some.remarks[0]


@pytest.mark.parametrize(
    "content",
    [
        '{"3": {"boxes": [[1, 2, 31, 42]], "scores": [0.5]}, "3": {"boxes": [[5, 6, 7, 8]], "scores": [0.25]}}',
        {"3": detections([ROW], [0.5]), "3.jpg": detections([[5, 6, 7, 8]], [0.25])},
        [{"image_id": 3, "boxes": [ROW], "scores": [0.5]}, {"image_id": 3, "boxes": [[5, 6, 7, 8]], "scores": [0.25]}],
    ],
)
def test_an_image_that_comes_twice_has_the_boxes_of_both_and_is_counted(read, content):
    found = read(content)
    assert found.scores.tolist() == [0.5, 0.25]
    assert found.report == {"repeated_images": 1, "images_without_proposals": 1}
    assert "1 entries are of images that had one before" in found.remarks[0]


def test_plain_numbers_are_ids_or_where_more_of_them_are_so_the_numbers_of_files(tmp_path, read):
    path = tmp_path / "numbered.json"
    images = [{"id": at, "height": 100, "width": 200, "file_name": f"{at + 1:03}.jpg"} for at in range(3)]
    categories = [{"id": 1, "name": "cat"}]
    path.write_text(json.dumps({"images": images, "annotations": [], "categories": categories}))
    manifest = read_dataset("coco", tmp_path, annotations=path)
    for numbers, rows in (((0, 1, 2), (0, 1, 2)), ((1, 2, 3), (0, 1, 2))):
        content = [{"image_id": number, "bbox": SIZES, "score": number / 10} for number in numbers]
        (tmp_path / "proposals.json").write_text(json.dumps(content))
        found = read_proposals(tmp_path / "proposals.json", manifest)
        assert [round(10 * score) for score in found.scores] == [numbers[row] for row in rows]


def test_a_name_that_two_images_have_is_unknown(tmp_path):
    path = tmp_path / "two.json"
    images = [{"id": at, "height": 100, "width": 200, "file_name": f"{at}/a.jpg"} for at in range(2)]
    path.write_text(json.dumps({"images": images, "annotations": [], "categories": []}))
    manifest = read_dataset("coco", tmp_path, annotations=path)
    for name, told in (("a.jpg", "are not in"), ("a", "are not in")):
        (tmp_path / "proposals.json").write_text(json.dumps({name: detections([ROW], [1])}))
        with pytest.raises(AnnotationError, match=told):
            read_proposals(tmp_path / "proposals.json", manifest)
    (tmp_path / "proposals.json").write_text(json.dumps({"1/a.jpg": detections([ROW], [1])}))
    assert read_proposals(tmp_path / "proposals.json", manifest).region_count.tolist() == [0, 1]


def test_labels_that_are_no_categories_are_told_with_the_ids_there_are(read):
    (remark,) = read({"3": detections([ROW, ROW], [0.5, 0.25], labels=[0, "cow"])}).remarks
    assert "2 labels are none of the dataset's category ids, which go from 10 to 20" in remark


def test_sizes_in_place_of_corners_are_told(read):
    boxes = [[100 + at, 50, 20, 10 + at] for at in range(10)]
    (remark,) = read({"3": detections(boxes, [0.5] * 10)}).remarks
    assert "they look like x, y, width, height in pixels, expected x1, y1, x2, y2 in pixels" in remark


def test_one_bad_record_is_left_out_counted_and_told(read):
    results = [{"image_id": 3, "bbox": SIZES, "score": at / 20} for at in range(20)]
    results.insert(4, {"image_id": 3, "segmentation": {}, "score": 1})
    found = read(results)
    assert found.scores.tolist() == pytest.approx([at / 20 for at in range(20)])
    assert found.report["skipped_records"] == 1
    assert "[4] has no `bbox`" in found.remarks[0]


def test_a_few_unknown_images_are_left_out_and_counted(read):
    found = read({str(at): detections([ROW], [1]) for at in (3, 5, 6)}, max_failures=FailureLimit(count=1))
    assert found.region_count.tolist() == [1, 1]
    assert found.report == {"unknown_images": 1}


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
