"""FeatureCache: writing, reading, damage, resuming, errors of the disk; the files as plain Zarr."""

import hashlib
import json
import os
import pickle
import random
import resource
import shutil
import subprocess
import sys
import threading
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from multiprocessing import get_context
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
import zarr
from makers import error_in_fork, fill, make_features, make_manifest

from regionspot.cache import (
    NO_CATEGORY,
    CacheError,
    Category,
    CorruptPartError,
    FeatureCache,
    FeatureSet,
    ImageFeatures,
    InputError,
    Manifest,
    NotACacheError,
    NotExtractedError,
    ProvenanceMismatchError,
    Ragged,
)
from regionspot.cache.format.header import load_header
from regionspot.cache.tools.resume import open_or_create

MAPS = FeatureSet(
    "clip", "map", (5, 8), provenance={"model": "ViT-L-14", "weights_sha256": "ab", "versions": {"a": "1"}}
)
TOKENS = FeatureSet("sam", "token", (6,), provenance={"model": "vit_b", "pixels": [1024, 1024]})
CATEGORIES = (
    Category(3, "person", "person.n.01", "f", ("man", "woman"), "a human being"),
    Category(7, "fire_hydrant", "hydrant.n.01", "r", definition=""),
    Category(90, "chaise longue (sofa) ü"),
)


COUNTS = [2, 0, 1, 5, 60, 7, 70, 0, 3, 1]


def manifest_of(counts, seed=0, **columns):
    """A manifest with distinct values in every column."""
    rng, images, regions = np.random.default_rng(seed), len(counts), sum(counts)
    return make_manifest(
        counts,
        image_ids=rng.permutation(10 * images)[:images] - 5,
        paths=[f"val2017/{row:04d} ü.jpg" for row in range(images)],
        heights=rng.integers(1, 2000, images, dtype=np.int32),
        widths=rng.integers(1, 2000, images, dtype=np.int32),
        category_index=rng.integers(NO_CATEGORY, len(CATEGORIES), regions, dtype=np.int32),
        annotation_ids=rng.integers(0, 2**40, regions),
        categories=CATEGORIES,
        source={"files": {"lvis_v1_train.json": "c0ffee"}},
        report={"boxes under 1 pixel": 3},
        **columns,
    )


def features_of(manifest, row):
    return make_features(manifest, [MAPS, TOKENS], row)


def require_equal_to_source(cache, rows, batch):
    for index, row in enumerate(rows):
        features, count = features_of(cache.manifest, row).features, cache.manifest.region_count[row]
        np.testing.assert_array_equal(batch.feature_map[index], features["clip"].astype(np.float16))
        np.testing.assert_array_equal(batch.tokens[index, :count], features["sam"].astype(np.float16))
        assert not batch.tokens[index, count:].any()


def files_under(folder: Path):
    return {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}


def snapshot(folder: Path):
    return {name: (path.read_bytes(), path.stat().st_mtime_ns) for name, path in files_under(folder).items()}


@pytest.fixture(scope="module")
def manifest():
    """Ten images, 4 per part; part 1 has more regions than one inner chunk of tokens, two images have none."""
    return manifest_of(COUNTS)


@pytest.fixture(scope="module")
def caches(tmp_path_factory, manifest):
    """Folder with an empty and a full cache to copy, which is ten times as fast as creating one."""
    folder = tmp_path_factory.mktemp("caches")
    FeatureCache.create(folder / "empty", manifest, [MAPS, TOKENS], part_size=4)
    shutil.copytree(folder / "empty", folder / "full")
    fill(FeatureCache.open(folder / "full", "a"))
    return folder


@pytest.fixture
def empty(caches, tmp_path):
    return FeatureCache.open(shutil.copytree(caches / "empty", tmp_path / "c.zarr"), "a")


@pytest.fixture
def cache(caches, tmp_path):
    return FeatureCache.open(shutil.copytree(caches / "full", tmp_path / "c.zarr"), "a")


# --- the manifest ---


def test_the_digest_of_many_images_is_that_of_all_their_columns_and_paths():
    many = make_manifest(np.ones(70_000, np.int64))
    columns = (many.image_ids, many.heights, many.widths, many.offsets, many.boxes_xyxy, many.category_index)
    expected = hashlib.sha256(b"".join(column.tobytes() for column in (*columns, many.annotation_ids)))
    expected.update("\0".join(many.paths.tolist()).encode())
    expected.update(b"[(1, 'cat')]")
    assert many.digest() == expected.hexdigest()


