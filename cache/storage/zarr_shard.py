"""One Zarr shard, written record by record and read by its index.

The format is the sharding_indexed codec with the index at the end, which every Zarr v3 library reads
(https://zarr-specs.readthedocs.io/en/latest/v3/codecs/sharding-indexed/index.html):

    record | record | ... | index: (offset, nbytes) u64 LE for every slot | crc32c of the index, u32 LE

Records are adjacent. Uncompressed records have one size, so any record is read with one aligned request; the size of a
compressed one is in the index. An empty slot has 2^64 - 1 as offset and nbytes and takes no data bytes.
"""

from __future__ import annotations

from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from regionspot.cache.storage.base import NewFile

ZSTD_LEVEL = 3  # zstd's default: on features, higher levels are slower and not smaller
_EMPTY = np.uint64(2**64 - 1)


class ShardWriter:
    """Writes a shard into a file. Only the index is kept in memory."""

    def __init__(self, file: NewFile, slots: int) -> None:
        self._file = file
        self._index = np.full((slots, 2), _EMPTY, dtype="<u8")
        self._end = 0

    def append(self, slot: int, record: NDArray[Any] | bytes) -> None:
        """Append a record, as a contiguous array or compressed bytes; it becomes inner chunk `slot`."""
        size = len(record) if isinstance(record, bytes) else record.nbytes
        self._file.write(record)
        self._index[slot] = self._end, size
        self._end += size

    def finish(self) -> int:
        """Append the index and flush the file to disk; the shard's size in bytes."""
        index = with_crc(self._index.tobytes())
        self._file.write(index)
        self._file.finish()
        return self._end + len(index)


def index_bytes(slots: int) -> int:
    """Size of a shard's index with its checksum."""
    return slots * 16 + 4


def parse_index(
    stored: bytes, data_bytes: int, record_bytes: int | None
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Offset and size of the record in each slot, both int64 (slots,); -1 and 0 for an empty slot.

    stored         the shard's last `index_bytes(slots)` bytes
    data_bytes     number of bytes before them
    record_bytes   size of every record, None if they are compressed

    Raises ValueError when the index is damaged or belongs to other records.
    """
    index = np.frombuffer(without_crc(stored, "its index"), dtype="<u8").reshape(-1, 2)
    empty = (index == _EMPTY).all(axis=1)
    offsets = np.where(empty, -1, index[:, 0].astype(np.int64))
    sizes = np.where(empty, 0, index[:, 1].astype(np.int64))
    # Compare each alone: the sum of two large numbers could overflow.
    inside = (offsets >= 0) & (offsets <= data_bytes) & (sizes > 0) & (sizes <= data_bytes - offsets)
    right_size = True if record_bytes is None else sizes == record_bytes
    if not (empty | (inside & right_size)).all():
        kind = "compressed records" if record_bytes is None else f"records of {record_bytes} bytes"
        raise ValueError(f"has an index that points outside its {data_bytes} bytes of {kind}")
    return offsets, sizes


def compress(record: NDArray[Any]) -> bytes:
    """Compress a contiguous record as Zarr's zstd codec does."""
    from numcodecs import zstd  # imported on demand: takes 0.2 s

    return bytes(zstd.compress(record, ZSTD_LEVEL, False))


def decompress(stored: bytes | memoryview, out: NDArray[Any]) -> None:
    """Decompress a record of `compress` into the contiguous `out`.

    Raises ValueError when the bytes are damaged or the record has another size.
    """
    from numcodecs import zstd  # imported on demand: takes 0.2 s

    try:
        data = zstd.decompress(stored)
    except (RuntimeError, MemoryError) as error:  # damaged bytes may claim any size
        raise ValueError(f"cannot be decompressed: {error}") from None
    if len(data) != out.nbytes:
        raise ValueError(f"holds a record of {len(data)} bytes, expected {out.nbytes}")
    out.reshape(-1).view(np.uint8)[:] = np.frombuffer(data, np.uint8)


def with_crc(data: bytes) -> bytes:
    """Data with its checksum appended, u32 LE, as Zarr's crc32c codec stores it."""
    return data + int(google_crc32c.value(data)).to_bytes(4, "little")


def without_crc(stored: bytes, what: str) -> bytes:
    """The data of `with_crc`. Raises ValueError, naming `what`, when the checksum does not match."""
    if with_crc(stored[:-4]) != stored:
        raise ValueError(f"does not match the checksum of {what}")
    return stored[:-4]
