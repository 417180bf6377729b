"""The toy world: its annotations agree with its images."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as rle

from regionspot.cache.errors import InputError
from regionspot.pipeline.toy import rendering
from regionspot.pipeline.toy.rendering import COLOURS, GROUND, HALF, SHAPES, TEXTURES, VISIBLE, draw_image
from regionspot.pipeline.toy.world import assign_classes, make_toy_world, toy_classes


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return make_toy_world(tmp_path_factory.mktemp("world"), images=60, seed=3)


@pytest.fixture(scope="module")
def annotations(world) -> dict[str, dict]:
    return {split: json.loads((world / f"toy_{split}.json").read_text()) for split in ("train", "val")}


def test_the_same_seed_gives_the_same_files_and_another_seed_others(world, tmp_path):
    same, other = make_toy_world(tmp_path / "same", 60, seed=3), make_toy_world(tmp_path / "other", 60, seed=4)
    files = sorted(path.relative_to(world) for path in world.rglob("*.*"))
    assert len(files) == 62
    assert all((same / file).read_bytes() == (world / file).read_bytes() for file in files)
    assert all((other / file).read_bytes() != (world / file).read_bytes() for file in files)


def test_classes_are_every_combination_and_every_word_of_a_rare_one_occurs_elsewhere():
    classes = toy_classes()
    assert len({entry.look.name for entry in classes}) == len(SHAPES) * len(COLOURS) * len(TEXTURES) == 192
    assert Counter(entry.frequency for entry in classes) == {"r": 32, "c": 96, "f": 64}
    taught = {word for entry in classes if entry.frequency != "r" for word in entry.look.name.split()}
    assert taught == {*SHAPES, *COLOURS, *TEXTURES}


def test_rare_classes_are_never_trained_on_and_all_validated(annotations):
    rare = {entry.id for entry in toy_classes() if entry.frequency == "r"}
    shown = {split: {a["category_id"] for a in annotations[split]["annotations"]} for split in annotations}
    assert not rare & shown["train"]
    assert rare <= shown["val"]
    assert not rare & {category["id"] for category in annotations["train"]["categories"]}
    assert len(annotations["val"]["categories"]) == 192


def test_the_smallest_world_still_validates_every_rare_class():
    rng = np.random.default_rng(0)
    assigned = [entry for image in assign_classes(toy_classes(), "val", 8, rng) for entry in image]
    assert {entry.id for entry in assigned} >= {entry.id for entry in toy_classes() if entry.frequency == "r"}


def test_frequent_classes_are_trained_on_more_than_common_ones():
    assigned = [
        entry for image in assign_classes(toy_classes(), "train", 800, np.random.default_rng(0)) for entry in image
    ]
    count = Counter(entry.frequency for entry in assigned)
    assert count["f"] / 64 > 2 * count["c"] / 96
    assert len({entry.id for entry in assigned}) == 160


def test_every_image_exists_with_the_stated_size(world, annotations):
    for split, content in annotations.items():
        for image in content["images"]:
            path = world / "photos" / Path(*image["coco_url"].split("/")[-2:])
            assert path.parent.name == split
            with Image.open(path) as opened:
                assert opened.size == (image["width"], image["height"])


def test_boxes_and_areas_are_those_of_the_masks(annotations):
    for content in annotations.values():
        sizes = {image["id"]: (image["height"], image["width"]) for image in content["images"]}
        for region in content["annotations"]:
            mask = rle.decode(region["segmentation"])
            assert mask.shape == sizes[region["image_id"]]
            rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
            x, y, w, h = region["bbox"]
            assert (x, y, x + w, y + h) == (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
            assert region["area"] == mask.sum() > 0


def test_masks_lie_on_what_has_the_colour_of_the_class(world, annotations):
    """A plain object has one colour: the image under its mask is nearest to that of its name."""
    categories = {category["id"]: category["name"].split() for category in annotations["train"]["categories"]}
    names, tones = list(COLOURS), np.array(list(COLOURS.values()), float)
    right = []
    for region in annotations["train"]["annotations"]:
        texture, colour, _ = categories[region["category_id"]]
        if texture == "plain" and region["area"] > 100:
            image = np.asarray(Image.open(world / "photos" / "train" / f"{region['image_id']:012d}.jpg"), float)
            seen = np.median(image[rle.decode(region["segmentation"]) > 0], axis=0)
            right.append(names[np.abs(tones - seen).sum(axis=1).argmin()] == colour)
    assert len(right) > 30
    assert np.mean(right) > 0.95


def test_absent_classes_are_stated_as_absent(annotations):
    for content in annotations.values():
        listed = {category["id"] for category in content["categories"]}
        for image in content["images"]:
            present = {a["category_id"] for a in content["annotations"] if a["image_id"] == image["id"]}
            assert set(image["neg_category_ids"]) == listed - present
            assert image["not_exhaustive_category_ids"] == []


def test_every_object_shows_at_least_the_stated_part_of_itself(monkeypatch):
    whole, place = [], rendering._place

    def recording(*arguments):
        cover, window = place(*arguments)
        whole.append(np.count_nonzero(cover > HALF))
        return cover, window

    monkeypatch.setattr(rendering, "_place", recording)
    looks = [entry.look for entry in toy_classes()[:72:8]]
    for seed in range(20):
        whole.clear()
        owner = draw_image(looks, np.random.default_rng(seed)).owner
        visible = np.bincount(owner.ravel() - GROUND, minlength=1 + len(looks))[1:]
        assert (visible >= VISIBLE * np.array(whole)).all()


def test_too_few_images_and_an_unwritable_folder_are_refused_in_one_line(tmp_path):
    with pytest.raises(InputError, match="expected at least 40"):
        make_toy_world(tmp_path, images=39)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="exists and is not a folder"):
        make_toy_world(tmp_path / "file", images=40)