def test_a_stored_manifest_equals_the_original(tmp_path, manifest):
    full = replace(
        manifest,
        scores=np.random.default_rng(1).random(len(manifest.boxes_xyxy), dtype=np.float32),
        negatives=Ragged(np.array([0, 2, 2, *[3] * 8]), np.array([0, 2, 1], np.int32)),
        not_exhaustive=Ragged(np.zeros(11, np.int64), np.zeros(0, np.int32)),
    )
    for name, original in {"plain": manifest, "full": full}.items():
        FeatureCache.create(tmp_path / name, original, [MAPS], part_size=3)
        loaded = FeatureCache.open(tmp_path / name).manifest
        assert loaded.digest() == original.digest()
        for field in fields(Manifest):
            value, stored = getattr(original, field.name), getattr(loaded, field.name)
            if isinstance(value, np.ndarray):
                np.testing.assert_array_equal(stored, value, strict=True)
            elif isinstance(value, Ragged):
                np.testing.assert_array_equal(stored.offsets, value.offsets)
                np.testing.assert_array_equal(stored.values, value.values)
            else:
                assert stored == value


def test_stored_feature_sets_equal_the_originals(cache):
    assert FeatureCache.open(cache.path).feature_sets == {"clip": MAPS, "sam": TOKENS}


@pytest.mark.parametrize("counts", [[0], [3], [0, 0, 0], [64], [65, 1]])
def test_small_and_empty_splits_work(tmp_path, counts):
    cache = fill(FeatureCache.create(tmp_path / "c.zarr", manifest_of(counts), [MAPS, TOKENS]))
    rows = np.arange(len(counts))
    batch = FeatureCache.open(cache.path).read(rows)
    require_equal_to_source(cache, rows, batch)
    assert batch.tokens.shape == (len(counts), max(1, *counts, 0), 6)
    assert cache.part_size == len(counts)


def test_a_split_without_images_is_refused(tmp_path):
    with pytest.raises(InputError, match="holds no image"):
        FeatureCache.create(tmp_path / "c.zarr", manifest_of([]), [MAPS])


# --- reading ---


def test_rows_are_read_in_any_order_and_repeatedly(cache):
    rows = [9, 0, 4, 4, 6, 1, 3, 0, 2, 5, 7, 8]
    batch = FeatureCache.open(cache.path).read(rows)
    require_equal_to_source(cache, rows, batch)
    assert batch.rows.tolist() == rows
    np.testing.assert_array_equal(batch.image_ids, cache.manifest.image_ids[rows])


def test_a_batch_masks_its_padding(cache, manifest):
    batch = cache.read([1, 3])
    assert batch.region_mask.tolist() == [[False] * 5, [True] * 5]
    regions = manifest.regions(3)
    np.testing.assert_array_equal(batch.boxes_xyxy[1], manifest.boxes_xyxy[regions])
    np.testing.assert_array_equal(batch.categories[1], manifest.category_index[regions])
    np.testing.assert_array_equal(batch.annotation_ids[1], manifest.annotation_ids[regions])
    assert (batch.categories[0] == -1).all()
    assert (batch.annotation_ids[0] == -1).all()
    assert not batch.boxes_xyxy[0].any()
    assert (batch.scores == 1).all()


def test_scores_are_read_with_their_boxes(tmp_path, manifest):
    scores = np.random.default_rng(1).random(len(manifest.boxes_xyxy), dtype=np.float32)
    cache = fill(FeatureCache.create(tmp_path / "c.zarr", replace(manifest, scores=scores), [MAPS, TOKENS], 4))
    batch = cache.read([3, 0])
    np.testing.assert_array_equal(batch.scores[0], scores[manifest.regions(3)])
    np.testing.assert_array_equal(batch.scores[1, 2:], [1, 1, 1])


def test_a_reused_batch_keeps_its_memory(cache):
    batch = cache.read([6, 4, 5])
    feature_map, tokens = batch.feature_map, batch.tokens
    for rows in ([5, 0], [6, 6, 6], [1]):
        assert cache.read(rows, out=batch) is batch
        require_equal_to_source(cache, rows, batch)
        assert np.shares_memory(batch.feature_map, feature_map)
        assert np.shares_memory(batch.tokens, tokens)


def test_a_reused_batch_grows_if_needed(cache):
    batch = cache.read([0])
    cache.read([6, 4, 5], out=batch)
    require_equal_to_source(cache, [6, 4, 5], batch)


