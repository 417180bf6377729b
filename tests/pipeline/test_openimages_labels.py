"""OpenImages' verified labels and hierarchy: which classes become negatives, and which are not exhaustive."""

import json

import numpy as np
import pytest
from PIL import Image

from regionspot.cache.errors import AnnotationError
from regionspot.cache.format.schema import FeatureSet
from regionspot.cache.store import FeatureCache
from regionspot.fusion.training.negatives import CountedClasses
from regionspot.pipeline.datasets.registry import read_dataset

NAMES = ["Animal", "Dog", "Poodle", "Cat", "Vehicle", "Car", "Tree"]
ANIMAL, DOG, POODLE, CAT, VEHICLE, CAR, TREE = (f"/m/{index}" for index in range(7))
ONE, TWO, THREE = ("0000000000000001", "00000000000000ff", "ffffffffffffffff")
LABELS, HIERARCHY = "oidv6-train-annotations-human-imagelabels.csv", "bbox_labels_600_hierarchy.json"


def node(mid, *children, **other):
    return {"LabelName": mid, **({"Subcategory": list(children)} if children else {}), **other}


TREE_OF_CLASSES = node(
    "/m/root",
    node(ANIMAL, node(DOG, node(POODLE)), node(CAT), Part=[node("/m/ear")]),
    node(VEHICLE, node(CAR)),
    node(TREE),
)


@pytest.fixture
def read(tmp_path, home):
    """Reads three images with a poodle, a car, and an animal and a dog; labels are (image, class, confidence)."""
    (tmp_path / "train").mkdir()
    for image in (ONE, TWO, THREE):
        Image.new("RGB", (20, 10)).save(tmp_path / "train" / f"{image}.jpg")
    (tmp_path / "class-descriptions-boxable.csv").write_text("".join(f"/m/{i},{n}\n" for i, n in enumerate(NAMES)))
    boxes = [(ONE, POODLE), (TWO, CAR), (THREE, ANIMAL), (THREE, DOG)]
    rows = "".join(f"{image},x,{mid},1,0.1,0.5,0.2,0.7,0,0,0,0,0\n" for image, mid in boxes)
    header = "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsOccluded,IsTruncated,IsGroupOf,IsDepiction,IsI"
    (tmp_path / "oidv6-train-annotations-bbox.csv").write_text(f"{header}\n{rows}")

    def read(labels=None, hierarchy=None):
        if labels is not None:
            lines = [f"{image},verification,{mid},{confidence}" for image, mid, confidence in labels]
            (tmp_path / LABELS).write_text("\n".join(["ImageID,Source,LabelName,Confidence", *lines]) + "\n")
        if hierarchy is not None:
            (tmp_path / HIERARCHY).write_text(json.dumps(hierarchy))
        return read_dataset("openimages", tmp_path)

    return read


def names_of(ragged):
    """The class names in the list of each image."""
    bounds = zip(ragged.offsets[:-1], ragged.offsets[1:], strict=True)
    return [[NAMES[index] for index in ragged.values[start:end]] for start, end in bounds]


def test_without_the_files_all_classes_count_and_a_remark_says_so(read):
    manifest = read()
    assert manifest.negatives is None
    assert manifest.not_exhaustive is None
    assert f"has no {LABELS} and no {HIERARCHY}: in training, classes that an image may show" in manifest.remarks[-1]


def test_verified_absent_classes_are_negatives_with_all_their_kinds(read):
    manifest = read([(ONE, VEHICLE, 0), (TWO, DOG, 0), (TWO, TREE, 0)], TREE_OF_CLASSES)
    assert names_of(manifest.negatives) == [["Vehicle", "Car"], ["Dog", "Poodle", "Tree"], []]
    assert manifest.remarks == ()
    assert {LABELS, HIERARCHY} < set(manifest.source["files"])


def test_neither_a_shown_class_nor_one_above_it_is_a_negative(read):
    """Image 1 shows a poodle by its box; image 2 a dog by a verified label. Then animals cannot be absent."""
    labels = [(ONE, DOG, 0), (ONE, TREE, 0), (TWO, DOG, 1), (TWO, ANIMAL, 0)]
    manifest = read(labels, TREE_OF_CLASSES)
    assert names_of(manifest.negatives) == [["Tree"], ["Poodle", "Cat"], []]


def test_classes_above_a_shown_one_are_not_exhaustive(read):
    expected = [["Animal", "Dog"], ["Vehicle"], ["Animal"]]
    assert names_of(read(None, TREE_OF_CLASSES).not_exhaustive) == expected
    assert names_of(read([(TWO, CAT, 1)], TREE_OF_CLASSES).not_exhaustive) == [
        ["Animal", "Dog"],
        ["Animal", "Vehicle"],
        ["Animal"],
    ]


def test_a_class_with_two_parents_is_below_both(read):
    hierarchy = node("/m/root", node(ANIMAL, node(POODLE)), node(VEHICLE, node(POODLE), node(CAR)), node(DOG))
    assert names_of(read(None, hierarchy).not_exhaustive)[0] == ["Animal", "Vehicle"]


def test_labels_of_machines_other_images_and_other_classes_are_skipped(read):
    labels = [
        (ONE, TREE, 0.3),
        ("00000000000000aa", TREE, 0),
        ("no image", TREE, 0),
        (ONE, "/m/unboxable", 0),
        (THREE.upper(), CAR, 0),
    ]
    assert names_of(read(labels).negatives) == [[], [], ["Car"]]


def test_training_counts_only_verified_classes_of_the_cache(read, tmp_path):
    manifest = read([(ONE, VEHICLE, 0), (THREE, CAT, 0)], TREE_OF_CLASSES)
    maps = FeatureSet("maps", "map", (5, 8), "float16", {})
    FeatureCache.create(tmp_path / "a.zarr", manifest, [maps])
    cached = FeatureCache.open(tmp_path / "a.zarr").manifest
    _, ignored = CountedClasses(cached, np.arange(3)).of_step(0, np.arange(3), np.zeros((3, 2), np.int64))
    counted = [[NAMES[index] for index in np.flatnonzero(~row)] for row in ignored]
    assert counted == [["Poodle", "Vehicle", "Car"], ["Car"], ["Dog", "Cat"]]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (LABELS, "ImageID,LabelName\na,b\n", "this is not OpenImages' table of image labels, with columns ImageID"),
        (LABELS, f"ImageID,LabelName,Confidence\n{ONE},{DOG}\n", "this is not OpenImages' table of image labels"),
        (HIERARCHY, '{"LabelName": "/m/root"}', "holds none of the classes"),
        (HIERARCHY, "[1]", "Expected `object`"),
    ],
)
def test_other_files_are_refused_in_one_line(read, tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(AnnotationError) as error:
        read()
    assert str(error.value).startswith(str(tmp_path / name))
    assert message in str(error.value)
    assert "\n" not in str(error.value)
