"""A feature set as a dask array, and channel statistics, compared with numpy."""

import json
import logging
import pickle
import subprocess
import sys
from pathlib import Path

import dask
import numpy as np
import pytest
from makers import make_manifest

from regionspot.cache import FeatureCache, FeatureSet, ImageFeatures, InputError, NotExtractedError
from regionspot.cache.format.encodings import decode, encode, statistics_of
from regionspot.cache.reading.dask_arrays import dask_array
from regionspot.cache.reading.feature_reader import FeatureReader
from regionspot.cache.tools.channel_stats import Moments, channel_stats, combine, moments

COUNTS = [2, 0, 3, 1, 70, 2, 1, 0]
FAILED = {1: "is empty", 5: "is not there"}


def maps_of(row: int) -> np.ndarray:
    return np.random.default_rng([0, row]).standard_normal((5, 8)).astype(np.float32) * np.arange(1, 9) + 100


def tokens_of(row: int) -> np.ndarray:
    return np.random.default_rng([1, row]).standard_normal((COUNTS[row], 6)).astype(np.float32)


STATISTICS = statistics_of(np.stack([maps_of(row) for row in range(8)]))
SETS = [
    FeatureSet("half", "map", (5, 8)),
    FeatureSet("full", "map", (5, 8), "float32", compression="zstd"),
    FeatureSet("brain", "map", (5, 8), "bfloat16"),
    FeatureSet("int8", "map", (5, 8), "int8", statistics=STATISTICS),
    FeatureSet("token", "token", (6,)),
]


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    """Eight images in three parts, two of them failed; the set `later` is not written."""
    folder = tmp_path_factory.mktemp("dask")
    later = FeatureSet("later", "map", (2, 2))
    cache = FeatureCache.create(folder / "a.zarr", make_manifest(COUNTS), [*SETS, later], part_size=3)
    for part in range(3):
        images = [
            ImageFeatures(row, {}, FAILED[row])
            if row in FAILED
            else ImageFeatures(
                row, {feature_set.name: maps_of(row) for feature_set in SETS[:4]} | {"token": tokens_of(row)}
            )
            for row in cache.part_rows(part)
        ]
        cache.write_part(part, images, [feature_set.name for feature_set in SETS])
    return cache.path


@pytest.fixture
def cache(path) -> FeatureCache:
    return FeatureCache.open(path)


def expected(feature_set: FeatureSet) -> np.ndarray:
    """All features after encoding and decoding, NaN for failed images."""
    values = []
    for row in range(8):
        original = tokens_of(row) if feature_set.kind == "token" else maps_of(row)[None]
        stored, scales = encode(original, feature_set)
        decoded = decode(stored.copy(), feature_set, scales)
        values.append(np.full_like(decoded, np.nan) if row in FAILED else decoded)
    return np.concatenate(values)


@pytest.mark.parametrize("feature_set", SETS, ids=lambda each: each.name)
def test_the_array_holds_every_feature_in_the_manifests_order(cache, feature_set):
    array = cache.dask(feature_set.name)
    assert array.dtype == (np.float16 if feature_set.dtype == "float16" else np.float32)
    assert array.shape == expected(feature_set).shape
    np.testing.assert_array_equal(array.compute(), expected(feature_set))


def test_a_chunk_is_a_part(cache):
    assert cache.dask("half").chunks == ((3, 3, 2), (5,), (8,))
    assert cache.dask("token").chunks == ((5, 73, 1), (6,))


def test_an_operation_on_the_array_gives_the_result_of_numpy(cache):
    with np.errstate(invalid="ignore"):
        classes = cache.dask("half")[:, 0].astype("float32")
        result = (classes @ np.ones(8, np.float32)).compute()
    np.testing.assert_allclose(result, expected(SETS[0])[:, 0].sum(axis=-1), rtol=1e-6)


def test_only_the_needed_parts_are_read(cache, monkeypatch):
    read = []
    original = FeatureReader.record
    monkeypatch.setattr(FeatureReader, "record", lambda self, part: read.append(part) or original(self, part))
    cache.dask("half")[6:].compute(scheduler="sync")
    assert read == [2]


def test_an_incomplete_set_is_refused_with_the_count_of_parts(cache):
    with pytest.raises(NotExtractedError, match="3 of 3 parts of later are not written yet"):
        cache.dask("later")
    with pytest.raises(InputError, match="no feature set 'dino'; it has half, full"):
        cache.dask("dino")