def test_reading_no_rows_gives_an_empty_batch(cache):
    assert cache.read([]).feature_map.shape == (0, 5, 8)


@pytest.mark.parametrize("rows", [[-1], [10], [0, 99], [[1, 2]], [0.5]])
def test_rows_that_do_not_exist_are_refused(cache, rows):
    with pytest.raises(InputError, match="row"):
        cache.read(rows)


def test_one_of_several_sets_of_a_kind_must_be_named(tmp_path, manifest):
    other = replace(MAPS, name="clip_336", shape=(3, 2), dtype="float32")
    cache = FeatureCache.create(tmp_path / "c.zarr", manifest, [MAPS, other], part_size=10)
    values = np.random.default_rng(0).standard_normal((10, 3, 2)).astype(np.float32)
    cache.write_part(0, [ImageFeatures(row, {"clip_336": values[row]}) for row in range(10)], ["clip_336"])
    with pytest.raises(InputError, match="clip, clip_336; name one"):
        cache.read([0])
    with pytest.raises(InputError, match="'dino' is not one of them"):
        cache.read([0], map_set="dino")
    batch = cache.read([7, 1], map_set="clip_336")
    np.testing.assert_array_equal(batch.feature_map, values[[7, 1]], strict=True)
    assert batch.tokens.shape == (2, 1 if not cache.manifest.region_count[[7, 1]].any() else 0, 0)


def test_a_row_of_a_pending_part_is_refused(empty):
    fill(empty, [1])
    with pytest.raises(NotExtractedError, match=r"\(row 9, .*\) is in part 2 of clip, which is not written yet"):
        empty.read([4, 9])
    assert empty.valid_rows().tolist() == [4, 5, 6, 7]


def test_a_part_written_after_opening_is_read(empty):
    reader = FeatureCache.open(empty.path)
    with pytest.raises(NotExtractedError):
        reader.read([0])
    fill(empty, [0])
    require_equal_to_source(empty, [0], reader.read([0]))


def test_several_threads_can_read_one_cache(cache, monkeypatch):
    # With one open file allowed, each thread closes the file of another one.
    monkeypatch.setattr("regionspot.cache.storage.shard_files.max_open_files", lambda: 1)
    reader, orders = (
        FeatureCache.open(cache.path, check="always", access="pread"),
        [np.random.default_rng(n).permutation(10) for n in range(60)],
    )
    with ThreadPoolExecutor(4) as pool:
        for rows, batch in zip(orders, pool.map(reader.read, orders), strict=True):
            require_equal_to_source(cache, rows, batch)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_worker_processes_can_read_an_open_cache(cache, method):
    cache.read([0, 4])  # so that a fork inherits open files
    with get_context(method).Pool(1) as pool:
        batches = [pool.apply(cache.read, ([9, 4],)) for _ in range(2)]
    for batch in batches:
        require_equal_to_source(cache, [9, 4], batch)


def test_a_pickled_cache_is_reopened(cache):
    reader = pickle.loads(pickle.dumps(FeatureCache.open(cache.path, check="never")))
    assert (reader.path, reader.mode, reader.check) == (cache.path, "r", "never")
    assert len(pickle.dumps(cache)) < 1000


def test_open_files_are_bounded_whatever_the_number_of_parts(tmp_path, monkeypatch):
    monkeypatch.setattr("regionspot.cache.storage.shard_files.max_open_files", lambda: 4)
    path = fill(FeatureCache.create(tmp_path / "c.zarr", manifest_of([1] * 30), [MAPS, TOKENS], part_size=1)).path
    cache = FeatureCache.open(path, access="pread")
    before = len(os.listdir("/proc/self/fd"))
    cache.read(np.arange(30))
    assert len(os.listdir("/proc/self/fd")) - before == 2 * 4


# --- as plain Zarr ---


def test_the_example_of_the_docs_reads_features_with_plain_zarr(cache, manifest):
    root = zarr.open(cache.path, mode="r")
    maps, tokens = root["features/clip/feature_map"], root["features/sam/token"]
    counts, part_size = root["images/region_count"][:], root.attrs["regionspot"]["part_size"]
    names = [category["name"] for category in root.attrs["regionspot"]["categories"]]

    row = 6
    part = row // part_size
    first = counts[part * part_size : row].sum()
    regions = slice(first, first + counts[row])
    feature_map = maps[row]
    token = tokens[part, regions]
    box, category = root["regions/box"][part, regions], root["regions/category"][part, regions]

    features = features_of(manifest, row).features
    np.testing.assert_array_equal(feature_map, features["clip"].astype(np.float16))
    np.testing.assert_array_equal(token, features["sam"].astype(np.float16))
    np.testing.assert_array_equal(box, manifest.boxes_xyxy[manifest.regions(row)])
    np.testing.assert_array_equal(category, manifest.category_index[manifest.regions(row)])
    assert root["images/path"][row] == manifest.paths[row]
    assert root["images/id"][row] == manifest.image_ids[row]
    assert names == [category.name for category in CATEGORIES]


