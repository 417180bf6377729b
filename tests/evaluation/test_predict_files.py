"""`regionspot predict` on many images: how they are listed, boxes from files of other programs, what is written."""

import io
import json
import os

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from regionspot.cache.errors import AnnotationError, InputError
from regionspot.evaluation.inference.box_files import boxes_of_images
from regionspot.evaluation.inference.boxes import names_from
from regionspot.evaluation.inference.image_list import list_images, names_one_file
from regionspot.evaluation.report.predictions import labelled_paths

pytestmark = pytest.mark.usefixtures("module_home")

TOY = ("--preset", "toy", "--device", "cpu", "--templates", "plain", "--names", "red star,blue ring")


@pytest.fixture
def images(tmp_path, monkeypatch):
    """A folder with two images in sub-folders and a file that is none; it is the current folder."""
    monkeypatch.chdir(tmp_path)
    for name, colour in (("a/one.jpg", "red"), ("b/two.png", "blue")):
        (tmp_path / name).parent.mkdir()
        Image.new("RGB", (120, 80), colour).save(tmp_path / name)
    (tmp_path / "a/notes.txt").write_text("no image")
    return tmp_path


def test_images_are_files_folders_patterns_and_lines_of_standard_input(images):
    both = ["a/one.jpg", "b/two.png"]
    for arguments, lines, expected in [
        (["."], "", both),
        (["b", "a/one.jpg"], "", both[::-1]),
        (["**/*.jpg"], "", both[:1]),
        (["*/*"], "", ["a/notes.txt", *both]),
        (["-", "b"], "a/one.jpg\n\nb/two.png\n", both),
        (["absent.jpg"], "", ["absent.jpg"]),
    ]:
        assert [path.as_posix() for path in list_images(arguments, io.StringIO(lines))] == expected
    (images / "c[1].jpg").touch()
    assert [path.name for path in list_images(["c[1].jpg"], [])] == ["c[1].jpg"]
    assert names_one_file(["absent.jpg"])
    assert names_one_file(["c[1].jpg"])
    assert not any(names_one_file(arguments) for arguments in (["a"], ["-"], ["*.jpg"], both))


@pytest.mark.parametrize(
    ("argument", "message"),
    [("empty", "this folder has no image"), ("*.tif", "no file fits this pattern"), ("-", "there are no images")],
)
def test_an_empty_list_of_images_is_refused(images, argument, message):
    (images / "empty").mkdir()
    with pytest.raises(InputError, match=message):
        list_images([argument], [])


COCO = {
    "images": [{"id": 7, "file_name": "val/one.jpg", "height": 80, "width": 120}],
    "annotations": [{"id": 1, "image_id": 7, "category_id": 3, "bbox": [10, 20, 30, 40]}],
    "categories": [{"id": 3, "name": "dog"}],
}
RECTANGLE = {"x": 10, "y": 25, "width": 30, "height": 50, "rectanglelabels": ["dog"]}


def label_studio(value, url="/data/upload/4/0a1b2c3d-one.jpg"):
    region = {"original_width": 100, "original_height": 80, "value": value}
    cancelled = {"was_cancelled": True, "result": [{"value": {}}]}
    return [{"id": 1, "data": {"image": url}, "annotations": [cancelled, {"result": [region]}]}]


def label_me(shape_type, points):
    return {"imagePath": "..\\photos\\one.jpg", "shapes": [{"label": "x", "shape_type": shape_type, "points": points}]}


@pytest.mark.parametrize(
    "content",
    [
        COCO,
        [{"image_id": "one", "bbox": [10, 20, 30, 40], "score": 0.9, "category_id": 1}],
        {"one.jpg": {"boxes": [[10, 20, 40, 60]], "scores": [0.5]}},
        label_studio(RECTANGLE),
        label_studio(RECTANGLE, "/data/local-files/?d=photos/one.jpg"),
        label_studio({"points": [[10, 25], [40, 25], [20, 75]], "polygonlabels": ["dog"]}),
        # Turned by 90 degrees around its first corner: 40 wide and 30 high become 30 wide and 40 high.
        label_studio({**RECTANGLE, "x": 40, "width": 40, "height": 37.5, "rotation": 90}),
        label_me("rectangle", [[40, 60], [10, 20]]),
        label_me("polygon", [[10, 30], [40, 20], [20, 60]]),
    ],
    ids=[
        "COCO",
        "results",
        "by image",
        "Studio",
        "Studio, local",
        "Studio, polygon",
        "Studio, turned",
        "Me",
        "polygon",
    ],
)
def test_boxes_come_from_files_of_other_programs(images, content):
    path = images / "boxes.json"
    path.write_text(json.dumps(content))
    one, two = boxes_of_images(path, list_images(["a/one.jpg", "b/two.png"], []))
    np.testing.assert_allclose(one, [[10, 20, 40, 60]], atol=1e-3)
    assert two.shape == (0, 4)


