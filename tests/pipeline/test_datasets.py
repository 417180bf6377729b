"""Datasets in COCO format: the manifest of each, clipped and dropped boxes, image folders, and refused files."""

import gzip
import json
import pickle
import re

import numpy as np
import pytest
from PIL import Image

from regionspot.cache.errors import AnnotationError, InputError
from regionspot.pipeline.datasets import json_stream
from regionspot.pipeline.datasets.failure_limit import FailureLimit
from regionspot.pipeline.datasets.registry import (
    DATASETS,
    describe,
    image_folder_of,
    read_dataset,
    read_split,
    require_regions,
)


def image(image_id, **fields):
    return {"id": image_id, "height": 100, "width": 200, "file_name": f"{image_id}.jpg"} | fields


def box(image_id, category_id=1, bbox=(10, 20, 30, 40), **fields):
    return {"image_id": image_id, "category_id": category_id, "bbox": list(bbox)} | fields


ONE_IMAGE = (image(1),)


def coco(images=ONE_IMAGE, annotations=(), categories=({"id": 1, "name": "cat"},)):
    return {"images": list(images), "annotations": list(annotations), "categories": list(categories)}


@pytest.fixture
def read(tmp_path):
    """`read(content, name, ...)`: write a file, as JSON unless the content is text, and read it as that dataset."""

    def read(content, name="coco", split="train"):
        path = tmp_path / "boxes.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return read_dataset(name, tmp_path, split, annotations=path)

    return read


def lvis_image(image_id, folder="val2017", **fields):
    return {
        "id": image_id,
        "height": 100,
        "width": 200,
        "coco_url": f"http://images.cocodataset.org/{folder}/{image_id:012}.jpg",
        "neg_category_ids": [],
        "not_exhaustive_category_ids": [],
    } | fields


# The manifest


def test_boxes_become_corners_in_the_order_of_the_file(read):
    boxes = [box(7, bbox=(1, 2, 3, 4), id=30), box(3, bbox=(5, 6, 7, 8), id=20), box(7, bbox=(9, 9, 9, 9), id=10)]
    manifest = read(coco([image(7), image(5), image(3)], boxes))
    assert manifest.image_ids.tolist() == [7, 5, 3]
    assert manifest.region_count.tolist() == [2, 0, 1]
    assert manifest.boxes_xyxy.tolist() == [[1, 2, 4, 6], [9, 9, 18, 18], [5, 6, 12, 14]]
    assert manifest.annotation_ids.tolist() == [30, 10, 20]


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"iscrowd": 1}, "dropped_crowd"),
        ({"isfake": 1}, "dropped_fake"),
        ({"iscrowd": 1, "bbox": [10, 20, 0, 0]}, "dropped_crowd"),
    ],
)
def test_a_dropped_box_is_counted_once(read, fields, reason):
    manifest = read(coco(annotations=[box(1), box(1) | fields]))
    assert len(manifest.boxes_xyxy) == 1
    assert manifest.report == {reason: 1}


def test_a_box_one_pixel_wide_is_not_dropped_because_of_rounding(read):
    assert 3.1 + 1 - 3.1 < 1
    assert len(read(coco(annotations=[box(1, bbox=(3.1, 0.4, 1, 1))])).boxes_xyxy) == 1


def test_nan_inside_a_name_is_not_replaced(read):
    names = [{"id": 1, "name": 'a "NaN, Infinity" \\'}]
    manifest = read(coco(annotations=[box(1, bbox=(float("nan"), 1, 2, 3))], categories=names))
    assert manifest.categories[0].name == names[0]["name"]


def test_categories_are_sorted_by_id_and_their_names_stripped(read):
    categories = [{"id": 9, "name": "dog "}, {"id": 2, "name": "cat"}]
    manifest = read(coco(annotations=[box(1, 9), box(1, 2)], categories=categories), "o365")
    assert [(category.id, category.name) for category in manifest.categories] == [(2, "cat"), (9, "dog")]
    assert manifest.category_index.tolist() == [1, 0]


def test_categories_with_the_same_name_are_kept_by_id(read):
    categories = [{"id": 4, "name": "bass"}, {"id": 8, "name": "bass"}]
    manifest = read(coco(annotations=[box(1, 8)], categories=categories), "v3det")
    assert [category.id for category in manifest.categories] == [4, 8]
    assert manifest.category_index.tolist() == [1]


