"""Datasets in COCO's form: what a manifest says of each, which boxes it holds, and what is refused with one line."""

import json

import numpy as np
import pytest
from PIL import Image

from regionspot.cache.errors import AnnotationError, InputError
from regionspot.pipeline import annotation_file
from regionspot.pipeline.datasets import DATASETS, describe, photo_dir, read_dataset


def picture(image_id, **fields):
    return {"id": image_id, "height": 100, "width": 200, "file_name": f"{image_id}.jpg"} | fields


def box(image_id, category_id=1, bbox=(10, 20, 30, 40), **fields):
    return {"image_id": image_id, "category_id": category_id, "bbox": list(bbox)} | fields


ONE_PICTURE = (picture(1),)


def coco(images=ONE_PICTURE, annotations=(), categories=({"id": 1, "name": "cat"},)):
    return {"images": list(images), "annotations": list(annotations), "categories": list(categories)}


@pytest.fixture
def read(tmp_path):
    """`read(content, name, ...)`: write the file, as JSON unless it is text already, and read it as that dataset."""

    def read(content, name="coco", split="train"):
        path = tmp_path / "boxes.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return read_dataset(name, tmp_path, split, annotations=path)

    return read


def lvis_picture(image_id, folder="val2017", **fields):
    return {
        "id": image_id,
        "height": 100,
        "width": 200,
        "coco_url": f"http://images.cocodataset.org/{folder}/{image_id:012}.jpg",
        "neg_category_ids": [],
        "not_exhaustive_category_ids": [],
    } | fields


# What a manifest holds


def test_boxes_become_corners_of_their_pictures_in_the_order_of_the_file(read):
    boxes = [box(7, bbox=(1, 2, 3, 4), id=30), box(3, bbox=(5, 6, 7, 8), id=20), box(7, bbox=(9, 9, 9, 9), id=10)]
    manifest = read(coco([picture(7), picture(5), picture(3)], boxes))
    assert manifest.image_ids.tolist() == [7, 5, 3]
    assert manifest.region_count.tolist() == [2, 0, 1]
    assert manifest.boxes_xyxy.tolist() == [[1, 2, 4, 6], [9, 9, 18, 18], [5, 6, 12, 14]]
    assert manifest.annotation_ids.tolist() == [30, 10, 20]


def test_boxes_are_clipped_to_the_picture(read):
    assert read(coco(annotations=[box(1, bbox=(-5, 90, 300, 30))])).boxes_xyxy.tolist() == [[0, 90, 200, 100]]


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"iscrowd": 1}, "dropped_crowd"),
        ({"isfake": 1}, "dropped_fake"),
        ({"bbox": [10, 20, 0.9, 40]}, "dropped_under_1_px"),
        ({"bbox": [10, 20, 40, -3]}, "dropped_under_1_px"),
        ({"bbox": [199.5, 20, 40, 40]}, "dropped_under_1_px"),
        ({"bbox": [float("nan"), 20, 40, 40]}, "dropped_not_finite"),
        ({"bbox": [10, 20, float("inf"), 40]}, "dropped_not_finite"),
        ({"iscrowd": 1, "bbox": [10, 20, 0, 0]}, "dropped_crowd"),
    ],
)
def test_an_unusable_box_is_dropped_and_counted_once(read, fields, reason):
    manifest = read(coco(annotations=[box(1), box(1) | fields]))
    assert len(manifest.boxes_xyxy) == 1
    assert manifest.report == {reason: 1}


def test_a_box_stated_one_pixel_wide_is_not_lost_to_rounding(read):
    assert 3.1 + 1 - 3.1 < 1
    assert len(read(coco(annotations=[box(1, bbox=(3.1, 0.4, 1, 1))])).boxes_xyxy) == 1


def test_a_name_that_holds_nan_survives_a_file_with_nan_in_it(read):
    names = [{"id": 1, "name": 'a "NaN, Infinity" \\'}]
    manifest = read(coco(annotations=[box(1, bbox=(float("nan"), 1, 2, 3))], categories=names))
    assert manifest.categories[0].name == names[0]["name"]