def test_region_arrays_are_padded_with_fill_values(cache):
    root = zarr.open(cache.path, mode="r")
    assert root["features/sam/token"].shape == (3, 192, 6)
    assert (root["regions/category"][0, 8:] == -1).all()
    assert not root["features/sam/token"][0, 8:].any()
    assert not root["features/sam/token"][1, 137:].any()  # the last of three chunks, filled twice before


def test_stored_checksums_match_the_chunks(cache):
    root = zarr.open(cache.path, mode="r")
    maps, tokens = root["features/clip/feature_map"][:], root["features/sam/token"][:]
    assert root["features/clip/crc32c"][:].tolist() == [google_crc32c.value(feature_map) for feature_map in maps]
    assert root["features/sam/crc32c"][1].tolist() == [
        google_crc32c.value(np.ascontiguousarray(tokens[1, first : first + 64])) for first in (0, 64, 128)
    ]
    assert root["features/sam/crc32c"][0, 1:].tolist() == [0, 0]


# --- images that could not be read ---


def test_a_failed_image_is_recorded_and_cannot_be_read(empty):
    fill(empty, failures={4: "truncated JPEG", 7: "truncated JPEG"})
    reader = FeatureCache.open(empty.path)
    assert [(failure.row, failure.reason) for failure in reader.failures()] == [
        (4, "truncated JPEG"),
        (7, "truncated JPEG"),
    ]
    assert reader.failures()[0].path == reader.manifest.paths[4]
    assert reader.valid_rows().tolist() == [0, 1, 2, 3, 5, 6, 8, 9]
    require_equal_to_source(reader, reader.valid_rows(), reader.read(reader.valid_rows()))
    with pytest.raises(NotExtractedError, match=r"row 4, .*could not be read.*truncated JPEG.*valid_rows"):
        reader.read([4], map_set="clip")
    assert not zarr.open(empty.path, mode="r")["features/sam/token"][1, :60].any()


def test_an_image_that_failed_in_one_set_is_valid_in_the_other(empty):
    for name, failing in (("clip", 2), ("sam", 3)):
        images = [features_of(empty.manifest, row) for row in range(4)]
        images[failing] = ImageFeatures(failing, {}, "gone")
        empty.write_part(0, images, [name])
    assert empty.valid_rows(["clip"]).tolist() == [0, 1, 3]
    assert empty.valid_rows().tolist() == [0, 1]
    assert [failure.row for failure in empty.failures()] == [2, 3]


# --- writing ---


def test_a_part_is_pending_until_all_requested_sets_are_written(empty):
    fill(empty, [1])
    images = [features_of(empty.manifest, row) for row in empty.part_rows(2)]
    empty.write_part(2, images, ["sam"])
    assert empty.pending_parts() == [0, 2]
    assert empty.pending_parts(["sam"]) == [0]
    assert empty.missing_sets(2) == ["clip"]
    empty.write_part(2, images)
    assert empty.pending_parts() == [0]
    require_equal_to_source(empty, [8, 9], empty.read([8, 9]))


def test_a_part_record_describes_the_part(empty):
    record = empty.write_part(1, (features_of(empty.manifest, row) for row in range(4, 8)), worker="gpu:1")
    assert (record.part, record.first_row, record.images, record.regions) == (1, 4, 4, 137)
    assert record.files == {name: (empty.path / name).stat().st_size for name in record.files}
    assert len(record.files) == 4
    stored = json.loads((empty.path / "parts/sam/00001.json").read_bytes())
    assert (stored["worker"], stored["regions"], len(stored["files"])) == ("gpu:1", 137, 2)


def test_a_part_is_not_written_twice(cache):
    before = snapshot(cache.path)
    with pytest.raises(CacheError, match="part 1 is already written"):
        fill(cache, [1])
    assert snapshot(cache.path) == before


