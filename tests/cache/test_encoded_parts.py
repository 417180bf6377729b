"""Writing encoded features: streamed, in one order, the same bytes every time, and refused before anything is made."""

import os
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest

from regionspot.cache import (
    Category,
    FeatureCache,
    FeatureSet,
    ImageFeatures,
    InputError,
    Manifest,
    ProvenanceMismatchError,
)
from regionspot.cache.format.encodings import statistics_of
from regionspot.cache.format.feature_dtypes import Statistics
from regionspot.cache.format.schema import Geometry
from regionspot.cache.storage.local import LocalStorage
from regionspot.cache.tools.resume import open_or_create
from regionspot.cache.writing.feature_set_writers import MapWriter, TokenWriter

COUNTS = [3, 70, 1]
SAMPLE = np.random.default_rng(0).standard_normal((8, 5, 6)).astype(np.float32) * [1, 2, 4, 8, 16, 32]


def manifest_of(counts=COUNTS):
    total = sum(counts)
    return Manifest(
        dataset="lvis",
        split="train",
        image_ids=np.arange(len(counts)),
        paths=np.array([f"{row}.jpg" for row in range(len(counts))], np.dtypes.StringDType()),
        heights=np.full(len(counts), 480, np.int32),
        widths=np.full(len(counts), 640, np.int32),
        offsets=np.concatenate([[0], np.cumsum(counts)]),
        boxes_xyxy=np.zeros((total, 4), np.float32),
        category_index=np.zeros(total, np.int32),
        annotation_ids=np.arange(total),
        categories=(Category(1, "dog"),),
    )


def sets_of(dtype="int8", compression=None, statistics=None):
    statistics = statistics or (statistics_of(SAMPLE) if dtype == "int8" else None)
    return [
        FeatureSet("clip", "map", (5, 6), dtype, compression=compression, statistics=statistics),
        FeatureSet("sam", "token", (6,), dtype, compression=compression, statistics=statistics),
    ]


def fill(path, sets):
    cache = FeatureCache.create(path, manifest_of(), sets)
    rng = np.random.default_rng(1)
    cache.write_part(
        0,
        [
            ImageFeatures(row, {"clip": rng.standard_normal((5, 6)), "sam": rng.standard_normal((count, 6))})
            for row, count in enumerate(COUNTS)
        ],
    )
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in path.rglob("*") if file.is_file()}


@pytest.mark.parametrize("compression", [None, "zstd"])
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_the_same_features_give_the_same_bytes(tmp_path, dtype, compression):
    first, second = (fill(tmp_path / name, sets_of(dtype, compression)) for name in ("a", "b"))
    taking_turns = {name for name in first if name.startswith("parts/")}  # they state the seconds it took
    assert first.keys() == second.keys()
    assert {name: first[name] for name in first.keys() - taking_turns} == {
        name: second[name] for name in second.keys() - taking_turns
    }


def test_a_part_gets_its_names_data_first_then_scales_checksums_and_the_record(tmp_path, monkeypatch):
    given, real = [], os.replace
    FeatureCache.create(tmp_path / "c.zarr", manifest_of(), sets_of()[:1])
    cache = FeatureCache.open(tmp_path / "c.zarr", "a")
    monkeypatch.setattr(os, "replace", lambda old, new: given.append(str(new)) or real(old, new))
    cache.write_part(0, [ImageFeatures(row, {"clip": SAMPLE[row]}) for row in range(3)])
    folder = f"{tmp_path}/c.zarr"
    assert given == [
        f"{folder}/features/clip/feature_map/c.0.0.0",
        f"{folder}/features/clip/scale/c.0.0",
        f"{folder}/features/clip/crc32c/c.0",
        f"{folder}/parts/clip/00000.json",
    ]


@pytest.mark.parametrize("compression", [None, "zstd"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8"])
def test_memory_does_not_grow_with_the_part(tmp_path, dtype, compression):
    sample = np.random.default_rng(0).standard_normal((64, 256)).astype(np.float32)
    statistics = statistics_of(sample) if dtype == "int8" else None
    feature_set = FeatureSet("clip", "map", sample.shape, dtype, compression=compression, statistics=statistics)

    def peak(images):
        tracemalloc.start()
        writer = MapWriter(LocalStorage(tmp_path), feature_set, Geometry(images, images, 64), 0)
        for row in range(images):
            writer.append(row, 0, sample)
        writer.finish()
        bytes_at_most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return bytes_at_most

    peak(1)  # what is imported and compiled on the way
    assert peak(64) < peak(2) + 64 * 150  # two indexes of 16 bytes a record, checksums, and a few copies of them


def test_tokens_fall_into_the_same_chunks_however_the_images_divide_them(tmp_path):
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


def test_a_writer_that_cannot_make_its_second_file_leaves_none(tmp_path, monkeypatch):
    class Full(LocalStorage):
        def create(self, name):
            if "scale" in name:
                raise OSError(28, "No space left on device")
            return super().create(name)

    with pytest.raises(OSError, match="No space"):
        MapWriter(Full(tmp_path), sets_of()[0], Geometry(3, 3, 64), 0)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_cache_of_int8_without_statistics_is_not_made(tmp_path):
    without = replace(sets_of()[0], statistics=None)
    with pytest.raises(InputError, match="clip: int8 needs the statistics of its channels"):
        FeatureCache.create(tmp_path / "c.zarr", manifest_of(), [without])
    assert not list(tmp_path.iterdir())


def test_whoever_goes_on_with_a_cache_takes_its_statistics(tmp_path):
    FeatureCache.create(tmp_path / "c.zarr", manifest_of(), sets_of())
    other = Statistics(np.ones(6, np.float32), np.full(6, 2, np.float32))
    for asked in (sets_of(statistics=other), [replace(each, statistics=None) for each in sets_of()]):
        cache = open_or_create(tmp_path / "c.zarr", manifest_of(), asked)
        assert [each.statistics for each in cache.feature_sets.values()] == [statistics_of(SAMPLE)] * 2


def test_another_encoding_of_a_set_is_refused_by_what_differs(tmp_path):
    FeatureCache.create(tmp_path / "c.zarr", manifest_of(), sets_of("float16"))
    for asked, what in (
        (sets_of("int8"), "dtype is 'float16', requested 'int8'"),
        (sets_of("float16", "zstd"), "zstd"),
    ):
        with pytest.raises(ProvenanceMismatchError, match=what):
            open_or_create(tmp_path / "c.zarr", manifest_of(), asked)