def test_categories_are_sorted_by_id_and_their_names_lose_blanks_at_the_ends(read):
    categories = [{"id": 9, "name": "dog "}, {"id": 2, "name": "cat"}]
    manifest = read(coco(annotations=[box(1, 9), box(1, 2)], categories=categories), "o365")
    assert [(category.id, category.name) for category in manifest.categories] == [(2, "cat"), (9, "dog")]
    assert manifest.category_index.tolist() == [1, 0]


def test_categories_of_one_name_stay_apart_by_their_ids(read):
    categories = [{"id": 4, "name": "bass", "cat_info": "a fish"}, {"id": 8, "name": "bass"}]
    manifest = read(coco(annotations=[box(1, 8)], categories=categories), "v3det")
    assert [category.id for category in manifest.categories] == [4, 8]
    assert manifest.categories[0].definition == "a fish"
    assert manifest.category_index.tolist() == [1]


def test_objects365_v2_paths_are_their_last_two_parts_and_known_misspellings_are_corrected_and_counted(read):
    images = [picture(1, file_name="images/v1/patch8/objects365_v1_00420917.jpg")]
    names = [{"id": 53, "name": "Bakset"}, {"id": 54, "name": "Drum"}]
    manifest = read(coco(images, categories=names), "o365v2")
    assert manifest.paths.tolist() == ["patch8/objects365_v1_00420917.jpg"]
    assert [category.name for category in manifest.categories] == ["Basket", "Drum"]
    assert manifest.report == {"corrected_names": 1}


def test_v3det_paths_keep_every_part(read):
    assert read(coco([picture(1, file_name="images/n01/x.jpg")]), "v3det").paths.tolist() == ["images/n01/x.jpg"]


def test_lvis_gives_paths_by_coco_url_facts_of_its_categories_and_federated_lists(read):
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
        lvis_picture(5, "train2017", neg_category_ids=[12, 11]),
        lvis_picture(6, not_exhaustive_category_ids=[12]),
    ]
    manifest = read(coco(images, [box(5, 12)], categories), "lvis", "val")
    assert manifest.paths.tolist() == ["train2017/000000000005.jpg", "val2017/000000000006.jpg"]
    can = manifest.categories[0]
    assert (can.name, can.frequency, can.synset) == ("aerosol_can_(tin)", "c", "aerosol.n.02")
    assert (can.synonyms, can.definition) == (("aerosol_can", "spray_can"), "a dispenser")
    assert (manifest.negatives.offsets.tolist(), manifest.negatives.values.tolist()) == ([0, 2, 2], [1, 0])
    assert (manifest.not_exhaustive.offsets.tolist(), manifest.not_exhaustive.values.tolist()) == ([0, 0, 1], [1])


def test_minival_is_val_cut_to_the_listed_pictures(tmp_path):
    boxes = [box(1), box(2, bbox=(1, 1, 50, 50)), box(3)]
    whole = coco([lvis_picture(1), lvis_picture(2), lvis_picture(3)], boxes)
    (tmp_path / "annotations").mkdir()
    (tmp_path / "lvis_v1_val.json").write_text(json.dumps(whole))
    minival = tmp_path / "annotations" / "lvis_v1_minival_inserted_image_name.json"
    minival.write_text(json.dumps({"images": [{"id": 3}, {"id": 2}]}))
    manifest = read_dataset("lvis", tmp_path, "minival")
    assert manifest.split == "minival"
    assert manifest.image_ids.tolist() == [2, 3]
    assert manifest.boxes_xyxy.tolist() == [[1, 1, 51, 51], [10, 20, 40, 60]]
    assert set(manifest.source["files"]) == {"lvis_v1_val.json", minival.name}


def test_a_long_file_read_in_slices_gives_the_same_as_in_one(read, monkeypatch):
    nested = {"parts": [{"a": "}, {"}, {"b": 2}], "segmentation": {"counts": "a}, {b", "size": [1, 2]}}
    images = [picture(image_id) for image_id in range(1, 50)]
    boxes = [box(1 + at % 49, bbox=(at % 90, at % 40, 5, 6), id=at, **nested) for at in range(500)]
    whole = read(coco(images, boxes))
    monkeypatch.setattr(annotation_file, "SLICE_BYTES", 1000)
    assert read(coco(images, boxes)).digest() == whole.digest()
    assert whole.region_count.sum() == 500


