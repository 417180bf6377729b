"""Writers of one feature set of one part: records into a shard, their checksums into another file.

    features  ->  checked  ->  encoded  ->  compressed (optional)  ->  crc32c  ->  shard
                                  └ scales of int8  ------------------^  ->  shard of scales

Scales and checksums have files of their own, so that records stay adjacent and aligned. Features are checked here,
where an error can name the image's row. One record is in memory at a time.
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
class WrittenFiles:
    """Sizes of the files of one feature set of one part, and the crc32c of its checksum file."""

    files: dict[str, int]
    checksums: dict[str, int]


class FeatureSetWriter(ABC):
    """Writes the shards and checksums of one feature set of one part."""

    def __init__(self, storage: Storage, feature_set: FeatureSet, geometry: Geometry, part: int) -> None:
        self.feature_set = feature_set
        self._encoder = Encoder(feature_set)
        self._storage, self._part, self._slots = storage, part, geometry.slots(feature_set)
        self._checksums = np.zeros(self._slots, dtype="<u4")
        self._files: dict[str, NewFile] = {}
        self._count = 0  # images or regions so far
        try:
            self._records = self._new_shard(shard_file(feature_set, part))
            self._scales = self._new_shard(scale_file(feature_set, part)) if feature_set.has_scales else None
        except BaseException:
            self.discard()
            raise

    @abstractmethod
    def append(self, row: int, regions: int, features: NDArray[Any] | EncodedFeatures) -> None:
        """Write the features of the image at `row`, which has `regions` regions."""

    @abstractmethod
    def skip(self, regions: int) -> None:
        """Leave an image out that could not be read."""

    def finish(self) -> WrittenFiles:
        """Flush all files to disk."""
        sizes = {shard_file(self.feature_set, self._part): self._records.finish()}
        if self._scales is not None:
            sizes[scale_file(self.feature_set, self._part)] = self._scales.finish()
        name, stored = checksum_file(self.feature_set, self._part), with_crc(self._checksums.tobytes())
        checksums = self._new_file(name)
        checksums.write(stored)
        checksums.finish()
        return WrittenFiles({**sizes, name: len(stored)}, {name: file_crc(stored)})

    def publish(self) -> None:
        """Rename all files into place."""
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
        """Encode features as stored on disk; the arrays are reused by the next call.

        Raises InputError for another shape, a dtype that is not floating, and values that are not finite once encoded:
        an overflow to infinity would only show up later, in a training loss.
        """
        where = f"feature set {self.feature_set.name}, row {row}"
        if isinstance(features, EncodedFeatures):
            return self._check_encoded(features, where, shape)
        if features.shape != shape or not np.issubdtype(features.dtype, np.floating):
            raise InputError(f"{where}: got {features.dtype} {features.shape}, expected floating {shape}")
        return self._encoder(features, where)

    def _check_encoded(
        self, features: EncodedFeatures, where: str, shape: tuple[int, ...]
    ) -> tuple[NDArray[Any], NDArray[np.float16] | None]:
        """Codes and scales as given; their values were checked when they were first written."""
        codes, scales = features.codes, features.scales
        expected = [(self.feature_set.stored, shape)] + [(np.dtype("<f2"), shape[:-1])] * self.feature_set.has_scales
        actual = [(array.dtype, array.shape) for array in (codes, scales) if array is not None]
        if actual != expected:
            raise InputError(f"{where}: got encoded {_describe(actual)}, expected {_describe(expected)}")
        return np.ascontiguousarray(codes), None if scales is None else np.ascontiguousarray(scales)

    def _put(self, slot: int, record: NDArray[Any], scales: NDArray[np.float16] | None) -> None:
        stored = compress(record) if self.feature_set.compression else record
        crc = google_crc32c.value(stored)
        self._records.append(slot, stored)
        if self._scales is not None and scales is not None:
            crc = google_crc32c.extend(crc, scales)
            self._scales.append(slot, scales)
        self._checksums[slot] = crc


class MapWriter(FeatureSetWriter):
    """One record per image. The slot of an image that could not be read stays empty."""

    def append(self, row: int, regions: int, features: NDArray[Any] | EncodedFeatures) -> None:
        self._put(self._count, *self._encode(row, features, self.feature_set.shape))
        self._count += 1

    def skip(self, regions: int) -> None:
        self._count += 1


class TokenWriter(FeatureSetWriter):
    """One row per region, in inner chunks of TOKEN_CHUNK rows; an image's rows may span several."""

    def __init__(self, storage: Storage, feature_set: FeatureSet, geometry: Geometry, part: int) -> None:
        super().__init__(storage, feature_set, geometry, part)
        self._chunk = np.zeros(feature_set.record_shape, dtype=feature_set.stored)
        self._chunk_scales = np.zeros(feature_set.scale_shape, dtype="<f2") if feature_set.has_scales else None

    def append(self, row: int, regions: int, features: NDArray[Any] | EncodedFeatures) -> None:
        self._extend(regions, *self._encode(row, features, (regions, *self.feature_set.shape)))

    def skip(self, regions: int) -> None:
        self._extend(regions)

    def finish(self) -> WrittenFiles:
        unfilled = -self._count % TOKEN_CHUNK
        if unfilled:
            self._extend(unfilled)
        return super().finish()

    def _extend(
        self, regions: int, tokens: NDArray[Any] | None = None, scales: NDArray[np.float16] | None = None
    ) -> None:
        """Append `regions` rows: the tokens, or zeros if None."""
        done = 0
        while done < regions:
            filled = self._count % TOKEN_CHUNK
            count = min(TOKEN_CHUNK - filled, regions - done)
            self._chunk[filled : filled + count] = 0 if tokens is None else tokens[done : done + count]
            if self._chunk_scales is not None:
                self._chunk_scales[filled : filled + count] = 0 if scales is None else scales[done : done + count]
            self._count, done = self._count + count, done + count
            if filled + count == TOKEN_CHUNK:
                self._put(self._count // TOKEN_CHUNK - 1, self._chunk, self._chunk_scales)


def _describe(arrays: list[tuple[np.dtype[Any], tuple[int, ...]]]) -> str:
    return " and ".join(f"{dtype} {shape}" for dtype, shape in arrays)