BAD_FEATURES = {
    "shape": ({"clip": np.zeros((5, 7))}, r"set clip, row 5: got float64 \(5, 7\), expected floating \(5, 8\)"),
    "one region too few": (
        {"sam": np.zeros((6, 6))},
        r"set sam, row 5: got float64 \(6, 6\), expected floating \(7, 6\)",
    ),
    "integers": ({"clip": np.zeros((5, 8), np.int64)}, "got int64"),
    "a NaN": ({"clip": np.full((5, 8), np.nan)}, "40 of 40 values are NaN or beyond 65504"),
    "overflow": ({"sam": np.full((7, 6), 7e4, np.float32)}, "set sam, row 5: 42 of 42 values are NaN or beyond 65504"),
}


@pytest.mark.parametrize("case", BAD_FEATURES)
def test_wrong_features_are_refused_and_leave_no_files(empty, case):
    wrong, message = BAD_FEATURES[case]
    images = [features_of(empty.manifest, row) for row in empty.part_rows(1)]
    images[1].features.update(wrong)
    require_refused(empty, images, InputError, message)


@pytest.mark.parametrize(
    ("wrong_images", "message"),
    [
        (lambda images: images[:3], "has 4 images, got only 3"),
        (lambda images: [*images, images[0]], "rows 4 to 7 in order; got row 4 after 4 images"),
        (lambda images: images[::-1], "got row 7 after 0 images"),
        (lambda images: [ImageFeatures(4, {"sam": np.zeros((60, 6))})], "row 4: no features of clip, only of"),
    ],
)
def test_images_of_another_part_are_refused_and_leave_no_files(empty, wrong_images, message):
    images = [features_of(empty.manifest, row) for row in empty.part_rows(1)]
    require_refused(empty, wrong_images(images), InputError, message)


def test_an_error_of_the_iterator_leaves_the_part_unwritten(empty):
    def images():
        yield features_of(empty.manifest, 4)
        raise OSError("the image folder went away")

    require_refused(empty, images(), OSError, "image folder went away")


def require_refused(cache, images, error, message):
    before = snapshot(cache.path)
    with pytest.raises(error, match=message):
        cache.write_part(1, images)
    assert snapshot(cache.path) == before


def test_the_largest_float16_is_stored(empty):
    images = [features_of(empty.manifest, row) for row in range(4)]
    images[0].features["clip"] = np.full((5, 8), -65504.0)
    empty.write_part(0, images)
    assert (empty.read([0]).feature_map == -65504).all()


def test_memory_does_not_grow_with_the_part_size(tmp_path):
    maps = FeatureSet("clip", "map", (64, 256))

    def peak(images):
        cache = FeatureCache.create(tmp_path / f"{images}.zarr", manifest_of([1] * images), [maps], images)
        tracemalloc.start()
        cache.write_part(0, (ImageFeatures(row, {"clip": np.ones((64, 256))}) for row in range(images)))
        bytes_used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return bytes_used

    assert peak(64) < peak(8) + 64_000  # a record is 32 KB


def test_a_cache_open_for_reading_writes_nothing(cache):
    stale = cache.path / "parts/sam" / "00002.json.elsewhere-1.partial"
    stale.write_bytes(b"")
    before = snapshot(cache.path)
    reader = FeatureCache.open(cache.path)
    reader.read(reader.valid_rows())
    reader.failures()
    with pytest.raises(CacheError, match="open for reading; open it with mode 'a'"):
        fill(reader, [0])
    assert snapshot(cache.path) == before


# --- damage ---


def flip(path, rng):
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def reopened(cache: FeatureCache) -> FeatureCache:
    """The same cache without open files and verified checksums, and without reading the manifest again."""
    header = load_header(cache.storage)
    return FeatureCache(cache.storage, header, cache.manifest, cache.mode, cache.check, cache.access)


def test_every_flipped_bit_in_a_parts_files_is_detected(cache):
    rng, everything = random.Random(0), np.arange(10)
    names = [
        name for name in files_under(cache.path) if name.startswith(("features/", "parts/")) and "zarr.json" not in name
    ]
    reader = FeatureCache.open(cache.path)
    for _ in range(300):
        path = cache.path / rng.choice(names)
        original = path.read_bytes()
        flip(path, rng)
        reader = reopened(reader)
        with pytest.raises(CorruptPartError, match=r"`regionspot cache repair` drops part \d, then the same"):
            reader.read(everything)
        path.write_bytes(original)
    reader = reopened(reader)
    require_equal_to_source(cache, everything, reader.read(everything))


