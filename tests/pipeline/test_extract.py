"""Extraction from real JPEGs by the toy backbones: the cache holds their outputs, also after faults."""

import signal
from pathlib import Path

import numpy as np
import pytest
from forked import ForkedCommand
from makers import extracted_content
from PIL import Image
from typer.testing import CliRunner

from regionspot.cache import FeatureCache
from regionspot.cache.errors import CacheError, InputError
from regionspot.cache.tools.resume import open_or_create
from regionspot.cli import app
from regionspot.pipeline.backbones.bundle import Backbones
from regionspot.pipeline.datasets.registry import image_folder_of, read_dataset
from regionspot.pipeline.extraction.config import ExtractConfig
from regionspot.pipeline.extraction.extract import extract
from regionspot.pipeline.images.decode import read_image

PART_SIZE = 4
IMAGES = 10


def new_cache(path, manifest, backbones) -> FeatureCache:
    return open_or_create(path, manifest, backbones.feature_sets(), PART_SIZE)


def test_the_cache_holds_the_outputs_of_the_backbones(world, manifest, backbones, undisturbed):
    assert undisturbed.valid_rows().tolist() == list(range(IMAGES))
    for row in (0, 5, 9):
        image = read_image(image_folder_of("toy", world) / str(manifest.paths[row]))
        size, boxes = (image.height, image.width), manifest.boxes_xyxy[manifest.regions(row)]
        embedding = backbones.localizer.encode([backbones.localizer.preprocess(image)])[0]
        tokens = backbones.localizer.tokens_of_images(embedding[None], [boxes], [size])[0].numpy()
        feature_map = backbones.encoders[0].encode(backbones.encoders[0].preprocess(image)[None])[0].numpy()
        batch = undisturbed.read(np.array([row]))
        assert np.abs(batch.tokens[0, : len(boxes)] - tokens).max() <= 2e-3 * np.abs(tokens).max()
        assert np.abs(batch.feature_map[0] - feature_map).max() <= 2e-3 * np.abs(feature_map).max()
        assert batch.region_mask[0].sum() == len(boxes)


def test_a_second_run_has_nothing_to_do(world, backbones, undisturbed):
    summary = extract(FeatureCache.open(undisturbed.path, "a"), image_folder_of("toy", world), backbones)
    assert (summary.images, summary.parts, summary.parts_before) == (0, 0, 3)
    assert "nothing to do" in summary.text()


def test_a_killed_run_is_resumed_to_the_bytes_of_an_uninterrupted_one(world, tmp_path):
    path, manifest = tmp_path / "killed.zarr", read_dataset("toy", world, "train")
    backbones = Backbones.load("toy", device="cpu", dtype="bfloat16")
    whole = open_or_create(tmp_path / "whole.zarr", manifest, backbones.feature_sets(), part_size=3)
    extract(whole, image_folder_of("toy", world), backbones, ExtractConfig(batch_size=2))
    arguments = ["extract", "toy", "--data", str(world), "--cache", str(path), "--preset", "toy"]
    arguments += ["--part-size", "3", "--batch-size", "2", "--device", "cpu", "--dtype", "bfloat16"]
    command = ForkedCommand(*arguments)
    command.wait_until(lambda: list(path.glob("parts/toy_clip/*.json")))
    command.stop(signal.SIGKILL)
    committed = len(list(path.glob("parts/toy_clip/*.json")))
    assert 1 <= committed < whole.n_parts
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert extracted_content(path) == extracted_content(whole.path)
    assert f"{committed} parts were complete before" in result.output


def test_a_broken_and_a_missing_image_are_recorded_and_the_others_are_unchanged(
    image_folder, manifest, backbones, undisturbed, tmp_path
):
    broken, missing = image_folder / str(manifest.paths[2]), image_folder / str(manifest.paths[7])
    broken.write_bytes(broken.read_bytes()[:700])
    missing.unlink()
    cache = new_cache(tmp_path / "c.zarr", manifest, backbones)
    summary = extract(cache, image_folder, backbones)
    assert summary.failed == 2
    assert {failure.row: Path(failure.path).name for failure in cache.failures()} == {2: broken.name, 7: missing.name}
    readable = np.array([0, 1, 3, 4, 5, 6, 8, 9])
    assert cache.valid_rows().tolist() == readable.tolist()
    assert np.array_equal(cache.read(readable).feature_map, undisturbed.read(readable).feature_map)
    assert np.array_equal(cache.read(readable).tokens, undisturbed.read(readable).tokens)


def test_an_image_of_another_size_than_its_annotations_state_is_not_used(image_folder, manifest, backbones, tmp_path):
    path = image_folder / str(manifest.paths[0])
    Image.open(path).resize((50, 40)).save(path)
    cache = new_cache(tmp_path / "c.zarr", manifest, backbones)
    extract(cache, image_folder, backbones)
    assert [failure.row for failure in cache.failures()] == [0]
    assert "40" in cache.failures()[0].reason


def test_a_wrong_image_folder_stops_the_run_before_a_part_is_written(manifest, backbones, tmp_path):
    cache = new_cache(tmp_path / "c.zarr", manifest, backbones)
    with pytest.raises(InputError, match=r"3 of 10 images could not be read.*check --data"):
        extract(cache, tmp_path / "nowhere", backbones, ExtractConfig(batch_size=16))
    assert FeatureCache.open(cache.path).valid_rows().tolist() == []


def test_the_second_backbone_can_be_added_later(world, manifest, backbones, undisturbed, tmp_path):
    path, folder = tmp_path / "c.zarr", image_folder_of("toy", world)
    clip = Backbones(encoders=backbones.encoders)
    extract(new_cache(path, manifest, clip), folder, clip)
    before = (path / "features/toy_clip/feature_map/c.0.0.0").stat().st_mtime_ns
    cache = new_cache(path, manifest, backbones)
    assert extract(cache, folder, backbones).parts == 3
    assert (path / "features/toy_clip/feature_map/c.0.0.0").stat().st_mtime_ns == before
    rows = np.arange(IMAGES)
    assert np.array_equal(cache.read(rows).tokens, undisturbed.read(rows).tokens)
    assert np.array_equal(cache.read(rows).feature_map, undisturbed.read(rows).feature_map)


def test_an_error_of_the_writer_stops_the_run(world, manifest, backbones, tmp_path, monkeypatch):
    cache = new_cache(tmp_path / "c.zarr", manifest, backbones)

    def full(*_, **__):
        raise CacheError("c.zarr: no space left on the disk")

    monkeypatch.setattr(cache, "write_part", full)
    with pytest.raises(CacheError, match="no space left"):
        extract(cache, image_folder_of("toy", world), backbones, ExtractConfig(batch_size=1))