@pytest.mark.parametrize(
    ("cat_info", "definition"), [("a fish", "a fish"), (["a guitar", "a voice"], "a guitar"), ([], None), (None, None)]
)
def test_the_definition_of_a_v3det_category_is_its_text_or_the_first_of_its_list(read, cat_info, definition):
    categories = [{"id": 4, "name": "bass", "cat_info": cat_info}]
    manifest = read(coco(annotations=[box(1, 4)], categories=categories), "v3det")
    assert manifest.categories[0].definition == definition


def test_objects365_v2_shortens_paths_and_corrects_known_misspellings(read):
    images = [image(1, file_name="images/v1/patch8/objects365_v1_00420917.jpg")]
    names = [{"id": 53, "name": "Bakset"}, {"id": 54, "name": "Drum"}]
    manifest = read(coco(images, categories=names), "o365v2")
    assert manifest.paths.tolist() == ["patch8/objects365_v1_00420917.jpg"]
    assert [category.name for category in manifest.categories] == ["Basket", "Drum"]
    assert manifest.report == {"corrected_names": 1}


def test_v3det_keeps_whole_paths(read):
    assert read(coco([image(1, file_name="images/n01/x.jpg")]), "v3det").paths.tolist() == ["images/n01/x.jpg"]


def test_lvis_has_paths_by_coco_url_category_details_and_federated_lists(read):
    categories = [
        {"id": 12, "name": "alcohol", "frequency": "r"},
        {
            "id": 11,
            "name": "aerosol_can_(tin)",
            "frequency": "c",
            "synset": "aerosol.n.02",
            "synonyms": ["aerosol_can", "spray_can"],
            "def": "a dispenser",
        },
    ]
    images = [
        lvis_image(5, "train2017", neg_category_ids=[12, 11]),
        lvis_image(6, not_exhaustive_category_ids=[12]),
    ]
    manifest = read(coco(images, [box(5, 12)], categories), "lvis", "val")
    assert manifest.paths.tolist() == ["train2017/000000000005.jpg", "val2017/000000000006.jpg"]
    can = manifest.categories[0]
    assert (can.name, can.frequency, can.synset) == ("aerosol_can_(tin)", "c", "aerosol.n.02")
    assert (can.synonyms, can.definition) == (("aerosol_can", "spray_can"), "a dispenser")
    assert (manifest.negatives.offsets.tolist(), manifest.negatives.values.tolist()) == ([0, 2, 2], [1, 0])
    assert (manifest.not_exhaustive.offsets.tolist(), manifest.not_exhaustive.values.tolist()) == ([0, 0, 1], [1])


def test_minival_is_the_listed_images_of_val(tmp_path):
    boxes = [box(1), box(2, bbox=(1, 1, 50, 50)), box(3)]
    whole = coco([lvis_image(1), lvis_image(2), lvis_image(3)], boxes)
    (tmp_path / "annotations").mkdir()
    (tmp_path / "lvis_v1_val.json").write_text(json.dumps(whole))
    minival = tmp_path / "annotations" / "lvis_v1_minival_inserted_image_name.json"
    minival.write_text(json.dumps({"images": [{"id": 3}, {"id": 2}]}))
    manifest = read_dataset("lvis", tmp_path, "minival")
    assert manifest.split == "minival"
    assert manifest.image_ids.tolist() == [2, 3]
    assert manifest.boxes_xyxy.tolist() == [[1, 1, 51, 51], [10, 20, 40, 60]]
    assert set(manifest.source["files"]) == {"lvis_v1_val.json", minival.name}


def test_reading_in_slices_gives_the_same_manifest(read, monkeypatch):
    nested = {"parts": [{"a": "}, {"}, {"b": 2}], "segmentation": {"counts": "a}, {b", "size": [1, 2]}}
    images = [image(image_id) for image_id in range(1, 50)]
    boxes = [box(1 + at % 49, bbox=(at % 90, at % 40, 5, 6), id=at, **nested) for at in range(500)]
    whole = read(coco(images, boxes))
    monkeypatch.setattr(json_stream, "SLICE_BYTES", 1000)
    assert read(coco(images, boxes)).digest() == whole.digest()
    assert whole.region_count.sum() == 500


