"""Copies a part's files from another cache without decoding features.

Files on the same disk are hard-linked, which is safe because a cache replaces files and never changes them in place.
Otherwise the bytes are copied, and each record is compared with its checksum.

A shard's index and the checksum file have one slot for every inner chunk of the largest part. If the caches differ in
that number, the records are copied and the index and checksums are resized.
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

_BLOCK = 8 << 20  # bytes of one read: an object store's latency equals the transfer of a few megabytes
_NO_LINK = (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.EACCES)  # other disk, FAT, 65,000 links, ...


@dataclass(frozen=True)
class PartRef:
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
    def record_path(self) -> str:
        return record_file(self.name, self.part)

    def files(self) -> list[str]:
        """All files of the part: the shards, then the checksum file."""
        return part_files(self.feature_set, self.part)


def copy_part(source: PartRef, target: PartRef, link: bool, before_publish: Callable[[], None]) -> None:
    """Copy a part, its part record last.

    link             hard-link the files where possible
    before_publish   called before the first rename; if it raises, the part stays unwritten

    Raises CorruptPartError if the source is damaged, CacheError if a storage fails.
    """
    try:
        record = copy_part_files(source, target, link, before_publish)
        paths = [target.storage.local_path(name) for name in target.files()]
        for folder in {path.parent for path in paths if path is not None}:
            sync_folder(folder)
        record.save(target.storage, target.record_path)
    except OSError as error:
        raise CacheError(
            f"{target.storage.address}: part {target.part} could not be written: {error.strerror or error}; "
            "finished parts are safe: fix that and run the same command again"
        ) from error


def copy_part_files(
    source: PartRef, target: PartRef, link: bool = True, before_publish: Callable[[], None] = lambda: None
) -> PartRecord:
    """Copy a part's files, without its part record, which is returned. Linked files are not flushed.

    Both parts have the same images, encoding and statistics.
    """
    target.storage.check_writable()  # hard links do not go through the storage
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
    failures = tuple(replace(failure, row=failure.row - record.first_row + rows.start) for failure in record.failures)
    identity = None  # records of earlier versions have none
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
    """Hard-link files; False if this is not possible."""
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
            os.replace(partial, new_path)  # replaces what a killed run left
        finally:
            partial.unlink(missing_ok=True)  # rename does nothing if both names are the same file
    return True


def _copy_files(
    source: PartRef, target: PartRef, before_publish: Callable[[], None]
) -> tuple[dict[str, int], dict[str, int]]:
    """Copy and verify the files; their sizes, and the crc32c of the checksum file, by name."""
    crcs = np.zeros(source.slots, np.uint32)
    files: list[NewFile] = []
    sizes: dict[str, int] = {}
    try:
        for name, new_name in zip(source.files()[:-1], target.files()[:-1], strict=True):
            files.append(target.storage.create(new_name))
            shard = ShardWriter(files[-1], target.slots)
            for slot, record in read_records(source, name):
                if slot >= target.slots:
                    raise _corrupt(source, name, f"has a record in slot {slot}, beyond its images")
                shard.append(slot, record)
                crcs[slot] = google_crc32c.extend(int(crcs[slot]), record)
            sizes[new_name] = shard.finish()
        require_checksums(source, crcs)
        crcs.resize(target.slots)  # only slots without a record are cut off or added
        checksums, new_name = with_crc(crcs.astype("<u4").tobytes()), target.files()[-1]
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


def read_records(source: PartRef, name: str) -> Iterator[tuple[int, bytes]]:
    """Slot and stored bytes of each record of a shard, in file order, read in large blocks."""
    try:
        data_bytes = source.storage.size(name) - index_bytes(source.slots)
        if data_bytes < 0:
            raise ValueError("is too short for its index")
        index = _read(source.storage, name, data_bytes, index_bytes(source.slots))
        offsets, sizes = parse_index(index, data_bytes, None)
    except (FileNotFoundError, EOFError, ValueError) as error:
        raise _corrupt(source, name, str(error)) from None
    order = [slot for slot in np.argsort(offsets, kind="stable").tolist() if offsets[slot] >= 0]
    block, start = b"", 0
    for slot in order:
        offset, size = int(offsets[slot]), int(sizes[slot])
        if not start <= offset <= offset + size <= start + len(block):
            start = offset
            block = _read(source.storage, name, start, min(max(_BLOCK, size), data_bytes - start))
        yield slot, block[offset - start : offset - start + size]


def _read(storage: Storage, name: str, offset: int, size: int) -> bytes:
    block = bytearray(size)
    storage.read_into(name, offset, memoryview(block))
    return bytes(block)


def _require_size(source: PartRef, file: str, record: PartRecord) -> None:
    """Raises CorruptPartError if a file is missing or truncated, before it is linked."""
    try:
        size = source.storage.size(file)
    except FileNotFoundError:
        raise _corrupt(source, file, "is missing") from None
    if size != record.files.get(file):
        raise _corrupt(source, file, f"has {size} bytes, {record.files.get(file)} were written")


def require_checksums(source: PartRef, crcs: NDArray[np.uint32]) -> None:
    """Raises CorruptPartError if the records' crc32c do not match the checksum file."""
    name = source.files()[-1]
    try:
        expected = np.frombuffer(without_crc(source.storage.read(name), "its checksum file"), "<u4")
    except (FileNotFoundError, ValueError) as error:
        raise _corrupt(source, name, str(error)) from None
    if len(expected) != len(crcs):
        raise _corrupt(source, name, f"has {len(expected)} checksums, expected {len(crcs)}")
    if len(wrong := np.flatnonzero(expected != crcs)):
        raise _corrupt(source, " or ".join(source.files()[:-1]), f"record {wrong[0]} does not match its checksum")


def _corrupt(source: PartRef, file: str, reason: str) -> CorruptPartError:
    return CorruptPartError(f"{source.storage.address}: {file}: {reason}; {source.storage.repair_hint(source.part)}")
