"""The commands as a user types them: bad input gives one line that says how to fix it, and exit code 2."""

import json
import pickle
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from regionspot import cli
from regionspot.cache import FeatureCache
from regionspot.cache.errors import InputError
from regionspot.fusion.checkpoint import load_checkpoint
from regionspot.pipeline.backbones.clip import load_encoder
from regionspot.pipeline.backbones.sam import load_localizer
from regionspot.pipeline.datasets.registry import DATASETS
from regionspot.pipeline.extraction.config import ExtractConfig

pytestmark = pytest.mark.usefixtures("home")


def extract(world, cache, *more) -> tuple:
    return ("extract", "toy", "--data", world, "--cache", cache, "--preset", "toy", "--limit", 3, *more)


@pytest.fixture(scope="module")
def cache(world, tmp_path_factory) -> Path:
    """A cache of three images of the toy world."""
    path = tmp_path_factory.mktemp("cache") / "toy.zarr"
    argv = ["regionspot", *map(str, extract(world, path))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", argv)
        with pytest.raises(SystemExit) as stop:
            cli.main()
    assert not stop.value.code
    return path


def test_dataset_shows_what_was_read_and_what_is_missing(regionspot, world, tmp_path):
    copy = shutil.copytree(world, tmp_path / "copy")
    next((copy / "photos" / "train").glob("*.jpg")).unlink()
    code, out, _ = regionspot("dataset", "toy", "--data", copy)
    assert code == 0
    assert "32 images" in out
    assert "images: 1 are not in" in out


def test_results_can_be_read_by_a_program(regionspot, world, cache):
    def result(*command) -> dict:
        code, out, err = regionspot(*command, "--json")
        assert code == 0, err
        return json.loads(out)

    assert result("dataset", "toy", "--data", world)["images"] == 32
    assert result(*extract(world, cache))["parts_before"] == 1
    assert result(*extract(world, cache), "--dry-run")["plan"]["images"] == 0
    report = result("cache", "verify", cache)
    assert (report["problems"], report["parts"], report["pending"]) == ([], 2, 0)


def coco_file(folder, boxes, name="a.jpg"):
    """An annotation file of one existing image of 64 x 48 pixels."""
    Image.new("RGB", (64, 48)).save(folder / "a.jpg")
    annotations = [{"id": at, "image_id": 1, "category_id": 1, "bbox": box} for at, box in enumerate(boxes)]
    images = [{"id": 1, "height": 48, "width": 64, "file_name": name, "coco_url": None}]
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "red star"}]}
    (folder / "boxes.json").write_text(json.dumps(content))
    return folder / "boxes.json"


def test_dataset_and_extract_warn_of_boxes_in_another_form(regionspot, tmp_path, caplog):
    file = coco_file(tmp_path, [[30, 20, 60, 40], [20, 30, 50, 40], [2, 2, 9, 9]])
    arguments = ("coco", "--data", tmp_path, "--annotations", file)
    code, out, _ = regionspot("dataset", *arguments)
    assert code == 0
    assert "clipped: 2\n" in out
    warning = (
        f"{file}: 2 of 3 boxes are clipped and 0 dropped: they do not fit their images; they look like x1, y1, x2, y2"
    )
    assert warning in out
    code, _, err = regionspot("extract", *arguments, "--preset", "toy", "--cache", tmp_path / "c.zarr", "--dry-run")
    assert (code, warning in caplog.text) == (0, True), err
    assert out.count(warning) == 1


def test_a_dataset_without_regions_is_refused_unless_only_maps_are_extracted(regionspot, refused, tmp_path):
    file = coco_file(tmp_path, [[0.1, 0.1, 0.5, 0.5]])
    arguments = ("coco", "--data", tmp_path, "--annotations", file)
    code, out, err = regionspot("dataset", *arguments)
    assert code == 2
    assert "dropped under 1 px: 1" in out
    assert "look like x, y, width, height from 0 to 1" in out
    assert err.startswith("regionspot: coco train: boxes.json has no usable region (dropped under 1 px: 1)")
    extract = ("extract", *arguments, "--preset", "toy", "--cache", tmp_path / "c.zarr")
    refused("they look like x, y, width, height from 0 to 1", *extract)
    code, _, err = regionspot(*extract, "--localizer", "none")
    assert (code, len(FeatureCache.open(tmp_path / "c.zarr").valid_rows())) == (0, 1), err


