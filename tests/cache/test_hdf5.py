"""A cache in one HDF5 file reads like the folder, imports byte-identically, and is complete or absent."""

import os
import pickle
import random
import shutil
import signal
import tracemalloc
from multiprocessing import get_context
from pathlib import Path

import h5py
import numpy as np
import pytest
from makers import files_under, fork, make_manifest, was_killed

from regionspot.cache import (
    NO_CATEGORY,
    CacheError,
    Category,
    CorruptPartError,
    FeatureCache,
    FeatureSet,
    ImageFeatures,
    InputError,
    NotACacheError,
    NotExtractedError,
    Ragged,
)
from regionspot.cache.format.encodings import statistics_of
from regionspot.cache.format.schema import shard_file
from regionspot.cache.tools.hdf5_export import export_hdf5, import_hdf5
from regionspot.cache.tools.info import describe_cache
from regionspot.cache.tools.verify import verify

COUNTS = [2, 0, 3, 1, 130, 2, 1, 0, 5]
SHAPE = (5, 8)


MANIFEST = make_manifest(
    COUNTS,
    dataset="lvis",
    split="val",
    image_ids=np.arange(len(COUNTS)) * 7 - 3,
    paths=[f"val/{row} ü.jpg" for row in range(len(COUNTS))],
    category_index=np.random.default_rng(0).integers(NO_CATEGORY, 2, sum(COUNTS), dtype=np.int32),
    categories=(Category(1, "cup"), Category(2, "bowl ü")),
    negatives=Ragged(np.arange(len(COUNTS) + 1), np.zeros(len(COUNTS), np.int32)),
)


def maps_of(row: int) -> np.ndarray:
    return np.random.default_rng([0, row]).standard_normal(SHAPE).astype(np.float32)


def tokens_of(row: int, count: int) -> np.ndarray:
    return np.random.default_rng([1, row]).standard_normal((count, 6)).astype(np.float32)


STATISTICS = statistics_of(np.stack([maps_of(row) for row in range(9)]))
SETS = [
    FeatureSet("clip", "map", SHAPE, provenance={"model": "ViT-L-14", "weights_sha256": "ab"}),
    FeatureSet("small", "map", SHAPE, "int8", compression="zstd", statistics=STATISTICS),
    FeatureSet("brain", "map", SHAPE, "bfloat16"),
    FeatureSet("sam", "token", (6,)),
    FeatureSet("sam8", "token", (6,), "int8", statistics=statistics_of(tokens_of(0, 50)[:, None])),
]


@pytest.fixture(scope="module")
def caches(tmp_path_factory) -> Path:
    """`a.zarr`: nine images, one failed, in three parts; the last part of two sets is pending. `a.h5`: its export."""
    folder = tmp_path_factory.mktemp("hdf5")
    cache = FeatureCache.create(folder / "a.zarr", MANIFEST, SETS, part_size=4)
    for part in range(3):
        images = [
            ImageFeatures(row, {}, "is empty")
            if row == 2
            else ImageFeatures(
                row, {one.name: maps_of(row) if one.kind == "map" else tokens_of(row, COUNTS[row]) for one in SETS}
            )
            for row in cache.part_rows(part)
        ]
        cache.write_part(part, images, [one.name for one in SETS][: 3 if part == 2 else None], worker="here")
    export_hdf5(cache, folder / "a.h5")
    return folder


@pytest.fixture
def zarr(caches) -> FeatureCache:
    return FeatureCache.open(caches / "a.zarr")


@pytest.fixture
def h5(caches) -> FeatureCache:
    return FeatureCache.open(caches / "a.h5")


def require_same(one, other, rows, **sets):
    ours, theirs = one.read(rows, **sets), other.read(rows, **sets)
    for field in ("feature_map", "map_scale", "tokens", "token_scale", "boxes_xyxy", "categories", "image_ids"):
        np.testing.assert_array_equal(getattr(ours, field), getattr(theirs, field))


