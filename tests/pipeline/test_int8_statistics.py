"""The sample for int8 statistics: the same images in every run, and only if the cache has no statistics yet."""

from dataclasses import replace

import numpy as np
import pytest
from makers import make_manifest

from regionspot.cache import FeatureCache, FeatureSet, ImageFeatures, InputError, NotACacheError
from regionspot.cache.format.encodings import statistics_of
from regionspot.cache.tools.resume import open_or_create
from regionspot.pipeline.extraction.int8_statistics import SAMPLE_IMAGES, add_int8_statistics, sample_rows

MAPS = FeatureSet("clip", "map", (3, 4), "int8")
TOKENS = FeatureSet("sam", "token", (5,), "int8")
PLAIN = FeatureSet("other", "map", (3, 4), "float16")


@pytest.fixture
def manifest():
    return make_manifest([1, 0, 2, 3] * 50)


@pytest.fixture
def backbones(manifest):
    """Yields features of images; `calls` are the requests so far."""

    class Backbones:
        def __init__(self):
            self.calls, self.broken = [], set()

        def __call__(self, rows, names):
            self.calls.append((rows, names))
            for row in rows:
                failed = "truncated JPEG" if row in self.broken else None
                yield ImageFeatures(row, {} if failed else {name: self.of(row, name) for name in names}, failed)

        def of(self, row, name):
            shape = (3, 4) if name == "clip" else (int(manifest.region_count[row]), 5)
            return np.random.default_rng(row).standard_normal(shape).astype(np.float32) + row

    return Backbones()


def test_the_sample_is_spread_over_the_images_that_have_regions(manifest):
    rows = sample_rows(manifest)
    assert len(rows) == len(set(rows)) == SAMPLE_IMAGES
    assert (rows[0], rows[-1]) == (0, len(manifest) - 1)
    assert manifest.region_count[rows].all()
    assert max(np.diff(rows)) <= 5


@pytest.mark.parametrize(("counts", "rows"), [([0], [0]), ([0, 0, 0], [0, 1, 2]), ([0, 7, 0], [1]), ([1, 1], [0, 1])])
def test_the_sample_of_small_splits_and_of_splits_without_regions(counts, rows):
    assert sample_rows(make_manifest(counts)) == rows


def test_statistics_are_those_of_the_images_that_can_be_read(tmp_path, manifest, backbones):
    rows = sample_rows(manifest)
    backbones.broken = set(rows[:40])
    maps, tokens = add_int8_statistics(tmp_path / "c.zarr", manifest, [MAPS, TOKENS], backbones)
    assert maps == replace(MAPS, statistics=statistics_of(backbones.of(row, "clip") for row in rows[40:]))
    assert tokens == replace(TOKENS, statistics=statistics_of(backbones.of(row, "sam") for row in rows[40:]))
    assert backbones.calls == [(rows, ["clip", "sam"])]


def test_an_unreadable_sample_is_refused(tmp_path, manifest, backbones):
    backbones.broken = set(range(len(manifest)))
    with pytest.raises(InputError, match=r"none of 64 images could be read \(the last: truncated JPEG\); check --data"):
        add_int8_statistics(tmp_path / "c.zarr", manifest, [MAPS], backbones)


def test_only_new_int8_sets_are_sampled(tmp_path, manifest, backbones):
    path = tmp_path / "c.zarr"
    made = add_int8_statistics(path, manifest, [PLAIN, MAPS], backbones)
    assert made[0] == PLAIN
    assert [names for _, names in backbones.calls] == [["clip"]]
    FeatureCache.create(path, manifest, made)

    again = add_int8_statistics(path, manifest, [MAPS, TOKENS, PLAIN], backbones)
    assert [feature_set.name for feature_set in again] == ["clip", "sam", "other"]
    assert [names for _, names in backbones.calls] == [["clip"], ["sam"]]
    cache = open_or_create(path, manifest, again)
    assert cache.feature_sets["clip"] == made[1]
    assert cache.feature_sets["sam"].statistics is not None

    add_int8_statistics(path, manifest, [MAPS, TOKENS, PLAIN], backbones)
    assert len(backbones.calls) == 2


def test_without_int8_no_image_is_read(tmp_path, manifest, backbones):
    assert add_int8_statistics(tmp_path / "c.zarr", manifest, [PLAIN], backbones) == [PLAIN]
    assert not backbones.calls


def test_a_folder_that_is_not_a_cache_is_refused_before_an_image_is_read(tmp_path, manifest, backbones):
    with pytest.raises(NotACacheError):
        add_int8_statistics(tmp_path, manifest, [MAPS], backbones)
    assert not backbones.calls