def test_every_truncated_file_of_a_part_is_detected(cache):
    rng = random.Random(0)
    reader = FeatureCache.open(cache.path)
    for name, path in files_under(cache.path).items():
        if name.startswith(("features/", "parts/")) and "zarr.json" not in name:
            original = path.read_bytes()
            for length in (0, rng.randrange(1, len(original) - 1), len(original) - 2):  # a record ends with a newline
                path.write_bytes(original[:length])
                reader = reopened(reader)
                with pytest.raises(CorruptPartError):
                    reader.read(np.arange(10))
            path.unlink()
            reader = reopened(reader)
            with pytest.raises(NotExtractedError if name.startswith("parts/") else CorruptPartError):
                reader.read(np.arange(10))
            path.write_bytes(original)


def test_a_corrupt_record_is_reported_with_file_and_image_and_can_be_extracted_again(cache):
    path = cache.path / "features/clip/feature_map/c.1.0.0"
    data = bytearray(path.read_bytes())
    data[2 * MAPS.record_bytes] ^= 1
    path.write_bytes(data)
    reader = FeatureCache.open(cache.path)
    require_equal_to_source(cache, [4, 5], reader.read([4, 5]))
    expected = rf"c\.1\.0\.0: the record of image {cache.manifest.image_ids[6]} \(row 6, val2017/0006 ü.jpg\) does not"
    with pytest.raises(CorruptPartError, match=expected):
        reader.read([6])
    (cache.path / "parts/clip/00001.json").unlink()
    fill(cache)
    require_equal_to_source(cache, [6], FeatureCache.open(cache.path).read([6]))


def test_checksums_are_verified_first_always_or_never(cache):
    readers = {check: FeatureCache.open(cache.path, check=check) for check in ("first", "always", "never")}
    for reader in readers.values():
        reader.read([0])
    path = cache.path / "features/sam/token/c.0.0.0"
    with path.open("r+b") as file:
        file.write(b"\xff")
    for check in ("first", "never"):
        readers[check].read([0])
    with pytest.raises(CorruptPartError, match="does not match its checksum"):
        readers["always"].read([0])


def test_a_record_of_another_part_is_detected(cache):
    (cache.path / "parts/clip/00000.json").write_bytes((cache.path / "parts/clip/00001.json").read_bytes())
    with pytest.raises(CorruptPartError, match="part: found 1, expected 0"):
        FeatureCache.open(cache.path).read([0])


def test_a_flipped_bit_in_the_manifest_is_detected_on_opening(cache):
    rng = random.Random(0)
    names = [
        name for name in files_under(cache.path) if name.startswith(("images/", "regions/")) and "zarr.json" not in name
    ]
    for name in names:
        original = (cache.path / name).read_bytes()
        flip(cache.path / name, rng)
        with pytest.raises(NotACacheError, match="is not what was written when the cache was created"):
            FeatureCache.open(cache.path)
        (cache.path / name).unlink()
        with pytest.raises(NotACacheError, match="is missing"):
            FeatureCache.open(cache.path)
        (cache.path / name).write_bytes(original)


def test_a_flipped_bit_in_the_metadata_is_detected_or_harmless(cache):
    rng, path, detected = random.Random(0), cache.path / "zarr.json", 0
    original = path.read_bytes()
    for _ in range(60):
        flip(path, rng)
        try:
            opened = FeatureCache.open(cache.path)
        except CacheError:
            detected += 1
        else:  # white space or an unused field
            assert opened.feature_sets == cache.feature_sets
            assert opened.manifest.digest() == cache.manifest.digest()
        path.write_bytes(original)
    assert detected > 40


# --- creating and opening ---


def test_attributes_of_the_user_are_kept(cache):
    zarr.open(cache.path, mode="a").attrs["note"] = "mine"
    extended = open_or_create(cache.path, cache.manifest, [replace(MAPS, name="other")])
    assert zarr.open(extended.path, mode="r").attrs["note"] == "mine"
    require_equal_to_source(cache, [4], extended.read([4], map_set="clip"))


