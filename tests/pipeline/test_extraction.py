"""Options of an extraction: selected parts, dry runs, several encoders, and retries of failed images."""

import os
import re
import shutil
import signal
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from makers import fork, was_killed
from typer.testing import CliRunner

from regionspot.cache import Category, FeatureCache
from regionspot.cache.errors import InputError
from regionspot.cache.format.feature_dtypes import Encoding
from regionspot.cache.storage.local import LocalStorage
from regionspot.cache.tools.verify import verify
from regionspot.cli import app
from regionspot.pipeline.backbones.bundle import Backbones
from regionspot.pipeline.datasets.failure_limit import FailureLimit
from regionspot.pipeline.datasets.registry import image_folder_of
from regionspot.pipeline.extraction import decode_ahead as decoding
from regionspot.pipeline.extraction.config import ExtractConfig
from regionspot.pipeline.extraction.extract import Extraction, extract
from regionspot.pipeline.extraction.plan import plan_extraction
from regionspot.pipeline.extraction.retry import retry

PART_SIZE = 4


@pytest.fixture
def extraction(world, manifest, backbones, tmp_path):
    """`extraction(parts="0")`: an extraction into the cache of this test, with these fields of the config."""

    def make(**fields):
        folder = fields.pop("image_folder", image_folder_of("toy", world))
        config = ExtractConfig(**{"cache": str(tmp_path / "c.zarr"), "part_size": PART_SIZE, **fields})
        return Extraction(config, manifest, folder, backbones)

    return make


def feature_files(cache: Path) -> dict[str, bytes]:
    return {str(path.relative_to(cache)): path.read_bytes() for path in cache.glob("features/**/*") if path.is_file()}


# --- which parts ---


def test_class_names_that_the_toy_encoder_does_not_know_are_logged_before_the_extraction(
    world, manifest, backbones, tmp_path, caplog
):
    names = ("person", "red circle", "traffic light", "striped zebra", "dog")
    categories = tuple(Category(number + 1, name) for number, name in enumerate(names))
    image_folder, path = image_folder_of("toy", world), str(tmp_path / "c.zarr")
    index = manifest.category_index % len(names)
    other = replace(manifest, categories=categories, category_index=index)
    Extraction(ExtractConfig(path), other, image_folder, backbones).prepare()
    (message,) = [record.getMessage() for record in caplog.records if "cannot read" in record.getMessage()]
    assert message.startswith(
        "toy_clip cannot read 4 of the 5 class names of this dataset (person, traffic light, striped"
    )
    assert "it knows the words blue, checkered, circle" in message
    caplog.clear()
    Extraction(ExtractConfig(str(tmp_path / "toy.zarr")), manifest, image_folder, backbones).prepare()
    assert not caplog.text


def test_only_the_selected_parts_are_written(extraction, undisturbed):
    summary = extraction(parts="0,2").run()
    assert (summary.images, summary.parts) == (6, 2)
    cache = FeatureCache.open(extraction().config.cache)
    assert cache.pending_parts() == [1]
    assert extraction(parts="0,2").run().parts == 0
    assert extraction().run().parts == 1
    assert feature_files(cache.path) == feature_files(undisturbed.path)


def test_all_shards_together_fill_the_cache(extraction, undisturbed):
    for shard in ("2/3", "3/3", "1/3"):
        assert extraction(shard=shard).run().parts == 1
    assert feature_files(Path(extraction().config.cache)) == feature_files(undisturbed.path)


# --- dry runs and disk space ---


@pytest.mark.parametrize(("maps", "tokens"), [("int8", "float32"), ("float16", "int8")])
def test_the_planned_bytes_are_those_that_are_written(extraction, maps, tokens):
    one = extraction(encoding=Encoding.parse(maps), token_encoding=Encoding.parse(tokens))
    plan = one.dry_run().plan
    assert not Path(one.config.cache).exists()
    one.run()
    for name, size in plan.bytes.items():
        files = [path for path in Path(one.config.cache, "features", name).glob("**/c.*") if "crc32c" not in path.parts]
        assert sum(path.stat().st_size for path in files) == size
    assert one.dry_run().plan.total_bytes == 0


def test_a_dry_run_estimates_the_work_and_writes_nothing(extraction, manifest):
    result = extraction(parts="1-2").dry_run()
    assert (result.plan.parts, result.plan.images) == ((1, 2), 6)
    assert result.plan.regions == manifest.offsets[10] - manifest.offsets[4]
    assert result.rate > 0
    assert "6 images" in result.text()
    assert "nothing was written" in result.text()
    assert not Path(extraction().config.cache).exists()


def test_a_plan_counts_the_missing_parts_of_one_feature_set(extraction, manifest, backbones):
    extraction(parts="0").run()
    maps = [feature_set for feature_set in backbones.feature_sets() if feature_set.kind == "map"]
    plan = plan_extraction(extraction().config.cache, manifest, maps, PART_SIZE)
    assert plan.parts == (1, 2)
    assert set(plan.bytes) == {maps[0].name}


def test_a_dry_run_on_a_wrong_image_folder_says_so(extraction, tmp_path):
    result = extraction(image_folder=tmp_path / "nowhere").dry_run()
    assert result.rate is None
    assert "could not be read" in result.text()


def test_a_disk_without_enough_space_is_refused_before_the_cache_is_created(extraction, monkeypatch):
    needed = extraction().dry_run().plan.total_bytes
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 0, needed))
    with pytest.raises(InputError, match=r"10 images need .* free; .*--no-room-check"):
        extraction().run()
    assert not Path(extraction().config.cache).exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 0, int(needed * 1.02)))
    assert extraction().run().parts == 3


def test_the_check_of_the_disk_space_can_be_disabled(extraction, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("usage", "total used free")(1, 1, 0))
    assert extraction(check_disk_space=False).run().parts == 3


