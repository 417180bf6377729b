"""The dtypes that a feature set can be stored in, and the channel statistics that int8 needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from regionspot.cache.errors import InputError, unknown_name

STORED = {"float16": "<f2", "float32": "<f4", "bfloat16": "<u2", "int8": "|i1"}  # numpy's dtype of each on disk


class Encoding(NamedTuple):
    """How a feature set is stored: its dtype and its compression."""

    dtype: str
    compression: Literal["zstd"] | None = None

    @classmethod
    def parse(cls, text: str) -> Encoding:
        """Parse `int8` or `float16+zstd`. Raises InputError for an unknown encoding."""
        dtype, plus, compression = text.partition("+")
        if dtype not in STORED or compression != ("zstd" if plus else ""):
            raise unknown_name("encoding", text, STORED, ", or one of them with +zstd")
        return cls(dtype, "zstd" if plus else None)

    def __str__(self) -> str:
        return f"{self.dtype}+{self.compression}" if self.compression else self.dtype


@dataclass(frozen=True, eq=False)
class Statistics:
    """Mean and standard deviation of each of D channels, which int8 standardises by: float32 (D,), read-only.

    Raises InputError unless all are finite and every deviation is above 0.
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
                f"statistics: mean has shape {self.mean.shape} and deviation {self.deviation.shape}, expected one "
                "number per channel in each; use statistics_of()"
            )
        if not (np.isfinite(self.mean).all() and np.isfinite(self.deviation).all() and (self.deviation > 0).all()):
            raise InputError(
                "statistics: a mean or deviation is not finite, or a deviation is not above 0; use statistics_of()"
            )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Statistics):
            return NotImplemented
        return np.array_equal(self.mean, other.mean) and np.array_equal(self.deviation, other.deviation)

    def to_json(self) -> dict[str, list[float]]:
        """Lists of floats. JSON numbers represent every float32 exactly, so `from_json` restores the same bits."""
        return {"mean": self.mean.tolist(), "deviation": self.deviation.tolist()}

    @classmethod
    def from_json(cls, document: dict[str, list[float]]) -> Statistics:
        return cls(np.array(document["mean"], np.float32), np.array(document["deviation"], np.float32))