def test_a_cache_is_not_created_over_an_existing_path(tmp_path, manifest):
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "folder", tmp_path / "folder/file"):
        with pytest.raises(CacheError, match="exists already"):
            FeatureCache.create(path, manifest, [MAPS])
        (tmp_path / "folder/file").write_text("hello")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_invalid_options_are_refused(tmp_path, cache, manifest):
    with pytest.raises(InputError, match=r"expected r\|a"):
        FeatureCache.open(cache.path, mode="w")
    with pytest.raises(InputError, match="there is no feature set 'dino'; it has clip, sam"):
        cache.pending_parts(["dino"])
    with pytest.raises(InputError, match="there is no part 3: this cache has parts 0 to 2"):
        cache.part_rows(3)
    with pytest.raises(InputError, match="part_size is 0"):
        FeatureCache.create(tmp_path / "new", manifest, [MAPS], part_size=0)
    with pytest.raises(InputError, match="clip is given twice"):
        FeatureCache.create(tmp_path / "new", manifest, [MAPS, MAPS])
    with pytest.raises(InputError, match=r"'\.\./x': a name is"):
        FeatureSet("../x", "map", (1, 1))
    with pytest.raises(InputError, match="provenance cannot be stored as JSON"):
        FeatureSet("x", "map", (1, 1), provenance={"model": object()})


# --- resuming ---


def test_the_same_run_again_opens_the_cache_and_changes_nothing(cache, manifest):
    before = snapshot(cache.path)
    resumed = open_or_create(cache.path, manifest, [TOKENS, MAPS], part_size=9)
    assert resumed.pending_parts() == []
    assert resumed.part_size == 4
    assert snapshot(cache.path) == before


def test_open_or_create_creates_a_missing_cache(tmp_path, manifest):
    cache = open_or_create(tmp_path / "deep/er/c.zarr", manifest, [MAPS, TOKENS], part_size=4)
    assert fill(cache).pending_parts() == []


def test_adding_a_feature_set_changes_only_the_header(cache, manifest):
    before = snapshot(cache.path)
    dino = FeatureSet("dino", "map", (2, 3))
    grown = open_or_create(cache.path, manifest, [MAPS, dino])
    assert grown.pending_parts(["clip"]) == []
    assert grown.pending_parts() == [0, 1, 2]
    for part in grown.pending_parts():
        grown.write_part(
            part, [ImageFeatures(row, {"dino": np.full((2, 3), row) * 1.0}) for row in grown.part_rows(part)]
        )
    after = snapshot(cache.path)
    assert {name for name in before if after[name] != before[name]} == {"zarr.json"}
    reader = FeatureCache.open(cache.path)
    assert list(reader.feature_sets) == ["clip", "sam", "dino"]
    assert (reader.read([9], map_set="dino").feature_map == 9).all()
    require_equal_to_source(cache, [6], reader.read([6], map_set="clip"))


MISMATCHES = {
    "weights": (
        replace(MAPS, provenance={**MAPS.provenance, "weights_sha256": "cd"}),
        "clip .*weights_sha256 is 'ab', requested 'cd'",
    ),
    "an additional field": (
        replace(MAPS, provenance={**MAPS.provenance, "exif": "auto"}),
        "provenance.exif is None, requested 'auto'",
    ),
    "shape": (replace(MAPS, shape=(5, 16)), r"shape is \(5, 8\), requested \(5, 16\)"),
    "dtype": (replace(MAPS, dtype="float32"), "dtype is 'float16', requested 'float32'"),
}


@pytest.mark.parametrize("case", MISMATCHES)
def test_features_of_another_backbone_are_refused_with_the_difference(cache, manifest, case):
    requested, message = MISMATCHES[case]
    with pytest.raises(ProvenanceMismatchError, match=message):
        open_or_create(cache.path, manifest, [requested, FeatureSet("new", "map", (1, 1))])
    assert list(FeatureCache.open(cache.path).feature_sets) == ["clip", "sam"]


def test_other_software_versions_only_give_a_warning(cache, manifest, caplog):
    requested = replace(MAPS, provenance={**MAPS.provenance, "versions": {"a": "2"}})
    open_or_create(cache.path, manifest, [requested])
    assert "provenance.versions.a is '1', requested '2'" in caplog.text


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (manifest_of([2, 0, 1]), "images 10, not 3, regions 149, not 3"),
        (manifest_of(COUNTS, seed=1), "other boxes, sizes, paths, ids or class names"),
        (manifest_of([*COUNTS[:-1], 2], split="val"), "split 'train', not 'val', regions 149, not 150"),
    ],
)
def test_other_annotations_are_refused_with_the_difference(cache, other, message):
    with pytest.raises(ProvenanceMismatchError, match=message):
        open_or_create(cache.path, other, [MAPS])


# --- errors of the disk ---


def in_child(tmp_path, function):
    """The error of `function` in a forked process, which may change its user and its limits; "" if none."""

    def run():
        os.chdir(tmp_path)  # another user may not be allowed to enter the parent folders
        function()

    error = error_in_fork(run)
    return f"{type(error).__name__}: {error}" if error else ""


