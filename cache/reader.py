"""Reading records straight from the shard files: one positioned read each, into memory that is there already.

A Zarr library takes 10 to 20 times as long for the same bytes. `pread` and not a memory map, for a shard cut short
under a map kills the process, and on a cold disk a map reads four times what was asked for.

What is kept of a part, its offsets and checksums, is 20 bytes a record; only open files are bounded.
"""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from regionspot.cache.errors import CorruptPartError, NotExtractedError
from regionspot.cache.manifest import Manifest
from regionspot.cache.records import PartRecord, load_record
from regionspot.cache.schema import TOKEN_CHUNK, FeatureSet, Geometry, checksum_file, record_file, shard_file
from regionspot.cache.shard import read_offsets, without_crc
from regionspot.cache.storage import Storage

Check = Literal["first", "always", "never"]  # when a record's checksum is looked at; "first" is once a process

_OPEN_FILES = 64  # of one feature set: training on six caches at once stays under the usual 1,024 a process


class _OpenFile:
    """A descriptor closed when nobody holds it any more, so that one thread may forget it while another reads."""

    def __init__(self, path: Path) -> None:
        self.fd = -1
        self.fd = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)


class FeatureReader:
    """Reads one feature set. Safe to use from several threads and after a fork: no file position is shared."""

    def __init__(
        self, storage: Storage, feature_set: FeatureSet, manifest: Manifest, geometry: Geometry, check: Check
    ) -> None:
        self.feature_set = feature_set
        self._storage, self._manifest, self._geometry, self._check = storage, manifest, geometry, check
        self._parts: dict[int, _Part] = {}
        self._open = lru_cache(maxsize=_OPEN_FILES)(_OpenFile)

    def read_map(self, row: int, out: NDArray[Any]) -> None:
        """Read one picture's record into the contiguous (T, D) `out`."""
        part = self._part_of(row)
        slot = row % self._geometry.part_size
        self._read(part, slot, row, out)
        self._verify(part, slot, row, out)

    def read_tokens(self, row: int, out: NDArray[Any]) -> None:
        """Read the tokens of one picture's regions into the contiguous (n, C) `out`."""
        part = self._part_of(row)
        first = int(self._manifest.offsets[row] - self._manifest.offsets[part.first_row])
        done = 0
        while done < len(out):
            slot, skipped = divmod(first + done, TOKEN_CHUNK)
            wanted = out[done : done + TOKEN_CHUNK - skipped]
            if self._needs_check(part, slot):
                chunk = np.empty(self.feature_set.record_shape, dtype=self.feature_set.stored)
                self._read(part, slot, row, chunk)
                self._verify(part, slot, row, chunk)
                wanted[:] = chunk[skipped : skipped + len(wanted)]
            else:
                self._read(part, slot, row, wanted, skipped * out.strides[0])
            done += len(wanted)

    def record(self, part: int) -> PartRecord:
        """A part's record. Raises FileNotFoundError where it is not written, CorruptPartError where it is damaged."""
        path = record_file(self.feature_set.name, part)
        try:
            record = load_record(self._storage, path)
        except FileNotFoundError:
            raise
        except (ValueError, TypeError, KeyError, OSError) as error:
            raise self._corrupt(part, path, str(error)) from None
        shard = shard_file(self.feature_set, part)
        if record.part != part or shard not in record.files:
            raise self._corrupt(part, path, f"is the record of part {record.part} with files {sorted(record.files)}")
        return record

    def _part_of(self, row: int) -> _Part:
        number = row // self._geometry.part_size
        part = self._parts.get(number)
        if part is None:
            part = self._parts[number] = self._load_part(number, row)
        if row in part.failures:
            raise NotExtractedError(
                f"{self._storage.address}: {self._picture(row)} could not be read when it was extracted: "
                f"{part.failures[row]}; take only the rows of valid_rows()"
            )
        return part

    def _load_part(self, number: int, row: int) -> _Part:
        try:
            record = self.record(number)
        except FileNotFoundError:
            raise NotExtractedError(
                f"{self._storage.address}: {self._picture(row)} is in part {number} of {self.feature_set.name}, "
                "which is not written yet; run the same `regionspot extract` again, it goes on where it stopped"
            ) from None
        name = shard_file(self.feature_set, number)
        try:
            path = self._storage.local_path(name)
            file = self._open(path)  # held here until its index is read
            return _Part(self._storage, path, self.feature_set, self._geometry, record, file.fd)
        except FileNotFoundError as error:
            raise self._corrupt(number, error.filename, "is missing") from None
        except (ValueError, OSError) as error:
            raise self._corrupt(number, name, str(error)) from None

    def _read(self, part: _Part, slot: int, row: int, out: NDArray[Any], skip: int = 0) -> None:
        offset = part.offsets[slot]
        if offset < 0:
            raise self._corrupt(part.number, part.path, f"holds no record of {self._picture(row)}")
        file = self._open(part.path)  # held here until the read is over
        if os.preadv(file.fd, [out.data], offset + skip) != out.nbytes:
            raise self._corrupt(part.number, part.path, f"ends inside the record of {self._picture(row)}")

    def _needs_check(self, part: _Part, slot: int) -> bool:
        return self._check == "always" or (self._check == "first" and not part.verified[slot])

    def _verify(self, part: _Part, slot: int, row: int, record: NDArray[Any]) -> None:
        if not self._needs_check(part, slot):
            return
        if google_crc32c.value(record) != part.checksums[slot]:
            what = f"the record of {self._picture(row)} does not match its checksum"
            raise self._corrupt(part.number, part.path, what)
        part.verified[slot] = True

    def _picture(self, row: int) -> str:
        return f"picture {self._manifest.image_ids[row]} (row {row}, {self._manifest.paths[row]})"

    def _corrupt(self, part: int, file: object, what: str) -> CorruptPartError:
        return CorruptPartError(
            f"{self._storage.address}: {file}: {what}; `regionspot cache repair` drops part {part}, then the same "
            "`regionspot extract` makes it anew"
        )


class _Part:
    """What it takes to read a part's records: offsets (-1 where there is none), checksums, and which were verified."""

    def __init__(
        self,
        storage: Storage,
        path: Path,
        feature_set: FeatureSet,
        geometry: Geometry,
        record: PartRecord,
        fd: int,
    ) -> None:
        self.number = record.part
        self.path = path
        self.first_row = record.first_row
        self.failures = {failure.row: failure.reason for failure in record.failures}
        size, expected = os.fstat(fd).st_size, record.files[shard_file(feature_set, record.part)]
        if size != expected:
            raise ValueError(f"has {size} bytes, {expected} were written")
        slots = geometry.slots(feature_set)
        self.offsets: list[int] = read_offsets(fd, slots, feature_set.record_bytes).tolist()
        checksums = without_crc(storage.read(checksum_file(feature_set, record.part)), "its checksums' file")
        self.checksums: list[int] = np.frombuffer(checksums, dtype="<u4").tolist()
        self.verified = bytearray(slots)
        if len(self.checksums) != slots:
            raise ValueError(f"has {len(self.checksums)} checksums, expected {slots}")
