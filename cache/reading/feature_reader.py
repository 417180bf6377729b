"""Reading records of one feature set from the shard files into caller-provided buffers.

A Zarr library takes 10 to 20 times as long for the same bytes. A reader keeps a bounded number of open parts, so its
memory does not depend on the size of the cache; mapped pages belong to the kernel, which can reclaim them at any time.
"""

from __future__ import annotations

import errno
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Literal

import numpy as np

from regionspot.cache.errors import CacheError, CorruptPartError, NotExtractedError
from regionspot.cache.format.manifest import Manifest
from regionspot.cache.format.part_record import PartIndex, PartRecord
from regionspot.cache.format.schema import TOKEN_CHUNK, FeatureSet, Geometry
from regionspot.cache.machine import available_memory, processors
from regionspot.cache.reading.part_reader import SCALE_BYTES, Bytes, DamagedError, PartReader, load_part_record
from regionspot.cache.storage.base import Access, ReplacedError, Storage
from regionspot.cache.storage.shard_files import ShardOpener

Check = Literal["first", "always", "never"]  # when to verify a record's checksum; "first" is once per process

_OPEN_PARTS_BYTES = 64 << 20  # memory of a reader's open parts: 4,000 of 512 records, a terabyte of CLIP's maps
_PART_BYTES = 4000  # memory of an open part, without its records
_MIN_OPEN_PARTS = 16
_PREFETCHED = 32  # records requested from the disk at once: fewer leave it idle, more evict pages still needed
_RETRIES = 3  # for an image whose files are replaced while it is read
_THREADS = 4  # for a local cache: each copies 5 to 10 GB/s, more than a GPU can take


class PartOpener:
    """Opens parts by number. Separate from the reader to avoid a reference cycle: a released reader closes its files.

    generation   incremented each time files were found to be replaced; an open part keeps the value of its opening
    """

    def __init__(self, storage: Storage, feature_set: FeatureSet, index: PartIndex, slots: int, mapped: bool) -> None:
        self._storage, self._feature_set, self._index, self._slots = storage, feature_set, index, slots
        self._open_shard = ShardOpener(storage, mapped)
        self.generation = 0

    def __call__(self, part: int) -> PartReader:
        generation = self.generation
        opened = PartReader(self._storage, self._feature_set, self._index, part, self._slots, self._open_shard)
        opened.generation = generation
        return opened

    def begin_generation(self) -> None:
        self.generation += 1
        self._open_shard.close_files()