@pytest.mark.parametrize("map_set", ["clip", "small", "brain"])
@pytest.mark.parametrize("token_set", ["sam", "sam8"])
def test_it_reads_like_the_folder(zarr, h5, map_set, token_set):
    rows = zarr.valid_rows([map_set, token_set])
    assert len(rows) == 7
    require_same(h5, zarr, rows[::-1], map_set=map_set, token_set=token_set)


def test_it_has_the_manifest_and_provenance(zarr, h5):
    assert h5.manifest.digest() == zarr.manifest.digest()
    assert h5.feature_sets == zarr.feature_sets
    assert h5.failures() == zarr.failures()
    assert h5.record(1, "clip") == zarr.record(1, "clip")
    ours, theirs = describe_cache(h5).as_json(), describe_cache(zarr).as_json()
    assert {**ours, "path": ""} == {**theirs, "path": ""}


def test_failed_and_pending_images_keep_their_state(h5):
    with pytest.raises(NotExtractedError, match="is empty"):
        h5.read([2], map_set="clip", token_set="sam")
    assert h5.pending_parts(["sam"]) == [2]
    with pytest.raises(NotExtractedError, match="not written yet"):
        h5.read([8], map_set="clip", token_set="sam")


def test_import_restores_the_folder_byte_for_byte(caches, tmp_path):
    import_hdf5(caches / "a.h5", tmp_path / "b.zarr")
    assert files_under(tmp_path / "b.zarr") == files_under(caches / "a.zarr")
    assert not list(tmp_path.glob("*.partial"))