def test_max_failures_applies_to_annotations(regionspot, refused, tmp_path):
    file = coco_file(tmp_path, [[2, 2, 9, 9], None, [5, 5, 9, 9]])
    arguments = ("dataset", "coco", "--data", tmp_path, "--annotations", file)
    refused(
        "1 of 3 annotations cannot be read, more than --max-failures 20% allows; the first: annotations[1].bbox",
        *arguments,
    )
    code, out, err = regionspot(*arguments, "--max-failures", "50%")
    assert (code, "skipped annotations: 1" in out, "annotations[1].bbox is null" in out) == (0, True, True), err


def cache_files(path):
    return {file.relative_to(path): file.read_bytes() for file in path.rglob("c.*") if file.is_file()}


def test_runs_with_different_limits_can_follow_in_any_order(regionspot, world, tmp_path):

    def run(cache, limit, *more):
        """Returns the number of images in the cache, and of those that this run extracted."""
        limited = ("--limit", limit) if limit else ()
        arguments = ("--data", world, "--cache", tmp_path / cache, "--preset", "toy", "--part-size", 4)
        code, out, err = regionspot("extract", "toy", *arguments, "--localizer", "none", *limited, *more)
        assert code == 0, err
        extracted = 0 if "nothing to do" in out else int(re.search(r"zarr: (\d+) images", out)[1])
        return len(FeatureCache.open(tmp_path / cache)), extracted

    assert run("a.zarr", 3) == (3, 3)
    assert run("a.zarr", 10, "--dry-run") == (3, 10)  # the part of three images grows, so it is written again
    assert run("a.zarr", 10) == (10, 10)
    assert run("a.zarr", 10) == (10, 0)
    assert run("a.zarr", 3) == (10, 0)
    assert (
        regionspot(
            "extract", "toy", "--data", world, "--cache", tmp_path / "a.zarr", "--preset", "toy", "--retry-failed"
        )[0]
        == 0
    )
    assert len(FeatureCache.open(tmp_path / "a.zarr")) == 10  # a retry does not add images
    assert run("a.zarr", None) == (32, 24)  # two of three parts were complete
    assert run("a.zarr", 5) == (32, 0)
    assert run("b.zarr", None, "--parts", "7") == (32, 4)
    assert run("b.zarr", 6) == (32, 8)  # whole parts
    assert run("b.zarr", None) == (32, 20)
    assert cache_files(tmp_path / "a.zarr") == cache_files(tmp_path / "b.zarr")


def test_training_with_validation_keeps_the_best_head(regionspot, world, cache, tmp_path):
    run = tmp_path / "run"
    train = ("train", "--cache", cache, "--preset", "toy", "--schedule", "toy", "--templates", "plain")
    validation = ("--val-cache", cache, "--val-annotations", world / "toy_train.json", "--val-every", 2)
    code, _, err = regionspot(*train, *validation, "--iterations", 4, "--out", run, "--keep-checkpoints", 1)
    assert code == 0, err
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [next(iter(line["validation"])) for line in lines] == ["AP", "AP"]
    best = load_checkpoint(run / "best.safetensors").info
    assert best.validation["AP"] == max(line["validation"]["AP"] for line in lines)
    code, out, _ = regionspot("runs", tmp_path)
    assert (code, "4/4" in out, "finished" in out) == (0, True, True)


