"""A part that another cache holds just as it is wanted: its files are taken whole, no feature is decoded.

On one disk a file gets a second name (a hard link), so not a byte is read or written; no file of a cache is ever
changed in place, only replaced, so neither cache can harm the other. Elsewhere the bytes are copied, and each record is
compared with its checksum on the way.

A shard's index and the checksums have a slot for every inner chunk of the largest part. Where the caches differ in
that number, the records are copied as they lie, and the index and the checksums made as long as they have to be.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from regionspot.cache.errors import CacheError, CorruptPartError
from regionspot.cache.format.part_record import PartRecord, part_identity, set_crc
from regionspot.cache.format.schema import FeatureSet, part_files, record_file
from regionspot.cache.storage.atomic_files import file_crc, partial_path, sync_folder
from regionspot.cache.storage.base import NewFile, Storage
from regionspot.cache.storage.zarr_shard import ShardWriter, index_bytes, parse_index, with_crc, without_crc
from regionspot.cache.store import FeatureCache

_BLOCK = 8 << 20  # bytes read at once: an object store's answer takes as long as a few megabytes
_NO_LINK = (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.EACCES)  # other disk, FAT, 65,000 links, ...


@dataclass(frozen=True)
class Place:
    """One feature set of one part of a cache."""

    cache: FeatureCache
    name: str
    part: int

    @property
    def storage(self) -> Storage:
        return self.cache.storage

    @property
    def feature_set(self) -> FeatureSet:
        return self.cache.feature_sets[self.name]

    @property
    def slots(self) -> int:
        return self.cache.geometry.slots(self.feature_set)

    @property
    def record(self) -> str:
        return record_file(self.name, self.part)

    def files(self) -> list[str]:
        """All files of the part: the shards, and last the checksums of their records."""
        return part_files(self.feature_set, self.part)


def commit_part(source: Place, target: Place, link: bool, before_publish: Callable[[], None]) -> None:
    """Write a part that `source` holds, with its record last.

    link             give the files a second name where they can have one
    before_publish   called before the first file gets its name: what it raises leaves the part unwritten

    Raises CorruptPartError for a source that is not as it was written, CacheError where a store refuses.
    """
    try:
        record = take_part(source, target, link, before_publish)
        paths = [target.storage.local_path(name) for name in target.files()]
        for folder in {path.parent for path in paths if path is not None}:
            sync_folder(folder)
        record.save(target.storage, target.record)
    except OSError as error:
        raise CacheError(
            f"{target.storage.address}: part {target.part} could not be written: {error.strerror or error}; "
            "the finished parts are safe: mend that and run the same command again"
        ) from error


def take_part(
    source: Place, target: Place, link: bool = True, before_publish: Callable[[], None] = lambda: None
) -> PartRecord:
    """Put the files of a part in their places, those that are linked not flushed; its record, which is not saved.

    The two places are of the same images in one encoding with the same statistics.
    """
    target.storage.check_writable()  # a link asks no storage whether it still is what was opened
    record = source.cache.record(source.part, source.name)
    for file in source.files():
        _require_size(source, file, record)
    names = list(zip(source.files(), target.files(), strict=True))
    if link and source.slots == target.slots and _link_all(source.storage, target.storage, names, before_publish):
        sizes = {new: record.files[old] for old, new in names}
        checksums = {new: record.checksums[old] for old, new in names if old in record.checksums}
    else:
        sizes, checksums = _copy_files(source, target, before_publish)
    rows = target.cache.part_rows(target.part)
    failures = tuple(replace(each, row=each.row - record.first_row + rows.start) for each in record.failures)
    identity = None  # a record of an earlier version says nothing of its identity, and stays as it is
    if record.identity is not None:
        identity = part_identity(
            target.cache.part_rows(target.part), target.cache.manifest, set_crc(target.feature_set)
        )
    return replace(
        record,
        part=target.part,
        first_row=rows.start,
        files=sizes,
        checksums=checksums,
        failures=failures,
        identity=identity,
    )


def _link_all(
    source: Storage, target: Storage, names: Sequence[tuple[str, str]], before_publish: Callable[[], None]
) -> bool:
    """Give files a second name; False where they cannot have one."""
    paths = [(source.local_path(name), target.local_path(new_name)) for name, new_name in names]
    for number, (path, new_path) in enumerate(paths):
        if path is None or new_path is None:
            return False
        new_path.parent.mkdir(parents=True, exist_ok=True)
        partial = partial_path(new_path)
        try:
            os.link(path, partial)
        except OSError as error:
            if error.errno not in _NO_LINK:
                raise
            return False
        try:
            if not number:
                before_publish()
            os.replace(partial, new_path)  # over what a killed run may have left there
        finally:
            partial.unlink(missing_ok=True)  # a rename between two names of one file does nothing
    return True


def _copy_files(
    source: Place, target: Place, before_publish: Callable[[], None]
) -> tuple[dict[str, int], dict[str, int]]:
    """Copy and check; the sizes by name, and the crc32c of the checksums' file."""
    found = np.zeros(source.slots, np.uint32)
    files: list[NewFile] = []
    sizes: dict[str, int] = {}
    try:
        for name, new_name in zip(source.files()[:-1], target.files()[:-1], strict=True):
            files.append(target.storage.create(new_name))
            shard = ShardWriter(files[-1], target.slots)
            for slot, stored in records_of(source, name):
                if slot >= target.slots:
                    raise _corrupt(source, name, f"holds a record in slot {slot}, behind all of its images")
                shard.append(slot, stored)
                found[slot] = google_crc32c.extend(int(found[slot]), stored)
            sizes[new_name] = shard.finish()
        require_equal(source, found)
        found.resize(target.slots)  # what is cut off, or put behind, is slots without a record
        checksums, new_name = with_crc(found.astype("<u4").tobytes()), target.files()[-1]
        files.append(target.storage.create(new_name))
        files[-1].write(checksums)
        files[-1].finish()
        before_publish()
        for file in files:
            file.publish()
    finally:
        for file in files:
            file.discard()
    return {**sizes, new_name: len(checksums)}, {new_name: file_crc(checksums)}


