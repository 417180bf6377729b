"""The description of a cache as text and JSON, and the list of its images."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from makers import make_manifest

from regionspot.cache import CorruptPartError, FeatureCache, FeatureSet, ImageFeatures, InputError
from regionspot.cache.tools.info import describe_cache, list_images, size_text
from regionspot.pipeline.reporting.run_summary import ExtractSummary, RunRecord
from regionspot.pipeline.reporting.summary_page import publish

MAPS = FeatureSet(
    "clip",
    "map",
    (5, 8),
    provenance={
        "model": "ViT-L-14",
        "weights_sha256": "ab" * 32,
        "weights_origin": "official",
        "resize": "bilinear to 224 x 224",
        "dtype": "float32",
        "mean": [0.5, 0.25],
        "versions": {"torch": "2.15.0"},
    },
)
TOKENS = FeatureSet("sam", "token", (6,), provenance={"model": "vit_b"})
REGIONS = [2, 0, 3, 1, 4, 1, 2]


@pytest.fixture(scope="module")
def template(tmp_path_factory) -> Path:
    """Seven images in three parts: maps are written in two parts, with two failures; tokens in none."""
    manifest = make_manifest(
        REGIONS,
        dataset="lvis",
        split="val",
        image_ids=np.arange(7) * 11,
        paths=[f"val/{row}.jpg" for row in range(7)],
        source={"files": {"lvis_v1_val.json": "c0ffee" * 10}},
        report={"boxes_without_area": 3, "crowd": 0},
    )
    cache = FeatureCache.create(tmp_path_factory.mktemp("info") / "a.zarr", manifest, [MAPS, TOKENS], part_size=3)
    for part in (0, 1):
        cache.write_part(part, (image(row) for row in cache.part_rows(part)), ["clip"], worker="gpu1:7")
    return cache.path


@pytest.fixture
def cache(template, tmp_path) -> FeatureCache:
    return FeatureCache.open(shutil.copytree(template, tmp_path / "a.zarr"), "a")


def image(row: int) -> ImageFeatures:
    failures = {1: "/photos/val/1.jpg: has 71 bytes too few", 4: "/photos/val/4.jpg: has 9 bytes too few"}
    if row in failures:
        return ImageFeatures(row, {}, failures[row])
    return ImageFeatures(row, {"clip": np.full((5, 8), row, np.float16), "sam": np.ones((REGIONS[row], 6))})


def test_it_counts_parts_sizes_and_images_of_each_feature_set(cache):
    maps, tokens = describe_cache(cache).feature_sets
    on_disk = sum(path.stat().st_size for path in cache.path.glob("features/clip/*/c.*"))
    assert (maps.parts, maps.pending, maps.images, maps.bytes) == (2, 1, 4, on_disk)
    assert maps.bytes_as_float16 == 4 * 5 * 8 * 2
    assert maps.writers == {"gpu1:7": 2}
    assert (tokens.parts, tokens.pending, tokens.bytes) == (0, 3, 0)


def test_failures_are_grouped_by_reason_without_paths_and_numbers(cache):
    info = describe_cache(cache)
    assert (info.failed, info.failures) == (2, {"has N bytes too few": 2})


def test_an_image_that_failed_in_two_sets_counts_once(cache):
    cache.write_part(0, (image(row) for row in cache.part_rows(0)), ["sam"])
    assert describe_cache(cache).failed == 2


def test_the_text_describes_the_cache(cache):
    text = describe_cache(cache).text()
    for expected in (
        f"{cache.path}: lvis val",
        "7 in 3 parts of 3",
        "lvis_v1_val.json (c0ffeec0ffee)",
        "boxes without area 3",
        "clip: a map of 5 x 8 per image, float16",
        "sam: a token of 6 numbers per region, float16",
        "2 of 3; 1 pending",
        "ViT-L-14, weights abababababab (official), computed in float32",
        "mean 0.5 0.25",
        "torch 2.15.0",
        "gpu1:7 (2)",
        "2 of 7 images could not be read:\n  2  has N bytes too few",
    ):
        assert expected in text
    assert "crowd" not in text
    assert max(map(len, text.splitlines())) < 160


def test_a_smaller_encoding_shows_its_ratio_to_float16(cache, tmp_path):
    maps = FeatureSet("clip", "map", (5, 8), "float16", compression="zstd")
    small = FeatureCache.create(tmp_path / "small.zarr", cache.manifest, [maps], part_size=7)
    small.write_part(0, [ImageFeatures(row, {"clip": np.zeros((5, 8))}) for row in range(7)])
    text = describe_cache(small).text()
    assert "clip: a map of 5 x 8 per image, float16, zstd" in text
    assert "of float16's size" in text


def test_the_json_has_all_fields(cache):
    document = json.loads(json.dumps(describe_cache(cache).as_json()))
    assert (document["schema"], document["pictures"], document["failed"]) == (1, 7, 2)
    assert [one["name"] for one in document["feature_sets"]] == ["clip", "sam"]
    assert document["feature_sets"][0]["provenance"]["weights_sha256"] == "ab" * 32
    assert (document["rate"], document["last_run"]) == (0, None)


def ran(cache, started, images, seconds):
    summary = ExtractSummary(images, 0, 1, 0, 0, 0, seconds, {})
    run = RunRecord(started, "gpu1:7", "complete", {}, {}, {}, summary)
    publish(cache, run)


def test_the_rate_is_that_of_the_last_run(cache):
    assert "images/s" not in describe_cache(cache).text()
    ran(cache, "2026-01-02T03:04:05+00:00", 3, 100.0)
    ran(cache, "2026-01-03T03:04:05+00:00", 3, 1.5)
    ran(cache, "2026-01-04T03:04:05+00:00", 0, 0.5)  # nothing was pending
    cache.storage.write("runs/notes.json", b"[]")
    info = describe_cache(cache)
    assert info.rate == 2
    document = info.as_json()
    assert (document["rate"], [one["rate"] for one in document["feature_sets"]]) == (2, [2, 0])
    assert "last run    3 images in 2s, 2 images/s; by gpu1:7, started 2026-01-03 03:04 UTC" in info.text()
    assert "2 of 3; 1 pending, 2s at the last run's rate" in info.text()


def test_a_damaged_part_record_is_named_with_its_fix(cache):
    record = cache.path / "parts" / "clip" / "00001.json"
    record.write_text(record.read_text().replace("gpu1", "gpu2"))
    with pytest.raises(CorruptPartError, match=r"00001\.json.* repair"):
        describe_cache(cache)


def test_every_image_has_a_line_with_its_state(cache):
    cache.write_part(0, (image(row) for row in cache.part_rows(0)), ["sam"])
    lines = list(list_images(cache))
    assert len(lines) == 7
    assert lines[0].split() == ["0", "0", "640", "x", "480", "2", "regions", "val/0.jpg", "done"]
    assert lines[1].endswith("val/1.jpg  failed: has 71 bytes too few")
    assert lines[3].endswith("pending: sam")
    assert lines[6].endswith("pending: clip, sam")
    assert len({line.index("regions") for line in lines}) == 1


def test_the_list_is_filtered_by_state_and_limit(cache):
    assert [line.split()[0] for line in list_images(cache, ["failed"])] == ["1", "4"]
    assert [line.split()[0] for line in list_images(cache, ["pending"], limit=2)] == ["0", "2"]
    assert not list(list_images(cache, ["done"]))


def test_an_invalid_state_or_limit_is_refused(cache):
    with pytest.raises(InputError, match="state is broken, expected done, failed, pending"):
        list_images(cache, ["broken"])
    with pytest.raises(InputError, match="expected at least 1"):
        list_images(cache, limit=0)


def test_the_list_is_streamed(cache, monkeypatch):
    looked = []
    monkeypatch.setattr(
        cache, "record", lambda part, name: looked.append(part) or FeatureCache.record(cache, part, name)
    )
    assert next(list_images(cache)).split()[0] == "0"
    assert looked == [0]


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (999, "999 B"), (4880, "4.88 kB"), (999_900, "1 MB"), (349e9, "349 GB"), (2e15, "2 PB")],
)
def test_sizes_are_in_decimal_units(size, text):
    assert size_text(size) == text
