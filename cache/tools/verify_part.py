"""Everything that can be said of one feature set of one part: is it what its record, the manifest and itself promise?

From the outside in, so that each step may rely on the one before: the record, the files' sizes, the checksums, the
index, the records' bytes, the padding of tokens. A shard is read from its first byte to its last in large pieces into
memory that is used again, which is as fast as the disk gives it.
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
from regionspot.cache.tools.verify_report import Mend, Problem

_MISSING = "is missing"
# Of one read: what is checked right away should still lie in the processor's own cache; a network is slow to begin.
_LOCAL_BLOCK, _REMOTE_BLOCK = 1 << 20, 8 << 20


@dataclass(frozen=True)
class _Shard:
    """A shard whose index is sound: its records lie one after another in the order of `slots`, from 0 to the index."""

    name: str
    slots: NDArray[np.int64]
    ends: NDArray[np.int64]


class _Found(Exception):
    """What is wrong with a file of the part."""

    def __init__(self, path: str, reason: str, mend: Mend = "drop") -> None:
        super().__init__(path, reason)
        self.path, self.reason, self.mend = path, reason, mend


class PartCheck:
    """Checks parts one after another, in the same memory. Not for several threads at once.

    manifest     None where it is damaged itself: what a part says of its rows is then taken as it is
    quick        leave the records' own bytes out
    bytes_read   so far
    """

    def __init__(self, storage: Storage, geometry: Geometry, manifest: Manifest | None, quick: bool = False) -> None:
        self._storage, self._geometry, self._manifest, self._quick = storage, geometry, manifest, quick
        local = storage.local_path("zarr.json") is not None
        self._block = _LOCAL_BLOCK if local else _REMOTE_BLOCK
        self._memory = np.empty(0, np.uint8)
        self.bytes_read = 0

    def problem(self, feature_set: FeatureSet, part: int) -> Problem | None:
        """The first thing that is wrong with a written part, all its damaged records as one; None if it is sound.

        Nothing that a damaged or unreadable file may hold makes this raise.
        """
        try:
            self._check(feature_set, part)
        except _Found as found:
            if found.path == record_file(feature_set.name, part) and found.reason == _MISSING:
                return None  # dropped meanwhile: it is no written part any more
            mend = found.mend if self._storage.writable or found.mend != "drop" else "restore"
            return Problem(found.path, part, feature_set.name, found.reason, mend)
        return None

    def _check(self, feature_set: FeatureSet, part: int) -> None:
        record = self._record(feature_set, part)
        for name, size in record.files.items():
            with self._reading(name):
                found = self._storage.size(name)
            if found != size:
                raise _Found(name, f"has {found} bytes, {size} were written")
        checksums = self._checksums(feature_set, record)
        filled = self._filled_slots(feature_set, record)
        record_bytes = None if feature_set.compression else feature_set.record_bytes
        data = self._shard(shard_file(feature_set, part), record, checksums, filled, record_bytes)
        scales = None
        if feature_set.has_scales:
            scale_bytes = 2 * math.prod(feature_set.scale_shape)  # float16
            scales = self._shard(scale_file(feature_set, part), record, checksums, filled, scale_bytes)
        if not self._quick:
            self._check_records(feature_set, record, checksums, data, scales)

    def _record(self, feature_set: FeatureSet, part: int) -> PartRecord:
        name = record_file(feature_set.name, part)
        try:
            record = parse_record(self._read(name))
        except ValueError as error:
            raise _Found(name, str(error)) from None
        if misfit := PartIndex(feature_set, self._geometry, self._manifest).misfit(part, record):
            raise _Found(name, misfit)
        return record

    def _checksums(self, feature_set: FeatureSet, record: PartRecord) -> NDArray[np.uint32]:
        """uint32 (slots,): crc32c of each record."""
        name, slots = checksum_file(feature_set, record.part), self._geometry.slots(feature_set)
        stored = self._read(name)
        try:
            checksums = np.frombuffer(without_crc(stored, "its own"), dtype="<u4")
        except ValueError as error:
            raise _Found(name, str(error)) from None
        if file_crc(stored) != record.checksums[name] or len(checksums) != slots:
            raise _Found(name, f"is not the file of {slots} checksums that the part's record speaks of")
        return checksums

    def _filled_slots(self, feature_set: FeatureSet, record: PartRecord) -> NDArray[np.bool_]:
        """bool (slots,): which ones hold a record, those of images that could be read or of regions."""
        filled = np.zeros(self._geometry.slots(feature_set), dtype=bool)
        if feature_set.kind == "token":
            filled[: math.ceil(record.regions / TOKEN_CHUNK)] = True
        else:
            filled[: record.images] = True
            filled[[failure.row - record.first_row for failure in record.failures]] = False
        return filled

    def _shard(
        self,
        name: str,
        record: PartRecord,
        checksums: NDArray[np.uint32],
        filled: NDArray[np.bool_],
        record_bytes: int | None,
    ) -> _Shard:
        """The index of a shard, held against what it has to be."""
        length = index_bytes(len(filled))
        data_bytes = record.files[name] - length
        if data_bytes < 0:
            raise _Found(name, f"is too short to hold an index of {len(filled)} records")
        try:
            offsets, sizes = parse_index(self._read_piece(name, data_bytes, length).tobytes(), data_bytes, record_bytes)
        except ValueError as error:
            raise _Found(name, str(error)) from None
        unexpected = np.flatnonzero((offsets >= 0) != filled)
        if len(unexpected):
            slot = int(unexpected[0])
            found, expected = ("no record", "one") if filled[slot] else ("a record", "none")
            raise _Found(name, f"holds {found} in slot {slot}, expected {expected}")
        if checksums[~filled].any():
            raise _Found(name, "has a checksum for a slot that holds no record")
        ends = np.cumsum(sizes[filled])
        if not np.array_equal(offsets[filled], ends - sizes[filled]) or ends[-1:].sum() != data_bytes:
            raise _Found(name, f"has records that do not lie side by side in its {data_bytes} bytes")
        return _Shard(name, np.flatnonzero(filled), ends)

    def _check_records(
        self,
        feature_set: FeatureSet,
        record: PartRecord,
        checksums: NDArray[np.uint32],
        data: _Shard,
        scales: _Shard | None,
    ) -> None:
        scale_of = {} if scales is None else {slot: piece.copy() for slot, piece in self._pieces(scales)}
        wrong, last = [], np.empty(0, np.uint8)
        for slot, piece in self._pieces(data):
            crc = google_crc32c.value(piece)
            if scales is not None:
                crc = google_crc32c.extend(crc, scale_of[slot])
            if crc != checksums[slot]:
                wrong.append(slot)
            last = piece
        if wrong:
            first = self._told(feature_set, record, wrong[0])
            raise _Found(data.name, f"{len(wrong)} of {len(data.slots)} records do not match their checksums: {first}")
        if feature_set.kind == "token" and len(last):
            self._check_padding(feature_set, record, data.name, last)

    def _told(self, feature_set: FeatureSet, record: PartRecord, slot: int) -> str:
        """The first of the damaged records, as people know it."""
        if feature_set.kind == "token":
            return f"the first is of regions {slot * TOKEN_CHUNK} and on"
        row = record.first_row + slot
        known = "" if self._manifest is None else f" ({self._manifest.paths[row]})"
        return f"the first is of row {row}{known}"

    def _check_padding(self, feature_set: FeatureSet, record: PartRecord, name: str, last: NDArray[np.uint8]) -> None:
        """Tokens behind the part's last region are zero."""
        tokens = np.empty(feature_set.record_shape, feature_set.stored)
        if feature_set.compression:
            try:
                decompress(last.tobytes(), tokens)
            except ValueError as error:
                raise _Found(name, str(error)) from None
        else:
            tokens.reshape(-1).view(np.uint8)[:] = last
        used = record.regions - (len(range(0, record.regions, TOKEN_CHUNK)) - 1) * TOKEN_CHUNK
        if tokens[used:].any():
            raise _Found(name, f"has tokens behind its {record.regions} regions, expected zeros")

    def _pieces(self, shard: _Shard) -> Iterator[tuple[int, NDArray[np.uint8]]]:
        """Each slot and its record's bytes, which are good until the next one is asked for."""
        ends, first = shard.ends, 0
        while first < len(ends):
            begin = int(ends[first - 1]) if first else 0
            # As many as a block takes, one at least.
            after = max(int(np.searchsorted(ends, begin + self._block, side="right")), first + 1)
            block = self._read_piece(shard.name, begin, int(ends[after - 1]) - begin)
            bounds = [0, *(ends[first:after] - begin).tolist()]
            for place, slot in enumerate(shard.slots[first:after].tolist()):
                yield slot, block[bounds[place] : bounds[place + 1]]
            first = after

    def _read_piece(self, name: str, offset: int, length: int) -> NDArray[np.uint8]:
        """Bytes of a file in the memory that the next call uses again."""
        if len(self._memory) < length:
            self._memory = np.empty(max(length, self._block), np.uint8)
        piece = self._memory[:length]
        with self._reading(name):
            self._storage.read_into(name, offset, piece.data)
        self.bytes_read += length
        return piece

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
            raise _Found(name, _MISSING) from None
        except EOFError:
            raise _Found(name, "ends before its last record") from None
        except CacheError as error:
            raise _Found(name, str(error), "restore") from None  # the one file that all of the cache lies in
        except OSError as error:
            raise _Found(name, f"cannot be read: {error.strerror or error}", "access") from None
