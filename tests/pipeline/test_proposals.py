"""Proposals: a detector's boxes instead of the ground truth, in all file formats, and refused files."""

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


def test_regions_are_replaced_by_the_detectors_boxes_scores_and_labels(read, manifest):
    proposals = read(
        {
            "3": detections([[1, 2, 30, 40], [5, 6, 70, 80]], [0.25, 0.75], labels=[20, 10]),
            "5": detections([[0, 0, 50, 50]], [0.5], labels=[20]),
        }
    )
    assert proposals.image_ids.tolist() == manifest.image_ids.tolist()
    assert proposals.boxes_xyxy.tolist() == [[0, 0, 50, 50], [1, 2, 30, 40], [5, 6, 70, 80]]
    assert proposals.scores.tolist() == [0.5, 0.25, 0.75]
    assert proposals.category_index.tolist() == [1, 1, 0]
    assert proposals.annotation_ids.tolist() == [-1, -1, -1]
    assert proposals.report == {}


def test_the_coco_results_format_gives_the_same_manifest(read):
    by_image = read({"3": detections([[1, 2, 31, 42]], [0.25], labels=[20]), "5": detections([], [], labels=[])})
    results = read([{"image_id": 3, "bbox": [1, 2, 30, 40], "score": 0.25, "category_id": 20}])
    assert results.digest() == by_image.digest()


def test_images_without_proposals_are_kept_and_counted(read):
    proposals = read({"3": detections([[1, 2, 30, 40]], [0.25])})
    assert proposals.region_count.tolist() == [0, 1]
    assert proposals.report == {"images_without_proposals": 1}


def test_an_empty_file_keeps_all_images(read):
    for empty in ({}, []):
        proposals = read(empty)
        assert (len(proposals), len(proposals.boxes_xyxy), proposals.report) == (2, 0, {"images_without_proposals": 2})


def test_unknown_labels_are_counted_but_missing_labels_are_not(read):
    proposals = read({"3": detections([[1, 2, 30, 40]], [0.5], labels=[99]), "5": detections([[1, 2, 30, 40]], [0.5])})
    assert proposals.category_index.tolist() == [NO_CATEGORY, NO_CATEGORY]
    assert proposals.report == {"unknown_labels": 1}


def test_boxes_are_clipped_and_dropped_as_annotated_boxes_are(read):
    boxes = [[-5, -5, 300, 300], [10, 10, 10.5, 50], [float("nan"), 0, 9, 9], [0, 0, 9, 9]]
    proposals = read({"3": detections(boxes, [0.1, 0.2, 0.3, float("nan")]), "5": detections([[0, 0, 9, 9]], [1])})
    assert proposals.boxes_xyxy[1:].tolist() == [[0, 0, 200, 100]]
    assert proposals.report == {
        "clipped": 1,
        "dropped_under_1_px": 1,
        "dropped_not_finite": 1,
        "dropped_score_not_finite": 1,
    }


def test_unknown_images_are_refused_unless_allowed(read):
    boxes = {str(image_id): detections([[0, 0, 9, 9]], [1], labels=[77]) for image_id in (3, 5, 6, 7, 8, 9)}
    with pytest.raises(AnnotationError, match=r"4 of its 6 images are not in coco val \(6, 7, 8, \.\.\.\)"):
        read(boxes)
    proposals = read(boxes, allow_unknown=True)
    assert len(proposals.boxes_xyxy) == 2
    assert proposals.report == {"unknown_images": 4, "unknown_labels": 2}


def test_gt_keeps_the_annotated_boxes_and_minival_may_use_a_file_for_val(manifest, tmp_path):
    assert with_boxes(manifest, "gt") is manifest
    path = tmp_path / "proposals.json"
    path.write_text(json.dumps({image_id: detections([[0, 0, 9, 9]], [1]) for image_id in ("3", "99")}))
    with pytest.raises(AnnotationError, match="1 of its 2 images are not in coco val"):
        with_boxes(manifest, str(path))
    assert len(with_boxes(replace(manifest, split="minival"), str(path)).boxes_xyxy) == 1