# --- models ---


def test_an_image_is_decoded_once_for_several_encoders(extraction, manifest, tmp_path, monkeypatch):
    both = Backbones.load(
        "toy", "random:0", device="cpu", localizer="none", encoders=["toy_clip", "open_clip:ViT-S-32-alt"]
    )
    opened, decode = [], decoding.decode_image
    monkeypatch.setattr(decoding, "decode_image", lambda *args: opened.append(args) or decode(*args))
    rows = np.arange(3)
    one = replace(extraction(), manifest=manifest.head(len(rows)), backbones=both)
    one.run()
    cache = FeatureCache.open(one.config.cache)
    assert set(cache.feature_sets) == {encoder.name for encoder in both.encoders}
    assert len(opened) == len(rows)
    for encoder in both.encoders:
        config = replace(one.config, cache=str(tmp_path / encoder.name))
        replace(one, config=config, backbones=Backbones(encoders=(encoder,))).run()
        expected = FeatureCache.open(config.cache).read(rows, map_set=encoder.name).feature_map
        np.testing.assert_array_equal(cache.read(rows, map_set=encoder.name).feature_map, expected)


def test_an_encoder_named_twice_is_refused():
    with pytest.raises(InputError, match="named twice"):
        Backbones.load("toy", device="cpu", encoders=["toy_clip", "toy_clip"])


# --- retries ---


@pytest.fixture
def with_failures(extraction, image_folder, manifest):
    """An extraction whose images 2, 7 and 8 have failed, and a function that repairs one of these files."""
    kept = {row: (image_folder / str(manifest.paths[row])).read_bytes() for row in (2, 7, 8)}
    for row in kept:
        (image_folder / str(manifest.paths[row])).write_bytes(b"")
    one = extraction(image_folder=image_folder, max_failures=FailureLimit(count=3))
    assert one.run().failed == 3
    return one, lambda row: (image_folder / str(manifest.paths[row])).write_bytes(kept[row])


def test_a_retry_adds_the_failed_images_that_can_be_read_now(with_failures, undisturbed):
    extraction, repair = with_failures
    before = FeatureCache.open(extraction.config.cache).read(np.array([0, 1, 3]))
    repair(2), repair(8)
    summary = extraction.retry()
    assert (summary.read, summary.failed) == (2, 1)
    assert "1 still cannot be read" in summary.text()
    cache = FeatureCache.open(extraction.config.cache, check="always")
    assert [failure.row for failure in cache.failures()] == [7]
    assert not verify(cache).problems
    page = Path(extraction.config.cache, "summary.md").read_text()
    assert str(cache.manifest.paths[7]) in page
    assert str(cache.manifest.paths[2]) not in page
    after, expected = cache.read(np.array([2, 8])), undisturbed.read(np.array([2, 8]))
    np.testing.assert_array_equal(after.feature_map, expected.feature_map)
    np.testing.assert_array_equal(after.tokens, expected.tokens)
    np.testing.assert_array_equal(cache.read(np.array([0, 1, 3])).feature_map, before.feature_map)


def test_a_retry_in_which_every_image_fails_again_changes_no_byte(with_failures):
    extraction, _ = with_failures
    before = {
        path: path.stat().st_mtime_ns for path in Path(extraction.config.cache).glob("[fp]*/**/*") if path.is_file()
    }
    assert extraction.retry().failed == 3
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_without_failures_there_is_nothing_to_retry(extraction):
    extraction().run()
    assert "nothing to retry" in extraction().retry().text()


def test_a_retry_without_a_cache_is_refused(extraction):
    with pytest.raises(InputError, match="no such cache"):
        extraction().retry()


def test_a_retry_killed_between_two_files_is_repaired_by_the_next_extract(with_failures, undisturbed, monkeypatch):
    extraction, repair = with_failures
    for row in (2, 7, 8):
        repair(row)
    remove = LocalStorage.remove

    def remove_and_die(self, name):
        remove(self, name)
        if name.startswith("parts/"):
            os.kill(os.getpid(), signal.SIGKILL)

    cache = FeatureCache.open(extraction.config.cache, "a")
    with monkeypatch.context() as patch:
        patch.setattr(LocalStorage, "remove", remove_and_die)
        assert was_killed(fork(lambda: retry(cache, extraction.image_folder, extraction.backbones, extraction.config)))
    assert FeatureCache.open(extraction.config.cache).pending_parts() == [0]
    extract(FeatureCache.open(extraction.config.cache, "a"), extraction.image_folder, extraction.backbones)
    assert extraction.retry().read == 3  # the killed retry had replaced one feature set of one part
    assert feature_files(Path(extraction.config.cache)) == feature_files(undisturbed.path)


# --- the command ---


def test_the_command_has_these_options(world, tmp_path):
    path = tmp_path / "c.zarr"
    arguments = ["extract", "toy", "--data", str(world), "--cache", str(path), "--preset", "toy", "--device", "cpu"]
    arguments += ["--limit", "10", "--part-size", "4"]
    planned = CliRunner().invoke(app, [*arguments, "--dry-run"])
    assert "10 images" in planned.stdout, planned.output
    assert not path.exists()
    some = CliRunner().invoke(app, [*arguments, "--parts", "0,2", "--localizer", "none", "--exact"])
    assert re.search(r"6 images with \d+ regions in 2 parts", some.stdout), some.output
    assert list(FeatureCache.open(path).feature_sets) == ["toy_clip"]
    rest = CliRunner().invoke(app, [*arguments, "--max-failures", "0"])
    assert "10 images" in rest.stdout, rest.output
    again = CliRunner().invoke(app, [*arguments, "--retry-failed"])
    assert "nothing to retry" in again.stdout, again.output
