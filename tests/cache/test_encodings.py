"""Encodings: each loses what it says it loses, by bits where that is exact, and refuses what it cannot hold."""

import json

import ml_dtypes
import numpy as np
import pytest
import torch

from regionspot.cache import FeatureSet, InputError
from regionspot.cache.format.encodings import Encoder, decode, encode, statistics_of, widen
from regionspot.cache.format.feature_dtypes import Encoding, Statistics

TOKENS, WIDTH = 9, 16
ALL = ("float16", "float32", "bfloat16", "int8")


@pytest.fixture(scope="module")
def sample():
    """Twenty images' maps whose channels have means and widths of many sizes; the last never moves."""
    rng = np.random.default_rng(0)
    wide, middle = 10.0 ** rng.uniform(-2, 2, WIDTH), rng.uniform(-50, 50, WIDTH)
    wide[-1] = 0
    return (rng.standard_normal((20, TOKENS, WIDTH)) * wide + middle).astype(np.float32)


@pytest.fixture(scope="module")
def statistics(sample):
    return statistics_of(sample)


@pytest.fixture
def set_of(statistics):
    def make(dtype, statistics=statistics):
        return FeatureSet("clip", "map", (TOKENS, WIDTH), dtype, statistics=statistics if dtype == "int8" else None)

    return make


def every_float16():
    """All finite float16."""
    halves = np.arange(2**16, dtype=np.uint16).view(np.float16)
    return halves[np.isfinite(halves)]


def float32_of_all_sizes():
    """Random bits, so numbers of every exponent, and ties between two bfloat16."""
    bits = np.random.default_rng(1).integers(0, 2**32, 200_000, dtype=np.uint32)
    bits[::2] = bits[::2] & 0xFFFF_0000 | 0x8000
    values = bits.view(np.float32)
    return values[np.isfinite(values) & (np.abs(values) < 3.3e38)]


# --- exact by bits ---


def test_float16_widens_exactly_for_every_number_there_is():
    halves = every_float16()
    wide = np.empty(halves.shape, np.float32)
    widen(halves, wide)
    np.testing.assert_array_equal(wide, halves.astype(np.float32))
    np.testing.assert_array_equal(np.signbit(wide), np.signbit(halves))


def test_bfloat16_rounds_as_two_other_libraries_do(set_of):
    values = float32_of_all_sizes()
    bits, scales = encode(values, set_of("bfloat16"))
    assert scales is None
    np.testing.assert_array_equal(bits, values.astype(ml_dtypes.bfloat16).view(np.uint16))
    np.testing.assert_array_equal(bits, torch.from_numpy(values).bfloat16().view(torch.uint16).numpy())


def test_float16_and_float32_come_back_as_they_were(set_of):
    halves = every_float16()
    for dtype in ("float16", "float32"):
        stored, _ = encode(halves, set_of(dtype))
        assert stored.dtype == dtype
        np.testing.assert_array_equal(decode(stored, set_of(dtype)), halves.astype(np.float32))


def test_a_record_in_its_stored_dtype_is_not_copied(set_of, sample):
    assert Encoder(set_of("float32"))(sample)[0] is sample
    halves = sample.astype(np.float16)
    assert Encoder(set_of("float16"))(halves)[0] is halves


@pytest.mark.parametrize("dtype", ALL)
@pytest.mark.parametrize("given", ["float16", "float32", "float64", "transposed", "halves transposed", "read-only"])
def test_features_may_come_in_any_float_dtype_and_order(set_of, sample, dtype, given):
    halves = sample[0].astype(np.float16)
    forms = {
        "transposed": np.asfortranarray(halves.astype(np.float32)),
        "halves transposed": np.asfortranarray(halves),
        "read-only": np.frombuffer(halves.tobytes(), np.float16).reshape(halves.shape),
    }
    values = forms[given] if given in forms else halves.astype(given)
    before = values.copy()
    stored, scales = encode(values, set_of(dtype))
    expected, expected_scales = encode(halves.astype(np.float32), set_of(dtype))
    np.testing.assert_array_equal(stored, expected)
    assert stored.flags.c_contiguous
    assert stored.dtype == set_of(dtype).stored
    if scales is not None:
        np.testing.assert_array_equal(scales, expected_scales)
    np.testing.assert_array_equal(values, before)  # the caller's memory is left alone


# --- int8 ---


def test_int8_is_off_by_no_more_than_half_a_step_of_its_row(set_of, sample, statistics):
    codes, scales = encode(sample, set_of("int8"))
    assert (codes.dtype, codes.shape, scales.dtype, scales.shape) == (np.int8, sample.shape, np.float16, (20, TOKENS))
    steps = scales.astype(np.float64)[..., None] * statistics.deviation
    error = np.abs(decode(codes, set_of("int8"), scales) - sample.astype(np.float64))
    assert (error <= 0.501 * steps + 1e-6 * np.abs(statistics.mean)).all()
    assert np.abs(codes).max(axis=-1).min() >= 126  # every row uses the whole range