def test_a_cache_with_a_limit_can_be_used_for_training_and_evaluation(regionspot, world, tmp_path):
    arguments = ("extract", "toy", "--split", "val", "--data", world, "--preset", "toy", "--limit", 3)
    assert regionspot(*arguments, "--cache", tmp_path / "c.zarr")[0] == 0
    train = ("train", "--cache", tmp_path / "c.zarr", "--preset", "toy", "--schedule", "toy", "--templates", "plain")
    assert regionspot(*train, "--iterations", 1, "--out", tmp_path / "run")[0] == 0
    evaluate = ("eval-lvis", "--dataset", "toy", "--data", world, "--checkpoint", tmp_path / "run" / "head.safetensors")
    code, _, err = regionspot(*evaluate, "--cache", tmp_path / "c.zarr", "--out", tmp_path / "eval")
    assert code == 0, err
    assert json.loads((tmp_path / "eval" / "results.json").read_text())["images"] == 3


def test_help_names_every_dataset(regionspot):
    _, out, _ = regionspot("extract", "--help")
    assert all(name in out for name in DATASETS)


def test_a_missing_annotation_file_is_named_with_its_expected_path(refused, tmp_path):
    refused(f"{tmp_path}: toy needs toy_train.json here or in annotations/", *extract(tmp_path, tmp_path / "c.zarr"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text[: len(text) // 2], "toy_train.json"),
        (lambda text: text.replace('"bbox"', '"box"'), "bbox"),
        (lambda text: "", "toy_train.json"),
    ],
    ids=["truncated", "without a field", "empty"],
)
def test_a_damaged_annotation_file_is_named_with_its_field(refused, world, tmp_path, damage, message):
    (tmp_path / "toy_train.json").write_text(damage((world / "toy_train.json").read_text()))
    refused(message, *extract(tmp_path, tmp_path / "c.zarr"))
    assert not (tmp_path / "c.zarr").exists()


def test_a_folder_that_is_not_a_cache_is_left_unchanged(refused, world, tmp_path):
    (tmp_path / "holiday").mkdir()
    (tmp_path / "holiday" / "beach.txt").write_text("sand")
    refused(f"{tmp_path / 'holiday'}: ", *extract(world, tmp_path / "holiday"))
    assert [path.name for path in (tmp_path / "holiday").iterdir()] == ["beach.txt"]


def test_a_cache_of_other_backbones_is_refused_with_what_differs(refused, world, cache):
    before = sorted(path.stat().st_mtime_ns for path in cache.rglob("*"))
    refused("weights_sha256", *extract(world, cache, "--weights", "random:3"))
    assert sorted(path.stat().st_mtime_ns for path in cache.rglob("*")) == before
    assert len(FeatureCache.open(cache).valid_rows()) == 3


def test_weights_of_another_shape_are_refused(refused, world, tmp_path):
    from safetensors.numpy import save_file

    save_file({"image_encoder.pos_embed": np.zeros((1, 2, 2, 3), np.float32)}, tmp_path / "sam.safetensors")
    refused("sam.safetensors", *extract(world, tmp_path / "c.zarr", "--sam-weights", tmp_path / "sam.safetensors"))


class _Trap:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return (Path.touch, (self.target,))


def test_a_pickle_with_code_is_refused_and_not_executed(refused, world, tmp_path):
    (tmp_path / "evil.pth").write_bytes(pickle.dumps(_Trap(tmp_path / "ran"), protocol=2))
    refused("evil.pth", *extract(world, tmp_path / "c.zarr", "--sam-weights", tmp_path / "evil.pth"))
    refused("evil.pth", "eval-lvis", "--data", world, "--dataset", "toy", "--out", tmp_path / "e",
            "--checkpoint", tmp_path / "evil.pth")  # fmt: skip
    assert not (tmp_path / "ran").exists()


def test_proposals_for_unknown_images_are_refused(refused, world, tmp_path):
    boxes = {"999999": {"boxes": [[0, 0, 9, 9]], "scores": [0.5], "labels": [1]}}
    (tmp_path / "boxes.json").write_text(json.dumps(boxes))
    refused("999999", *extract(world, tmp_path / "c.zarr", "--boxes", tmp_path / "boxes.json"))


def test_an_empty_vocabulary_is_refused(refused, tmp_path, world):
    image = next((world / "photos" / "train").glob("*.jpg"))
    refused("names", "predict", image, "--checkpoint", "x", "--boxes", "1,1,9,9", "--names", " , ")


def test_a_path_that_cannot_be_written_is_named(refused, world, tmp_path):
    # A file where a folder is needed also stops root, whom permissions do not.
    (tmp_path / "file").write_text("")
    refused(str(tmp_path / "file"), *extract(world, tmp_path / "file" / "c.zarr"))


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--preset", "xl", "'--preset': 'xl' is not one of 'bb', 'bl', 'bl336', 'toy'"),
        ("--exif", "maybe", "'--exif': 'maybe' is not one of 'auto', 'apply', 'ignore'"),
        ("--dtype", "int4", "'--dtype': 'int4' is not one of 'auto', 'float32', 'bfloat16', 'float16'"),
    ],
)
def test_an_unknown_choice_is_refused_with_the_known_ones(refused, world, tmp_path, option, value, message):
    refused(message, *extract(world, tmp_path / "c.zarr", option, value))
    assert not (tmp_path / "c.zarr").exists()