def test_the_source_names_the_file_with_its_sha256(read):
    source = read("  " + json.dumps(coco())).source
    assert list(source["files"]) == ["boxes.json"]
    assert source["files"]["boxes.json"] != read(coco()).source["files"]["boxes.json"]


# Other ways of writing the same values


TWO_BOXES = [box(1, 1, (10, 20, 30, 40), id=1), box(2, 1, (1, 2, 3, 4), id=2)]
TWO_IMAGES = [image(1), image(2)]


def changed(records, **fields):
    return [record | fields for record in records]


SAME = {  # each means the same as TWO_IMAGES with TWO_BOXES
    "null in unused fields": coco(changed(TWO_IMAGES, coco_url=None, license=None), TWO_BOXES),
    "other types in unused fields": coco(
        changed(TWO_IMAGES, coco_url=7, neg_category_ids="none", date_captured={}),
        changed(TWO_BOXES, segmentation=None, keypoints=None, attributes={"occluded": False}, area="large"),
        [{"id": 1, "name": "cat", "supercategory": None, "frequency": "x", "synonyms": None, "def": 1, "synset": []}],
    ),
    "integers as floats": coco(
        [{"id": float(at), "height": 100.0, "width": 200.0, "file_name": f"{at}.jpg"} for at in (1, 2)],
        [one | {"image_id": float(one["image_id"]), "category_id": 1.0, "id": float(one["id"])} for one in TWO_BOXES],
        [{"id": 1.0, "name": "cat"}],
    ),
    "numbers as strings": coco(
        [{"id": f"0{at}", "height": "100", "width": " 200 ", "file_name": f"{at}.jpg"} for at in (1, 2)],
        [
            {name: str(value) for name, value in one.items()} | {"bbox": [str(side) for side in one["bbox"]]}
            for one in TWO_BOXES
        ],
        [{"id": "1", "name": "cat"}],
    ),
    "nested boxes": coco(TWO_IMAGES, [one | {"bbox": [one["bbox"]]} for one in TWO_BOXES]),
    **{
        f"iscrowd as {none!r}": coco(TWO_IMAGES, changed(TWO_BOXES, iscrowd=none, isfake=none))
        for none in (None, 0.0, "0", "", False, "false")
    },
}


@pytest.mark.parametrize("case", SAME)
def test_equivalent_files_give_the_same_manifest(read, case):
    manifest = read(SAME[case])
    assert manifest.digest() == read(coco(TWO_IMAGES, TWO_BOXES)).digest()
    assert (manifest.report, manifest.remarks) == ({}, ())


@pytest.mark.parametrize("crowd", [1, 1.0, True, "1", "true", 2])
def test_every_spelling_of_a_crowd_flag_is_read(read, crowd):
    assert read(coco(annotations=[box(1), box(1, iscrowd=crowd)])).report == {"dropped_crowd": 1}


def test_a_utf8_byte_order_mark_is_ignored(read, tmp_path):
    content = json.dumps(coco(annotations=[box(1)]))
    assert read("\ufeff" + content).digest() == read(content).digest()


def test_image_ids_that_are_names_get_the_same_number_in_every_file(read):
    first = read(coco([image("a.jpg"), image("dog-7")], [box("dog-7"), box("a.jpg")]))
    other = read(coco([image(5), image("dog-7")], [box("dog-7")]))
    assert first.paths.tolist() == ["a.jpg.jpg", "dog-7.jpg"]
    assert first.region_count.tolist() == [1, 1]
    assert first.image_ids[1] == other.image_ids[1] >= 2**62
    assert (first.report, other.report) == ({"image_ids_that_are_names": 2}, {"image_ids_that_are_names": 1})


def test_an_image_id_of_more_than_64_bits_is_a_name(read):
    manifest = read(coco([image(2**64 + 5), image(5)], [box(2**64 + 5), box(str(2**64 + 5))]))
    assert manifest.region_count.tolist() == [2, 0]


@pytest.mark.parametrize("number", ["seven", None, 2**70, 1.5, True, [1]])
def test_an_annotation_id_that_is_not_an_integer_is_ignored(read, number):
    assert read(coco(annotations=[box(1, id=number)])).annotation_ids.tolist() == [-1]


