"""One Zarr shard, written one record at a time and read by its index.

The form is that of the sharding_indexed codec with the index at the end, read by every Zarr v3 library
(https://zarr-specs.readthedocs.io/en/latest/v3/codecs/sharding-indexed/index.html):

    record | record | ... | index: (offset, nbytes) u64 LE for every slot | crc32c of the index, u32 LE

Records are uncompressed, all of one size, and lie side by side, so the file's data is aligned to the record and any
record is read with one request. A slot without a record has 2^64 - 1 as offset and nbytes and costs no bytes.
"""

from __future__ import annotations

import os
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from regionspot.cache.storage import NewFile

_EMPTY = np.uint64(2**64 - 1)


class ShardWriter:
    """A shard being written into a file. Memory holds its index only, whatever the number of records."""

    def __init__(self, file: NewFile, slots: int) -> None:
        self._file = file
        self._index = np.full((slots, 2), _EMPTY, dtype="<u8")
        self._end = 0

    def append(self, slot: int, record: NDArray[Any]) -> None:
        """Put a contiguous record behind the last one; it becomes inner chunk `slot`."""
        self._file.write(record)
        self._index[slot] = self._end, record.nbytes
        self._end += record.nbytes

    def finish(self) -> int:
        """Put the index behind the records and make the file durable; its size in bytes."""
        index = with_crc(self._index.tobytes())
        self._file.write(index)
        self._file.finish()
        return self._end + len(index)


def index_bytes(slots: int) -> int:
    """Length of a shard's index with its checksum."""
    return slots * 16 + 4


def read_offsets(fd: int, slots: int, record_bytes: int) -> NDArray[np.int64]:
    """int64 (slots,): where each record begins, -1 for an empty slot, from an open shard.

    Raises ValueError, saying what is wrong, when the index is damaged or is not one of records of that size.
    """
    end = os.fstat(fd).st_size - index_bytes(slots)
    if end < 0:
        raise ValueError(f"is too short to hold an index of {slots} records")
    index = np.frombuffer(without_crc(os.pread(fd, index_bytes(slots), end), "its index"), dtype="<u8").reshape(
        slots, 2
    )
    empty = (index == _EMPTY).all(axis=1)
    offsets = np.where(empty, -1, index[:, 0].astype(np.int64))
    inside = (offsets >= 0) & (offsets <= end - record_bytes) & (index[:, 1] == record_bytes)
    if not (empty | inside).all():
        raise ValueError(f"has an index that points outside its {end} bytes of records of {record_bytes} bytes")
    return offsets


def with_crc(data: bytes) -> bytes:
    """Data as Zarr's crc32c codec stores it: its checksum behind it, u32 LE."""
    return data + int(google_crc32c.value(data)).to_bytes(4, "little")


def without_crc(stored: bytes, what: str) -> bytes:
    """The data of `with_crc`. Raises ValueError, naming `what`, when it does not match its checksum."""
    if with_crc(stored[:-4]) != stored:
        raise ValueError(f"does not match the checksum of {what}")
    return stored[:-4]