def test_the_source_names_the_file_with_its_sha256(read):
    source = read("  " + json.dumps(coco())).source
    assert list(source["files"]) == ["boxes.json"]
    assert source["files"]["boxes.json"] != read(coco()).source["files"]["boxes.json"]


# Where files are found


@pytest.mark.parametrize("folder", [".", "annotations"])
@pytest.mark.parametrize("name", ["o365", "o365v2", "v3det", "lvis", "coco", "toy"])
def test_the_annotation_file_is_found_under_its_own_name(tmp_path, name, folder):
    path = tmp_path / folder / DATASETS[name].files["val"][0]
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(coco([lvis_picture(1, file_name="1.jpg")])))
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
def test_the_photo_folder_is_found_where_people_have_it(tmp_path, name, inside, expected):
    (tmp_path / inside).mkdir(parents=True)
    assert photo_dir(name, tmp_path, "val") == tmp_path / expected


def test_the_photos_of_any_coco_form_file_are_found_by_its_first_paths(read, tmp_path):
    manifest = read(coco([picture(1, file_name="train/deep/a.jpg")]))
    (tmp_path / "images").mkdir()
    (tmp_path / "train" / "deep").mkdir(parents=True)
    (tmp_path / "train" / "deep" / "a.jpg").touch()
    assert photo_dir("coco", tmp_path, "train", manifest) == tmp_path


def test_real_coco_photos_and_boxes_fit_each_other(coco_mini):
    for split in ("train", "val"):
        manifest = read_dataset("coco", coco_mini, split)
        folder = photo_dir("coco", coco_mini, split)
        assert describe(manifest, folder).missing_photos == 0
        assert len(manifest) == 100
        with Image.open(folder / manifest.paths[0]) as photo:
            assert photo.size == (manifest.widths[0], manifest.heights[0])
    assert len(manifest.boxes_xyxy) + manifest.report["dropped_crowd"] == 712


def test_real_lvis_form_annotations_read_with_their_federated_lists(coco_mini):
    path = coco_mini / "annotations" / "lvis_mini_val.json"
    manifest = read_dataset("lvis", coco_mini, "val", annotations=path)
    assert describe(manifest, photo_dir("lvis", coco_mini, "val")).missing_photos == 0
    first = json.loads(path.read_text())["images"][0]
    negatives = manifest.negatives.values[: manifest.negatives.offsets[1]]
    assert [manifest.categories[index].id for index in negatives] == first["neg_category_ids"]


# What is told


def test_the_report_counts_what_was_read_dropped_and_is_missing(read, tmp_path):
    images = [picture(1), picture(2, file_name="deep/2.jpg"), picture(3)]
    manifest = read(coco(images, [box(1), box(1), box(2), box(2, iscrowd=1)]))
    (tmp_path / "1.jpg").touch()
    report = describe(manifest, tmp_path)
    assert (report.pictures, report.regions, report.categories) == (3, 3, 1)
    assert (report.median_regions, report.max_regions, report.pictures_without_regions) == (1, 2, 1)
    assert (report.missing_photos, report.first_missing) == (2, ("deep/2.jpg", "3.jpg"))
    assert "dropped crowd: 1" in report.text()
    assert f"2 are not in {tmp_path}: deep/2.jpg, 3.jpg" in report.text()


def test_the_disk_is_left_alone_when_photos_are_not_to_be_checked(read, tmp_path):
    report = describe(read(coco()), tmp_path / "nowhere", check_photos=False)
    assert report.missing_photos is None
    assert "photos" not in report.text()


# What is refused