def test_the_source_names_both_files(read, manifest):
    proposals = read({})
    assert set(proposals.source["files"]) == {"boxes.json", "proposals.json"}
    assert set(manifest.source["files"]) == {"boxes.json"}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{"3": {"boxes": [[1, 2', "is truncated"),
        ('"boxes"', "Expected `object`, got `str`"),
        ('[{"image_id": 3}]\n[{"image_id": 5}]', "has text after the end of its JSON"),
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
        ({"3": detections([[1, 2, 3, 4]], [90])}, "its scores are from 90 to 90, expected 0 to 1 (per cent? divide"),
        ({"3": detections([[1, 2, 3, 4]], [-0.5])}, "expected 0 to 1 (logits? apply a sigmoid)"),
        ({"cat.jpg": detections([], [])}, "1 of its 1 images are not in coco val (cat.jpg)"),
        ({str(2**70): detections([], [])}, f"are not in coco val ({2**70})"),
        ([{"image_id": 3, "score": 1}], "1 of 1 records cannot be read, the first: [0] has no `bbox`"),
        ([{"bbox": [1, 2, 3, 4], "score": 1}], "[0] has no `image_id`"),
        ({"images": [], "annotations": [], "categories": []}, "holds annotations, not a detector's boxes"),
        ({"ids": [3], "boxes": [[[1, 2, 3, 4]], []]}, "`boxes` is not a list with one entry for each of `ids`"),
        ({"ids": [3], "boxes": [[[1, 2, 3, 4]]], "bbox_mode": 4}, "bbox_mode is 4, expected 0 (x1, y1, x2, y2) or 1"),
        ([[[1, 2, 3, 4, 0.5]]], "holds boxes of 1 images without ids, the dataset has 2"),
    ],
)
def test_a_broken_file_is_refused_in_one_line(read, tmp_path, content, expected):
    with pytest.raises(AnnotationError) as caught:
        read(content)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'proposals.json'}: ")
    assert expected in message
    assert "\n" not in message


ROW, SCORE, LABEL = [1, 2, 31, 42], 0.25, 20  # of image 3; 20 is the second category
SIZES = [1, 2, 30, 40]

SAME = {  # one box of image 3, in the formats of different programs
    "id as a string": {"3": detections([ROW], [SCORE], labels=[LABEL])},
    "id with zeros": {"0003": detections([ROW], [SCORE], labels=[LABEL])},
    "id as a float": {"3.0": detections([ROW], [SCORE], labels=[LABEL])},
    "file name": {"3.jpg": detections([ROW], [SCORE], labels=[LABEL])},
    "path": {"/data/val2017/3.jpg": detections([ROW], [SCORE], labels=[LABEL])},
    "path on Windows": {"C:\\val2017\\3.jpg": detections([ROW], [SCORE], labels=[LABEL])},
    "numbers as strings and floats": {"3": detections([[str(side) for side in ROW]], [str(SCORE)], labels=["20.0"])},
    "name of the category": {"3": detections([ROW], [SCORE], labels=["dog"])},
    "score in the box": {"3": {"boxes": [[*ROW, SCORE]], "labels": [LABEL]}},
    "COCO": [{"image_id": 3, "bbox": SIZES, "score": SCORE, "category_id": LABEL, "segmentation": {"counts": "x"}}],
    "COCO, all as strings": [
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
def test_all_formats_give_the_same_manifest(read, case):
    expected = read({"3": detections([ROW], [SCORE], labels=[LABEL]), "5": detections([], [])})
    proposals = read(SAME[case])
    assert proposals.digest() == expected.digest()
    assert proposals.report == {"images_without_proposals": 1}


def test_detectron2_proposals_have_logits_and_a_box_mode(read):
    lists = {"ids": [3, "5"], "boxes": [[SIZES], []], "objectness_logits": [[0.0], []], "bbox_mode": 1}
    proposals = read(lists)
    assert proposals.boxes_xyxy.tolist() == [ROW]
    assert proposals.scores.tolist() == [0.5]


def test_mmdetection_lists_are_in_the_order_of_the_annotations_with_a_remark(read):
    proposals = read([[[*ROW, 0.5]], []])  # image 5 comes first
    assert proposals.region_count.tolist() == [1, 0]
    assert "in the order of the annotation file" in proposals.remarks[0]


def test_missing_scores_count_as_1_beside_others(read):
    assert read({"3": {"boxes": [ROW]}, "5": {"boxes": [ROW], "scores": None}}).scores is None
    assert read([{"image_id": 3, "bbox": SIZES}]).scores is None
    some = read({"3": {"boxes": [ROW]}, "5": detections([ROW], [0.5])})
    assert some.scores.tolist() == [0.5, 1.0]
    assert some.report == {"boxes_without_score": 1}
    assert "1 boxes have no score, which counts as 1" in some.remarks[0]


@pytest.mark.parametrize(
    "content",
    [
        '{"3": {"boxes": [[1, 2, 31, 42]], "scores": [0.5]}, "3": {"boxes": [[5, 6, 7, 8]], "scores": [0.25]}}',
        {"3": detections([ROW], [0.5]), "3.jpg": detections([[5, 6, 7, 8]], [0.25])},
        [{"image_id": 3, "boxes": [ROW], "scores": [0.5]}, {"image_id": 3, "boxes": [[5, 6, 7, 8]], "scores": [0.25]}],
    ],
)
def test_a_repeated_image_gets_all_boxes_and_is_counted(read, content):
    proposals = read(content)
    assert proposals.scores.tolist() == [0.5, 0.25]
    assert proposals.report == {"repeated_images": 1, "images_without_proposals": 1}
    assert "1 entries repeat an image" in proposals.remarks[0]


def test_plain_numbers_are_ids_or_file_names_whichever_matches_more(tmp_path, read):
    path = tmp_path / "numbered.json"
    images = [{"id": at, "height": 100, "width": 200, "file_name": f"{at + 1:03}.jpg"} for at in range(3)]
    categories = [{"id": 1, "name": "cat"}]
    path.write_text(json.dumps({"images": images, "annotations": [], "categories": categories}))
    manifest = read_dataset("coco", tmp_path, annotations=path)
    for numbers, rows in (((0, 1, 2), (0, 1, 2)), ((1, 2, 3), (0, 1, 2))):
        content = [{"image_id": number, "bbox": SIZES, "score": number / 10} for number in numbers]
        (tmp_path / "proposals.json").write_text(json.dumps(content))
        proposals = read_proposals(tmp_path / "proposals.json", manifest)
        assert [round(10 * score) for score in proposals.scores] == [numbers[row] for row in rows]


def test_an_ambiguous_name_is_unknown(tmp_path):
    path = tmp_path / "two.json"
    images = [{"id": at, "height": 100, "width": 200, "file_name": f"{at}/a.jpg"} for at in range(2)]
    path.write_text(json.dumps({"images": images, "annotations": [], "categories": []}))
    manifest = read_dataset("coco", tmp_path, annotations=path)
    for name in ("a.jpg", "a"):
        (tmp_path / "proposals.json").write_text(json.dumps({name: detections([ROW], [1])}))
        with pytest.raises(AnnotationError, match="are not in"):
            read_proposals(tmp_path / "proposals.json", manifest)
    (tmp_path / "proposals.json").write_text(json.dumps({"1/a.jpg": detections([ROW], [1])}))
    assert read_proposals(tmp_path / "proposals.json", manifest).region_count.tolist() == [0, 1]


def test_unknown_labels_are_reported_with_the_known_ids(read):
    (remark,) = read({"3": detections([ROW, ROW], [0.5, 0.25], labels=[0, "cow"])}).remarks
    assert "2 labels are not category ids of the dataset, which are from 10 to 20" in remark


def test_sizes_instead_of_corners_are_reported(read):
    boxes = [[100 + at, 50, 20, 10 + at] for at in range(10)]
    (remark,) = read({"3": detections(boxes, [0.5] * 10)}).remarks
    assert "they look like x, y, width, height in pixels, expected x1, y1, x2, y2 in pixels" in remark


def test_one_unreadable_record_is_skipped_and_reported(read):
    results = [{"image_id": 3, "bbox": SIZES, "score": at / 20} for at in range(20)]
    results.insert(4, {"image_id": 3, "segmentation": {}, "score": 1})
    proposals = read(results)
    assert proposals.scores.tolist() == pytest.approx([at / 20 for at in range(20)])
    assert proposals.report["skipped_records"] == 1
    assert "[4] has no `bbox`" in proposals.remarks[0]


def test_a_few_unknown_images_are_skipped_and_counted(read):
    proposals = read({str(at): detections([ROW], [1]) for at in (3, 5, 6)}, max_failures=FailureLimit(count=1))
    assert proposals.region_count.tolist() == [1, 1]
    assert proposals.report == {"unknown_images": 1}


def test_real_proposals_keep_boxes_scores_and_labels(coco_mini):
    path = coco_mini / "annotations" / "lvis_mini_val.json"
    manifest = read_dataset("lvis", coco_mini, "val", annotations=path)
    file = coco_mini / "proposals" / "detector_boxes_lvis_mini_val.json"
    proposals = read_proposals(file, manifest)
    assert (
        len(proposals.boxes_xyxy) + sum(n for name, n in proposals.report.items() if name.startswith("dropped")) == 1605
    )
    expected = json.loads(file.read_text())["139"]
    regions = proposals.regions(proposals.row_of(139))
    assert proposals.boxes_xyxy[regions] == pytest.approx(np.array(expected["boxes"]), abs=1e-3)
    assert proposals.scores[regions].tolist() == pytest.approx(expected["scores"])
    assert [proposals.categories[index].id for index in proposals.category_index[regions]] == expected["labels"]
    assert proposals.negatives is manifest.negatives
