"""Encodings: exact bits or bounded error, statistics, refused values."""

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
    """Maps of twenty images with various means and deviations of the channels; the last channel is constant."""
    rng = np.random.default_rng(0)
    deviation, mean = 10.0 ** rng.uniform(-2, 2, WIDTH), rng.uniform(-50, 50, WIDTH)
    deviation[-1] = 0
    return (rng.standard_normal((20, TOKENS, WIDTH)) * deviation + mean).astype(np.float32)


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
    """Random bits: numbers of every exponent, half of them ties between two bfloat16."""
    bits = np.random.default_rng(1).integers(0, 2**32, 200_000, dtype=np.uint32)
    bits[::2] = bits[::2] & 0xFFFF_0000 | 0x8000
    values = bits.view(np.float32)
    return values[np.isfinite(values) & (np.abs(values) < 3.3e38)]


# --- exact bits ---


def test_every_float16_is_widened_exactly():
    halves = every_float16()
    wide = np.empty(halves.shape, np.float32)
    widen(halves, wide)
    np.testing.assert_array_equal(wide, halves.astype(np.float32))
    np.testing.assert_array_equal(np.signbit(wide), np.signbit(halves))


def test_bfloat16_rounds_like_ml_dtypes_and_torch(set_of):
    values = float32_of_all_sizes()
    bits, scales = encode(values, set_of("bfloat16"))
    assert scales is None
    np.testing.assert_array_equal(bits, values.astype(ml_dtypes.bfloat16).view(np.uint16))
    np.testing.assert_array_equal(bits, torch.from_numpy(values).bfloat16().view(torch.uint16).numpy())


def test_float16_and_float32_are_decoded_exactly(set_of):
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
def test_features_of_any_float_dtype_and_order_are_encoded_alike(set_of, sample, dtype, given):
    halves = sample[0].astype(np.float16)
    layouts = {
        "transposed": np.asfortranarray(halves.astype(np.float32)),
        "halves transposed": np.asfortranarray(halves),
        "read-only": np.frombuffer(halves.tobytes(), np.float16).reshape(halves.shape),
    }
    values = layouts[given] if given in layouts else halves.astype(given)
    before = values.copy()
    stored, scales = encode(values, set_of(dtype))
    expected, expected_scales = encode(halves.astype(np.float32), set_of(dtype))
    np.testing.assert_array_equal(stored, expected)
    assert stored.flags.c_contiguous
    assert stored.dtype == set_of(dtype).stored
    if scales is not None:
        np.testing.assert_array_equal(scales, expected_scales)
    np.testing.assert_array_equal(values, before)  # the input is unchanged


# --- int8 ---


def test_the_error_of_int8_is_at_most_half_a_step(set_of, sample, statistics):
    codes, scales = encode(sample, set_of("int8"))
    assert (codes.dtype, codes.shape, scales.dtype, scales.shape) == (np.int8, sample.shape, np.float16, (20, TOKENS))
    steps = scales.astype(np.float64)[..., None] * statistics.deviation
    error = np.abs(decode(codes, set_of("int8"), scales) - sample.astype(np.float64))
    assert (error <= 0.501 * steps + 1e-6 * np.abs(statistics.mean)).all()
    assert np.abs(codes).max(axis=-1).min() >= 126  # every row uses the whole range


def test_int8_loses_below_1_percent_of_each_channels_deviation_and_a_scale_per_row_alone_a_third():
    rng = np.random.default_rng(0)
    deviation = np.ones(1024)
    deviation[:8] = 100
    features = (rng.standard_normal((40, 50, 1024)) * deviation).astype(np.float32)

    def relative_error(statistics):
        feature_set = FeatureSet("clip", "map", (50, 1024), "int8", statistics=statistics)
        codes, scales = encode(features, feature_set)
        error = decode(codes, feature_set, scales) - features
        return np.sqrt(np.square(error).mean(axis=(0, 1))) / deviation

    assert relative_error(statistics_of(features[:4])).max() < 0.01
    plain = Statistics(np.zeros(1024, np.float32), np.ones(1024, np.float32))
    assert np.median(relative_error(plain)) > 0.3


def test_rows_at_the_mean_and_far_from_it_are_stored(set_of, statistics):
    rows = np.stack([statistics.mean, statistics.mean + 1e5 * statistics.deviation, statistics.mean])
    codes, scales = encode(rows, set_of("int8"))
    assert not codes[0].any()
    decoded = decode(codes, set_of("int8"), scales)
    np.testing.assert_allclose(decoded[0], statistics.mean, rtol=1e-6)
    np.testing.assert_allclose(decoded[1] - statistics.mean, 1e5 * statistics.deviation, rtol=1e-3)


@pytest.mark.filterwarnings("error")
def test_rows_close_to_the_mean_have_a_small_absolute_error():
    statistics = Statistics(np.zeros(WIDTH, np.float32), np.ones(WIDTH, np.float32))
    feature_set = FeatureSet("clip", "map", (TOKENS, WIDTH), "int8", statistics=statistics)
    for largest in (0, 1e-8, 1e-6, 1e-4, 7e-3):
        row = np.linspace(-largest, largest, WIDTH, dtype=np.float32)[None]
        codes, scales = encode(row, feature_set)
        np.testing.assert_allclose(decode(codes, feature_set, scales), row, rtol=0, atol=3.1e-5)