def test_circles_of_labelme_have_a_box_and_its_points_have_none(images):
    path = images / "boxes.json"
    for kind, points, expected in [("circle", [[50, 40], [53, 44]], [[45, 35, 55, 45]]), ("point", [[5, 5]], [])]:
        path.write_text(json.dumps(label_me(kind, points)))
        assert boxes_of_images(path, list_images(["a"], []))[0].tolist() == expected


def test_labelme_files_of_a_folder_belong_to_the_images_of_their_names(images, caplog):
    (images / "b/two.json").write_text(json.dumps(label_me("rectangle", [[1, 2], [30, 40]])))
    assert [len(boxes) for boxes in boxes_of_images(images / "b", list_images(["."], []))] == [0, 1]
    assert "has no entry for 1 of 2 images, the first is a/one.jpg" in caplog.text


def test_a_plain_list_of_boxes_is_for_every_image(images):
    for content in ("[[1, 2, 30, 40]]", '{"boxes": [[1, 2, 30, 40]]}'):
        (images / "boxes.json").write_text(content)
        boxes = boxes_of_images(images / "boxes.json", list_images(["."], []))
        assert [of_image.tolist() for of_image in boxes] == [[[1, 2, 30, 40]]] * 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        ("[[1, 2", "is not JSON"),
        ('[[1, 2, 3, "x"]]', "is not a list of numbers"),
        ("[[1, 2, 3, 1e300]]", "box 1 is not finite"),
        (json.dumps(COCO).replace("one.jpg", "other.jpg"), "of none of the 2 images; it has val/other.jpg"),
        ('[{"data": {"image": "one.jpg"}, "annotations": [{}]}]', "task 0 is not one of Label Studio's"),
        ('{"shapes": [{"points": "here"}]}', "shape 1 is not one of LabelMe's"),
        ('[{"image_id": 5, "bbox": [1, 2, 3, 4], "score": 1}]', "has usable boxes of none of the 2 images"),
    ],
)
def test_the_error_for_an_invalid_boxes_file_names_it(images, content, message):
    path = images / "boxes.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises((AnnotationError, InputError), match=message) as caught:
        boxes_of_images(path, list_images(["."], []))
    assert str(path) in str(caught.value)


def test_names_and_their_category_ids_come_from_coco_annotations(images):
    (images / "coco.json").write_text(json.dumps(COCO))
    assert names_from("@coco.json", None) == (["dog"], {"dog": 3})
    (images / "coco.json").write_text('{"categories": ["dog"]}')
    with pytest.raises(InputError, match=r"coco\.json: expected .*categories"):
        names_from("@coco.json", None)


def test_a_failed_image_is_listed_and_the_others_are_done(regionspot, images):
    (images / "a/broken.jpg").write_bytes(b"\xff\xd8\xff nothing more")
    code, out, err = regionspot("predict", ".", *TOY, "--boxes", "5,5,60,60", "--masks", "-o", "named")
    assert code == 1
    assert "a/broken.jpg: " in err
    assert err.endswith("1 of 3 images failed\n")
    first, second = json.loads(out)
    assert (first["image"], second["image"]) == (os.path.join("a", "one.jpg"), os.path.join("b", "two.png"))
    assert (first["width"], first["height"]) == (120, 80)
    (region,) = first["regions"]
    assert region["box"] == [5, 5, 60, 60]
    assert coco_mask.decode(region["mask"]).shape == (80, 120)
    named = sorted(path.relative_to(images / "named").as_posix() for path in (images / "named").rglob("*.*"))
    assert named == ["a/one.jpg", "b/two.png"]


def test_results_in_cocos_form_have_the_number_of_the_file_and_the_ids_of_the_names(regionspot, images, caplog):
    caplog.set_level("INFO")
    os.rename(images / "a/one.jpg", images / "a/000139.jpg")
    (images / "names.json").write_text(
        '{"categories": [{"id": 70, "name": "red star"}, {"id": 9, "name": "blue ring"}]}'
    )
    options = (*TOY[:-2], "--names", "@names.json", "--boxes", "5,5,60,60", "--format", "coco")
    code, out, err = regionspot("predict", ".", *options)
    assert code == 0, err
    results = json.loads(out)
    assert [result["image_id"] for result in results] == [139, "two"]
    assert {result["category_id"] for result in results} <= {70, 9}
    assert results[0]["bbox"] == [5, 5, 55, 55]
    assert "segmentation" not in results[0]
    assert "a head trained on boxes with names" in caplog.text


def test_a_labelled_image_never_replaces_an_image(images):
    listed = list_images(["."], [])
    with pytest.raises(InputError, match="is an input of this command"):
        labelled_paths(images, listed)
    assert [path.as_posix() for path in labelled_paths(images / "out", listed)] == [
        f"{images}/out/a/one.jpg",
        f"{images}/out/b/two.png",
    ]


def test_a_method_beside_a_checkpoint_is_refused(refused, images):
    refused(
        "--method crop: names regions without a head", "predict", "a", *TOY, "--checkpoint", "x", "--method", "crop"
    )
