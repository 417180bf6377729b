"""What our writers wrote is Zarr to everybody: the same numbers by zarr-python, by zarrs and by tensorstore."""

import json
import subprocess
import sys

import google_crc32c
import numpy as np
import pytest
import zarr

from regionspot.cache import Category, FeatureCache, FeatureSet, ImageFeatures, Manifest
from regionspot.cache.format.encodings import decode, encode, statistics_of
from regionspot.cache.format.schema import TOKEN_CHUNK, shard_file
from regionspot.cache.storage.zarr_shard import index_bytes, parse_index

COUNTS = [2, 0, 1, 5, 60, 7, 70, 0, 3, 1]  # regions of ten images; part 1 needs three inner chunks of tokens
PART_SIZE, FAILED = 4, 5
MAP_SHAPE, TOKEN_DIM = (5, 8), 6
DTYPES = ("float16", "float32", "bfloat16", "int8")
CASES = [(kind, dtype, zstd) for kind in ("map", "token") for dtype in DTYPES for zstd in (None, "zstd")]
READERS = ("zarr-python", "zarrs", "tensorstore")

# In a process of its own: tensorstore's threads end a process that forks after it was used.
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
    """An image's map and tokens, some channels a hundred times as wide as others."""
    rng, wide = np.random.default_rng(row), 10.0 ** np.linspace(-1, 1, 8)
    return {
        "map": (rng.standard_normal(MAP_SHAPE) * wide + 3).astype(np.float32),
        "token": (rng.standard_normal((COUNTS[row], TOKEN_DIM)) * wide[:TOKEN_DIM]).astype(np.float32),
    }


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A full cache that holds the same maps and tokens in every encoding; one image could not be read."""
    total = sum(COUNTS)
    manifest = Manifest(
        dataset="lvis",
        split="train",
        image_ids=np.arange(len(COUNTS)),
        paths=np.array([f"{row}.jpg" for row in range(len(COUNTS))], np.dtypes.StringDType()),
        heights=np.full(len(COUNTS), 480, np.int32),
        widths=np.full(len(COUNTS), 640, np.int32),
        offsets=np.concatenate([[0], np.cumsum(COUNTS)]),
        boxes_xyxy=np.zeros((total, 4), np.float32),
        category_index=np.zeros(total, np.int32),
        annotation_ids=np.arange(total),
        categories=(Category(1, "dog"),),
    )
    sample = {kind: statistics_of(features_of(row)[kind] for row in range(4)) for kind in ("map", "token")}
    shapes = {"map": MAP_SHAPE, "token": (TOKEN_DIM,)}
    sets = [
        FeatureSet(
            name_of(kind, dtype, zstd),
            kind,
            shapes[kind],
            dtype,
            compression=zstd,
            statistics=sample[kind] if dtype == "int8" else None,
        )
        for kind, dtype, zstd in CASES
    ]
    made = FeatureCache.create(tmp_path_factory.mktemp("interop") / "c.zarr", manifest, sets, PART_SIZE)
    for part in range(made.n_parts):
        made.write_part(part, [image(row, sets) for row in made.part_rows(part)])
    return made


def image(row, sets):
    if row == FAILED:
        return ImageFeatures(row, {}, "truncated JPEG")
    features = features_of(row)
    return ImageFeatures(row, {each.name: features[each.kind] for each in sets})


@pytest.fixture(scope="module")
def read_by(cache, tmp_path_factory):
    """`read_by(reader, array name)`: the whole array as another library reads it."""
    names = [name for each in cache.feature_sets.values() for name in arrays_of(each)]
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
    """What must lie in the arrays, put together without our writers: numbers and, for int8, scales."""
    if feature_set.kind == "map":
        values = np.zeros((len(COUNTS), *MAP_SHAPE), feature_set.stored)
        scales = np.zeros(values.shape[:-1], np.float16)
    else:
        capacity = max(1, -(-max(sum(COUNTS[row] for row in cache.part_rows(p)) for p in range(3)) // 64)) * 64
        values = np.zeros((cache.n_parts, capacity, TOKEN_DIM), feature_set.stored)
        scales = np.zeros(values.shape[:-1], np.float16)
    for row, count in enumerate(COUNTS):
        first = sum(COUNTS[row // PART_SIZE * PART_SIZE : row])
        place = row if feature_set.kind == "map" else (row // PART_SIZE, slice(first, first + count))
        if row != FAILED:
            values[place], found = encode(features_of(row)[feature_set.kind], feature_set)
            scales[place] = 0 if found is None else found
    return values, scales


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(("kind", "dtype", "zstd"), CASES)
def test_another_library_reads_the_numbers_that_were_written(cache, read_by, reader, kind, dtype, zstd):
    feature_set = cache.feature_sets[name_of(kind, dtype, zstd)]
    values, scales = expected_of(cache, feature_set)
    np.testing.assert_array_equal(read_by(reader, feature_set.array), values, strict=True)
    if dtype == "int8":
        np.testing.assert_array_equal(read_by(reader, feature_set.scales), scales, strict=True)


@pytest.mark.parametrize("check", ["always", "never"])
@pytest.mark.parametrize("zstd", [None, "zstd"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_our_reader_hands_out_the_same_numbers_and_scales(cache, dtype, zstd, check):
    maps, tokens = (cache.feature_sets[name_of(kind, dtype, zstd)] for kind in ("map", "token"))
    rows = [6, 0, 9, 4, 3, 7]
    batch = FeatureCache.open(cache.path, check=check).read(rows, map_set=maps.name, token_set=tokens.name)
    values, scales = expected_of(cache, maps)
    np.testing.assert_array_equal(batch.feature_map, values[rows], strict=True)
    np.testing.assert_array_equal(batch.map_scale, scales[rows] if dtype == "int8" else np.zeros((len(rows), 0)))
    values, scales = expected_of(cache, tokens)
    for place, row in enumerate(rows):
        first, count = sum(COUNTS[row // PART_SIZE * PART_SIZE : row]), COUNTS[row]
        where = (row // PART_SIZE, slice(first, first + count))
        np.testing.assert_array_equal(batch.tokens[place, :count], values[where], strict=True)
        if dtype == "int8":
            np.testing.assert_array_equal(batch.token_scale[place, :count], scales[where], strict=True)


@pytest.mark.parametrize(("kind", "dtype", "zstd"), CASES)
def test_a_stranger_decodes_by_what_the_cache_says_of_itself(cache, kind, dtype, zstd):
    root = zarr.open_group(cache.path, mode="r")
    name = name_of(kind, dtype, zstd)
    (entry,) = [each for each in root.attrs["regionspot"]["feature_sets"] if each["name"] == name]
    array = root[f"features/{name}/{'feature_map' if kind == 'map' else 'token'}"]
    row, place = (3, 3) if kind == "map" else (3, (0, slice(3, 8)))
    values = array[place]
    if array.attrs.get("regionspot_dtype") == "bfloat16":
        values = (values.astype(np.uint32) << 16).view(np.float32)
    if array.attrs.get("regionspot_dtype") == "int8":
        mean, deviation = (np.array(entry["statistics"][key], np.float32) for key in ("mean", "deviation"))
        values = values * root[f"features/{name}/scale"][place][..., None] * deviation + mean
    wide = np.abs(features_of(row)[kind]).max(axis=0)
    assert (np.abs(values - features_of(row)[kind]) <= 0.02 * wide).all()


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(("kind", "dtype", "zstd"), CASES)
def test_a_checksum_covers_the_bytes_on_disk_and_then_their_scales(cache, read_by, reader, kind, dtype, zstd):
    feature_set = cache.feature_sets[name_of(kind, dtype, zstd)]
    _, scales = expected_of(cache, feature_set)
    slots = PART_SIZE if kind == "map" else scales.shape[1] // TOKEN_CHUNK
    checksums, seen = read_by(reader, feature_set.checksums).reshape(-1), 0
    for part in range(cache.n_parts):
        shard = (cache.path / shard_file(feature_set, part)).read_bytes()
        data_bytes = len(shard) - index_bytes(slots)
        record_bytes = None if zstd else feature_set.record_bytes
        offsets, sizes = parse_index(shard[data_bytes:], data_bytes, record_bytes)
        for slot in np.flatnonzero(offsets >= 0):
            covered = shard[offsets[slot] : offsets[slot] + sizes[slot]]
            if dtype == "int8":
                covered += scales.reshape(-1, *feature_set.scale_shape)[part * slots + slot].tobytes()
            assert google_crc32c.value(covered) == checksums[part * slots + slot]
            seen += 1
    assert seen == (9 if kind == "map" else 1 + 3 + 1)


def test_an_image_that_could_not_be_read_costs_no_bytes(cache):
    plain = cache.feature_sets["map_int8"]
    sizes = [(cache.path / shard_file(plain, part)).stat().st_size for part in range(cache.n_parts)]
    assert sizes == [count * plain.record_bytes + index_bytes(PART_SIZE) for count in (4, 3, 2)]
    scales = zarr.open_array(cache.path / plain.scales, mode="r")
    assert scales.attrs.asdict() == {}
    assert not scales[FAILED].any()


def test_decoded_numbers_are_near_what_was_given(cache):
    for feature_set in cache.feature_sets.values():
        stored, scales = encode(features_of(4)[feature_set.kind], feature_set)
        came_back = decode(stored, feature_set, scales)
        given = features_of(4)[feature_set.kind]
        lost = np.sqrt(np.square(came_back - given).mean() / np.square(given).mean())
        assert lost < {"float16": 3e-4, "float32": 1e-9, "bfloat16": 2.5e-3, "int8": 1e-2}[feature_set.dtype]