def test_an_array_without_rows_is_encoded(set_of):
    for dtype in ALL:
        stored, scales = encode(np.zeros((0, WIDTH), np.float32), set_of(dtype))
        assert stored.shape == (0, WIDTH)
        assert decode(stored, set_of(dtype), scales).shape == (0, WIDTH)


def test_decoding_int8_needs_one_scale_per_row(set_of):
    for scales in (None, np.ones(TOKENS - 1, np.float16)):
        with pytest.raises(InputError, match=r"clip: scales are .*, expected \(9,\)"):
            decode(np.zeros((TOKENS, WIDTH), np.int8), set_of("int8"), scales)


def test_int8_without_statistics_is_refused(set_of):
    with pytest.raises(InputError, match="clip: int8 needs the statistics"):
        encode(np.zeros((1, WIDTH), np.float32), set_of("int8", statistics=None))


# --- statistics ---


def test_statistics_are_mean_and_deviation_per_channel(sample, statistics):
    flat = sample.reshape(-1, WIDTH).astype(np.float64)
    np.testing.assert_allclose(statistics.mean, flat.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(statistics.deviation[:-1], flat.std(axis=0)[:-1], rtol=1e-4)


def test_a_constant_channel_gets_a_minimum_deviation(sample, statistics, set_of):
    assert statistics.deviation[-1] == pytest.approx(1e-3 * np.median(statistics.deviation[:-1]), rel=1e-5)
    stored, scales = encode(sample, set_of("int8"))
    np.testing.assert_allclose(decode(stored, set_of("int8"), scales)[..., -1], sample[..., -1], rtol=1e-6)
    assert (statistics_of(np.full((3, 2), 7.0)).deviation == np.float32(1e-3)).all()


def test_a_sample_may_be_an_iterator_with_empty_records(sample):
    records = [sample[0], np.zeros((0, WIDTH), np.float16), *sample[1:]]
    assert statistics_of(iter(records)) == statistics_of(sample)


def test_a_sample_without_rows_gives_mean_0_and_deviation_1_and_an_empty_one_is_refused():
    assert statistics_of([np.zeros((0, 3))]) == Statistics(np.zeros(3, np.float32), np.ones(3, np.float32))
    with pytest.raises(InputError, match="the sample is empty"):
        statistics_of([])


def test_statistics_survive_json_bit_by_bit(statistics):
    loaded = Statistics.from_json(json.loads(json.dumps(statistics.to_json())))
    assert loaded.mean.tobytes() == statistics.mean.tobytes()
    assert loaded.deviation.tobytes() == statistics.deviation.tobytes()
    assert loaded == statistics
    assert loaded != Statistics(statistics.mean, statistics.deviation * 2)


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
def test_invalid_statistics_are_refused(mean, deviation, message):
    with pytest.raises(InputError, match=message):
        Statistics(np.array(mean, np.float32), np.array(deviation, np.float32))


# --- refused values ---


@pytest.mark.parametrize("dtype", ALL)
@pytest.mark.parametrize("given", ["float16", "float32", "float64"])
@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
def test_nan_and_infinity_are_refused_at_any_position(set_of, dtype, given, value):
    for index in ((0, 0), (TOKENS - 1, WIDTH - 1)):
        values = np.zeros((TOKENS, WIDTH), given)
        values[index] = value
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
def test_the_largest_value_is_stored_and_the_next_is_refused(set_of, dtype, largest, too_large):
    plain = Statistics(np.zeros(WIDTH, np.float32), np.ones(WIDTH, np.float32))
    for sign in (1, -1):
        stored, scales = encode(np.full((1, WIDTH), sign * largest), set_of(dtype, plain))
        np.testing.assert_allclose(decode(stored, set_of(dtype, plain), scales), sign * largest, rtol=5e-3)
        with pytest.raises(InputError, match="16 of 16 values"):
            encode(np.full((1, WIDTH), sign * too_large), set_of(dtype, plain))


# --- encoder, names of encodings, feature sets ---


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_an_encoder_reuses_its_buffers(set_of, sample, dtype):
    encoder = Encoder(set_of(dtype))
    first, _ = encoder(sample[0])
    expected = encode(sample[1], set_of(dtype))
    second = encoder(sample[1])
    assert np.shares_memory(first, second[0])
    np.testing.assert_array_equal(second[0], expected[0])
    assert encoder(sample[1, :3])[0].shape == (3, WIDTH)


@pytest.mark.parametrize("text", ["int8", "bfloat16+zstd"])
def test_an_encoding_is_parsed_and_formatted(text):
    encoding = Encoding.parse(text)
    assert str(encoding) == text
    assert encoding == (text.split("+")[0], "zstd" if "+" in text else None)


@pytest.mark.parametrize("text", ["", "float64", "int8+", "+zstd", "int8+gzip", "INT8"])
def test_an_unknown_encoding_is_refused(text):
    with pytest.raises(InputError, match="expected one of float16, float32, bfloat16, int8, or one of them with"):
        Encoding.parse(text)


def test_a_feature_set_survives_json(set_of):
    for feature_set in (
        set_of("int8"),
        set_of("int8", None),
        set_of("bfloat16"),
        FeatureSet("sam", "token", (4,), compression="zstd", provenance={"pixels": [3, 4]}),
    ):
        assert FeatureSet.from_json(json.loads(json.dumps(feature_set.to_json()))) == feature_set


def test_dtype_and_size_on_disk(set_of):
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
def test_an_invalid_feature_set_is_refused(changes, message):
    with pytest.raises(InputError, match=message):
        FeatureSet("clip", "map", (TOKENS, WIDTH), **changes)