def test_an_unknown_schedule_is_refused(refused, cache, tmp_path):
    train = ("train", "--cache", cache, "--preset", "toy", "--out", tmp_path / "run")
    refused("'--schedule': 'long' is not one of 'paper', 'stage2', 'fast', 'toy'", *train, "--schedule", "long")


def test_training_from_a_cache_without_the_presets_features_is_refused_with_those_it_has(refused, cache, tmp_path):
    refused("toy_sam, toy_clip", "train", "--cache", cache, "--preset", "bb", "--out", tmp_path / "run")


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [
        (("dataset", "LVIS", "--data", "."), "lvis"),
        (("dataset", "opnimages", "--data", "."), "openimages"),
        (("dataset", "coco", "--data", ".", "--split", "vall"), "val"),
        (("extract", "toy", "--data", ".", "--cache", "c", "--encoding", "int-8"), "int8"),
    ],
)
def test_a_misspelt_name_is_refused_with_a_suggestion(refused, arguments, meant):
    refused(f"did you mean {meant!r}?", *arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("cuda", "--device cuda: this torch sees no CUDA device"),
        ("cuda:1", "--device cuda:1: this torch sees no CUDA device"),
        ("tpu", "--device tpu: torch knows no such device; expected cpu, cuda or cuda:1"),
        ("cuda:-1", "--device cuda:-1: torch knows no such device"),
        ("meta", "--device meta: this torch cannot compute on it here"),
        ("mps", "--device mps: this torch cannot compute on it here"),
    ],
)
def test_an_unavailable_device_is_refused_by_every_command(refused, world, cache, tmp_path, device, message):
    refused(message, *extract(world, tmp_path / "c.zarr", "--device", device))
    refused(message, "train", "--cache", cache, "--preset", "toy", "--out", tmp_path / "run", "--device", device)
    evaluate = ("eval-lvis", "--dataset", "toy", "--data", world, "--preset", "toy", "--baseline", "pooled")
    refused(message, *evaluate, "--out", tmp_path / "eval", "--device", device)
    for load in (load_localizer, load_encoder):
        with pytest.raises(InputError, match=message):
            load("toy_sam" if load is load_localizer else "toy_clip", device=device)
    assert not list(tmp_path.iterdir())


def test_another_part_size_than_the_caches_is_refused(refused, regionspot, world, cache):
    refused("has parts of 3 images, not of 2 as --part-size asks", *extract(world, cache, "--part-size", 2))
    for more in ((), ("--part-size", 512)):
        code, out, err = regionspot(*extract(world, cache, *more))
        assert (code, "nothing to do" in out) == (0, True), err


def test_keywords_stay_keywords_if_files_of_these_names_exist(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("gt", "random:0", "boxes.json"):
        (tmp_path / name).touch()
    config = ExtractConfig("c.zarr", "toy", "data", weights="random:0")
    absolute = config.with_absolute_paths()
    assert (absolute.boxes, absolute.weights, absolute.data) == ("gt", "random:0", str(tmp_path / "data"))
    assert replace(config, boxes="boxes.json").with_absolute_paths().boxes == str(tmp_path / "boxes.json")