def test_int8_loses_less_than_a_hundredth_of_every_channels_width_where_a_plain_scale_loses_a_third():
    rng = np.random.default_rng(0)
    wide = np.ones(1024)
    wide[:8] = 100
    features = (rng.standard_normal((40, 50, 1024)) * wide).astype(np.float32)

    def lost(statistics):
        feature_set = FeatureSet("clip", "map", (50, 1024), "int8", statistics=statistics)
        codes, scales = encode(features, feature_set)
        off = decode(codes, feature_set, scales) - features
        return np.sqrt(np.square(off).mean(axis=(0, 1))) / wide

    assert lost(statistics_of(features[:4])).max() < 0.01
    plain = Statistics(np.zeros(1024, np.float32), np.ones(1024, np.float32))
    assert np.median(lost(plain)) > 0.3


def test_a_row_of_means_and_an_image_far_from_them_are_both_stored(set_of, statistics):
    rows = np.stack([statistics.mean, statistics.mean + 1e5 * statistics.deviation, statistics.mean])
    codes, scales = encode(rows, set_of("int8"))
    assert not codes[0].any()
    came_back = decode(codes, set_of("int8"), scales)
    np.testing.assert_allclose(came_back[0], statistics.mean, rtol=1e-6)
    np.testing.assert_allclose(came_back[1] - statistics.mean, 1e5 * statistics.deviation, rtol=1e-3)


@pytest.mark.filterwarnings("error")
def test_a_row_hardly_off_the_means_is_stored_to_a_ten_thousandth_of_a_deviation():
    statistics = Statistics(np.zeros(WIDTH, np.float32), np.ones(WIDTH, np.float32))
    feature_set = FeatureSet("clip", "map", (TOKENS, WIDTH), "int8", statistics=statistics)
    for off in (0, 1e-8, 1e-6, 1e-4, 7e-3):
        row = np.linspace(-off, off, WIDTH, dtype=np.float32)[None]
        codes, scales = encode(row, feature_set)
        np.testing.assert_allclose(decode(codes, feature_set, scales), row, rtol=0, atol=3.1e-5)


def test_no_rows_at_all_are_encoded_too(set_of):
    for dtype in ALL:
        stored, scales = encode(np.zeros((0, WIDTH), np.float32), set_of(dtype))
        assert stored.shape == (0, WIDTH)
        assert decode(stored, set_of(dtype), scales).shape == (0, WIDTH)


def test_decoding_int8_needs_the_scales_of_its_rows(set_of):
    for scales in (None, np.ones(TOKENS - 1, np.float16)):
        with pytest.raises(InputError, match=r"clip: scales are .*, expected \(9,\)"):
            decode(np.zeros((TOKENS, WIDTH), np.int8), set_of("int8"), scales)


def test_int8_without_statistics_is_refused(set_of):
    with pytest.raises(InputError, match="clip: int8 needs the statistics"):
        encode(np.zeros((1, WIDTH), np.float32), set_of("int8", statistics=None))


# --- statistics ---


