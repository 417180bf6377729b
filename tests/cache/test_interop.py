"""Our files are standard Zarr: zarr-python, zarrs and tensorstore read the same values."""

import json
import subprocess
import sys

import google_crc32c
import numpy as np
import pytest
import zarr
from makers import make_manifest

from regionspot.cache import FeatureCache, FeatureSet, ImageFeatures
from regionspot.cache.format.encodings import decode, encode, statistics_of
from regionspot.cache.format.schema import TOKEN_CHUNK, shard_file
from regionspot.cache.storage.zarr_shard import index_bytes, parse_index

COUNTS = [2, 0, 1, 5, 60, 7, 70, 0, 3, 1]  # regions of ten images; part 1 needs three inner chunks of tokens
PART_SIZE, FAILED = 4, 5
MAP_SHAPE, TOKEN_DIM = (5, 8), 6
DTYPES = ("float16", "float32", "bfloat16", "int8")
CASES = [(kind, dtype, zstd) for kind in ("map", "token") for dtype in DTYPES for zstd in (None, "zstd")]
READERS = ("zarr-python", "zarrs", "tensorstore")

# In its own process: tensorstore's threads abort a process that forks afterwards.
TENSORSTORE = """
import json, sys
import numpy as np, tensorstore

folder, out = sys.argv[1:]
def read(name):
    kvstore = {"driver": "file", "path": f"{folder}/{name}/"}
    return tensorstore.open({"driver": "zarr3", "kvstore": kvstore}, read=True).result().read().result()
np.savez(out, **{name: read(name) for name in json.load(sys.stdin)})
"""


def name_of(kind, dtype, zstd):
    return f"{kind}_{dtype}" + ("_zstd" if zstd else "")


def features_of(row):
    """An image's map and tokens; some channels have a hundred times the deviation of others."""
    rng, deviation = np.random.default_rng(row), 10.0 ** np.linspace(-1, 1, 8)
    return {
        "map": (rng.standard_normal(MAP_SHAPE) * deviation + 3).astype(np.float32),
        "token": (rng.standard_normal((COUNTS[row], TOKEN_DIM)) * deviation[:TOKEN_DIM]).astype(np.float32),
    }


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """The same maps and tokens in every encoding; one image failed."""
    statistics = {kind: statistics_of(features_of(row)[kind] for row in range(4)) for kind in ("map", "token")}
    shapes = {"map": MAP_SHAPE, "token": (TOKEN_DIM,)}
    sets = [
        FeatureSet(
            name_of(kind, dtype, zstd),
            kind,
            shapes[kind],
            dtype,
            compression=zstd,
            statistics=statistics[kind] if dtype == "int8" else None,
        )
        for kind, dtype, zstd in CASES
    ]
    cache = FeatureCache.create(tmp_path_factory.mktemp("interop") / "c.zarr", make_manifest(COUNTS), sets, PART_SIZE)
    for part in range(cache.n_parts):
        cache.write_part(part, [image(row, sets) for row in cache.part_rows(part)])
    return cache


def image(row, sets):
    if row == FAILED:
        return ImageFeatures(row, {}, "truncated JPEG")
    features = features_of(row)
    return ImageFeatures(row, {feature_set.name: features[feature_set.kind] for feature_set in sets})


@pytest.fixture(scope="module")
def read_by(cache, tmp_path_factory):
    """`read_by(reader, array name)`: the whole array, read by another library."""
    names = [name for feature_set in cache.feature_sets.values() for name in arrays_of(feature_set)]
    out = tmp_path_factory.mktemp("tensorstore") / "arrays.npz"
    command = [sys.executable, "-c", TENSORSTORE, str(cache.path), str(out)]
    subprocess.run(command, input=json.dumps(names), text=True, check=True)
    by_tensorstore = np.load(out)

    def read(reader, name):
        if reader == "tensorstore":
            return by_tensorstore[name]
        pipeline = {"zarrs": "zarrs.ZarrsCodecPipeline"}.get(reader, zarr.config.defaults[0]["codec_pipeline"]["path"])
        with zarr.config.set({"codec_pipeline.path": pipeline}):
            array = zarr.open_array(cache.path / name, mode="r")
            assert type(array.async_array.codec_pipeline).__name__ == pipeline.rpartition(".")[2]
            return array[:]

    return read


def arrays_of(feature_set):
    scales = [feature_set.scales] if feature_set.has_scales else []
    return [feature_set.array, feature_set.checksums, *scales]