def test_category_ids_may_be_zero_or_negative(read):
    categories = [{"id": 0, "name": "zero"}, {"id": -1, "name": "minus"}]
    manifest = read(coco(annotations=[box(1, 0), box(1, -1)], categories=categories))
    assert [manifest.categories[index].name for index in manifest.category_index] == ["zero", "minus"]


def test_repeated_ids_boxes_and_names_are_counted(read):
    categories = [{"id": 1, "name": "cat"}, {"id": 2, "name": "cat"}]
    boxes = [box(1, id=3), box(1, id=4), box(1, 2, id=4), box(1, bbox=(1, 1, 5, 5), id=3)]
    report = read(coco(annotations=boxes, categories=categories)).report
    assert report == {"repeated_category_names": 1, "repeated_boxes": 1, "repeated_annotation_ids": 2}


def test_windows_separators_are_converted(read):
    assert read(coco([image(1, file_name="sub dir\\e.jpg")])).paths.tolist() == ["sub dir/e.jpg"]


def test_lvis_takes_the_path_from_coco_url_or_else_file_name(read):
    urls = ["http://x/val2017/a%20b.jpg?size=1#top", None]
    images = [lvis_image(at) | {"coco_url": url, "file_name": "val2017/c%20d.jpg"} for at, url in enumerate(urls)]
    assert read(coco(images), "lvis").paths.tolist() == ["val2017/a b.jpg", "val2017/c%20d.jpg"]


# Unreadable records

MANY = 20  # --max-failures 20% allows four unreadable ones

BAD_ANNOTATIONS = {
    "no image": ({"bbox": [1, 2, 3, 4]}, " has no `image_id`"),
    "unknown image": (box(77), ".image_id is 77, which `images` lacks"),
    "unknown category": (box(1, 55), ".category_id is 55, which `categories` lacks"),
    "no box": ({"image_id": 1, "category_id": 1}, " has no `bbox`"),
    "null": (box(1) | {"bbox": None}, ".bbox is null, expected 4 numbers: x, y, width, height"),
    "empty box": (box(1, bbox=()), ".bbox is []"),
    "three numbers": (box(1, bbox=(1, 2, 3)), ".bbox has 3 numbers"),
    "rotated": (box(1, bbox=(1, 2, 3, 4, 90)), ".bbox has 5 numbers (a rotated box?)"),
    "text": (box(1, bbox=(1, 2, "wide", 4)), '.bbox[2] is "wide", expected a number'),
    "odd crowd": (box(1, iscrowd="many"), '.iscrowd is "many", expected 0 or 1'),
    "half an image": (box(1.5), ".image_id is 1.5"),
    "not an object": ("box", ' is "box", expected an object'),
    "a long value": (box(1) | {"bbox": "x" * 1000}, f'.bbox is "{"x" * 59}..., expected'),
}


@pytest.mark.parametrize("case", BAD_ANNOTATIONS)
def test_one_bad_annotation_is_skipped_counted_and_reported_with_its_index(read, tmp_path, case):
    bad, expected = BAD_ANNOTATIONS[case]
    boxes = [box(1, bbox=(at, at, 5, 5)) for at in range(MANY)]
    manifest = read(coco(annotations=[*boxes[:7], bad, *boxes[7:]]))
    assert manifest.boxes_xyxy[:, 0].tolist() == list(range(MANY))
    assert manifest.report == {"skipped_annotations": 1}
    (remark,) = manifest.remarks
    assert remark.startswith(f"{tmp_path / 'boxes.json'}: 1 of 21 annotations cannot be read and are left out")
    assert f"annotations[7]{expected}" in remark
    assert len(remark) < 300


BAD_IMAGES = {
    "height 0": ({"height": 0}, ".height is 0, expected pixels, a whole number from 1"),
    "width null": ({"width": None}, ".width is null"),
    "no name": ({"file_name": None}, " has no `file_name`"),
    "a number as name": ({"file_name": 7}, ".file_name is 7, expected text"),
    "absolute": ({"file_name": "/etc/a.jpg"}, '.file_name is "/etc/a.jpg", expected a path relative to'),
    "drive": ({"file_name": "C:\\b.jpg"}, "expected a path relative to the image folder"),
    "outside the folder": ({"file_name": "a/../../b.jpg"}, "this one leaves it"),
    "outside the folder, Windows": ({"file_name": "..\\pics\\b.jpg"}, "this one leaves it"),
    "URL": ({"file_name": "https://x/a.jpg"}, "not a URL; download the image into it"),
}


