"""Reading the records of one part of one feature set.

Opening a part loads the part record, the index at the end of each shard and the checksums; each of these files carries
its own checksum. An open part takes 21 bytes per record (int8: 37) and about 4 KB, so thousands can stay open.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from regionspot.cache.format.part_record import PartIndex, PartRecord, load_record
from regionspot.cache.format.schema import FeatureSet, checksum_file, record_file, scale_file, shard_file
from regionspot.cache.storage.atomic_files import file_crc
from regionspot.cache.storage.base import ReplacedError, ShardFile, Storage
from regionspot.cache.storage.zarr_shard import decompress, index_bytes, parse_index, without_crc

OpenShard = Callable[[str, int], ShardFile]  # opens a shard by its name and expected size in bytes

Bytes = NDArray[np.uint8]
SCALE_BYTES = 2  # float16


class DamagedError(Exception):
    """A damaged file of a part; the message is text to put after the file's name."""

    def __init__(self, file: str, reason: str) -> None:
        super().__init__(reason)
        self.file = file


class PartReader:
    """Reads records by slot. Safe to use from several threads and after a fork.

    record     the part record
    failures   why images could not be read during extraction, by row
    seen       1 for each slot that was read, and verified if that was requested; always 0 if the file may be replaced
               between two reads, as in an object store

    Raises FileNotFoundError if the part is not written, DamagedError for damaged files, OSError for errors of the disk
    or network.
    """

    def __init__(
        self, storage: Storage, feature_set: FeatureSet, index: PartIndex, part: int, slots: int, open_shard: OpenShard
    ) -> None:
        self.generation = 0  # set by PartOpener
        record = self.record = load_part_record(storage, feature_set, index, part)
        self.first_row = record.first_row
        self.failures = {failure.row: failure.reason for failure in record.failures}
        self.compressed = feature_set.compression is not None
        self.seen = bytearray(slots)
        size = None if self.compressed else feature_set.record_bytes
        self._data = _IndexedShard(shard_file(feature_set, part), record, slots, open_shard, size)
        self._scales: _IndexedShard | None = None
        if feature_set.has_scales:
            size = math.prod(feature_set.scale_shape) * SCALE_BYTES
            self._scales = _IndexedShard(scale_file(feature_set, part), record, slots, open_shard, size)
        self._checksums = _load_checksums(storage, checksum_file(feature_set, part), record, slots).data

    def prefetch(self, slot: int) -> None:
        """Ask the kernel to read a record from disk, while others are copied."""
        if size := self._data.sizes[slot]:
            with suppress(ReplacedError, OSError):  # reading reports it
                self._data.file.prefetch(self._data.offsets[slot], size)

    def read(self, slot: int, out: Bytes, scales: Bytes, check: bool) -> None:
        """Read a whole record into `out` and its scales into `scales` (empty unless the set has scales)."""
        stored = np.empty(self._data.sizes[slot], np.uint8) if self.compressed else out
        self._data.read(slot, 0, stored)
        if self._scales is not None:
            self._scales.read(slot, 0, scales)
        if check and google_crc32c.extend(google_crc32c.value(stored), scales) != self._checksums[slot]:
            raise DamagedError(self._data.name, "does not match its checksum")
        if self.compressed:
            try:
                decompress(stored.data, out)
            except ValueError as error:
                raise DamagedError(self._data.name, str(error)) from None
        self.seen[slot] = self._data.file.is_snapshot

    def read_some(self, slot: int, skipped: int, out: Bytes, skipped_scales: int, scales: Bytes) -> None:
        """Read a slice of an uncompressed record into `out`, from byte `skipped`, without verifying the checksum."""
        self._data.read(slot, skipped, out)
        if self._scales is not None:
            self._scales.read(slot, skipped_scales, scales)
        self.seen[slot] = self._data.file.is_snapshot


class _IndexedShard:
    """An open shard with the offset (-1 if missing) and size of each record."""

    def __init__(
        self, name: str, record: PartRecord, slots: int, open_shard: OpenShard, record_bytes: int | None
    ) -> None:
        self.name = name
        try:
            self.file = open_shard(name, record.files[name])
            data_bytes = self.file.size - index_bytes(slots)
            if data_bytes < 0:
                raise ValueError(f"is too short to hold an index of {slots} records")
            stored = np.empty(index_bytes(slots), np.uint8)
            self.file.read_into(data_bytes, stored)
            offsets, sizes = parse_index(stored.tobytes(), data_bytes, record_bytes)
        except FileNotFoundError:
            raise DamagedError(name, "is missing") from None
        except (ValueError, EOFError) as error:
            raise DamagedError(name, str(error)) from None
        # As memoryviews: their elements become Python ints faster than numpy's.
        self.offsets, self.sizes = offsets.data, sizes.data

    def read(self, slot: int, skipped: int, out: Bytes) -> None:
        """Read a slice of a slot's record into `out`, from byte `skipped`."""
        offset = self.offsets[slot]
        if offset < 0:
            raise DamagedError(self.name, "is missing")
        try:
            self.file.read_into(offset + skipped, out)
        except EOFError as error:
            raise DamagedError(self.name, f"is truncated: {error}") from None


def load_part_record(storage: Storage, feature_set: FeatureSet, index: PartIndex, part: int) -> PartRecord:
    """A part's record. Raises FileNotFoundError if it is not written, DamagedError, OSError."""
    name = record_file(feature_set.name, part)
    try:
        record = load_record(storage, name)
    except ValueError as error:
        raise DamagedError(name, str(error)) from None
    if misfit := index.misfit(part, record):
        raise DamagedError(name, misfit)
    return record


def _load_checksums(storage: Storage, name: str, record: PartRecord, slots: int) -> NDArray[np.uint32]:
    try:
        stored = storage.read(name)
        checksums = np.frombuffer(without_crc(stored, "its checksums' file"), dtype="<u4")
    except FileNotFoundError:
        raise DamagedError(name, "is missing") from None
    except ValueError as error:
        raise DamagedError(name, str(error)) from None
    if len(checksums) != slots or file_crc(stored) != record.checksums.get(name):
        raise DamagedError(name, "holds the checksums of another part")
    return checksums.astype(np.uint32)