def test_statistics_are_the_mean_and_deviation_of_every_channel(sample, statistics):
    flat = sample.reshape(-1, WIDTH).astype(np.float64)
    np.testing.assert_allclose(statistics.mean, flat.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(statistics.deviation[:-1], flat.std(axis=0)[:-1], rtol=1e-4)


def test_a_channel_that_never_moved_gets_a_deviation_to_divide_by(sample, statistics, set_of):
    assert statistics.deviation[-1] == pytest.approx(1e-3 * np.median(statistics.deviation[:-1]), rel=1e-5)
    stored, scales = encode(sample, set_of("int8"))
    np.testing.assert_allclose(decode(stored, set_of("int8"), scales)[..., -1], sample[..., -1], rtol=1e-6)
    assert (statistics_of(np.full((3, 2), 7.0)).deviation == np.float32(1e-3)).all()


def test_a_sample_may_come_record_by_record_and_hold_images_without_regions(sample):
    records = [sample[0], np.zeros((0, WIDTH), np.float16), *sample[1:]]
    assert statistics_of(iter(records)) == statistics_of(sample)


def test_a_sample_without_rows_leaves_values_as_they_are_and_one_without_records_is_refused():
    assert statistics_of([np.zeros((0, 3))]) == Statistics(np.zeros(3, np.float32), np.ones(3, np.float32))
    with pytest.raises(InputError, match="the sample is empty"):
        statistics_of([])


def test_statistics_go_through_json_to_the_bit(statistics):
    came_back = Statistics.from_json(json.loads(json.dumps(statistics.to_json())))
    assert came_back.mean.tobytes() == statistics.mean.tobytes()
    assert came_back.deviation.tobytes() == statistics.deviation.tobytes()
    assert came_back == statistics
    assert came_back != Statistics(statistics.mean, statistics.deviation * 2)


@pytest.mark.parametrize(
    ("mean", "deviation", "message"),
    [
        ([0, 0], [1], "expected one number per channel"),
        ([[0]], [[1]], "expected one number per channel"),
        ([0], [0], "not above 0"),
        ([0], [-1], "not above 0"),
        ([np.nan], [1], "not finite"),
        ([0], [np.inf], "not finite"),
    ],
)
def test_statistics_that_cannot_be_divided_by_are_refused(mean, deviation, message):
    with pytest.raises(InputError, match=message):
        Statistics(np.array(mean, np.float32), np.array(deviation, np.float32))


# --- what cannot be stored ---


@pytest.mark.parametrize("dtype", ALL)
@pytest.mark.parametrize("given", ["float16", "float32", "float64"])
@pytest.mark.parametrize("broken", [np.nan, -np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused_wherever_it_stands(set_of, dtype, given, broken):
    for place in ((0, 0), (TOKENS - 1, WIDTH - 1)):
        values = np.zeros((TOKENS, WIDTH), given)
        values[place] = broken
        with pytest.raises(InputError, match=f"1 of 144 values are NaN or beyond .*{dtype}; check the image"):
            encode(values, set_of(dtype))


def test_a_nan_whose_bits_would_round_to_zero_is_refused(set_of):
    values = np.full((1, WIDTH), 0x7FFF_FFFF, np.uint32).view(np.float32)
    with pytest.raises(InputError, match="16 of 16 values"):
        encode(values, set_of("bfloat16"))


@pytest.mark.parametrize(
    ("dtype", "largest", "too_large"),
    [
        ("float16", 65519.99, 65520.0),
        ("float32", 3.4028235e38, 3.4028236e38),
        ("bfloat16", 3.396177e38, 3.3961776e38),
        ("int8", 127 * 65519.9, 127 * 65520.1),
    ],
)
def test_the_largest_number_is_stored_and_the_next_refused(set_of, dtype, largest, too_large):
    plain = Statistics(np.zeros(WIDTH, np.float32), np.ones(WIDTH, np.float32))
    for sign in (1, -1):
        stored, scales = encode(np.full((1, WIDTH), sign * largest), set_of(dtype, plain))
        np.testing.assert_allclose(decode(stored, set_of(dtype, plain), scales), sign * largest, rtol=5e-3)
        with pytest.raises(InputError, match="16 of 16 values"):
            encode(np.full((1, WIDTH), sign * too_large), set_of(dtype, plain))


# --- an encoder of many records ---


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_an_encoder_uses_its_memory_again(set_of, sample, dtype):
    encoder = Encoder(set_of(dtype))
    first, _ = encoder(sample[0])
    expected = encode(sample[1], set_of(dtype))
    again = encoder(sample[1])
    assert np.shares_memory(first, again[0])
    np.testing.assert_array_equal(again[0], expected[0])
    assert encoder(sample[1, :3])[0].shape == (3, WIDTH)


# --- feature sets that say how they are encoded ---


@pytest.mark.parametrize("words", ["int8", "float16", "bfloat16+zstd", "int8+zstd"])
def test_an_encoding_reads_as_it_is_written(words):
    encoding = Encoding.parse(words)
    assert str(encoding) == words
    assert encoding == (words.split("+")[0], "zstd" if "+" in words else None)


@pytest.mark.parametrize("words", ["", "float64", "int8+", "+zstd", "int8+gzip", "int8 zstd", "INT8"])
def test_words_that_are_no_encoding_are_refused(words):
    with pytest.raises(InputError, match="expected one of float16, float32, bfloat16, int8, or one of them with"):
        Encoding.parse(words)


def test_a_feature_set_goes_through_json_and_back(set_of):
    for feature_set in (
        set_of("int8"),
        set_of("int8", None),
        set_of("bfloat16"),
        FeatureSet("sam", "token", (4,), compression="zstd", provenance={"pixels": [3, 4]}),
    ):
        assert FeatureSet.from_json(json.loads(json.dumps(feature_set.to_json()))) == feature_set


def test_what_lies_on_disk_follows_from_the_dtype(set_of):
    for dtype, stored, size in (
        ("float16", "<f2", 2),
        ("float32", "<f4", 4),
        ("bfloat16", "<u2", 2),
        ("int8", "|i1", 1),
    ):
        feature_set = set_of(dtype)
        assert feature_set.stored == stored
        assert feature_set.record_bytes == TOKENS * WIDTH * size
        assert feature_set.has_scales == (dtype == "int8")
    assert set_of("int8").scales == "features/clip/scale"
    assert set_of("int8").scale_shape == (TOKENS,)
    assert FeatureSet("sam", "token", (4,), "int8").scale_shape == (64,)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "float64"}, "clip: dtype is 'float64', expected one of float16, float32, bfloat16, int8"),
        ({"compression": "gzip"}, "clip: compression is 'gzip', expected None or 'zstd'"),
        ({"statistics": Statistics([0.0], [1.0])}, "clip: statistics are for int8, its dtype is float16"),
        ({"dtype": "int8", "statistics": Statistics([0.0], [1.0])}, "clip: statistics of 1 channels, expected 16"),
    ],
)
def test_a_feature_set_that_cannot_be_stored_is_refused(changes, message):
    with pytest.raises(InputError, match=message):
        FeatureSet("clip", "map", (TOKENS, WIDTH), **changes)
