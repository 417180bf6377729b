"""Reading the records of one feature set straight from the shard files, into memory that is there already.

A Zarr library takes 10 to 20 times as long for the same bytes. What is kept of the parts in use is bounded, so a
reader's own memory does not depend on the size of the cache; the pages of a map are the kernel's, which takes them back
whenever it needs them.
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

Check = Literal["first", "always", "never"]  # when a record's checksum is looked at; "first" is once a process

_KEPT_BYTES = 64 << 20  # of a reader's parts: 4,000 of 512 records, a terabyte of CLIP's maps
_PART_BYTES = 4000  # of a part, whatever its records
_LEAST_PARTS = 16  # whatever their records
_ANNOUNCED = 32  # records that a disk is asked for at once: with fewer it idles, more of them would push out others
_TRIES = 3  # of an image whose files are replaced while it is read
_THREADS = 4  # of a local cache: each copies 5 to 10 GB/s, and no GPU is fed with more


class PartOpener:
    """Opens parts by their number. Apart from the reader, so that one that is let go of closes its files at once.

    generation   how often files were found to be replaced, so far; an opened part keeps that of when it was opened
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
        self._open_shard.forget_files()


class FeatureReader(ABC):
    """Reads one feature set. Safe to use from several threads and after a fork.

    threads   how many may well read at once
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
        self._offsets = manifest.offsets.data  # its elements are Python ints at once
        local = storage.on_disk
        self._mapped = access == "map" or (access == "auto" and local and _fits_into_memory(feature_set, manifest))
        self.threads = min(_THREADS, processors()) if local else storage.readers
        slots = geometry.slots(feature_set)
        most = max(_LEAST_PARTS, _KEPT_BYTES // (_PART_BYTES + slots * (37 if feature_set.has_scales else 21)))
        self._index = PartIndex(feature_set, geometry, manifest)
        self._opener = PartOpener(storage, feature_set, self._index, slots, self._mapped)
        self._parts = lru_cache(maxsize=most)(self._opener)

    def read(self, rows: Sequence[int], outs: Sequence[Bytes], scales: Sequence[Bytes]) -> None:
        """Read the features of the images at `rows`.

        outs     for each row, the bytes of a contiguous array (T, D), or (n, C) for its n regions, to be filled
        scales   for each row, the bytes of its float16 scales, (T,) or (n,); without a byte unless the set has them

        Raises NotExtractedError for a row whose part is not committed or whose image could not be read,
        CorruptPartError for one whose bytes are not those written, CacheError for what the disk or network refuses.
        """
        parts = [self._part_of(row) for row in rows]
        self._announce(parts, rows, 0)
        for index, (part, row) in enumerate(zip(parts, rows, strict=True)):
            if index % _ANNOUNCED == 0:
                self._announce(parts, rows, index + _ANNOUNCED)
            try:
                self._read_one(part, row, outs[index], scales[index])
            except (ReplacedError, DamagedError, OSError) as error:
                self._read_again(error, part, row, outs[index], scales[index])

    def record(self, part: int) -> PartRecord:
        """A part's record. Raises FileNotFoundError where it is not written, CorruptPartError where it is damaged."""
        try:
            return load_part_record(self._storage, self.feature_set, self._index, part)
        except DamagedError as error:
            raise self._corrupt(part, error.file, str(error)) from None

    def records(self) -> list[PartRecord]:
        """The records of all written parts, in any order."""
        # In parallel: an object store takes 20 ms for each of thousands.
        with ThreadPoolExecutor(self._storage.readers) as pool:
            return list(pool.map(self.record, self.written_parts()))

    def written_parts(self) -> set[int]:
        """Listed anew at each call: other processes may be writing parts."""
        files = self._storage.list_files(f"parts/{self.feature_set.name}")
        stems = (file.removesuffix(".json") for file in files if file.endswith(".json"))
        return {int(stem) for stem in stems if stem.isdigit() and int(stem) < self.geometry.n_parts}

    @abstractmethod
    def _slot(self, part: PartReader, row: int) -> int:
        """The slot of a row's record, or of the first of them."""

    @abstractmethod
    def _read_one(self, part: PartReader, row: int, out: Bytes, scales: Bytes) -> None:
        """Read one image's features."""

    def _announce(self, parts: Sequence[PartReader], rows: Sequence[int], first: int) -> None:
        """Tell the disk which records will be read soon, so that it fetches them while others are copied."""
        some = slice(first, first + _ANNOUNCED)
        for part, row in zip(parts[some], rows[some], strict=True):
            slot = self._slot(part, row)
            # Telling takes 4 microseconds, and a record that was read from a map before is most likely there still.
            if not (self._mapped and part.seen[slot]):
                part.prefetch(slot)

    def _part_of(self, row: int) -> PartReader:
        try:
            part = self._parts(row // self._part_size)
        except (DamagedError, OSError) as error:
            part = self._opened_again(error, row)
        if part.failures and row in part.failures:
            raise NotExtractedError(
                f"{self._storage.address}: {self._image(row)} could not be read when it was extracted: "
                f"{part.failures[row]}; take only the rows of valid_rows()"
            )
        return part

    def _opened_again(self, error: Exception, row: int) -> PartReader:
        """The part of a row whose files did not fit each other, where they do now; otherwise raises what is wrong.

        They may be those of a part that was just being replaced, or copies of another store's that are damaged.
        """
        number = row // self._part_size
        if isinstance(error, DamagedError):
            self._storage.drop_local_copy(error.file)
            self._begin_generation()
            try:
                return self._parts(number)
            except (DamagedError, OSError) as again:
                error = again
        if isinstance(error, DamagedError):
            raise self._corrupt(number, error.file, str(error))
        if isinstance(error, FileNotFoundError):
            raise NotExtractedError(
                f"{self._storage.address}: {self._image(row)} is in part {number} of {self.feature_set.name}, "
                "which is not written yet; run the same `regionspot extract` again to resume"
            )
        raise self._refused(row, error)

    def _read_again(self, error: Exception, part: PartReader, row: int, out: Bytes, scales: Bytes) -> None:
        """Read an image again while its files may be others by now; otherwise raises what is wrong."""
        for _ in range(_TRIES):
            if not self._may_be_others(error, part):
                break
            part = self._renewed(part, row)
            try:
                return self._read_one(part, row, out, scales)
            except (ReplacedError, DamagedError, OSError) as again:
                error = again
        if isinstance(error, DamagedError):
            what = f"the record of {self._image(row)} {error}"
            raise self._corrupt(row // self._part_size, error.file, what)
        raise self._refused(row, error)

    def _may_be_others(self, error: Exception, part: PartReader) -> bool:
        """Whether the files of an open part may have been replaced, or copies of them are dropped that were wrong."""
        if isinstance(error, ReplacedError) or (isinstance(error, OSError) and error.errno == errno.ESTALE):
            return True
        if not isinstance(error, DamagedError):
            return False
        try:
            replaced = self.record(part.record.part) != part.record
        except (CacheError, OSError):
            replaced = True  # that of a part that is just being replaced, or what is wrong is told when it is opened
        return self._storage.drop_local_copy(error.file) or replaced

    def _renewed(self, part: PartReader, row: int) -> PartReader:
        """A part opened anew: by the first that finds its files replaced, for all rows and threads that do later."""
        if part.generation == self._opener.generation:
            self._begin_generation()
        now = self._part_of(row)
        if now.generation != self._opener.generation:  # another thread had begun to open it before
            self._parts.cache_clear()
            now = self._part_of(row)
        return now

    def _begin_generation(self) -> None:
        """Let go of all that is open: what is opened from now on is what lies there now."""
        self._opener.begin_generation()
        self._parts.cache_clear()

    def _must_check(self, part: PartReader, slot: int) -> bool:
        return self._check == "always" or (self._check == "first" and not part.seen[slot])

    def _image(self, row: int) -> str:
        return f"image {self.manifest.image_ids[row]} (row {row}, {self.manifest.paths[row]})"

    def _corrupt(self, part: int, file: str, what: str) -> CorruptPartError:
        return CorruptPartError(f"{self._storage.address}: {file}: {what}; {self._storage.repair_hint(part)}")

    def _refused(self, row: int, error: Exception) -> CacheError:
        why = getattr(error, "strerror", None) or str(error) or "its files keep changing"
        return CacheError(
            f"{self._storage.address}: {self._image(row)} could not be read from {self.feature_set.name}: {why}; "
            "mend the disk or the connection and read it again"
        )


class MapReader(FeatureReader):
    """One record an image."""

    def _slot(self, part: PartReader, row: int) -> int:
        return row - part.first_row

    def _read_one(self, part: PartReader, row: int, out: Bytes, scales: Bytes) -> None:
        slot = row - part.first_row
        part.read(slot, out, scales, self._must_check(part, slot))


class TokenReader(FeatureReader):
    """TOKEN_CHUNK regions a record; an image's may straddle several."""

    def _slot(self, part: PartReader, row: int) -> int:
        # A last image without regions may begin where there is no record any more.
        return min((self._offsets[row] - self._offsets[part.first_row]) // TOKEN_CHUNK, len(part.seen) - 1)

    def _read_one(self, part: PartReader, row: int, out: Bytes, scales: Bytes) -> None:
        width = self._row_bytes
        done, first = 0, self._offsets[row] - self._offsets[part.first_row]
        regions = self._offsets[row + 1] - self._offsets[row]
        while done < regions:
            slot, skipped = divmod(first + done, TOKEN_CHUNK)
            taken = min(TOKEN_CHUNK - skipped, regions - done)
            wanted = out[done * width : (done + taken) * width]
            wanted_scales = scales[done * SCALE_BYTES : (done + taken) * SCALE_BYTES]
            if part.compressed or self._must_check(part, slot):
                self._read_whole(part, slot, skipped, wanted, wanted_scales)
            else:
                part.read_some(slot, skipped * width, wanted, skipped * SCALE_BYTES, wanted_scales)
            done += taken

    def _read_whole(self, part: PartReader, slot: int, skipped: int, out: Bytes, scales: Bytes) -> None:
        """Read some rows of a record by way of the whole of it, which is what the checksum is of."""
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
    """The reader of a feature set of either kind. No file of it is opened yet."""
    kind = MapReader if feature_set.kind == "map" else TokenReader
    return kind(storage, feature_set, manifest, geometry, check, access)


def _fits_into_memory(feature_set: FeatureSet, manifest: Manifest) -> bool:
    """Whether all of a feature set may well stay in memory once it was read: within half of what is free."""
    rows = len(manifest) * feature_set.shape[0] if feature_set.kind == "map" else len(manifest.boxes_xyxy)
    scales = SCALE_BYTES if feature_set.has_scales else 0
    return rows * (_row_bytes(feature_set) + scales) <= available_memory() // 2


def _row_bytes(feature_set: FeatureSet) -> int:
    """Bytes of one token or region, uncompressed."""
    return feature_set.shape[-1] * feature_set.stored.itemsize