def records_of(source: Place, name: str) -> Iterator[tuple[int, bytes]]:
    """Slot and stored bytes of each record of a shard, as they lie behind one another, read in large blocks."""
    try:
        data_bytes = source.storage.size(name) - index_bytes(source.slots)
        if data_bytes < 0:
            raise ValueError("is too short to hold its index")
        index = _read(source.storage, name, data_bytes, index_bytes(source.slots))
        offsets, sizes = parse_index(index, data_bytes, None)
    except (FileNotFoundError, EOFError, ValueError) as error:
        raise _corrupt(source, name, str(error)) from None
    order = [slot for slot in np.argsort(offsets, kind="stable").tolist() if offsets[slot] >= 0]
    block, begin = b"", 0
    for slot in order:
        offset, size = int(offsets[slot]), int(sizes[slot])
        if not begin <= offset <= offset + size <= begin + len(block):
            begin = offset
            block = _read(source.storage, name, begin, min(max(_BLOCK, size), data_bytes - begin))
        yield slot, block[offset - begin : offset - begin + size]


def _read(storage: Storage, name: str, offset: int, size: int) -> bytes:
    block = bytearray(size)
    storage.read_into(name, offset, memoryview(block))
    return bytes(block)


def _require_size(source: Place, file: str, record: PartRecord) -> None:
    """Raises CorruptPartError where a file is missing or cut: a link to it would be as broken, and later found."""
    try:
        size = source.storage.size(file)
    except FileNotFoundError:
        raise _corrupt(source, file, "is missing") from None
    if size != record.files.get(file):
        raise _corrupt(source, file, f"has {size} bytes, {record.files.get(file)} were written")


def require_equal(source: Place, found: NDArray[np.uint32]) -> None:
    """Raises CorruptPartError where the records are not those that were written."""
    name = source.files()[-1]
    try:
        expected = np.frombuffer(without_crc(source.storage.read(name), "its checksums' file"), "<u4")
    except (FileNotFoundError, ValueError) as error:
        raise _corrupt(source, name, str(error)) from None
    if len(expected) != len(found):
        raise _corrupt(source, name, f"has {len(expected)} checksums, expected {len(found)}")
    if len(wrong := np.flatnonzero(expected != found)):
        raise _corrupt(source, " or ".join(source.files()[:-1]), f"record {wrong[0]} does not match its checksum")


def _corrupt(source: Place, file: str, what: str) -> CorruptPartError:
    return CorruptPartError(f"{source.storage.address}: {file}: {what}; {source.storage.repair_hint(source.part)}")