@pytest.mark.parametrize("case", BAD_IMAGES)
def test_one_bad_image_is_skipped_with_its_boxes(read, case):
    fields, expected = BAD_IMAGES[case]
    images = [image(at) for at in range(MANY)]
    images[3] |= fields
    manifest = read(coco(images, [box(3), box(4)]))
    assert manifest.image_ids.tolist() == [at for at in range(MANY) if at != 3]
    assert manifest.report == {"skipped_images": 1, "dropped_image_skipped": 1}
    assert re.search(rf"images\[3\].*{re.escape(expected)}", manifest.remarks[0])


def test_too_many_bad_records_are_refused_with_the_first_reason(read, tmp_path):
    boxes = [box(1), *[box(1) | {"bbox": None}] * 3, *[box(1)] * 6]
    with pytest.raises(
        AnnotationError, match=r"3 of 10 annotations cannot be read, more than --max-failures 20% allow"
    ):
        read(coco(annotations=boxes))
    path = tmp_path / "boxes.json"
    assert len(read_dataset("coco", tmp_path, annotations=path, max_failures=FailureLimit(count=3)).boxes_xyxy) == 7
    path.write_text(json.dumps(coco(annotations=boxes[1:4])))
    with pytest.raises(AnnotationError, match=r"3 of 3 annotations cannot be read, the first: annotations\[0\]\.bbox"):
        read_dataset("coco", tmp_path, annotations=path, max_failures=FailureLimit(share=1.0))


def test_bad_records_of_a_sliced_file_are_reported_by_their_index_in_the_file(read, monkeypatch):
    monkeypatch.setattr(json_stream, "SLICE_BYTES", 200)
    boxes = [box(1, id=at) for at in range(60)]
    boxes[45] |= {"bbox": None}
    manifest = read(coco(annotations=boxes))
    assert "annotations[45].bbox is null" in manifest.remarks[0]
    assert manifest.annotation_ids.tolist() == [at for at in range(60) if at != 45]


# Boxes in a wrong format

WIDTH, HEIGHT = 200, 100


def boxes_of(box_format, count=40):
    """Boxes in that format, inside images of 200 x 100."""
    rng = np.random.default_rng(3)
    x1, y1 = rng.uniform(0, 0.6, count) * WIDTH, rng.uniform(0, 0.6, count) * HEIGHT
    x2, y2 = x1 + rng.uniform(0.2, 0.4, count) * WIDTH, y1 + rng.uniform(0.2, 0.4, count) * HEIGHT
    columns = {
        "x, y, width, height in pixels": (x1, y1, x2 - x1, y2 - y1),
        "x1, y1, x2, y2 in pixels": (x1, y1, x2, y2),
        "centre x, centre y, width, height in pixels": ((x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1),
        "x, y, width, height from 0 to 1": (x1 / WIDTH, y1 / HEIGHT, (x2 - x1) / WIDTH, (y2 - y1) / HEIGHT),
        "x1, y1, x2, y2 from 0 to 1": (x1 / WIDTH, y1 / HEIGHT, x2 / WIDTH, y2 / HEIGHT),
        "x, y, width, height from 0 to 100": (
            100 * x1 / WIDTH,
            100 * y1 / HEIGHT,
            100 * (x2 - x1) / WIDTH,
            100 * (y2 - y1) / HEIGHT,
        ),
        "larger images": (3 * x1, 3 * y1, 3 * (x2 - x1), 3 * (y2 - y1)),
    }
    return np.stack(columns[box_format], axis=1).round(3).tolist()


@pytest.mark.parametrize(
    "box_format",
    [
        "x1, y1, x2, y2 in pixels",
        "x, y, width, height from 0 to 1",
        "centre x, centre y, width, height in pixels",
        "larger images",
    ],
)
def test_boxes_in_another_format_are_diagnosed(read, box_format):
    manifest = read(coco(annotations=[box(1, bbox=bbox) for bbox in boxes_of(box_format)]))
    assert manifest.report.get("clipped", 0) + manifest.report.get("dropped_under_1_px", 0) >= 5
    (remark,) = manifest.remarks
    assert box_format in remark


def test_swapped_sizes_are_diagnosed(read):
    boxes = boxes_of("x, y, width, height in pixels")
    manifest = read(coco([image(1, height=WIDTH, width=HEIGHT)], [box(1, bbox=bbox) for bbox in boxes]))
    assert "height and width are swapped" in manifest.remarks[0]


def test_boxes_a_little_over_the_border_give_no_remark(read):
    manifest = read(coco(annotations=[box(1, bbox=(10, 10, 191, 50))] * 2))
    assert (manifest.report["clipped"], manifest.remarks) == (2, ())


def test_a_split_without_regions_is_refused_with_the_counts(read, tmp_path):
    boxes = boxes_of("x, y, width, height from 0 to 1")
    manifest = read(coco(annotations=[box(1, bbox=bbox) for bbox in boxes]))
    with pytest.raises(InputError, match=r"boxes\.json has no usable region \(dropped under 1 px: 40\)") as error:
        require_regions(manifest)
    assert "they look like x, y, width, height from 0 to 1" in str(error.value)
    read(coco())
    with pytest.raises(InputError, match=r"\(no boxes\); give boxes by --annotations or --boxes"):
        read_split("coco", tmp_path, annotations=tmp_path / "boxes.json")
    assert len(read_split("coco", tmp_path, annotations=tmp_path / "boxes.json", may_be_empty=True)) == 1


# Locating files


@pytest.mark.parametrize("folder", [".", "annotations"])
@pytest.mark.parametrize("name", ["o365", "o365v2", "v3det", "lvis", "coco", "toy"])
def test_the_annotation_file_is_found_under_its_own_name(tmp_path, name, folder):
    path = tmp_path / folder / DATASETS[name].files["val"][0]
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(coco([lvis_image(1, file_name="1.jpg")])))
    manifest = read_dataset(name, tmp_path, "val")
    assert (manifest.dataset, manifest.split, len(manifest)) == (name, "val", 1)


