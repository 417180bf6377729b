"""One feature set of one part on its way to disk: records into a shard, their checksums into a file beside it.

    features, checked  ->  encoded  ->  compressed, where asked for  ->  crc32c  ->  shard
                              └ scales of int8  -------------------------^  ->  a shard of their own

Scales and checksums lie apart so that records stay adjacent and aligned. Features are checked here, where a wrong one
still has an image's row to be named by. One record is held at a time, so memory does not grow with the part.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from regionspot.cache.errors import InputError
from regionspot.cache.format.encodings import Encoder
from regionspot.cache.format.schema import (
    TOKEN_CHUNK,
    EncodedFeatures,
    FeatureSet,
    Geometry,
    checksum_file,
    scale_file,
    shard_file,
)
from regionspot.cache.storage.atomic_files import file_crc
from regionspot.cache.storage.base import NewFile, Storage
from regionspot.cache.storage.zarr_shard import ShardWriter, compress, with_crc


@dataclass(frozen=True)
class Finished:
    """Files of one feature set of one part: their bytes, and the crc32c of those that hold checksums."""

    files: dict[str, int]
    checksums: dict[str, int]


class SetWriter(ABC):
    """The shards and the checksums of one feature set in one part."""

    def __init__(self, storage: Storage, feature_set: FeatureSet, geometry: Geometry, part: int) -> None:
        self.feature_set = feature_set
        self._encoder = Encoder(feature_set)
        self._storage, self._part, self._slots = storage, part, geometry.slots(feature_set)
        self._checksums = np.zeros(self._slots, dtype="<u4")
        self._files: dict[str, NewFile] = {}
        self._taken = 0  # images or regions so far
        try:
            self._records = self._new_shard(shard_file(feature_set, part))
            self._scales = self._new_shard(scale_file(feature_set, part)) if feature_set.has_scales else None
        except BaseException:
            self.discard()
            raise

    @abstractmethod
    def append(self, row: int, regions: int, features: NDArray[Any] | EncodedFeatures) -> None:
        """Take the features of the image at `row`, which has that many regions."""

    @abstractmethod
    def skip(self, regions: int) -> None:
        """Take an image that could not be read."""

    def finish(self) -> Finished:
        """Flush all files."""
        sizes = {shard_file(self.feature_set, self._part): self._records.finish()}
        if self._scales is not None:
            sizes[scale_file(self.feature_set, self._part)] = self._scales.finish()
        name, stored = checksum_file(self.feature_set, self._part), with_crc(self._checksums.tobytes())
        checksums = self._new_file(name)
        checksums.write(stored)
        checksums.finish()
        return Finished({**sizes, name: len(stored)}, {name: file_crc(stored)})

    def publish(self) -> None:
        """Give all files their names."""
        for file in self._files.values():
            file.publish()

    def discard(self) -> None:
        for file in self._files.values():
            file.discard()

    def _new_file(self, name: str) -> NewFile:
        self._files[name] = self._storage.create(name)
        return self._files[name]

    def _new_shard(self, name: str) -> ShardWriter:
        return ShardWriter(self._new_file(name), self._slots)

    def _encode(
        self, row: int, features: NDArray[Any] | EncodedFeatures, shape: tuple[int, ...]
    ) -> tuple[NDArray[Any], NDArray[np.float16] | None]:
        """Features as they lie on disk, good until the next call.

        Raises InputError for another shape, for values that are not floating, and for those that are not finite once
        they are stored: an overflow to infinity would be found months later, in somebody's loss.
        """
        where = f"feature set {self.feature_set.name}, row {row}"
        if isinstance(features, EncodedFeatures):
            return self._as_stored(features, where, shape)
        if features.shape != shape or not np.issubdtype(features.dtype, np.floating):
            raise InputError(f"{where}: got {features.dtype} {features.shape}, expected floating {shape}")
        return self._encoder(features, where)

    def _as_stored(
        self, features: EncodedFeatures, where: str, shape: tuple[int, ...]
    ) -> tuple[NDArray[Any], NDArray[np.float16] | None]:
        """Codes and scales as they came; what is in them was checked when they were first stored."""
        codes, scales = features.codes, features.scales
        expected = [(self.feature_set.stored, shape)] + [(np.dtype("<f2"), shape[:-1])] * self.feature_set.has_scales
        found = [(array.dtype, array.shape) for array in (codes, scales) if array is not None]
        if found != expected:
            raise InputError(f"{where}: got stored {_words(found)}, expected {_words(expected)}")
        return np.ascontiguousarray(codes), None if scales is None else np.ascontiguousarray(scales)

    def _put(self, slot: int, record: NDArray[Any], scales: NDArray[np.float16] | None) -> None:
        stored = compress(record) if self.feature_set.compression else record
        crc = google_crc32c.value(stored)
        self._records.append(slot, stored)
        if self._scales is not None and scales is not None:
            crc = google_crc32c.extend(crc, scales)
            self._scales.append(slot, scales)
        self._checksums[slot] = crc


class MapWriter(SetWriter):
    """One record an image. An image that could not be read has none, so its slot stays empty."""

    def append(self, row: int, regions: int, features: NDArray[Any] | EncodedFeatures) -> None:
        self._put(self._taken, *self._encode(row, features, self.feature_set.shape))
        self._taken += 1

    def skip(self, regions: int) -> None:
        self._taken += 1


class TokenWriter(SetWriter):
    """One row a region, gathered into inner chunks of TOKEN_CHUNK; an image's rows may straddle two."""

    def __init__(self, storage: Storage, feature_set: FeatureSet, geometry: Geometry, part: int) -> None:
        super().__init__(storage, feature_set, geometry, part)
        self._chunk = np.zeros(feature_set.record_shape, dtype=feature_set.stored)
        self._chunk_scales = np.zeros(feature_set.scale_shape, dtype="<f2") if feature_set.has_scales else None

    def append(self, row: int, regions: int, features: NDArray[Any] | EncodedFeatures) -> None:
        self._extend(regions, *self._encode(row, features, (regions, *self.feature_set.shape)))

    def skip(self, regions: int) -> None:
        self._extend(regions)

    def finish(self) -> Finished:
        unfilled = -self._taken % TOKEN_CHUNK
        if unfilled:
            self._extend(unfilled)
        return super().finish()

    def _extend(
        self, regions: int, tokens: NDArray[Any] | None = None, scales: NDArray[np.float16] | None = None
    ) -> None:
        """Take that many rows, zeros where no tokens are given."""
        done = 0
        while done < regions:
            filled = self._taken % TOKEN_CHUNK
            count = min(TOKEN_CHUNK - filled, regions - done)
            self._chunk[filled : filled + count] = 0 if tokens is None else tokens[done : done + count]
            if self._chunk_scales is not None:
                self._chunk_scales[filled : filled + count] = 0 if scales is None else scales[done : done + count]
            self._taken, done = self._taken + count, done + count
            if filled + count == TOKEN_CHUNK:
                self._put(self._taken // TOKEN_CHUNK - 1, self._chunk, self._chunk_scales)


def _words(arrays: list[tuple[np.dtype[Any], tuple[int, ...]]]) -> str:
    return " and ".join(f"{dtype} {shape}" for dtype, shape in arrays)
