"""How features become the numbers on disk, and come back: four encodings, in numpy.

    float16    rounded to the nearest, ties to even
    float32    as they are
    bfloat16   rounded likewise; kept as its 16 bits, because neither numpy nor Zarr has the type
    int8       every channel standardised by the mean and deviation of a first sample, then one float16 scale for
               each row of D channels: value = code * scale * deviation + mean

A few channels of a transformer are many times as wide as the others, and a scale for the row alone would spend all its
steps on them. Root mean square of what is lost, over the features' own and over the deviation of the usual channel, for
normal numbers of many widths and means, 8 of 1,024 channels 30 times as wide as the others:

                                  float16    bfloat16    int8       int8, rows scaled without statistics
    of the features               0.02 %     0.17 %      0.8 %      6 %
    of the usual channel's width  0.02 %     0.18 %      0.8 %      32 %
    1 - cosine of a row, mean     < 1e-7     8e-7        5e-5       1.5e-3

Real features are kinder: maps and tokens of the toy backbones lose 0.5 and 0.4 % (benchmarks/results/encodings.md).
What cannot be stored is refused as it comes in: NaN, and what would round to infinity. Everything here works on whole
records and on bits where that is faster: numpy converts float16 one number at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from regionspot.cache.errors import InputError, unknown_name

if TYPE_CHECKING:  # schema.py imports Statistics from here
    from regionspot.cache.format.schema import FeatureSet

STORED = {"float16": "<f2", "float32": "<f4", "bfloat16": "<u2", "int8": "|i1"}  # numpy's dtype of each on disk

_CODES = 127  # codes go from -127 to 127: symmetric, so that 0 is the mean
# Exponents of all ones, Inf and NaN, begin here in the bits without their sign.
_INFINITY = {"<f2": 0x7C00, "<f4": 0x7F80_0000, "<u2": 0x7F80}
# The largest number of each; for int8 in deviations.
_LARGEST = {"float16": 65504.0, "float32": 3.4028235e38, "bfloat16": 3.3895314e38, "int8": _CODES * 65504.0}
# The smallest normal float16: below it a scale would lose digits. A row that small lies within 0.01 deviations.
_SMALLEST_SCALE = np.float32(2.0**-14)
# A channel that hardly moved in the sample counts as one that moves a thousandth of the usual one: it may move
# elsewhere, and divided by almost nothing it would take the whole row's scale for itself.
_LEAST_DEVIATION = 1e-3


class Encoding(NamedTuple):
    """How a feature set is stored: the dtype of a FeatureSet and its compression."""

    dtype: str
    compression: Literal["zstd"] | None = None

    @classmethod
    def parse(cls, words: str) -> Encoding:
        """An encoding as people write it: `int8`, `float16+zstd`. Raises InputError for what is none."""
        dtype, plus, compression = words.partition("+")
        if dtype not in STORED or compression != ("zstd" if plus else ""):
            raise unknown_name("encoding", words, STORED, ", or one of them with +zstd")
        return cls(dtype, "zstd" if plus else None)

    def __str__(self) -> str:
        return f"{self.dtype}+{self.compression}" if self.compression else self.dtype


@dataclass(frozen=True, eq=False)
class Statistics:
    """What int8 standardises by: mean and deviation of each of D channels, float32 (D,), read only.

    Raises InputError unless they are finite and every deviation is above 0.
    """

    mean: NDArray[np.float32]
    deviation: NDArray[np.float32]

    def __post_init__(self) -> None:
        for name in ("mean", "deviation"):
            values = np.array(getattr(self, name), dtype=np.float32)
            values.setflags(write=False)
            object.__setattr__(self, name, values)
        if self.mean.ndim != 1 or self.mean.shape != self.deviation.shape:
            raise InputError(
                f"statistics: mean is {self.mean.shape} and deviation {self.deviation.shape}, expected one number a "
                "channel in each; take them from statistics_of()"
            )
        if not (np.isfinite(self.mean).all() and np.isfinite(self.deviation).all() and (self.deviation > 0).all()):
            raise InputError(
                "statistics: a mean or deviation is not finite, or a deviation not above 0; take them from "
                "statistics_of()"
            )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Statistics):
            return NotImplemented
        return np.array_equal(self.mean, other.mean) and np.array_equal(self.deviation, other.deviation)

    def to_json(self) -> dict[str, list[float]]:
        """Lists of floats; a float32 is one of JSON's numbers exactly, so `from_json` gives the same bits back."""
        return {"mean": self.mean.tolist(), "deviation": self.deviation.tolist()}

    @classmethod
    def from_json(cls, words: dict[str, list[float]]) -> Statistics:
        return cls(np.array(words["mean"], np.float32), np.array(words["deviation"], np.float32))