@pytest.mark.parametrize(
    ("name", "inside", "expected"),
    [
        ("o365", "val", "val"),
        ("lvis", "images/train2017", "images"),
        ("lvis", "coco/val2017", "coco"),
        ("lvis", "val2017", "."),
        ("coco", "images/val2017", "images/val2017"),
        ("coco", "val", "val"),
        ("toy", "photos/val", "photos"),
        ("v3det", "images", "."),
        ("openimages", "validation", "validation"),
        ("openimages", "nothing", "val"),
    ],
)
def test_the_image_folder_is_found(tmp_path, name, inside, expected):
    (tmp_path / inside).mkdir(parents=True)
    assert image_folder_of(name, tmp_path, "val") == tmp_path / expected


def test_the_image_folder_of_another_coco_file_is_found_by_its_paths(read, tmp_path):
    manifest = read(coco([image(1, file_name="train/deep/a.jpg")]))
    (tmp_path / "images").mkdir()
    (tmp_path / "train" / "deep").mkdir(parents=True)
    (tmp_path / "train" / "deep" / "a.jpg").touch()
    assert image_folder_of("coco", tmp_path, "train", manifest) == tmp_path


def test_the_folder_with_most_of_the_sampled_images_is_used(read, tmp_path):
    manifest = read(coco([image(at) for at in range(100)]))
    (tmp_path / "train").mkdir()
    for at in range(50, 100):
        (tmp_path / "train" / f"{at}.jpg").touch()
    (tmp_path / "images").mkdir()
    assert image_folder_of("coco", tmp_path, "train", manifest) == tmp_path / "train"


def test_if_no_image_is_found_the_existing_folder_is_used(read, tmp_path):
    report = describe(manifest := read(coco()), image_folder_of("coco", tmp_path, "train", manifest))
    assert f"1 are not in {tmp_path}: 1.jpg" in report.text()


