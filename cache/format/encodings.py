"""Encoding features for storage, and decoding them: four encodings, in numpy.

    float16    rounded to nearest, ties to even
    float32    unchanged
    bfloat16   rounded to nearest, ties to even; stored as 16 bits, because neither numpy nor Zarr has the type
    int8       each channel standardised by the mean and deviation of a sample, then one float16 scale per row of D
               channels: value = code * scale * deviation + mean

A few channels of a transformer have a many times larger range than the others, and a scale per row alone would spend
all its steps on them. RMS error relative to the RMS of the features, and to the deviation of the median channel, for
normal numbers of various widths and means, 8 of 1,024 channels 30 times as wide as the others:

                                  float16    bfloat16    int8       int8, rows scaled without statistics
    of the features               0.02 %     0.17 %      0.8 %      6 %
    of the median deviation       0.02 %     0.18 %      0.8 %      32 %
    1 - cosine of a row, mean     < 1e-7     8e-7        5e-5       1.5e-3

Maps and tokens of the toy backbones lose 0.5 and 0.4 % (benchmarks/results/encodings.md). Values that cannot be stored
are refused when encoding: NaN, and those that would round to infinity. The code works on whole records, and on bits
where that is faster: numpy converts float16 one number at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from regionspot.cache.errors import InputError
from regionspot.cache.format.feature_dtypes import Statistics
from regionspot.cache.format.schema import FeatureSet

_CODES = 127  # codes range from -127 to 127: symmetric, so that 0 is the mean
# Without the sign, bit patterns from here on are Inf or NaN: all exponent bits are 1.
_INFINITY = {"<f2": 0x7C00, "<f4": 0x7F80_0000, "<u2": 0x7F80}
# The largest finite value; for int8 in deviations.
_LARGEST = {"float16": 65504.0, "float32": 3.4028235e38, "bfloat16": 3.3895314e38, "int8": _CODES * 65504.0}
# The smallest normal float16: a smaller scale would lose digits. Such rows are within 0.01 deviations of the mean.
_SMALLEST_SCALE = np.float32(2.0**-14)
# Lower limit, relative to the median channel. A channel that is nearly constant in the sample may vary elsewhere, and
# divided by a tiny deviation it would determine the whole row's scale.
_LEAST_DEVIATION = 1e-3


def statistics_of(sample: Iterable[NDArray[Any]]) -> Statistics:
    """Mean and deviation of each channel over all rows of a sample.

    sample   floating (n, ..., D), or an iterator over records (..., D), which need not fit in memory together

    A deviation is at least a thousandth of the median one. A sample without rows gives mean 0 and deviation 1.
    Raises InputError for a sample without records, and for values that are not finite.
    """
    rows, total, squares = 0, None, None
    for record in sample:
        flat = np.asarray(record).reshape(-1, record.shape[-1]).astype(np.float64)
        rows += len(flat)
        total = flat.sum(axis=0) + (0 if total is None else total)
        squares = np.square(flat).sum(axis=0) + (0 if squares is None else squares)
    if total is None or squares is None:
        raise InputError("statistics: the sample is empty; give the features of at least one image")
    if not rows:
        return Statistics(np.zeros(len(total), np.float32), np.ones(len(total), np.float32))
    mean = total / rows
    deviation = np.sqrt(np.maximum(squares / rows - mean**2, 0))
    median = np.median(deviation[deviation > 0]) if deviation.any() else 1.0
    return Statistics(mean.astype(np.float32), np.maximum(deviation, median * _LEAST_DEVIATION).astype(np.float32))


class Encoder:
    """Encodes records of one feature set into reused buffers: a result is valid until the next call. Not thread-safe.

    Raises InputError for an int8 set without statistics.
    """

    def __init__(self, feature_set: FeatureSet) -> None:
        self._set = feature_set
        self._buffers: dict[str, NDArray[Any]] = {}
        if feature_set.dtype == "int8":
            self._statistics = require_statistics(feature_set)
            self._inverse = 1 / self._statistics.deviation

    def __call__(self, values: NDArray[Any], where: str = "") -> tuple[NDArray[Any], NDArray[np.float16] | None]:
        """The stored form of floating (..., D) values, and for int8 the float16 (...) scales of its rows.

        A contiguous array that already has the stored dtype is returned itself. Raises InputError, starting with
        `where`, for values that are NaN or would round to infinity.
        """
        try:
            match self._set.dtype:
                case "int8":
                    return self._to_int8(values)
                case "bfloat16":
                    return self._to_bfloat16(values), None
                case "float32":
                    return self._float32(values), None
            return self._to_float16(values), None
        except _NotFinite:
            raise self._error(values, where or f"feature set {self._set.name}") from None

    def _to_float16(self, values: NDArray[Any]) -> NDArray[np.float16]:
        stored = values
        if values.dtype != "<f2" or not values.flags.c_contiguous:
            stored = self._buffer("stored", values.shape, "<f2")
            with np.errstate(over="ignore", invalid="ignore"):
                np.copyto(stored, values, casting="unsafe")
        _require_finite(stored)
        return stored

    def _to_bfloat16(self, values: NDArray[Any]) -> NDArray[np.uint16]:
        bits = self._float32(values).view(np.uint32)
        rounded = self._buffer("rounded", values.shape, np.uint32)
        # Add half a step minus one, and one more if the last kept bit is odd: rounds ties to even.
        np.right_shift(bits, 16, out=rounded)
        np.bitwise_and(rounded, 1, out=rounded)
        np.add(rounded, 0x7FFF, out=rounded)
        np.add(rounded, bits, out=rounded)
        np.right_shift(rounded, 16, out=rounded)
        stored = self._buffer("stored", values.shape, np.uint16)
        np.copyto(stored, rounded, casting="unsafe")
        _require_finite(stored)
        return stored

    def _to_int8(self, values: NDArray[Any]) -> tuple[NDArray[np.int8], NDArray[np.float16]]:
        standardised = self._buffer("standardised", values.shape, np.float32)
        np.subtract(self._float32(values), self._statistics.mean, out=standardised)
        np.multiply(standardised, self._inverse, out=standardised)
        largest = np.maximum(standardised.max(axis=-1), -standardised.min(axis=-1))
        with np.errstate(over="ignore"):
            scales = np.maximum(largest / np.float32(_CODES), _SMALLEST_SCALE).astype("<f2")
        _require_finite(scales)
        # Divide by the stored, rounded scale: decoding multiplies by the same number.
        np.multiply(standardised, (1 / scales.astype(np.float32))[..., None], out=standardised)
        np.rint(standardised, out=standardised)
        codes = self._buffer("stored", values.shape, np.int8)
        np.copyto(codes, standardised, casting="unsafe")
        return codes, scales

    def _float32(self, values: NDArray[Any]) -> NDArray[np.float32]:
        """The finite values as contiguous float32: the array itself, or a buffer."""
        if values.dtype == np.float32 and values.flags.c_contiguous:
            converted = values
        else:
            converted = self._buffer("float32", values.shape, np.float32)
            if values.dtype == "<f2":
                _require_finite(np.ascontiguousarray(values))
                widen(values, converted)
            else:
                with np.errstate(over="ignore", invalid="ignore"):
                    np.copyto(converted, values, casting="unsafe")
        _require_finite(converted)
        return converted

    def _buffer(self, name: str, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
        size = math.prod(shape)
        if name not in self._buffers or self._buffers[name].size < size:
            self._buffers[name] = np.empty(size, dtype)
        return self._buffers[name][:size].reshape(shape)

    def _error(self, values: NDArray[Any], where: str) -> InputError:
        compared, unit = values.astype(np.float64), ""
        if self._set.dtype == "int8":
            compared, unit = (compared - self._statistics.mean) * self._inverse, " deviations"
        largest = _LARGEST[self._set.dtype]
        count = int((~(np.abs(compared) <= largest)).sum())
        return InputError(
            f"{where}: {count} of {values.size} values are NaN or beyond {largest:.6g}{unit}, the largest "
            f"{self._set.dtype}; check the image and the weights, or store this set as float32"
        )


def encode(values: NDArray[Any], feature_set: FeatureSet) -> tuple[NDArray[Any], NDArray[np.float16] | None]:
    """The stored form of floating (..., D) values, and the float16 (...) scales of its rows, None unless int8.

    Raises InputError for values that are NaN or would round to infinity, and for int8 without statistics.
    """
    return Encoder(feature_set)(values)


def decode(
    stored: NDArray[Any], feature_set: FeatureSet, scales: NDArray[np.float16] | None = None
) -> NDArray[np.float32]:
    """float32 (..., D) from the stored form (..., D) and, for int8, the float16 (...) scales of its rows.

    Raises InputError for an int8 set without statistics, or scales of another shape.
    """
    values = np.empty(stored.shape, np.float32)
    if feature_set.dtype == "float16":
        widen(stored, values)
    elif feature_set.dtype == "bfloat16":
        np.left_shift(stored, 16, out=values.view(np.uint32), dtype=np.uint32)
    elif feature_set.dtype == "int8":
        statistics = require_statistics(feature_set)
        if scales is None or scales.shape != stored.shape[:-1]:
            shape = "none" if scales is None else str(scales.shape)
            raise InputError(f"feature set {feature_set.name}: scales are {shape}, expected {stored.shape[:-1]}")
        np.multiply(stored, scales.astype(np.float32)[..., None], out=values)
        np.multiply(values, statistics.deviation, out=values)
        np.add(values, statistics.mean, out=values)
    else:
        values[...] = stored
    return values


def require_statistics(feature_set: FeatureSet) -> Statistics:
    """The statistics of an int8 feature set. Raises InputError if it has none."""
    if feature_set.statistics is None:
        raise InputError(
            f"feature set {feature_set.name}: int8 needs the statistics of its channels; compute them with "
            "statistics_of() from a sample"
        )
    return feature_set.statistics


def widen(halves: NDArray[np.float16], out: NDArray[np.float32]) -> None:
    """Convert finite float16 to contiguous float32, exactly and four times as fast as numpy.

    The float16 bits, shifted to their place in a float32, represent 2^-112 of the value: the exponent biases are 15 and
    127.
    """
    bits = out.view(np.int32)
    np.copyto(bits, halves.view(np.int16))  # sign-extended
    np.left_shift(bits, 13, out=bits)
    np.bitwise_and(bits, np.int32(-0x7000_0001), out=bits)  # clears the copies of the sign
    np.multiply(out, np.float32(2.0**112), out=out)


class _NotFinite(Exception):
    """A value that is NaN or rounds to infinity."""


def _require_finite(values: NDArray[Any]) -> None:
    """Raises _NotFinite for an Inf or NaN in contiguous float16, float32 or bfloat16 bits."""
    infinity = _INFINITY[values.dtype.str]
    unsigned = values.view(f"u{values.itemsize}")
    # Positive values are the largest as signed integers, negative ones as unsigned; this needs no memory for a mask.
    positive = int(unsigned.view(f"i{values.itemsize}").max(initial=0))
    negative = int(unsigned.max(initial=0))
    if positive >= infinity or negative >= infinity + (1 << 8 * values.itemsize - 1):
        raise _NotFinite