class FeatureReader(ABC):
    """Reads one feature set. Safe to use from several threads and after a fork.

    threads   that can usefully read at once
    """

    def __init__(
        self,
        storage: Storage,
        feature_set: FeatureSet,
        manifest: Manifest,
        geometry: Geometry,
        check: Check,
        access: Access,
    ) -> None:
        self.feature_set, self.manifest, self.geometry = feature_set, manifest, geometry
        self.address = storage.address
        self._storage, self._check = storage, check
        self._part_size, self._row_bytes = geometry.part_size, _row_bytes(feature_set)
        self._offsets = manifest.offsets.data  # a memoryview: its elements are Python ints
        local = storage.on_disk
        self._mapped = access == "map" or (access == "auto" and local and _fits_into_memory(feature_set, manifest))
        self.threads = min(_THREADS, processors()) if local else storage.readers
        slots = geometry.slots(feature_set)
        max_parts = max(
            _MIN_OPEN_PARTS, _OPEN_PARTS_BYTES // (_PART_BYTES + slots * (37 if feature_set.has_scales else 21))
        )
        self._index = PartIndex(feature_set, geometry, manifest)
        self._opener = PartOpener(storage, feature_set, self._index, slots, self._mapped)
        self._parts = lru_cache(maxsize=max_parts)(self._opener)

    def read(self, rows: Sequence[int], outs: Sequence[Bytes], scales: Sequence[Bytes]) -> None:
        """Read the features of the images at `rows`.

        outs     for each row, a buffer for the bytes of an array (T, D), or (n, C) for its n regions
        scales   for each row, a buffer for its float16 scales, (T,) or (n,); empty unless the set has scales

        Raises NotExtractedError for a row whose part is not committed or whose image could not be read,
        CorruptPartError for bytes that do not match their checksum, CacheError for errors of the disk or network.
        """
        parts = [self._part_of(row) for row in rows]
        self._prefetch(parts, rows, 0)
        for index, (part, row) in enumerate(zip(parts, rows, strict=True)):
            if index % _PREFETCHED == 0:
                self._prefetch(parts, rows, index + _PREFETCHED)
            try:
                self._read_one(part, row, outs[index], scales[index])
            except (ReplacedError, DamagedError, OSError) as error:
                self._retry_read(error, part, row, outs[index], scales[index])

    def record(self, part: int) -> PartRecord:
        """A part's record. Raises FileNotFoundError if it is not written, CorruptPartError if it is damaged."""
        try:
            return load_part_record(self._storage, self.feature_set, self._index, part)
        except DamagedError as error:
            raise self._corrupt(part, error.file, str(error)) from None

    def records(self) -> list[PartRecord]:
        """The records of all written parts, in any order."""
        parts = self.written_parts()
        if self._storage.on_disk:
            # One thread: two would mostly wait for Python's lock, and take three times as long.
            return [self.record(part) for part in parts]
        # In parallel: an object store takes 20 ms for each of thousands.
        with ThreadPoolExecutor(self._storage.readers) as pool:
            return list(pool.map(self.record, parts))

    def written_parts(self) -> set[int]:
        """Numbers of the written parts; listed at each call, because other processes may write parts."""
        files = self._storage.list_files(f"parts/{self.feature_set.name}")
        stems = (file.removesuffix(".json") for file in files if file.endswith(".json"))
        return {int(stem) for stem in stems if stem.isdigit() and int(stem) < self.geometry.n_parts}

    @abstractmethod
    def _slot(self, part: PartReader, row: int) -> int:
        """The slot of a row's record, or of the first one."""

    @abstractmethod
    def _read_one(self, part: PartReader, row: int, out: Bytes, scales: Bytes) -> None:
        """Read one image's features."""

    def _prefetch(self, parts: Sequence[PartReader], rows: Sequence[int], first: int) -> None:
        """Ask the kernel to read the next records from disk, while others are copied."""
        window = slice(first, first + _PREFETCHED)
        for part, row in zip(parts[window], rows[window], strict=True):
            slot = self._slot(part, row)
            # A prefetch takes 4 microseconds, and a mapped record that was read before is most likely still in memory.
            if not (self._mapped and part.seen[slot]):
                part.prefetch(slot)

    def _part_of(self, row: int) -> PartReader:
        try:
            part = self._parts(row // self._part_size)
        except (DamagedError, OSError) as error:
            part = self._retry_open(error, row)
        if part.failures and row in part.failures:
            raise NotExtractedError(
                f"{self._storage.address}: {self._image(row)} could not be read when it was extracted: "
                f"{part.failures[row]}; read only rows from valid_rows()"
            )
        return part

    def _retry_open(self, error: Exception, row: int) -> PartReader:
        """Open the part of a row again after an error; raises its public form if that fails too.

        Its files may have been replaced during the first attempt, or be damaged local copies of remote files.
        """
        number = row // self._part_size
        if isinstance(error, DamagedError):
            self._storage.drop_local_copy(error.file)
            self._begin_generation()
            try:
                return self._parts(number)
            except (DamagedError, OSError) as second_error:
                error = second_error
        if isinstance(error, DamagedError):
            raise self._corrupt(number, error.file, str(error))
        if isinstance(error, FileNotFoundError):
            raise NotExtractedError(
                f"{self._storage.address}: {self._image(row)} is in part {number} of {self.feature_set.name}, "
                "which is not written yet; run the same `regionspot extract` again to resume"
            )
        raise self._io_error(row, error)

    def _retry_read(self, error: Exception, part: PartReader, row: int, out: Bytes, scales: Bytes) -> None:
        """Read an image again while its files may have been replaced; otherwise raises the error's public form."""
        for _ in range(_RETRIES):
            if not self._may_be_replaced(error, part):
                break
            part = self._reopen(part, row)
            try:
                return self._read_one(part, row, out, scales)
            except (ReplacedError, DamagedError, OSError) as next_error:
                error = next_error
        if isinstance(error, DamagedError):
            problem = f"the record of {self._image(row)} {error}"
            raise self._corrupt(row // self._part_size, error.file, problem)
        raise self._io_error(row, error)

    def _may_be_replaced(self, error: Exception, part: PartReader) -> bool:
        """Whether an open part's files may have been replaced, or a damaged local copy was dropped."""
        if isinstance(error, ReplacedError) or (isinstance(error, OSError) and error.errno == errno.ESTALE):
            return True
        if not isinstance(error, DamagedError):
            return False
        try:
            replaced = self.record(part.record.part) != part.record
        except (CacheError, OSError):
            replaced = True  # being replaced right now; other problems are reported when it is opened
        return self._storage.drop_local_copy(error.file) or replaced

    def _reopen(self, part: PartReader, row: int) -> PartReader:
        """Open a part again; the first caller that finds its files replaced does so for all threads."""
        if part.generation == self._opener.generation:
            self._begin_generation()
        current = self._part_of(row)
        if current.generation != self._opener.generation:  # another thread had started to open it before
            self._parts.cache_clear()
            current = self._part_of(row)
        return current

    def _begin_generation(self) -> None:
        """Close everything: parts opened from now on have the current files."""
        self._opener.begin_generation()
        self._parts.cache_clear()

    def _must_check(self, part: PartReader, slot: int) -> bool:
        return self._check == "always" or (self._check == "first" and not part.seen[slot])

    def _image(self, row: int) -> str:
        return f"image {self.manifest.image_ids[row]} (row {row}, {self.manifest.paths[row]})"

    def _corrupt(self, part: int, file: str, problem: str) -> CorruptPartError:
        return CorruptPartError(f"{self._storage.address}: {file}: {problem}; {self._storage.repair_hint(part)}")

    def _io_error(self, row: int, error: Exception) -> CacheError:
        reason = getattr(error, "strerror", None) or str(error) or "its files keep changing"
        return CacheError(
            f"{self._storage.address}: {self._image(row)} could not be read from {self.feature_set.name}: {reason}; "
            "fix the disk or the connection and read it again"
        )


class MapReader(FeatureReader):
    """One record per image."""

    def _slot(self, part: PartReader, row: int) -> int:
        return row - part.first_row

    def _read_one(self, part: PartReader, row: int, out: Bytes, scales: Bytes) -> None:
        slot = row - part.first_row
        part.read(slot, out, scales, self._must_check(part, slot))


class TokenReader(FeatureReader):
    """TOKEN_CHUNK regions per record; an image's regions may span several."""

    def _slot(self, part: PartReader, row: int) -> int:
        # A last image without regions may start after the last record.
        return min((self._offsets[row] - self._offsets[part.first_row]) // TOKEN_CHUNK, len(part.seen) - 1)

    def _read_one(self, part: PartReader, row: int, out: Bytes, scales: Bytes) -> None:
        width = self._row_bytes
        done, first = 0, self._offsets[row] - self._offsets[part.first_row]
        regions = self._offsets[row + 1] - self._offsets[row]
        while done < regions:
            slot, skipped = divmod(first + done, TOKEN_CHUNK)
            count = min(TOKEN_CHUNK - skipped, regions - done)
            target = out[done * width : (done + count) * width]
            target_scales = scales[done * SCALE_BYTES : (done + count) * SCALE_BYTES]
            if part.compressed or self._must_check(part, slot):
                self._read_whole(part, slot, skipped, target, target_scales)
            else:
                part.read_some(slot, skipped * width, target, skipped * SCALE_BYTES, target_scales)
            done += count

    def _read_whole(self, part: PartReader, slot: int, skipped: int, out: Bytes, scales: Bytes) -> None:
        """Read rows of a record by reading all of it, because the checksum covers the whole record."""
        width = self._row_bytes
        record = np.empty(TOKEN_CHUNK * width, np.uint8)
        all_scales = np.empty(TOKEN_CHUNK * SCALE_BYTES if self.feature_set.has_scales else 0, np.uint8)
        part.read(slot, record, all_scales, self._must_check(part, slot))
        out[:] = record[skipped * width :][: out.size]
        scales[:] = all_scales[skipped * SCALE_BYTES :][: scales.size]


def open_reader(
    storage: Storage,
    feature_set: FeatureSet,
    manifest: Manifest,
    geometry: Geometry,
    check: Check,
    access: Access = "auto",
) -> FeatureReader:
    """The reader of a feature set. Opens no file yet."""
    reader = MapReader if feature_set.kind == "map" else TokenReader
    return reader(storage, feature_set, manifest, geometry, check, access)


def _fits_into_memory(feature_set: FeatureSet, manifest: Manifest) -> bool:
    """Whether the whole feature set fits into half of the free memory."""
    rows = len(manifest) * feature_set.shape[0] if feature_set.kind == "map" else len(manifest.boxes_xyxy)
    scales = SCALE_BYTES if feature_set.has_scales else 0
    return rows * (_row_bytes(feature_set) + scales) <= available_memory() // 2


def _row_bytes(feature_set: FeatureSet) -> int:
    """Bytes of one token or region, uncompressed."""
    return feature_set.shape[-1] * feature_set.stored.itemsize