@pytest.mark.parametrize(
    ("path", "existing", "hint"),
    [
        ("c%20d.jpg", "c d.jpg", "c d.jpg exists: the annotations have its name URL-encoded"),
        ("patch3/a.jpg", "patch12/a.jpg", "a.jpg is in {}/patch12, not in {}/patch3"),
        ("images/a.jpg", "a.jpg", "a.jpg is in {}, not in {}/images"),
        ("a.jpg", "A.JPG", "A.JPG exists; change the name in the annotations"),
        ("a.jpg", "a.png", "a.png exists; change the name in the annotations"),
        ("val2017/a.jpg", "other/b.jpg", "{}/val2017 does not exist"),
        ("a.jpg", "b.jpg", ""),
    ],
)
def test_a_hint_names_the_likely_location_of_a_missing_image(read, tmp_path, path, existing, hint):
    folder = tmp_path / "photos"
    (folder / existing).parent.mkdir(parents=True)
    (folder / existing).touch()
    report = describe(read(coco([image(1, file_name=path)])), folder)
    assert report.hint.startswith(hint.replace("{}", str(folder)))
    assert bool(report.hint) == bool(hint)
    assert report.hint in report.text()


def test_real_coco_images_have_the_annotated_sizes(coco_mini):
    for split in ("train", "val"):
        manifest = read_dataset("coco", coco_mini, split)
        folder = image_folder_of("coco", coco_mini, split)
        assert describe(manifest, folder).missing_images == 0
        assert len(manifest) == 100
        with Image.open(folder / manifest.paths[0]) as image:
            assert image.size == (manifest.widths[0], manifest.heights[0])
    assert len(manifest.boxes_xyxy) + manifest.report["dropped_crowd"] == 712


def test_real_lvis_annotations_have_federated_lists(coco_mini):
    path = coco_mini / "annotations" / "lvis_mini_val.json"
    manifest = read_dataset("lvis", coco_mini, "val", annotations=path)
    assert describe(manifest, image_folder_of("lvis", coco_mini, "val")).missing_images == 0
    first = json.loads(path.read_text())["images"][0]
    negatives = manifest.negatives.values[: manifest.negatives.offsets[1]]
    assert [manifest.categories[index].id for index in negatives] == first["neg_category_ids"]


# Reports


def test_the_report_counts_regions_dropped_boxes_and_missing_images(read, tmp_path):
    images = [image(1), image(2, file_name="deep/2.jpg"), image(3)]
    manifest = read(coco(images, [box(1), box(1), box(2), box(2, iscrowd=1)]))
    (tmp_path / "1.jpg").touch()
    report = describe(manifest, tmp_path)
    assert (report.images, report.regions, report.categories) == (3, 3, 1)
    assert (report.median_regions, report.max_regions, report.images_without_regions) == (1, 2, 1)
    assert (report.missing_images, report.first_missing) == (2, ("deep/2.jpg", "3.jpg"))
    assert "dropped crowd: 1" in report.text()
    assert f"2 are not in {tmp_path}: deep/2.jpg, 3.jpg" in report.text()


def test_images_are_not_checked_without_check_images(read, tmp_path):
    report = describe(read(coco()), tmp_path / "nowhere", check_images=False)
    assert report.missing_images is None
    assert "images:" not in report.text()


# Refused files

