"""--max-failures: a share is a share of all images of a run, wherever the failed ones are."""

import os
import tempfile
from pathlib import Path

import pytest

from regionspot.cache import FeatureCache
from regionspot.cache.errors import InputError
from regionspot.cache.tools.resume import open_or_create
from regionspot.pipeline.backbones.bundle import Backbones
from regionspot.pipeline.datasets.failure_limit import FailureLimit
from regionspot.pipeline.datasets.registry import image_folder_of, read_dataset
from regionspot.pipeline.extraction.config import ExtractConfig
from regionspot.pipeline.extraction.extract import extract

IMAGES = 20


@pytest.mark.parametrize(
    ("text", "limit"),
    [("1%", FailureLimit(share=0.01)), ("0.2", FailureLimit(share=0.2)), ("200", FailureLimit(count=200))],
)
def test_a_limit_is_a_share_or_a_count(text, limit):
    assert FailureLimit.parse(text) == limit


@pytest.mark.parametrize("text", ["", "-1", "101%", "2.5", "many", "1e9", "nan", "٣%", "%"])
def test_an_invalid_limit_is_refused(text):
    with pytest.raises(InputError, match="expected a share"):
        FailureLimit.parse(text)


@pytest.mark.parametrize("text", ["1%", "20%", "0%", "100%", "2.5%", "200"])
def test_a_limit_is_printed_as_it_is_parsed(text):
    assert str(FailureLimit.parse(text)) == text


@pytest.mark.parametrize(
    ("text", "total", "allowed"),
    [("20%", 10, 2), ("20%", 4, 0), ("29%", 100, 29), ("1%", 99, 0), ("100%", 3, 3), ("200", 3, 200), ("0%", 10**6, 0)],
)
def test_a_share_is_rounded_down(text, total, allowed):
    limit = FailureLimit.parse(text)
    assert limit.of_all(total) == allowed
    assert limit.allows(allowed, total)
    assert not limit.allows(allowed + 1, total)


# --- extraction ---


@pytest.fixture(scope="module")
def manifest(world):
    return read_dataset("toy", world, "train").head(IMAGES)


@pytest.fixture(scope="module")
def backbones() -> Backbones:
    return Backbones.load("toy", device="cpu", localizer="none")


@pytest.fixture
def run(world, manifest, backbones, tmp_path):
    """`run({1, 5}, "20%")` extracts with the images of these rows missing and returns the number of failures."""

    def extract_without(missing, limit: str, part_size: int = 4) -> int:
        folder = Path(tempfile.mkdtemp(dir=tmp_path))
        for row, path in enumerate(manifest.paths):
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            if row not in missing:
                os.link(image_folder_of("toy", world) / path, folder / path)
        cache = open_or_create(tmp_path / "c.zarr", manifest, backbones.feature_sets(), part_size)
        config = ExtractConfig(batch_size=4, max_failures=FailureLimit.parse(limit))
        return extract(cache, folder, backbones, config).failed

    return extract_without


@pytest.mark.parametrize("missing", [range(4), range(16, 20), (3, 7, 11, 15)], ids=["first", "last", "spread"])
def test_a_run_completes_with_as_many_failures_as_allowed(run, missing):
    assert run(set(missing), "20%") == 4


@pytest.mark.parametrize("missing", [range(5), range(15, 20)], ids=["first", "last"])
def test_a_run_stops_at_one_failure_more_than_allowed(run, missing):
    with pytest.raises(InputError, match=r"5 of 20 images could not be read, more than --max-failures 20% allows"):
        run(set(missing), "20%")


def test_a_run_stops_at_the_first_failure_when_none_is_allowed(run, tmp_path):
    with pytest.raises(InputError, match=r"1 of 20 images could not be read, more than --max-failures 0 allows"):
        run({5}, "0")
    assert FeatureCache.open(tmp_path / "c.zarr").pending_parts() == [1, 2, 3, 4]  # the written part stays


def test_failures_of_earlier_runs_count(run):
    with pytest.raises(InputError, match="3 of 20"):
        run({0, 1, 6}, "2")
    with pytest.raises(InputError, match="3 of 20"):
        run({6}, "2")
    assert run({6}, "3") == 1  # in this run; the other two are in the records


def test_a_resumed_run_does_not_stop_because_its_few_images_fail(run):
    with pytest.raises(InputError):
        run({16, 17, 18, 19}, "0")
    assert run({16, 17, 18, 19}, "20%") == 4


def test_a_run_stops_when_the_first_ten_images_fail_whatever_the_limit(run):
    with pytest.raises(InputError, match=r"none of the first 10 images could be read .*check --data.*100%"):
        run(set(range(20)), "200", part_size=20)


def test_with_100_percent_all_images_may_fail(run):
    assert run(set(range(20)), "100%") == 20


def test_the_command_fails_when_most_images_of_a_small_set_are_missing(regionspot, world, manifest, tmp_path):
    (tmp_path / "toy_train.json").symlink_to(world / "toy_train.json")
    for path in manifest.paths[:2]:
        (tmp_path / "photos" / path).parent.mkdir(parents=True, exist_ok=True)
        os.link(image_folder_of("toy", world) / path, tmp_path / "photos" / path)
    arguments = ("extract", "toy", "--data", tmp_path, "--cache", tmp_path / "c.zarr", "--preset", "toy", "--limit", 10)
    code, _, err = regionspot(*arguments, "--device", "cpu")
    assert code == 2
    assert "3 of 10 images could not be read, more than --max-failures 20% allows" in err.splitlines()[-1]
    assert Path(tmp_path / "c.zarr").exists()
