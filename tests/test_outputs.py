"""Outputs are checked before any work is done, and never replace an input, also through links."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from regionspot.cache import FeatureCache
from regionspot.cache.errors import InputError
from regionspot.cache.outputs import check_output_file, check_output_folder
from regionspot.fusion.checkpoint import HeadInfo, save_checkpoint
from regionspot.fusion.heads.spec import HeadSpec
from regionspot.pipeline.toy.world import make_toy_world

pytestmark = pytest.mark.usefixtures("home")


@pytest.fixture
def image(tmp_path) -> Path:
    Image.new("RGB", (60, 40), (200, 30, 30)).save(tmp_path / "x.jpg")
    return tmp_path / "x.jpg"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    spec = HeadSpec(token_dim=128, width=192, text_dim=128, options={"layers": 1, "ffn": 64})
    path = tmp_path_factory.mktemp("head") / "head.safetensors"
    info = HeadInfo(preset="toy", localizer="toy_sam", encoder="toy_clip", templates=("{}.",))
    save_checkpoint(path, spec, spec.build(), info)
    return path


@pytest.fixture
def predict(regionspot, image, checkpoint):
    """`predict(out)` runs `regionspot predict` on one box of the image."""
    arguments = ("predict", image, "--checkpoint", checkpoint, "--boxes", "1,1,30,30", "--names", "red star")
    return lambda out: regionspot(*arguments, "--device", "cpu", "-o", out)


# Each returns another path of the same file.
ALIASES = {
    "itself": lambda path: path,
    "through ..": lambda path: path.parent / "folder" / ".." / path.name,
    "symbolic link": lambda path: _link(path, Path.symlink_to),
    "hard link": lambda path: _link(path, Path.hardlink_to),
    "link to its folder": lambda path: (
        _link(path.parent / "folder", lambda link, _: link.symlink_to(path.parent)) / path.name
    ),
}


def _link(path: Path, make) -> Path:
    link = path.parent / ("link" if path.is_dir() else "folder/link.jpg")
    make(link, path)
    return link


@pytest.fixture(params=ALIASES)
def alias(request):
    return ALIASES[request.param]


def test_an_input_is_not_replaced_under_any_path(image, alias):
    (image.parent / "folder").mkdir()
    with pytest.raises(InputError, match="is an input of this command and must not be replaced"):
        check_output_file(alias(image), [None, "s3://bucket/x", image])


def test_files_of_an_input_folder_are_not_replaced_but_new_ones_may_be_added(image):
    (image.parent / "in").symlink_to(image.parent)
    for folder in (image.parent, image.parent / "in"):
        with pytest.raises(InputError, match="is an input"):
            check_output_file(image, [folder])
        assert check_output_file(folder / "new.png", [image.parent]) == folder / "new.png"


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("nodir/x.png", "there is no folder"),
        ("x.jpg/x.png", "there is no folder"),
        (".", "exists and is not a file"),
        ("pipe", "exists and is not a file"),
        ("/proc/x.png", "cannot be written"),
    ],
)
def test_a_path_where_no_file_can_be_written_is_refused(image, out, message):
    os.mkfifo(image.parent / "pipe")
    with pytest.raises(InputError, match=message):
        check_output_file(image.parent / out)


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("x.jpg", "exists and is not a folder"),
        ("x.jpg/run", r"x\.jpg: exists and is not a folder"),
        ("/proc/run", "cannot be written"),
        ("cache", "is, or is inside, an input"),
        ("cache/run", "is, or is inside, an input"),
        ("link/run", "is, or is inside, an input"),
        ("other", "is a Zarr store"),
    ],
)
def test_a_path_where_no_folder_can_be_created_is_refused(image, out, message):
    folder = image.parent
    for name in ("cache", "other"):
        (folder / name).mkdir()
        (folder / name / "zarr.json").write_text("{}")
    (folder / "link").symlink_to("cache")
    with pytest.raises(InputError, match=message):
        check_output_folder(folder / out, [folder / "cache"])
    assert check_output_folder(folder / "new" / "run") == folder / "new" / "run"
    assert not (folder / "new").exists()


# --- predict ---


def test_predict_does_not_replace_its_image(predict, image, alias):
    (image.parent / "folder").mkdir()
    before = image.read_bytes()
    code, out, err = predict(alias(image))
    assert (code, out) == (2, "")
    assert "must not be replaced" in err
    assert image.read_bytes() == before


def test_predict_replaces_an_earlier_result_but_not_the_target_of_a_link(predict, image):
    kept = image.parent / "kept.png"
    kept.write_bytes(b"kept")
    (image.parent / "hard.png").hardlink_to(kept)
    (image.parent / "soft.png").symlink_to(kept)
    for name in ("hard.png", "soft.png", "hard.png"):
        code, out, err = predict(image.parent / name)
        assert code == 0, err
        assert json.loads(out)[0]["name"] == "red star"
        assert Image.open(image.parent / name).width >= 640
    assert kept.read_bytes() == b"kept"


def test_predict_prints_its_result_even_if_the_image_cannot_be_written(predict, image, monkeypatch):
    def full(path, content):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("regionspot.evaluation.report.drawing.write_file", full)
    code, out, err = predict(image.parent / "named.png")
    assert code == 2
    assert json.loads(out)[0]["name"] == "red star"
    assert "No space left on device" in err


# --- other commands ---


def test_cache_show_and_stats_do_not_replace_their_inputs(regionspot, small_folder, tmp_path):
    cache = shutil.copytree(small_folder / "full", tmp_path / "c.zarr")
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "photos" / "x.png")
    (cache / "x.png").write_bytes(b"in the cache")
    (cache / "x.json").write_bytes(b"in the cache")
    name = next(iter(FeatureCache.open(cache).feature_sets))
    for arguments in (
        ("cache", "show", cache, "100", "-o", cache / "x.png"),
        ("cache", "show", cache, "100", "--photos", tmp_path / "photos", "-o", tmp_path / "photos" / "x.png"),
        ("cache", "stats", cache, name, "-o", cache / "x.json"),
        ("cache", "stats", cache, name, "-o", cache / "zarr.json"),
    ):
        code, _, err = regionspot(*arguments)
        assert code == 2, arguments
        assert "must not be replaced" in err
    assert (cache / "x.json").read_bytes() == (cache / "x.png").read_bytes() == b"in the cache"


@pytest.mark.parametrize("name", ["results.json", "detections.json", "sheet.png"])
def test_an_evaluation_does_not_replace_its_inputs(regionspot, world, checkpoint, tmp_path, name):
    (tmp_path / "eval").mkdir()
    shutil.copy(world / "toy_val.json", tmp_path / "eval" / name)
    shutil.copy(checkpoint, tmp_path / "head.safetensors")
    arguments = ("eval-lvis", "--dataset", "toy", "--data", world, "--out", tmp_path / "eval")
    for options in (("--annotations", tmp_path / "eval" / name), ("--boxes", tmp_path / "eval" / name)):
        code, _, err = regionspot(*arguments, "--checkpoint", checkpoint, *options)
        assert code == 2
        assert f"{name}: is an input of this command" in err
    assert os.listdir(tmp_path / "eval") == [name]


@pytest.mark.parametrize("command", ["train", "eval-lvis"])
def test_training_and_evaluation_do_not_write_into_a_cache(
    regionspot, small_folder, world, checkpoint, tmp_path, command
):
    cache = shutil.copytree(small_folder / "full", tmp_path / "c.zarr")
    before = sorted(cache.rglob("*"))
    arguments = {
        "train": ("train", "--cache", cache),
        "eval-lvis": ("eval-lvis", "--dataset", "toy", "--data", world, "--cache", cache, "--checkpoint", checkpoint),
    }[command]
    for out in (cache, cache / "run", cache / "parts"):
        code, _, err = regionspot(*arguments, "--out", out)
        assert code == 2
        assert "an input of this command" in err
    assert sorted(cache.rglob("*")) == before


def test_a_toy_world_is_not_created_in_a_folder_of_other_images(tmp_path):
    for own in ("holiday.jpg", "photos/beach.jpg", "photos/train2017/000000000001.jpg"):
        folder = tmp_path / own.replace("/", "-")
        (folder / own).parent.mkdir(parents=True)
        (folder / own).write_bytes(b"mine")
        with pytest.raises(InputError, match="which is not part of a toy world; give an empty folder"):
            make_toy_world(folder, 40)
        assert [path for path in folder.rglob("*") if path.is_file()] == [folder / own]


@pytest.mark.parametrize("out", ["c.zarr", "c.zarr/inside"])
@pytest.mark.parametrize(
    "arguments",
    [("copy",), ("subset",), ("convert", "--to", "clip=float32"), ("merge", "-o")],
    ids=lambda arguments: arguments[0],
)
def test_a_cache_is_not_created_inside_its_source(regionspot, small_folder, tmp_path, arguments, out):
    cache = shutil.copytree(small_folder / "full", tmp_path / "c.zarr")
    before = {path: path.read_bytes() for path in cache.rglob("*") if path.is_file()}
    command, *more = arguments
    code, _, err = regionspot("cache", command, cache, *more, tmp_path / out)
    assert code == 2, err
    assert {path: path.read_bytes() for path in cache.rglob("*") if path.is_file()} == before
