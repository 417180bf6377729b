"""One Zarr shard, written one record at a time and read by its index.

The form is that of the sharding_indexed codec with the index at the end, read by every Zarr v3 library
(https://zarr-specs.readthedocs.io/en/latest/v3/codecs/sharding-indexed/index.html):

    record | record | ... | index: (offset, nbytes) u64 LE for every slot | crc32c of the index, u32 LE

Records lie side by side. Uncompressed ones are all of one size, so the file's data is aligned to the record and any
record is read with one request; compressed ones have the size that the index states. A slot without a record has
2^64 - 1 as offset and nbytes and costs no bytes.
"""

from __future__ import annotations

from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from regionspot.cache.storage.base import NewFile

ZSTD_LEVEL = 3  # zstd's own default: of features, higher levels win nothing and take longer
_EMPTY = np.uint64(2**64 - 1)


class ShardWriter:
    """A shard being written into a file. Memory holds its index only, whatever the number of records."""

    def __init__(self, file: NewFile, slots: int) -> None:
        self._file = file
        self._index = np.full((slots, 2), _EMPTY, dtype="<u8")
        self._end = 0

    def append(self, slot: int, record: NDArray[Any] | bytes) -> None:
        """Put a record behind the last one, as a contiguous array or compressed; it becomes inner chunk `slot`."""
        size = len(record) if isinstance(record, bytes) else record.nbytes
        self._file.write(record)
        self._index[slot] = self._end, size
        self._end += size

    def finish(self) -> int:
        """Put the index behind the records and make the file durable; its size in bytes."""
        index = with_crc(self._index.tobytes())
        self._file.write(index)
        self._file.finish()
        return self._end + len(index)


def index_bytes(slots: int) -> int:
    """Length of a shard's index with its checksum."""
    return slots * 16 + 4


def parse_index(
    stored: bytes, data_bytes: int, record_bytes: int | None
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Offset and size of the record in each slot, int64 (slots,) both, -1 and 0 for an empty slot.

    stored         the shard's last `index_bytes(slots)` bytes
    data_bytes     what stands before them
    record_bytes   size of every record, None where they are compressed

    Raises ValueError, saying what is wrong, when the index is damaged or is not one of such records.
    """
    index = np.frombuffer(without_crc(stored, "its index"), dtype="<u8").reshape(-1, 2)
    empty = (index == _EMPTY).all(axis=1)
    offsets = np.where(empty, -1, index[:, 0].astype(np.int64))
    sizes = np.where(empty, 0, index[:, 1].astype(np.int64))
    # Each by itself first: the sum of two large numbers could come out small.
    inside = (offsets >= 0) & (offsets <= data_bytes) & (sizes > 0) & (sizes <= data_bytes - offsets)
    right_size = True if record_bytes is None else sizes == record_bytes
    if not (empty | (inside & right_size)).all():
        kind = "compressed records" if record_bytes is None else f"records of {record_bytes} bytes"
        raise ValueError(f"has an index that points outside its {data_bytes} bytes of {kind}")
    return offsets, sizes


def compress(record: NDArray[Any]) -> bytes:
    """A contiguous record as Zarr's zstd codec stores it."""
    from numcodecs import zstd  # a fifth of a second, for those who compress

    return bytes(zstd.compress(record, ZSTD_LEVEL, False))


def decompress(stored: bytes | memoryview, out: NDArray[Any]) -> None:
    """Fill the contiguous `out` with the record that `compress` made of one like it.

    Raises ValueError where the bytes are damaged or were another record's.
    """
    from numcodecs import zstd  # a fifth of a second, for those who compress

    try:
        data = zstd.decompress(stored)
    except (RuntimeError, MemoryError) as error:  # damaged bytes may claim any size
        raise ValueError(f"cannot be decompressed: {error}") from None
    if len(data) != out.nbytes:
        raise ValueError(f"holds a record of {len(data)} bytes, expected {out.nbytes}")
    out.reshape(-1).view(np.uint8)[:] = np.frombuffer(data, np.uint8)


def with_crc(data: bytes) -> bytes:
    """Data as Zarr's crc32c codec stores it: its checksum behind it, u32 LE."""
    return data + int(google_crc32c.value(data)).to_bytes(4, "little")


def without_crc(stored: bytes, what: str) -> bytes:
    """The data of `with_crc`. Raises ValueError, naming `what`, when it does not match its checksum."""
    if with_crc(stored[:-4]) != stored:
        raise ValueError(f"does not match the checksum of {what}")
    return stored[:-4]
