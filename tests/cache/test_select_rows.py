"""Selecting images by ids, category or position; and the commands that derive caches from caches."""

import json
import sys

import numpy as np
import pytest
from makers import fill, make_manifest

from regionspot import cli
from regionspot.cache import Category, FeatureCache, FeatureSet, InputError
from regionspot.cache.tools.select_rows import read_ids, select_rows
from regionspot.pipeline.datasets.registry import read_dataset

MAPS = FeatureSet("clip", "map", (2, 4))
TOKENS = FeatureSet("sam", "token", (3,))


@pytest.fixture(scope="module")
def manifest():
    return make_manifest(
        [2, 0, 1, 0, 3, 1],
        image_ids=np.array([40, -7, 12, 3, 8, 100]),
        category_index=np.array([0, 0, 1, 2, 2, 1, -1], np.int32),
        categories=(Category(1, "star"), Category(2, "moon"), Category(3, "red star")),
    )


@pytest.mark.parametrize(
    ("filters", "rows"),
    [
        ({}, [0, 1, 2, 3, 4, 5]),
        ({"ids": np.array([3, 40, -7])}, [3, 0, 1]),
        ({"categories": ["moon"]}, [2, 4]),
        ({"categories": ["star", "moon"]}, [0, 2, 4]),
        ({"every": 2}, [0, 2, 4]),
        ({"every": 2, "first": 2}, [0, 2]),
        ({"first": 100}, [0, 1, 2, 3, 4, 5]),
        ({"ids": np.array([8, 3, 12]), "categories": ["moon"], "first": 1}, [4]),
    ],
)
def test_images_are_selected_by_ids_then_categories_then_every_nth(manifest, filters, rows):
    assert select_rows(manifest, **filters).tolist() == rows


@pytest.mark.parametrize(
    ("filters", "message"),
    [
        ({"ids": np.array([3, 4, 5])}, "has no image with 2 of the 3 ids, the first is 4"),
        ({"categories": ["red stare"]}, "has no category 'red stare'; did you mean red star"),
        ({"every": 0}, "every is 0, expected at least 1"),
        ({"first": 0}, "first is 0, expected at least 1"),
        (
            {"ids": np.array([3]), "categories": ["moon"]},
            "no image of 6 has one of the ids and one of the categories",
        ),
    ],
)
def test_selections_without_an_image_are_refused(manifest, filters, message):
    with pytest.raises(InputError, match=message):
        select_rows(manifest, **filters)


def test_ids_are_read_from_a_file(tmp_path):
    (tmp_path / "ids.txt").write_text("12\n\n -3 \n9223372036854775807\n")
    assert read_ids(tmp_path / "ids.txt").tolist() == [12, -3, 2**63 - 1]
    for text, message in (
        ("1\ntwo\n", "line 2 is 'two'"),
        ("9223372036854775808", "line 1 is '922"),
        ("1.5", "line 1 is"),
    ):
        (tmp_path / "ids.txt").write_text(text)
        with pytest.raises(InputError, match=message):
            read_ids(tmp_path / "ids.txt")
    (tmp_path / "ids.txt").write_bytes(b"\xff")
    for path in (tmp_path / "ids.txt", tmp_path / "none.txt", tmp_path):
        with pytest.raises(InputError, match="cannot be read as a list of ids"):
            read_ids(path)


@pytest.fixture
def regionspot(monkeypatch, capsys):
    """`regionspot("subset", ...)` gives the exit code, stdout and stderr of `regionspot cache subset ...`."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["regionspot", "cache", *map(str, arguments)])
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def cache(tmp_path, manifest):
    return fill(FeatureCache.create(tmp_path / "c.zarr", manifest, [MAPS, TOKENS], part_size=2))


def test_the_commands_derive_caches(cache, manifest, tmp_path, regionspot):
    (tmp_path / "ids.txt").write_text("8\n3\n")
    one, two, both, small, back = (tmp_path / name for name in ("one", "two", "both", "small", "back"))
    assert regionspot("subset", cache.path, one, "--ids", tmp_path / "ids.txt")[0] == 0
    assert FeatureCache.open(one).manifest.image_ids.tolist() == [8, 3]
    code, out, _ = regionspot("subset", cache.path, two, "--category", "star", "--first", 1, "--part-size", 1)
    assert (code, out) == (0, f"{two}: 0 parts copied whole, 2 rewritten, 0s\n")
    assert regionspot("merge", two, one, "--out", both)[0] == 0
    assert FeatureCache.open(both).manifest.image_ids.tolist() == [40, 8, 3]
    assert regionspot("convert", both, small, "--to", "clip=int8+zstd", "--to", "sam=float32")[0] == 0
    sets = FeatureCache.open(small).feature_sets
    assert (sets["clip"].dtype, sets["clip"].compression, sets["sam"].dtype) == ("int8", "zstd", "float32")
    assert regionspot("copy", small, back)[0] == 0
    assert FeatureCache.open(back).pending_parts() == []


def annotations(folder, images):
    """A COCO file of `images` images in reverse order, one box each."""
    rows = range(images)[::-1]
    document = {
        "images": [{"id": row, "file_name": f"{row}.jpg", "height": 40, "width": 60} for row in rows],
        "annotations": [{"id": row, "image_id": row, "category_id": 1, "bbox": [0, 0, 9, 9]} for row in rows],
        "categories": [{"id": 1, "name": "star"}],
    }
    (folder / "file.json").write_text(json.dumps(document))
    return "coco", "--data", folder, "--annotations", folder / "file.json"


def test_a_cache_is_extended_with_the_options_of_extract(tmp_path, regionspot):
    dataset = annotations(tmp_path, 3)
    path = tmp_path / "c.zarr"
    FeatureCache.create(path, read_dataset("coco", tmp_path, annotations=tmp_path / "file.json"), [MAPS], part_size=2)
    output = f"{path}: 2 images with 2 regions added; 0 parts are done, 3 pending: run `regionspot extract`\n"
    assert regionspot("extend", path, *dataset, "--part-size", 2)[:2] == (
        0,
        f"{path}: no image added; 0 parts are done, 2 pending: run `regionspot extract`\n",
    )
    assert regionspot("extend", path, *annotations(tmp_path, 5))[:2] == (0, output)
    assert FeatureCache.open(path).manifest.image_ids.tolist() == [2, 1, 0, 4, 3]
    code, _, err = regionspot("extend", path, *annotations(tmp_path, 4))
    assert (code, err.count("\n")) == (2, 1)
    assert "1 of its images are not there, the first has id 4" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("subset", "c.zarr", "out", "--category", "sun"), "has no category 'sun'"),
        (("merge", "c.zarr", "c.zarr", "--out", "out"), "6 images are in more than one of them"),
        (("convert", "c.zarr", "out", "--to", "clip"), "expected a feature set and its encoding once"),
        (("convert", "c.zarr", "out", "--to", "clip=int8", "--to", "clip=float32"), "its encoding once"),
        (("convert", "c.zarr", "out", "--to", "clip=int9"), "encoding 'int9': unknown; expected one of"),
        (("copy", "none.zarr", "out"), "no such cache"),
    ],
)
def test_errors_of_the_commands_are_one_line(cache, tmp_path, regionspot, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    code, _, err = regionspot(*arguments)
    assert (code, err.count("\n")) == (2, 1)
    assert message in err
    assert not (tmp_path / "out").exists()