def as_nobody():
    if os.geteuid() == 0:
        os.setuid(65534)


def test_a_folder_without_write_permission_is_refused(tmp_path, cache, manifest):
    for folder in (tmp_path, cache.path):
        folder.chmod(0o555)

    def create():
        as_nobody()
        FeatureCache.create("new.zarr", manifest, [MAPS])

    def extend():
        as_nobody()
        FeatureCache.open("c.zarr", "a")

    errors = in_child(tmp_path, create), in_child(tmp_path, extend)
    for folder in (tmp_path, cache.path):
        folder.chmod(0o755)
    assert errors[0] == (
        "CacheError: new.zarr: cannot be created: Permission denied; give a writable folder with free space"
    )
    assert errors[1] == "CacheError: c.zarr: no permission to write; change it, or open the cache for reading"
    assert [path.name for path in tmp_path.iterdir()] == ["c.zarr"]


def test_a_read_only_cache_can_be_read(tmp_path, cache):
    folders = [tmp_path, cache.path, *(path for path in cache.path.rglob("*") if path.is_dir())]
    for folder in folders:
        folder.chmod(0o555)

    def read():
        as_nobody()
        require_equal_to_source(cache, [4, 9], FeatureCache.open("c.zarr").read([4, 9]))

    error = in_child(tmp_path, read)
    for folder in folders:
        folder.chmod(0o755)
    assert error == ""


def test_a_cache_without_read_permission_is_refused(tmp_path, cache):
    tmp_path.chmod(0o700)

    def read():
        if os.geteuid() != 0:
            Path().chmod(0)
        as_nobody()
        FeatureCache.open("c.zarr")

    error = in_child(tmp_path, read)
    tmp_path.chmod(0o700)
    assert error == "NotACacheError: c.zarr/zarr.json: cannot be read: Permission denied; fix its permissions"


@pytest.mark.parametrize("limit", [0, 400])
def test_a_full_disk_loses_only_the_part_being_written(tmp_path, empty, limit):
    fill(empty, [0])
    before = snapshot(empty.path)

    def write():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        fill(empty, [1])

    error = in_child(tmp_path, write)
    assert error.startswith(f"CacheError: {empty.path}: part 1 could not be written: File too large; finished parts")
    assert {name: value for name, value in snapshot(empty.path).items() if "part" in name} == {
        name: value for name, value in before.items() if "part" in name
    }
    require_equal_to_source(empty, [0, 3], FeatureCache.open(empty.path).read([0, 3]))
    fill(empty)
    require_equal_to_source(empty, range(10), empty.read(range(10)))


def test_a_cache_that_does_not_fit_on_the_disk_leaves_no_files(tmp_path, manifest):
    def create():
        resource.setrlimit(resource.RLIMIT_FSIZE, (700, resource.RLIM_INFINITY))
        FeatureCache.create(tmp_path / "c.zarr", manifest, [MAPS])

    assert in_child(tmp_path, create).startswith(f"CacheError: {tmp_path}/c.zarr: cannot be created: File too large")
    assert not list(tmp_path.iterdir())


# --- imports, threads, checksums ---


def test_importing_the_cache_imports_neither_torch_nor_zarr():
    code = "import sys, regionspot.cache; print(sorted({'torch', 'zarr', 'PIL', 'h5py'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_reading_starts_no_threads(cache):
    before = threading.active_count()
    cache.read([0, 1])
    assert threading.active_count() == before


def test_different_files_have_different_checksums(cache):
    # Each file ends with its own crc32c; a crc32c over the whole file would be the same for all.
    chunks = {name: crc for name, crc in load_header(cache.storage).files.items() if not name.endswith(".json")}
    assert len(set(chunks.values())) == len({(cache.path / name).read_bytes() for name in chunks}) > 3
    records = [json.loads(path.read_bytes())["checksums"] for path in (cache.path / "parts").glob("*/*.json")]
    assert len({crc for record in records for crc in record.values()}) == len(records) == 6


def test_an_existing_cache_keeps_its_part_size_and_warns_if_another_one_is_requested(cache, manifest, caplog):
    size = cache.part_size
    for requested, warnings in ((512, 0), (size, 0), (len(manifest) + 5, 1), (size + 1, 1)):
        caplog.clear()
        with caplog.at_level("WARNING"):
            assert open_or_create(cache.path, manifest, [MAPS, TOKENS], requested).part_size == size
        assert (
            caplog.text.count(f"keeps its part size of {size} images; a part size of {requested} applies") == warnings
        )