def test_it_presents_every_file_of_the_folder(caches, h5):
    for name, data in files_under(caches / "a.zarr").items():
        assert h5.storage.read(name) == data
        middle = bytearray(len(data) // 2)
        h5.storage.read_into(name, len(data) // 4, memoryview(middle))
        assert middle == data[len(data) // 4 :][: len(middle)]
        with pytest.raises(EOFError):
            h5.storage.read_into(name, 1, memoryview(bytearray(len(data))))


def test_loader_dask_and_verify_work_on_it(zarr, h5):
    batches = [
        [batch.feature_map.copy() for batch in cache.loader(2, map_set="clip", token_set="sam")] for cache in (zarr, h5)
    ]
    for ours, theirs in zip(*batches, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(h5.dask("small").compute(), zarr.dask("small").compute())
    assert not verify(h5).problems


def test_any_hdf5_tool_reads_features_manifest_and_provenance(caches, zarr):
    with h5py.File(caches / "a.h5") as file:
        np.testing.assert_array_equal(file["features/clip/feature_map"][5], maps_of(5).astype(np.float16))
        np.testing.assert_array_equal(file["features/sam/token"][1, :130], tokens_of(4, 130).astype(np.float16))
        assert file["features/clip/feature_map"].chunks == (1, *SHAPE)
        assert file["images/path"][3].decode() == "val/3 ü.jpg"
        np.testing.assert_array_equal(file["regions/box"][0, :6], zarr.manifest.boxes_xyxy[:6])
        assert "ViT-L-14" in file["provenance"][()].decode()
        assert file["features/small/scale"].shape == (9, 5)
        assert file["features/small/feature_map"].attrs["regionspot_dtype"] == "int8"


def test_records_are_adjacent(caches):
    cache = FeatureCache.open(caches / "a.h5")
    cache.read([0, 3], map_set="clip", token_set="sam")
    shard = cache.storage._shards("features/clip/feature_map/c.0.0.0")
    assert len(shard.offsets) == 1


def test_other_processes_and_forks_read_it(h5, zarr):
    h5.read([0], map_set="clip", token_set="sam")
    with get_context("fork").Pool(2) as pool:
        read = pool.starmap(first_numbers, [(h5, row) for row in (0, 1, 3, 4)])
    assert read == [float(np.float16(maps_of(row)[0, 0])) for row in (0, 1, 3, 4)]
    require_same(pickle.loads(pickle.dumps(h5)), zarr, [5], map_set="clip", token_set="sam")


def first_numbers(cache: FeatureCache, row: int) -> float:
    return float(cache.read([row], map_set="clip", token_set="sam").feature_map[0, 0, 0])


def test_it_is_read_only(caches, tmp_path):
    before = (caches / "a.h5").read_bytes()
    with pytest.raises(CacheError, match="is read-only; convert it to a folder with `regionspot cache import`"):
        FeatureCache.open(caches / "a.h5", "a")
    with pytest.raises(CacheError, match="regionspot cache import"):
        FeatureCache.create(tmp_path / "new.h5", make_manifest([1]), SETS)
    assert (caches / "a.h5").read_bytes() == before
    assert not (tmp_path / "new.h5").exists()


@pytest.mark.parametrize("share", [0, 0.001, 0.3, 0.9, 0.9999])
def test_a_truncated_file_is_reported_in_one_line(caches, tmp_path, share):
    data = (caches / "a.h5").read_bytes()
    (tmp_path / "cut.h5").write_bytes(data[: int(share * len(data))])
    with pytest.raises(NotACacheError, match=r"cut\.h5: is (truncated|not an HDF5 file|damaged)") as error:
        FeatureCache.open(tmp_path / "cut.h5")
    assert "\n" not in str(error.value)


def test_another_hdf5_file_and_a_missing_one_have_different_errors(tmp_path):
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["features"] = np.zeros(3)
    with pytest.raises(NotACacheError, match="is not a cache"):
        FeatureCache.open(tmp_path / "other.h5")
    with pytest.raises(NotACacheError, match="no such cache"):
        FeatureCache.open(tmp_path / "none.h5")
    (tmp_path / "text.h5").write_text("no")
    with pytest.raises(NotACacheError, match="is not an HDF5 file"):
        FeatureCache.open(tmp_path / "text.h5")


def test_another_format_version_is_refused(caches, tmp_path):
    shutil.copy(caches / "a.h5", tmp_path / "b.h5")
    with h5py.File(tmp_path / "b.h5", "a") as file:
        file.attrs["regionspot_hdf5"] = 2
    with pytest.raises(NotACacheError, match="has format version 2, not 1"):
        FeatureCache.open(tmp_path / "b.h5")


def manifest_for_others(path: Path) -> list:
    with h5py.File(path) as file:
        return [file[name][:].tolist() for name in ("images/id", "images/path", "regions/box", "regions/category")]


def test_a_flipped_bit_is_found_or_harmless(caches, zarr, tmp_path):
    """HDF5 files have unused bytes; all others are covered by our or HDF5's checksums."""
    data = bytearray((caches / "a.h5").read_bytes())
    path, rng, detected = tmp_path / "flipped.h5", random.Random(1), 0
    whole, rows = manifest_for_others(caches / "a.h5"), zarr.valid_rows(["clip", "sam"])
    for _ in range(16):  # make stress: 1,000
        at, bit = rng.randrange(len(data)), 1 << rng.randrange(8)
        data[at] ^= bit
        path.write_bytes(data)
        data[at] ^= bit
        try:
            cache = FeatureCache.open(path)
            harmed = bool(verify(cache).problems) or manifest_for_others(path) != whole
        except (CacheError, OSError):
            detected += 1
            continue
        if harmed:
            detected += 1
            assert verify(cache).problems, f"byte {at} of {len(data)} told nobody"
        else:
            require_same(cache, zarr, rows, map_set="clip", token_set="sam")
    assert detected > 5


def test_the_error_of_a_damaged_file_says_copy_it_again_not_repair(caches, tmp_path):
    whole = export_hdf5(FeatureCache.open(caches / "a.zarr"), tmp_path / "whole.h5")
    right, data = FeatureCache.open(whole), whole.read_bytes()
    stored = right.storage.read(shard_file(right.feature_sets["clip"], 1))[:64]
    assert data.count(stored) == 1
    damaged = bytearray(data)
    damaged[data.index(stored)] ^= 4
    (tmp_path / "damaged.h5").write_bytes(damaged)
    with pytest.raises(CorruptPartError, match="its checksum; copy the file again, or export the cache again"):
        FeatureCache.open(tmp_path / "damaged.h5").read(right.part_rows(1), map_set="clip", token_set="sam")
    (problem,) = verify(tmp_path / "damaged.h5").problems
    assert (problem.part, problem.fix) == (1, "restore")


def test_a_damaged_part_is_not_exported(caches, tmp_path):
    copy = shutil.copytree(caches / "a.zarr", tmp_path / "a.zarr")
    shard = bytearray((copy / "features/clip/feature_map/c.1.0.0").read_bytes())
    shard[20] ^= 1
    (copy / "features/clip/feature_map/c.1.0.0").write_bytes(shard)
    with pytest.raises(CorruptPartError, match="does not match its checksum"):
        export_hdf5(FeatureCache.open(copy), tmp_path / "b.h5")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.zarr"]


def test_a_damaged_record_is_not_imported(caches, tmp_path):
    data = bytearray((caches / "a.h5").read_bytes())
    place = data.index(maps_of(5).astype("<f2").tobytes())
    data[place + 3] ^= 4
    (tmp_path / "b.h5").write_bytes(data)
    with pytest.raises(CorruptPartError, match="does not match its checksum"):
        import_hdf5(tmp_path / "b.h5", tmp_path / "b.zarr")
    with pytest.raises(CorruptPartError, match="does not match its checksum"):
        FeatureCache.open(tmp_path / "b.h5").read([5], map_set="clip", token_set="sam")
    assert [path.name for path in tmp_path.iterdir()] == ["b.h5"]


def test_existing_files_are_not_replaced(caches, zarr, tmp_path):
    (tmp_path / "b.h5").write_text("mine")
    (tmp_path / "b.zarr").mkdir()
    with pytest.raises(CacheError, match="exists already"):
        export_hdf5(zarr, tmp_path / "b.h5")
    with pytest.raises(CacheError, match="exists already"):
        import_hdf5(caches / "a.h5", tmp_path / "b.zarr")
    with pytest.raises(InputError, match=r"ends in \.h5"):
        export_hdf5(zarr, tmp_path / "b.hdf")


def export_until_killed(source, out, parts):
    from regionspot.cache.tools import hdf5_export as hdf5

    write, done = hdf5._write_records, []

    def write_or_die(arrays, place):
        if len(done) == parts:
            os.kill(os.getpid(), signal.SIGKILL)
        done.append(place)
        return write(arrays, place)

    hdf5._write_records = write_or_die  # in the child process
    export_hdf5(FeatureCache.open(source), out)


@pytest.mark.parametrize("parts", [0, 5])
def test_a_killed_export_leaves_no_file_and_the_next_one_cleans_up(caches, tmp_path, parts):
    assert was_killed(fork(lambda: export_until_killed(caches / "a.zarr", tmp_path / "b.h5", parts)))
    assert not (tmp_path / "b.h5").exists()
    assert len(list(tmp_path.glob("b.h5.*.partial"))) == 1
    export_hdf5(FeatureCache.open(caches / "a.zarr"), tmp_path / "b.h5")
    assert [path.name for path in tmp_path.iterdir()] == ["b.h5"]
    assert (tmp_path / "b.h5").stat().st_size == (caches / "a.h5").stat().st_size


def test_memory_does_not_grow_with_the_part(tmp_path):
    maps = FeatureSet("clip", "map", (64, 1024))
    cache = FeatureCache.create(tmp_path / "a.zarr", make_manifest([0] * 500), [maps], part_size=500)
    record = np.zeros(maps.shape, np.float16)
    cache.write_part(0, (ImageFeatures(row, {"clip": record}) for row in range(500)))
    export_hdf5(cache, tmp_path / "warm.h5")
    tracemalloc.start()
    export_hdf5(cache, tmp_path / "a.h5")
    import_hdf5(tmp_path / "a.h5", tmp_path / "b.zarr")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 30e6 < (tmp_path / "a.h5").stat().st_size / 2
