import json

import numpy as np
import pytest

from regionspot.cache.errors import AnnotationError, InputError
from regionspot.evaluation.metrics.detections import Detections, Masks
from regionspot.evaluation.metrics.results_file import read_results_json, write_results_json
from regionspot.pipeline.datasets.field_parsing import image_id


def detections(with_masks=False):
    rectangles = np.zeros((2, 20, 30), bool)
    rectangles[0, 2:12, 5:9], rectangles[1, :, 7] = True, True
    return Detections(
        np.array([7, 7, -3]),
        np.array([1, 2**40, 0]),
        np.array([[5, 2, 4, 10], [5, 2, 4, 10], [7, 0, 1, 20.25]]),
        np.array([0.9, 1 / 3, 0], np.float32),
        np.array([0, 0, 1]) if with_masks else np.arange(3),
        Masks.encode(rectangles) if with_masks else None,
    )


@pytest.mark.parametrize("with_masks", [False, True])
def test_results_are_read_as_they_were_written(tmp_path, with_masks):
    written = detections(with_masks)
    write_results_json(tmp_path / "results.json", written)
    read = read_results_json(tmp_path / "results.json")
    assert list(read.as_dicts()) == list(written.as_dicts())
    assert (read.scores == written.scores).all()
    assert read.masks is None or len(read.masks) == 2


def test_no_detections_are_an_empty_list(tmp_path):
    write_results_json(tmp_path / "results.json", detections().take(np.empty(0, int)))
    assert json.loads((tmp_path / "results.json").read_text()) == []
    assert len(read_results_json(tmp_path / "results.json")) == 0


def test_image_ids_may_be_names(tmp_path):
    name, written = "street/4.jpg", detections()
    write_results_json(tmp_path / "results.json", written, {7: name})
    assert json.loads((tmp_path / "results.json").read_text())[0]["image_id"] == name
    assert read_results_json(tmp_path / "results.json").image_ids.tolist() == [image_id("", name)] * 2 + [-3]


def test_without_a_box_it_is_that_of_the_mask(tmp_path):
    write_results_json(tmp_path / "results.json", detections(with_masks=True))
    records = [{**each, "bbox": None} for each in json.loads((tmp_path / "results.json").read_text())]
    (tmp_path / "masks.json").write_text(json.dumps(records))
    assert read_results_json(tmp_path / "masks.json").boxes_xywh.tolist() == [[5, 2, 4, 10]] * 2 + [[7, 0, 1, 20]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"score": float("nan")}, "1 of 3 detections cannot be read, the first: detections[1].score is null"),
        ({"score": "high"}, 'detections[1].score is "high", expected a number'),
        ({"image_id": ...}, "detections[1] has no `image_id`"),
        ({"category_id": ...}, "detections[1] has no `category_id`"),
        ({"score": ...}, "detections[1] has no `score`"),
        ({"bbox": ..., "segmentation": ...}, "detections[1] has no `bbox`"),
        ({"bbox": [1, 2, -3, 4]}, "detections[1].bbox is [1.0, 2.0, -3.0, 4.0], expected 4 numbers"),
        ({"bbox": [1, 2, 3]}, "detections[1].bbox has 3 numbers"),
        ({"segmentation": ...}, "detections[1] has no `segmentation`, unlike the records before it"),
        ({"segmentation": {"size": [20, 30], "counts": "abc"}}, 'detections[1].segmentation.counts is "abc"'),
        ({"segmentation": {"size": 20, "counts": "abc"}}, "detections[1].segmentation.size is 20"),
        ({"segmentation": [[1, 2, 3, 4, 5, 6]]}, ".segmentation is [[1, 2, 3, 4, 5, 6]], expected run lengths"),
    ],
)
def test_invalid_records_are_refused_in_one_line(tmp_path, change, message):
    path = tmp_path / "results.json"
    write_results_json(path, detections(with_masks=True))
    records = json.loads(path.read_text())
    records[1] = {name: value for name, value in {**records[1], **change}.items() if value is not ...}
    path.write_text(json.dumps(records))
    with pytest.raises(AnnotationError) as caught:
        read_results_json(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_list_is_refused(tmp_path):
    (tmp_path / "results.json").write_text('{"annotations": []}')
    with pytest.raises(AnnotationError, match="is not a list, expected detections"):
        read_results_json(tmp_path / "results.json")


def test_scores_that_json_cannot_hold_are_not_written(tmp_path):
    broken = detections()
    broken.scores[1] = np.nan
    with pytest.raises(InputError, match="scores or boxes of the detections are not finite"):
        write_results_json(tmp_path / "results.json", broken)
    assert not list(tmp_path.iterdir())