def expected_of(cache, feature_set):
    """The expected values and scales of the arrays, computed without our writers."""
    if feature_set.kind == "map":
        values = np.zeros((len(COUNTS), *MAP_SHAPE), feature_set.stored)
        scales = np.zeros(values.shape[:-1], np.float16)
    else:
        capacity = max(1, -(-max(sum(COUNTS[row] for row in cache.part_rows(p)) for p in range(3)) // 64)) * 64
        values = np.zeros((cache.n_parts, capacity, TOKEN_DIM), feature_set.stored)
        scales = np.zeros(values.shape[:-1], np.float16)
    for row, count in enumerate(COUNTS):
        first = sum(COUNTS[row // PART_SIZE * PART_SIZE : row])
        index = row if feature_set.kind == "map" else (row // PART_SIZE, slice(first, first + count))
        if row != FAILED:
            values[index], row_scales = encode(features_of(row)[feature_set.kind], feature_set)
            scales[index] = 0 if row_scales is None else row_scales
    return values, scales


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(("kind", "dtype", "zstd"), CASES)
def test_another_library_reads_the_same_values(cache, read_by, reader, kind, dtype, zstd):
    feature_set = cache.feature_sets[name_of(kind, dtype, zstd)]
    values, scales = expected_of(cache, feature_set)
    np.testing.assert_array_equal(read_by(reader, feature_set.array), values, strict=True)
    if dtype == "int8":
        np.testing.assert_array_equal(read_by(reader, feature_set.scales), scales, strict=True)


@pytest.mark.parametrize("check", ["always", "never"])
@pytest.mark.parametrize("zstd", [None, "zstd"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_our_reader_reads_the_same_values_and_scales(cache, dtype, zstd, check):
    maps, tokens = (cache.feature_sets[name_of(kind, dtype, zstd)] for kind in ("map", "token"))
    rows = [6, 0, 9, 4, 3, 7]
    batch = FeatureCache.open(cache.path, check=check).read(rows, map_set=maps.name, token_set=tokens.name)
    values, scales = expected_of(cache, maps)
    np.testing.assert_array_equal(batch.feature_map, values[rows], strict=True)
    np.testing.assert_array_equal(batch.map_scale, scales[rows] if dtype == "int8" else np.zeros((len(rows), 0)))
    values, scales = expected_of(cache, tokens)
    for index, row in enumerate(rows):
        first, count = sum(COUNTS[row // PART_SIZE * PART_SIZE : row]), COUNTS[row]
        region = (row // PART_SIZE, slice(first, first + count))
        np.testing.assert_array_equal(batch.tokens[index, :count], values[region], strict=True)
        if dtype == "int8":
            np.testing.assert_array_equal(batch.token_scale[index, :count], scales[region], strict=True)


@pytest.mark.parametrize(("kind", "dtype", "zstd"), CASES)
def test_the_attributes_are_enough_to_decode_the_features(cache, kind, dtype, zstd):
    root = zarr.open_group(cache.path, mode="r")
    name = name_of(kind, dtype, zstd)
    (entry,) = [entry for entry in root.attrs["regionspot"]["feature_sets"] if entry["name"] == name]
    array = root[f"features/{name}/{'feature_map' if kind == 'map' else 'token'}"]
    row = 3
    index = row if kind == "map" else (0, slice(3, 8))
    values = array[index]
    if array.attrs.get("regionspot_dtype") == "bfloat16":
        values = (values.astype(np.uint32) << 16).view(np.float32)
    if array.attrs.get("regionspot_dtype") == "int8":
        mean, deviation = (np.array(entry["statistics"][key], np.float32) for key in ("mean", "deviation"))
        values = values * root[f"features/{name}/scale"][index][..., None] * deviation + mean
    largest = np.abs(features_of(row)[kind]).max(axis=0)
    assert (np.abs(values - features_of(row)[kind]) <= 0.02 * largest).all()


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(("kind", "dtype", "zstd"), CASES)
def test_a_checksum_covers_the_stored_bytes_and_their_scales(cache, read_by, reader, kind, dtype, zstd):
    feature_set = cache.feature_sets[name_of(kind, dtype, zstd)]
    _, scales = expected_of(cache, feature_set)
    slots = PART_SIZE if kind == "map" else scales.shape[1] // TOKEN_CHUNK
    checksums, count = read_by(reader, feature_set.checksums).reshape(-1), 0
    for part in range(cache.n_parts):
        shard = (cache.path / shard_file(feature_set, part)).read_bytes()
        data_bytes = len(shard) - index_bytes(slots)
        record_bytes = None if zstd else feature_set.record_bytes
        offsets, sizes = parse_index(shard[data_bytes:], data_bytes, record_bytes)
        for slot in np.flatnonzero(offsets >= 0):
            data = shard[offsets[slot] : offsets[slot] + sizes[slot]]
            if dtype == "int8":
                data += scales.reshape(-1, *feature_set.scale_shape)[part * slots + slot].tobytes()
            assert google_crc32c.value(data) == checksums[part * slots + slot]
            count += 1
    assert count == (9 if kind == "map" else 1 + 3 + 1)


def test_a_failed_image_takes_no_bytes(cache):
    maps = cache.feature_sets["map_int8"]
    sizes = [(cache.path / shard_file(maps, part)).stat().st_size for part in range(cache.n_parts)]
    assert sizes == [count * maps.record_bytes + index_bytes(PART_SIZE) for count in (4, 3, 2)]
    scales = zarr.open_array(cache.path / maps.scales, mode="r")
    assert scales.attrs.asdict() == {}
    assert not scales[FAILED].any()


def test_decoded_values_are_close_to_the_originals(cache):
    for feature_set in cache.feature_sets.values():
        stored, scales = encode(features_of(4)[feature_set.kind], feature_set)
        original = features_of(4)[feature_set.kind]
        error = decode(stored, feature_set, scales) - original
        tolerance = {"float16": 3e-4, "float32": 1e-9, "bfloat16": 2.5e-3, "int8": 1e-2}[feature_set.dtype]
        assert np.sqrt(np.square(error).mean() / np.square(original).mean()) < tolerance
