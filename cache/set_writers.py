"""One feature set of one part on its way to disk: records into a shard, their checksums into a file beside it.

Checksums lie apart so that records stay adjacent and aligned. Features are checked here, where a wrong one still has
a picture's row to be named by.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from regionspot.cache.durable import file_crc
from regionspot.cache.errors import InputError
from regionspot.cache.schema import TOKEN_CHUNK, FeatureSet, Geometry, checksum_file, shard_file
from regionspot.cache.shard import ShardWriter, with_crc
from regionspot.cache.storage import NewFile, Storage


@dataclass(frozen=True)
class Published:
    """Files of one feature set of one part: their bytes, and the crc32c of those that hold checksums."""

    files: dict[str, int]
    checksums: dict[str, int]


class SetWriter(ABC):
    """The shard and the checksums of one feature set in one part."""

    def __init__(self, storage: Storage, feature_set: FeatureSet, geometry: Geometry, part: int) -> None:
        self.feature_set = feature_set
        self._names = shard_file(feature_set, part), checksum_file(feature_set, part)
        self._checksums = np.zeros(geometry.slots(feature_set), dtype="<u4")
        self._storage = storage
        self._files: list[NewFile] = [storage.create(self._names[0])]
        self._shard = ShardWriter(self._files[0], geometry.slots(feature_set))
        self._taken = 0  # pictures or regions so far

    @abstractmethod
    def append(self, row: int, regions: int, features: NDArray[Any]) -> None:
        """Take the features of the picture at `row`, which has that many regions."""

    @abstractmethod
    def skip(self, regions: int) -> None:
        """Take a picture that could not be read."""

    def publish(self) -> Published:
        """Flush both files and give them their names."""
        shard, checksums = self._names
        sizes = {shard: self._shard.finish()}
        stored = with_crc(self._checksums.tobytes())
        sizes[checksums] = len(stored)
        self._files.append(self._storage.create(checksums))
        self._files[1].write(stored)
        self._files[1].finish()
        for file in self._files:
            file.publish()
        return Published(sizes, {checksums: file_crc(stored)})

    def discard(self) -> None:
        for file in self._files:
            file.discard()

    def _put(self, slot: int, record: NDArray[Any]) -> None:
        self._checksums[slot] = google_crc32c.value(record)
        self._shard.append(slot, record)


class MapWriter(SetWriter):
    """One record a picture. A picture that could not be read has none, so its slot stays empty."""

    def append(self, row: int, regions: int, features: NDArray[Any]) -> None:
        self._put(self._taken, _as_stored(self.feature_set, row, features, self.feature_set.shape))
        self._taken += 1

    def skip(self, regions: int) -> None:
        self._taken += 1


class TokenWriter(SetWriter):
    """One row a region, gathered into inner chunks of TOKEN_CHUNK; a picture's rows may straddle two."""

    def __init__(self, storage: Storage, feature_set: FeatureSet, geometry: Geometry, part: int) -> None:
        super().__init__(storage, feature_set, geometry, part)
        self._chunk = np.zeros(feature_set.record_shape, dtype=feature_set.stored)

    def append(self, row: int, regions: int, features: NDArray[Any]) -> None:
        self._extend(_as_stored(self.feature_set, row, features, (regions, *self.feature_set.shape)))

    def skip(self, regions: int) -> None:
        self._extend(np.zeros((regions, *self.feature_set.shape), dtype=self.feature_set.stored))

    def publish(self) -> Published:
        if self._taken % TOKEN_CHUNK:
            self._chunk[self._taken % TOKEN_CHUNK :] = 0
            self._put(self._taken // TOKEN_CHUNK, self._chunk)
        return super().publish()

    def _extend(self, tokens: NDArray[Any]) -> None:
        while len(tokens):
            filled = self._taken % TOKEN_CHUNK
            taken = min(TOKEN_CHUNK - filled, len(tokens))
            self._chunk[filled : filled + taken] = tokens[:taken]
            tokens = tokens[taken:]
            self._taken += taken
            if filled + taken == TOKEN_CHUNK:
                self._put(self._taken // TOKEN_CHUNK - 1, self._chunk)


def _as_stored(feature_set: FeatureSet, row: int, value: NDArray[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    """Features as they lie on disk: contiguous, little-endian, in the set's dtype.

    Raises InputError for another shape, for values that are not floating, and for those that are not finite once
    they are stored: an overflow to infinity would be found months later, in somebody's loss.
    """
    where = f"feature set {feature_set.name}, row {row}"
    if value.shape != shape or not np.issubdtype(value.dtype, np.floating):
        raise InputError(f"{where}: got {value.dtype} {value.shape}, expected floating {shape}")
    with np.errstate(over="ignore"):
        stored = np.ascontiguousarray(value, dtype=feature_set.stored)
    if not _all_finite(stored):
        broken = int((~np.isfinite(stored)).sum())
        raise InputError(
            f"{where}: {broken} of {stored.size} values are NaN or beyond {np.finfo(stored.dtype).max:g}, the largest "
            f"{feature_set.dtype}; look at the picture and the weights, or store this set as float32"
        )
    return stored


def _all_finite(values: NDArray[Any]) -> bool:
    if values.dtype != "<f2":
        return bool(np.isfinite(values).all())
    # Ten times faster than isfinite: numpy converts float16 one by one. An exponent of all ones is Inf or NaN.
    bits = values.view("<u2")
    return bool(((bits & np.uint16(0x7FFF)).max(initial=0)) < 0x7C00)