def test_another_process_opens_the_cache_once(cache, tmp_path):
    (tmp_path / "array").write_bytes(pickle.dumps(cache.dask("half")))
    script = (
        "import pickle, sys; from regionspot.cache import FeatureCache\n"
        "opened, original = [], FeatureCache.open.__func__\n"
        "FeatureCache.open = classmethod(lambda *a, **k: opened.append(1) or original(*a, **k))\n"
        "total = pickle.load(open(sys.argv[1], 'rb'))[:, 0, 0].astype('f8').compute()\n"
        "print(len(opened), len(total), total[0])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "array"], capture_output=True, text=True, check=True
    )
    opened, length, first = done.stdout.split()
    assert (opened, length, float(first)) == ("1", "8", float(np.float16(maps_of(0)[0, 0])))
    assert len(pickle.dumps(cache.dask("half"))) < 5000


@pytest.mark.parametrize("feature_set", SETS, ids=lambda each: each.name)
def test_statistics_equal_those_of_numpy_without_failed_images(cache, feature_set):
    rows = expected(feature_set).reshape(-1, feature_set.shape[-1]).astype(np.float64)
    rows = rows[~np.isnan(rows[:, 0])]
    stats = channel_stats(cache, feature_set.name)
    assert (stats.count, stats.left_out) == (len(rows), 2)
    np.testing.assert_allclose(stats.mean, rows.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(stats.variance, rows.var(axis=0), rtol=1e-12)


def test_a_mean_that_is_large_compared_to_the_deviation_loses_no_digits():
    rows = np.random.default_rng(0).standard_normal((10_000, 3)) + 1e8
    parts = [moments(rows[at : at + 999]) for at in range(0, 10_000, 999)]
    whole = combine(parts)
    assert whole.count == 10_000
    np.testing.assert_allclose(whole.squares / whole.count, rows.var(axis=0), rtol=1e-7)
    naive = (rows**2).mean(axis=0) - rows.mean(axis=0) ** 2
    assert abs(naive / rows.var(axis=0) - 1).max() > 0.1


def test_joining_empty_moments_changes_nothing():
    empty, some = Moments(0, np.zeros(2), np.zeros(2)), moments(np.array([[1.0, 2], [3, 4]]))
    for parts in ([empty, some], [some, empty], [empty, empty, some]):
        whole = combine(parts)
        assert (whole.count, whole.mean.tolist(), whole.squares.tolist()) == (2, [2, 3], [2, 2])


def test_statistics_are_printed_and_saved(cache, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    stats = channel_stats(cache, "half")
    assert "half: 8 channels over 30 vectors; 2 images" in stats.text()
    assert "channel 7" in stats.text().splitlines()[3]
    assert "3/3 parts" in caplog.text
    stats.save(tmp_path / "s.npz")
    stats.save(tmp_path / "s.json")
    with np.load(tmp_path / "s.npz") as saved:
        np.testing.assert_array_equal(saved["mean"], stats.mean)
    assert json.loads((tmp_path / "s.json").read_text())["variance"] == stats.variance.tolist()
    with pytest.raises(InputError, match=r"\.npz or \.json"):
        stats.save(tmp_path / "s.csv")


def test_statistics_of_an_empty_set_are_refused(cache, tmp_path):
    manifest = cache.manifest.select(np.array([1, 7]))
    empty = FeatureCache.create(tmp_path / "a.zarr", manifest, [SETS[4]])
    empty.write_part(0, [ImageFeatures(row, {"token": np.zeros((0, 6))}) for row in range(2)])
    with pytest.raises(InputError, match="token holds no features"):
        channel_stats(empty, "token")


def test_statistics_run_on_a_cluster(path):
    from distributed import Client, LocalCluster

    with (
        LocalCluster(n_workers=1, threads_per_worker=1, processes=False, dashboard_address=None) as cluster,
        Client(cluster),
    ):
        stats = channel_stats(FeatureCache.open(path), "half")
    assert stats.count == 30


def test_arrays_of_two_caches_are_not_confused(cache, tmp_path):
    other = FeatureCache.create(tmp_path / "b.zarr", cache.manifest, [SETS[0]], part_size=8)
    other.write_part(0, [ImageFeatures(row, {"half": np.full((5, 8), float(row))}) for row in range(8)])
    both = dask.compute(dask_array(cache, "half")[0, 0, 0], dask_array(other, "half")[0, 0, 0])
    assert both == (np.float16(maps_of(0)[0, 0]), 0)
