"""Verifies one feature set of one part against its part record and the manifest.

Each step relies on the previous one: the part record, file sizes, checksums, the shard's index, the bytes of records,
the padding of tokens. A shard is read sequentially in large blocks into a reused buffer, at disk speed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from regionspot.cache.errors import CacheError
from regionspot.cache.format.manifest import Manifest
from regionspot.cache.format.part_record import PartIndex, PartRecord, parse_record
from regionspot.cache.format.schema import (
    TOKEN_CHUNK,
    FeatureSet,
    Geometry,
    checksum_file,
    record_file,
    scale_file,
    shard_file,
)
from regionspot.cache.storage.atomic_files import file_crc
from regionspot.cache.storage.base import Storage
from regionspot.cache.storage.zarr_shard import decompress, index_bytes, parse_index, without_crc
from regionspot.cache.tools.verify_report import Fix, Problem

_MISSING = "is missing"
# Bytes of one read: a local block stays in the CPU cache until it is checked; a network has latency.
_LOCAL_BLOCK, _REMOTE_BLOCK = 1 << 20, 8 << 20


@dataclass(frozen=True)
class _Shard:
    """A shard with a sound index: its records are adjacent, from offset 0 to the index, in the order of `slots`."""

    name: str
    slots: NDArray[np.int64]
    ends: NDArray[np.int64]


class _Damage(Exception):
    """A problem of one file of the part."""

    def __init__(self, path: str, reason: str, fix: Fix = "drop") -> None:
        super().__init__(path, reason)
        self.path, self.reason, self.fix = path, reason, fix


class PartChecker:
    """Verifies parts one at a time, with a reused buffer. Not thread-safe.

    manifest     None if it is damaged: a part's counts are then not compared with it
    quick        skip the bytes of records
    bytes_read   total so far
    """

    def __init__(self, storage: Storage, geometry: Geometry, manifest: Manifest | None, quick: bool = False) -> None:
        self._storage, self._geometry, self._manifest, self._quick = storage, geometry, manifest, quick
        local = storage.local_path("zarr.json") is not None
        self._block = _LOCAL_BLOCK if local else _REMOTE_BLOCK
        self._buffer = np.empty(0, np.uint8)
        self.bytes_read = 0

    def problem(self, feature_set: FeatureSet, part: int) -> Problem | None:
        """The first problem of a written part, or None; all of its damaged records are one problem.

        Damaged or unreadable files never make it raise.
        """
        try:
            self._check(feature_set, part)
        except _Damage as damage:
            if damage.path == record_file(feature_set.name, part) and damage.reason == _MISSING:
                return None  # dropped meanwhile, so it is pending
            fix = damage.fix if self._storage.writable or damage.fix != "drop" else "restore"
            return Problem(damage.path, part, feature_set.name, damage.reason, fix)
        return None

    def _check(self, feature_set: FeatureSet, part: int) -> None:
        record = self._record(feature_set, part)
        for name, size in record.files.items():
            with self._reading(name):
                actual = self._storage.size(name)
            if actual != size:
                raise _Damage(name, f"has {actual} bytes, {size} were written")
        checksums = self._checksums(feature_set, record)
        filled = self._filled_slots(feature_set, record)
        record_bytes = None if feature_set.compression else feature_set.record_bytes
        data = self._check_index(shard_file(feature_set, part), record, checksums, filled, record_bytes)
        scales = None
        if feature_set.has_scales:
            scale_bytes = 2 * math.prod(feature_set.scale_shape)  # float16
            scales = self._check_index(scale_file(feature_set, part), record, checksums, filled, scale_bytes)
        if not self._quick:
            self._check_records(feature_set, record, checksums, data, scales)

    def _record(self, feature_set: FeatureSet, part: int) -> PartRecord:
        name = record_file(feature_set.name, part)
        try:
            record = parse_record(self._read(name))
        except ValueError as error:
            raise _Damage(name, str(error)) from None
        if misfit := PartIndex(feature_set, self._geometry, self._manifest).misfit(part, record):
            raise _Damage(name, misfit)
        return record

    def _checksums(self, feature_set: FeatureSet, record: PartRecord) -> NDArray[np.uint32]:
        """uint32 (slots,): crc32c of each record."""
        name, slots = checksum_file(feature_set, record.part), self._geometry.slots(feature_set)
        stored = self._read(name)
        try:
            checksums = np.frombuffer(without_crc(stored, "its own"), dtype="<u4")
        except ValueError as error:
            raise _Damage(name, str(error)) from None
        if file_crc(stored) != record.checksums[name] or len(checksums) != slots:
            raise _Damage(name, f"is not the file of {slots} checksums that the part record describes")
        return checksums

    def _filled_slots(self, feature_set: FeatureSet, record: PartRecord) -> NDArray[np.bool_]:
        """bool (slots,): the slots that must have a record: those of readable images, or of regions."""
        filled = np.zeros(self._geometry.slots(feature_set), dtype=bool)
        if feature_set.kind == "token":
            filled[: math.ceil(record.regions / TOKEN_CHUNK)] = True
        else:
            filled[: record.images] = True
            filled[[failure.row - record.first_row for failure in record.failures]] = False
        return filled

    def _check_index(
        self,
        name: str,
        record: PartRecord,
        checksums: NDArray[np.uint32],
        filled: NDArray[np.bool_],
        record_bytes: int | None,
    ) -> _Shard:
        """Read a shard's index and check it."""
        length = index_bytes(len(filled))
        data_bytes = record.files[name] - length
        if data_bytes < 0:
            raise _Damage(name, f"is too short for an index of {len(filled)} records")
        try:
            offsets, sizes = parse_index(self._read_range(name, data_bytes, length).tobytes(), data_bytes, record_bytes)
        except ValueError as error:
            raise _Damage(name, str(error)) from None
        unexpected = np.flatnonzero((offsets >= 0) != filled)
        if len(unexpected):
            slot = int(unexpected[0])
            actual, expected = ("no record", "one") if filled[slot] else ("a record", "none")
            raise _Damage(name, f"has {actual} in slot {slot}, expected {expected}")
        if checksums[~filled].any():
            raise _Damage(name, "has a checksum for a slot without a record")
        ends = np.cumsum(sizes[filled])
        if not np.array_equal(offsets[filled], ends - sizes[filled]) or ends[-1:].sum() != data_bytes:
            raise _Damage(name, f"has records that are not adjacent in its {data_bytes} bytes")
        return _Shard(name, np.flatnonzero(filled), ends)

    def _check_records(
        self,
        feature_set: FeatureSet,
        record: PartRecord,
        checksums: NDArray[np.uint32],
        data: _Shard,
        scales: _Shard | None,
    ) -> None:
        scale_of = {} if scales is None else {slot: scale.copy() for slot, scale in self._read_records(scales)}
        wrong, last = [], np.empty(0, np.uint8)
        for slot, record_bytes in self._read_records(data):
            crc = google_crc32c.value(record_bytes)
            if scales is not None:
                crc = google_crc32c.extend(crc, scale_of[slot])
            if crc != checksums[slot]:
                wrong.append(slot)
            last = record_bytes
        if wrong:
            first = self._describe_slot(feature_set, record, wrong[0])
            raise _Damage(data.name, f"{len(wrong)} of {len(data.slots)} records do not match their checksums: {first}")
        if feature_set.kind == "token" and len(last):
            self._check_padding(feature_set, record, data.name, last)

    def _describe_slot(self, feature_set: FeatureSet, record: PartRecord, slot: int) -> str:
        """The image or regions of a damaged record."""
        if feature_set.kind == "token":
            return f"the first is of regions {slot * TOKEN_CHUNK} and on"
        row = record.first_row + slot
        path = "" if self._manifest is None else f" ({self._manifest.paths[row]})"
        return f"the first is of row {row}{path}"

    def _check_padding(self, feature_set: FeatureSet, record: PartRecord, name: str, last: NDArray[np.uint8]) -> None:
        """Check that tokens after the part's last region are zero."""
        tokens = np.empty(feature_set.record_shape, feature_set.stored)
        if feature_set.compression:
            try:
                decompress(last.tobytes(), tokens)
            except ValueError as error:
                raise _Damage(name, str(error)) from None
        else:
            tokens.reshape(-1).view(np.uint8)[:] = last
        used = record.regions - (len(range(0, record.regions, TOKEN_CHUNK)) - 1) * TOKEN_CHUNK
        if tokens[used:].any():
            raise _Damage(name, f"has tokens after its {record.regions} regions, expected zeros")

    def _read_records(self, shard: _Shard) -> Iterator[tuple[int, NDArray[np.uint8]]]:
        """Each slot and its record's bytes, in a buffer that the next one reuses."""
        ends, first = shard.ends, 0
        while first < len(ends):
            start = int(ends[first - 1]) if first else 0
            # As many as fit into a block, at least one.
            stop = max(int(np.searchsorted(ends, start + self._block, side="right")), first + 1)
            block = self._read_range(shard.name, start, int(ends[stop - 1]) - start)
            bounds = [0, *(ends[first:stop] - start).tolist()]
            for number, slot in enumerate(shard.slots[first:stop].tolist()):
                yield slot, block[bounds[number] : bounds[number + 1]]
            first = stop

    def _read_range(self, name: str, offset: int, length: int) -> NDArray[np.uint8]:
        """Bytes of a file, in a buffer that the next call reuses."""
        if len(self._buffer) < length:
            self._buffer = np.empty(max(length, self._block), np.uint8)
        out = self._buffer[:length]
        with self._reading(name):
            self._storage.read_into(name, offset, out.data)
        self.bytes_read += length
        return out

    def _read(self, name: str) -> bytes:
        with self._reading(name):
            stored = self._storage.read(name)
        self.bytes_read += len(stored)
        return stored

    @contextmanager
    def _reading(self, name: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise _Damage(name, _MISSING) from None
        except EOFError:
            raise _Damage(name, "ends before its last record") from None
        except CacheError as error:
            raise _Damage(name, str(error), "restore") from None  # the single file of an HDF5 cache
        except OSError as error:
            raise _Damage(name, f"cannot be read: {error.strerror or error}", "access") from None