def statistics_of(sample: Iterable[NDArray[Any]]) -> Statistics:
    """Mean and deviation of every channel over all rows of a sample.

    sample   floating (n, ..., D), or its records (..., D) one after another, so that it need not fit in memory

    A deviation is at least a thousandth of the median one. A sample without a row gives mean 0 and deviation 1.
    Raises InputError for a sample that holds no record, or values that are not finite.
    """
    rows, total, squares = 0, None, None
    for record in sample:
        flat = np.asarray(record).reshape(-1, record.shape[-1]).astype(np.float64)
        rows += len(flat)
        total = flat.sum(axis=0) + (0 if total is None else total)
        squares = np.square(flat).sum(axis=0) + (0 if squares is None else squares)
    if total is None or squares is None:
        raise InputError("statistics: the sample holds no record; give the features of at least one image")
    if not rows:
        return Statistics(np.zeros(len(total), np.float32), np.ones(len(total), np.float32))
    mean = total / rows
    deviation = np.sqrt(np.maximum(squares / rows - mean**2, 0))
    usual = np.median(deviation[deviation > 0]) if deviation.any() else 1.0
    return Statistics(mean.astype(np.float32), np.maximum(deviation, usual * _LEAST_DEVIATION).astype(np.float32))


class Encoder:
    """Encodes records of one feature set, one after another, into memory that is used again.

    What a call returns is good until the next one. Not for several threads at once.
    Raises InputError for an int8 set without statistics.
    """

    def __init__(self, feature_set: FeatureSet) -> None:
        self._set = feature_set
        self._memory: dict[str, NDArray[Any]] = {}
        if feature_set.dtype == "int8":
            self._statistics = require_statistics(feature_set)
            self._inverse = 1 / self._statistics.deviation

    def __call__(self, values: NDArray[Any], where: str = "") -> tuple[NDArray[Any], NDArray[np.float16] | None]:
        """The stored form of floating (..., D) values, and for int8 the float16 (...) scales of its rows.

        A contiguous array that has the stored dtype already is returned itself. Raises InputError, beginning with
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
        except _Unstorable:
            raise self._refusal(values, where or f"feature set {self._set.name}") from None

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
        # Half a step less one, and one more where the last bit kept is odd: ties go to the even one.
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
        work = self._buffer("work", values.shape, np.float32)
        np.subtract(self._float32(values), self._statistics.mean, out=work)
        np.multiply(work, self._inverse, out=work)
        largest = np.maximum(work.max(axis=-1), -work.min(axis=-1))
        with np.errstate(over="ignore"):
            scales = np.maximum(largest / np.float32(_CODES), _SMALLEST_SCALE).astype("<f2")
        _require_finite(scales)
        # By the scale as it is stored: decoding multiplies by the very number that was divided by.
        np.multiply(work, (1 / scales.astype(np.float32))[..., None], out=work)
        np.rint(work, out=work)
        codes = self._buffer("stored", values.shape, np.int8)
        np.copyto(codes, work, casting="unsafe")
        return codes, scales

    def _float32(self, values: NDArray[Any]) -> NDArray[np.float32]:
        """The finite values as contiguous float32: themselves, or a buffer."""
        if values.dtype == np.float32 and values.flags.c_contiguous:
            plain = values
        else:
            plain = self._buffer("float32", values.shape, np.float32)
            if values.dtype == "<f2":
                _require_finite(np.ascontiguousarray(values))
                widen(values, plain)
            else:
                with np.errstate(over="ignore", invalid="ignore"):
                    np.copyto(plain, values, casting="unsafe")
        _require_finite(plain)
        return plain

    def _buffer(self, name: str, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
        size = math.prod(shape)
        if name not in self._memory or self._memory[name].size < size:
            self._memory[name] = np.empty(size, dtype)
        return self._memory[name][:size].reshape(shape)

    def _refusal(self, values: NDArray[Any], where: str) -> InputError:
        compared = values.astype(np.float64)
        unit = ""
        if self._set.dtype == "int8":
            compared, unit = (compared - self._statistics.mean) * self._inverse, " deviations"
        largest = _LARGEST[self._set.dtype]
        broken = int((~(np.abs(compared) <= largest)).sum())
        return InputError(
            f"{where}: {broken} of {values.size} values are NaN or beyond {largest:.6g}{unit}, the largest "
            f"{self._set.dtype}; look at the image and the weights, or store this set as float32"
        )


def encode(values: NDArray[Any], feature_set: FeatureSet) -> tuple[NDArray[Any], NDArray[np.float16] | None]:
    """The stored form of floating (..., D) values, and for int8 the float16 (...) scales of its rows; else None.

    Raises InputError for values that are NaN or would round to infinity, and for int8 without statistics.
    """
    return Encoder(feature_set)(values)


def decode(
    stored: NDArray[Any], feature_set: FeatureSet, scales: NDArray[np.float16] | None = None
) -> NDArray[np.float32]:
    """float32 (..., D) from the stored form (..., D) and, for int8, the float16 (...) scales of its rows.

    Raises InputError for an int8 set without statistics, or scales that are not those of the rows.
    """
    values = np.empty(stored.shape, np.float32)
    if feature_set.dtype == "float16":
        widen(stored, values)
    elif feature_set.dtype == "bfloat16":
        np.left_shift(stored, 16, out=values.view(np.uint32), dtype=np.uint32)
    elif feature_set.dtype == "int8":
        statistics = require_statistics(feature_set)
        if scales is None or scales.shape != stored.shape[:-1]:
            found = "none" if scales is None else str(scales.shape)
            raise InputError(f"feature set {feature_set.name}: scales are {found}, expected {stored.shape[:-1]}")
        np.multiply(stored, scales.astype(np.float32)[..., None], out=values)
        np.multiply(values, statistics.deviation, out=values)
        np.add(values, statistics.mean, out=values)
    else:
        values[...] = stored
    return values


def require_statistics(feature_set: FeatureSet) -> Statistics:
    """The statistics of an int8 feature set. Raises InputError where it has none."""
    if feature_set.statistics is None:
        raise InputError(
            f"feature set {feature_set.name}: int8 needs the statistics of its channels; take them from "
            "statistics_of() of a first sample"
        )
    return feature_set.statistics


def widen(halves: NDArray[np.float16], out: NDArray[np.float32]) -> None:
    """Finite float16 as contiguous float32, exactly; four times as fast as numpy's own conversion.

    Moved to their places in a float32, the bits mean 2^-112 of the number: the exponents count from 15 and 127.
    """
    bits = out.view(np.int32)
    np.copyto(bits, halves.view(np.int16))  # repeats the sign in the upper bits
    np.left_shift(bits, 13, out=bits)
    np.bitwise_and(bits, np.int32(-0x7000_0001), out=bits)  # keeps it in the first one only
    np.multiply(out, np.float32(2.0**112), out=out)


class _Unstorable(Exception):
    """A value that is NaN or rounds to infinity."""


def _require_finite(values: NDArray[Any]) -> None:
    """Raises _Unstorable for an Inf or NaN among float16, float32 or the bits of bfloat16, contiguous."""
    infinity = _INFINITY[values.dtype.str]
    unsigned = values.view(f"u{values.itemsize}")
    # As signed integers the positive ones are the largest, as unsigned ones the negative; no memory for a mask.
    positive = int(unsigned.view(f"i{values.itemsize}").max(initial=0))
    negative = int(unsigned.max(initial=0))
    if positive >= infinity or negative >= infinity + (1 << 8 * values.itemsize - 1):
        raise _Unstorable