BROKEN = {
    "truncated": (json.dumps(coco(annotations=[box(1)]))[:-20], "is truncated"),
    "not JSON": ("\x01\x02", "is not valid JSON"),
    "a trailing comma": (json.dumps(coco()).replace("}]}", "},]}"), "is not valid JSON (trailing comma in array"),
    "comments": (f"// mine\n{json.dumps(coco())}", "has comments"),
    "two documents": (json.dumps(coco()) * 2, "has text after the end of its JSON"),
    "a web page": ("<!DOCTYPE html>", "perhaps a server's error page"),
    "UTF-16": (json.dumps(coco()).encode("utf-16"), "is text in UTF-16; save it as UTF-8"),
    "UTF-16 without a mark": (json.dumps(coco()).encode("utf-16-le"), "is text in UTF-16"),
    "gzip": (gzip.compress(json.dumps(coco()).encode()), "is compressed by gzip; unpack it"),
    "a pickle": (pickle.dumps(coco()), "is a Python pickle"),
    "Latin-1": (json.dumps(coco(categories=[{"id": 1, "name": "\xe4"}]), ensure_ascii=False).encode("latin-1"), "0xe4"),
    "a list": ("[]", "is a list, expected an object with images, annotations, categories"),
    "no annotations": ({"images": [], "categories": []}, "has no list `annotations`"),
    "annotations not a list": (coco() | {"annotations": None}, "`annotations` is null, expected a list"),
    "annotations by id": (coco() | {"annotations": {"1": box(1)}}, "`annotations` is an object, expected a list"),
    "captions": (coco(annotations=[{"id": 1, "image_id": 1, "caption": "a cat"}]), "the file holds captions"),
    "no images": (coco([]), "`images` is empty"),
    "no readable image": (coco([image(1, height=0)]), "images[0].height is 0, expected pixels"),
    "repeated image id": (
        coco([image(4), image(4)]),
        "has 1 ids more than once, the first is 4 (of 4.jpg and of 4.jpg)",
    ),
    "repeated category id": (coco(categories=[{"id": 3, "name": "a"}, {"id": 3, "name": "b"}]), "id 3 more than once"),
    "category without a name": (coco(categories=[{"id": 3, "name": " "}]), 'categories[0].name is " "'),
    "categories as strings": (coco(categories=["cat"]), 'categories[0] is "cat", expected an object'),
    "category id as a name": (coco(categories=[{"id": "cat", "name": "cat"}]), 'categories[0].id is "cat"'),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_refused_in_one_line_with_its_path(tmp_path, case):
    content, expected = BROKEN[case]
    path = tmp_path / "boxes.json"
    text = content if isinstance(content, str | bytes) else json.dumps(content)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(AnnotationError) as caught:
        read_dataset("coco", tmp_path, annotations=path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert expected in message
    assert "\n" not in message


def test_paths_that_leave_the_image_folder_are_refused_before_they_are_shortened(read):
    with pytest.raises(AnnotationError, match="this one leaves it"):
        read(coco([image(1, file_name="../../v1/patch8/a.jpg")]), "o365v2")


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"neg_category_ids": None}, "images\\[0\\] has no `neg_category_ids`"),
        ({"not_exhaustive_category_ids": [99]}, "names category 99"),
        ({"coco_url": "", "file_name": ""}, "images\\[0\\] has no `coco_url`"),
        ({"coco_url": "http://x/val2017/.."}, "this one leaves it"),
    ],
)
def test_a_broken_lvis_image_is_refused(read, fields, expected):
    with pytest.raises(AnnotationError, match=expected):
        read(coco([lvis_image(1) | fields]), "lvis")


def test_minival_of_another_val_is_refused(tmp_path):
    (tmp_path / "lvis_v1_val.json").write_text(json.dumps(coco([lvis_image(1)])))
    (tmp_path / "lvis_v1_minival_inserted_image_name.json").write_text('{"images": [{"id": 1}, {"id": 2}]}')
    with pytest.raises(AnnotationError, match=r"1 of its images are not in lvis_v1_val\.json, the first has id 2"):
        read_dataset("lvis", tmp_path, "minival")


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda path: None, "does not exist"),
        (lambda path: path.mkdir(), "cannot be read"),
        (lambda path: path.touch(), "is empty"),
    ],
)
def test_an_unreadable_file_is_refused(tmp_path, make, expected):
    path = tmp_path / "boxes.json"
    make(path)
    with pytest.raises(AnnotationError, match=expected):
        read_dataset("coco", tmp_path, annotations=path)


def test_a_missing_annotation_file_is_reported_with_its_names(tmp_path):
    with pytest.raises(AnnotationError, match=r"o365 needs objects365_val\.json here or in annotations/"):
        read_dataset("o365", tmp_path, "val")


def test_unknown_datasets_and_splits_are_refused_with_the_known_ones(tmp_path):
    with pytest.raises(InputError, match="dataset 'imagenet': unknown; expected one of o365, o365v2, openimages"):
        read_dataset("imagenet", tmp_path)
    with pytest.raises(InputError, match="o365 split 'test': unknown; expected one of train, val"):
        read_dataset("o365", tmp_path, "test")


def test_columns_have_the_dtypes_of_the_manifest(read):
    manifest = read(coco(annotations=[box(1)]))
    dtypes = {name: getattr(manifest, name).dtype for name in ("image_ids", "heights", "offsets", "boxes_xyxy")}
    assert dtypes == {"image_ids": np.int64, "heights": np.int32, "offsets": np.int64, "boxes_xyxy": np.float32}
    assert manifest.category_index.dtype == np.int32
    assert isinstance(manifest.paths.dtype, np.dtypes.StringDType)
