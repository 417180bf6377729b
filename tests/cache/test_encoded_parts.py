"""Writing encoded features: streaming, file order, reproducible bytes, refusals before any file is created."""

import os
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from makers import fill, make_manifest

from regionspot.cache import FeatureCache, FeatureSet, ImageFeatures, InputError, ProvenanceMismatchError
from regionspot.cache.format.encodings import statistics_of
from regionspot.cache.format.feature_dtypes import Statistics
from regionspot.cache.format.schema import Geometry
from regionspot.cache.storage.local import LocalStorage
from regionspot.cache.tools.resume import open_or_create
from regionspot.cache.writing.feature_set_writers import MapWriter, TokenWriter

COUNTS = [3, 70, 1]
SAMPLE = np.random.default_rng(0).standard_normal((8, 5, 6)).astype(np.float32) * [1, 2, 4, 8, 16, 32]


def sets_of(dtype="int8", compression=None, statistics=None):
    statistics = statistics or (statistics_of(SAMPLE) if dtype == "int8" else None)
    return [
        FeatureSet("clip", "map", (5, 6), dtype, compression=compression, statistics=statistics),
        FeatureSet("sam", "token", (6,), dtype, compression=compression, statistics=statistics),
    ]


def written_files(path, sets):
    fill(FeatureCache.create(path, make_manifest(COUNTS), sets))
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in path.rglob("*") if file.is_file()}


@pytest.mark.parametrize("compression", [None, "zstd"])
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_the_same_features_give_the_same_bytes(tmp_path, dtype, compression):
    first, second = (written_files(tmp_path / name, sets_of(dtype, compression)) for name in ("a", "b"))
    assert first.keys() == second.keys()
    assert all(first[name] == second[name] for name in first if not name.startswith("parts/"))  # which hold seconds


def test_a_part_publishes_data_then_scales_then_checksums_then_its_record(tmp_path, monkeypatch):
    published, real = [], os.replace
    FeatureCache.create(tmp_path / "c.zarr", make_manifest(COUNTS), sets_of()[:1])
    cache = FeatureCache.open(tmp_path / "c.zarr", "a")
    monkeypatch.setattr(os, "replace", lambda old, new: published.append(str(new)) or real(old, new))
    cache.write_part(0, [ImageFeatures(row, {"clip": SAMPLE[row]}) for row in range(3)])
    folder = f"{tmp_path}/c.zarr"
    assert published == [
        f"{folder}/features/clip/feature_map/c.0.0.0",
        f"{folder}/features/clip/scale/c.0.0",
        f"{folder}/features/clip/crc32c/c.0",
        f"{folder}/parts/clip/00000.json",
    ]


@pytest.mark.parametrize("compression", [None, "zstd"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8"])
def test_memory_does_not_grow_with_the_part_size(tmp_path, dtype, compression):
    sample = np.random.default_rng(0).standard_normal((64, 256)).astype(np.float32)
    statistics = statistics_of(sample) if dtype == "int8" else None
    feature_set = FeatureSet("clip", "map", sample.shape, dtype, compression=compression, statistics=statistics)

    def peak(images):
        tracemalloc.start()
        writer = MapWriter(LocalStorage(tmp_path), feature_set, Geometry(images, images, 64), 0)
        for row in range(images):
            writer.append(row, 0, sample)
        writer.finish()
        bytes_used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return bytes_used

    peak(1)  # imports and caches
    assert peak(64) < peak(2) + 64 * 150  # two indexes of 16 bytes per record, checksums, and some copies


def test_chunks_of_tokens_do_not_depend_on_the_images(tmp_path):
    tokens = np.random.default_rng(0).standard_normal((150, 6)).astype(np.float32)
    written = []
    for name, ends in (("whole", [150]), ("pieces", [10, 64, 64, 65, 149, 150])):
        writer = TokenWriter(LocalStorage(tmp_path / name), sets_of()[1], Geometry(len(ends), len(ends), 192), 0)
        for row, (first, last) in enumerate(zip([0, *ends], ends, strict=False)):
            writer.append(row, last - first, tokens[first:last])
        files = writer.finish().files
        writer.publish()
        written.append([(tmp_path / name / file).read_bytes() for file in files])
    assert written[0] == written[1]


def test_a_writer_that_cannot_create_its_second_file_leaves_none(tmp_path, monkeypatch):
    class Full(LocalStorage):
        def create(self, name):
            if "scale" in name:
                raise OSError(28, "No space left on device")
            return super().create(name)

    with pytest.raises(OSError, match="No space"):
        MapWriter(Full(tmp_path), sets_of()[0], Geometry(3, 3, 64), 0)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_an_int8_cache_without_statistics_is_not_created(tmp_path):
    without = replace(sets_of()[0], statistics=None)
    with pytest.raises(InputError, match="clip: int8 needs the statistics of its channels"):
        FeatureCache.create(tmp_path / "c.zarr", make_manifest(COUNTS), [without])
    assert not list(tmp_path.iterdir())


def test_a_resumed_cache_keeps_its_statistics(tmp_path):
    FeatureCache.create(tmp_path / "c.zarr", make_manifest(COUNTS), sets_of())
    other = Statistics(np.ones(6, np.float32), np.full(6, 2, np.float32))
    for requested in (sets_of(statistics=other), [replace(each, statistics=None) for each in sets_of()]):
        cache = open_or_create(tmp_path / "c.zarr", make_manifest(COUNTS), requested)
        assert [each.statistics for each in cache.feature_sets.values()] == [statistics_of(SAMPLE)] * 2


def test_another_encoding_of_a_set_is_refused_with_the_difference(tmp_path):
    FeatureCache.create(tmp_path / "c.zarr", make_manifest(COUNTS), sets_of("float16"))
    for requested, message in (
        (sets_of("int8"), "dtype is 'float16', requested 'int8'"),
        (sets_of("float16", "zstd"), "zstd"),
    ):
        with pytest.raises(ProvenanceMismatchError, match=message):
            open_or_create(tmp_path / "c.zarr", make_manifest(COUNTS), requested)