BROKEN = {
    "truncated": (json.dumps(coco(annotations=[box(1)]))[:-20], "not whole JSON"),
    "no JSON": ("\x00\x01", "not whole JSON"),
    "a list": ("[]", "Expected `object`, got `array`"),
    "no annotations": ({"images": [], "categories": []}, "missing required field `annotations`"),
    "annotations no list": (coco() | {"annotations": None}, "`annotations` is not a list"),
    "box without picture": (coco(annotations=[box(1), {"bbox": [1, 2, 3, 4]}]), "`image_id` - at `$.annotations[1]`"),
    "box of three numbers": (coco(annotations=[box(1, bbox=(1, 2, 3))]), "length 4 - at `$.annotations[0].bbox`"),
    "id as text": (coco([picture("1")]), "Expected `int`, got `str` - at `$.images[0].id`"),
    "id too large": (coco([picture(2**70)]), "`$.images[0].id`"),
    "no height": (coco([picture(1, height=0)]), "`int` >= 1 - at `$.images[0].height`"),
    "no pictures": (coco([]), "`images` is empty"),
    "no file name": (coco([{"id": 1, "height": 1, "width": 1}]), "`file_name` is missing or empty"),
    "absolute path": (coco([picture(1, file_name="/etc/a.jpg")]), "leaves the photo folder"),
    "climbing path": (coco([picture(1), picture(2, file_name="a/../../b.jpg")]), "at `$.images[1].file_name`"),
    "drive": (coco([picture(1, file_name="C:/b.jpg")]), "leaves the photo folder"),
    "backslashes": (coco([picture(1, file_name="..\\b.jpg")]), "leaves the photo folder"),
    "one id twice": (coco([picture(4), picture(4)]), "holds 1 ids more than once, the first is 4"),
    "one category twice": (coco(categories=[{"id": 3, "name": "a"}, {"id": 3, "name": "b"}]), "id 3 more than once"),
    "unknown picture": (coco(annotations=[box(77)]), "image_id 77, which `images` lacks"),
    "unknown category": (coco(annotations=[box(1, 55)]), "category_id 55, which `categories` lacks"),
    "bytes that are no text": (
        '{"images": [], "annotations": [], "categories": [{"id": 1, "name": "\udcff"}]}',
        "utf-8",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_refused_with_one_line_that_names_it(tmp_path, case):
    content, told = BROKEN[case]
    path = tmp_path / "boxes.json"
    text = content if isinstance(content, str) else json.dumps(content)
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(AnnotationError) as caught:
        read_dataset("coco", tmp_path, annotations=path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert told in message
    assert "\n" not in message


def test_the_place_of_an_error_is_counted_from_the_start_of_a_sliced_file(read, monkeypatch):
    monkeypatch.setattr(annotation_file, "SLICE_BYTES", 200)
    with pytest.raises(AnnotationError, match=r"\$\.annotations\[30\]\.bbox"):
        read(coco(annotations=[box(1)] * 30 + [box(1, bbox="none")] + [box(1)] * 30))


def test_climbing_paths_of_objects365_v2_are_refused_though_only_their_last_parts_count(read):
    with pytest.raises(AnnotationError, match="leaves the photo folder"):
        read(coco([picture(1, file_name="../../v1/patch8/a.jpg")]), "o365v2")


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"neg_category_ids": None}, "`neg_category_ids` is missing"),
        ({"not_exhaustive_category_ids": [99]}, "names category 99"),
        ({"coco_url": ""}, "`coco_url` is missing or empty"),
        ({"coco_url": "http://x/val2017/.."}, "leaves the photo folder"),
    ],
)
def test_a_broken_lvis_picture_is_refused(read, fields, told):
    with pytest.raises(AnnotationError, match=told):
        read(coco([lvis_picture(1) | fields]), "lvis")


def test_minival_of_another_val_is_refused(tmp_path):
    (tmp_path / "lvis_v1_val.json").write_text(json.dumps(coco([lvis_picture(1)])))
    (tmp_path / "lvis_v1_minival_inserted_image_name.json").write_text('{"images": [{"id": 1}, {"id": 2}]}')
    with pytest.raises(AnnotationError, match=r"1 of its pictures are not in lvis_v1_val\.json, the first has id 2"):
        read_dataset("lvis", tmp_path, "minival")


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda path: None, "there is no such file"),
        (lambda path: path.mkdir(), "cannot be read"),
        (lambda path: path.touch(), "the file is empty"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused(tmp_path, make, told):
    path = tmp_path / "boxes.json"
    make(path)
    with pytest.raises(AnnotationError, match=told):
        read_dataset("coco", tmp_path, annotations=path)


def test_an_absent_annotation_file_is_told_with_the_names_and_places_looked_at(tmp_path):
    with pytest.raises(AnnotationError, match=r"o365 needs objects365_val\.json here or in annotations/"):
        read_dataset("o365", tmp_path, "val")


def test_unknown_names_of_datasets_and_splits_are_told_with_those_there_are(tmp_path):
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
