"""The shards of a cache in one HDF5 file, put together from the chunks that their records are.

HDF5 is asked once a dataset where in the file its chunks lie; from then on records are copied from there, with nothing
of HDF5 between.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from regionspot.cache.errors import NotACacheError
from regionspot.cache.machine import available_memory
from regionspot.cache.storage.base import ShardFile
from regionspot.cache.storage.shard_files import MappedShard
from regionspot.cache.storage.zarr_shard import index_bytes, with_crc

SLOTS = "records_of_a_part"  # attribute of a dataset of records


class Descriptor:
    """A file by positioned reads, closed when nobody holds it any more."""

    is_snapshot = True

    def __init__(self, path: Path) -> None:
        self._path, self.fd = path, -1
        self.fd = os.open(path, os.O_RDONLY)
        self.size = os.fstat(self.fd).st_size
        if hasattr(os, "posix_fadvise"):  # macOS has none, and guesses by itself
            os.posix_fadvise(self.fd, 0, 0, os.POSIX_FADV_RANDOM)

    def __del__(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)

    def read_into(self, offset: int, out: NDArray[np.uint8]) -> None:
        while out.size:
            done = os.preadv(self.fd, [out.data], offset)
            if not done:
                raise EOFError(f"{self._path} ends at byte {offset}")
            out, offset = out[done:], offset + done

    def prefetch(self, offset: int, size: int) -> None:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self.fd, offset, size, os.POSIX_FADV_WILLNEED)


def open_file(path: Path) -> ShardFile:
    """The bytes of a file: through a map where all of them stay in memory, a disk is better asked for pieces."""
    return MappedShard(path) if path.stat().st_size <= available_memory() // 2 else Descriptor(path)


@dataclass(frozen=True)
class Records:
    """Where the records of an array lie in the file, part after part: int64 (parts, slots), -1 where there is none."""

    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]


@dataclass(eq=False)
class PiecedShard:
    """A part's records as if they lay in a shard, in runs of adjacent ones, and an index behind them.

    begins   where in the shard each run begins, and last its index
    places   where in the file each run lies
    """

    file: ShardFile
    records: Records
    part: int
    begins: list[int]
    places: list[int]
    size: int
    is_snapshot = True

    @classmethod
    def of(cls, file: ShardFile, records: Records, part: int) -> PiecedShard:
        there = records.offsets[part] >= 0
        offsets, sizes = records.offsets[part][there], records.sizes[part][there]
        ends = np.cumsum(sizes)
        first = np.ones(len(offsets), bool)
        first[1:] = offsets[1:] != offsets[:-1] + sizes[:-1]
        end = int(ends[-1]) if len(ends) else 0
        begins = [*(ends - sizes)[first].tolist(), end]
        return cls(file, records, part, begins, offsets[first].tolist(), end + index_bytes(len(there)))

    def read_into(self, offset: int, out: NDArray[np.uint8]) -> None:
        """Fill the contiguous `out`. Raises EOFError where the shard or the file ends before."""
        if offset + out.size > self.size:
            raise EOFError(f"the shard ends before byte {offset + out.size}")
        while out.size:
            run = bisect_right(self.begins, offset) - 1
            into = offset - self.begins[run]
            if run == len(self.places):
                out[:] = np.frombuffer(self.index(), np.uint8)[into : into + out.size]
                return
            piece = out[: self.begins[run + 1] - offset]
            self.file.read_into(self.places[run] + into, piece)
            out, offset = out[piece.size :], offset + piece.size

    def prefetch(self, offset: int, size: int) -> None:
        run = bisect_right(self.begins, offset) - 1
        if run < len(self.places):
            self.file.prefetch(self.places[run] + offset - self.begins[run], size)

    def index(self) -> bytes:
        """The index behind the records, as `ShardWriter` wrote it."""
        sizes = self.records.sizes[self.part]
        empty = self.records.offsets[self.part] < 0
        index = np.stack([np.cumsum(sizes) - sizes, sizes], axis=1).astype("<u8")
        index[empty] = np.uint64(2**64 - 1)
        return with_crc(index.tobytes())


def load_records(path: Path, array: str) -> Records:
    """Ask HDF5 where the chunks of a dataset lie: 5 microseconds each, once."""
    import h5py  # for whoever has such a file

    try:
        with h5py.File(path, "r", locking=False) as group:
            dataset = group[array]
            slots = int(dataset.attrs[SLOTS])
            chunks = -(-dataset.shape[0] // dataset.chunks[0]), -(-dataset.shape[1] // dataset.chunks[1])
            parts = -(-chunks[0] * chunks[1] // slots)
            offsets, sizes = np.full(parts * slots, -1, np.int64), np.zeros(parts * slots, np.int64)

            def note(chunk: Any) -> None:
                row, column = chunk.chunk_offset[0], chunk.chunk_offset[1] // dataset.chunks[1]
                number = row * chunks[1] + column
                offsets[number], sizes[number] = chunk.byte_offset, chunk.size

            dataset.id.chunk_iter(note)
        if (offsets + sizes).max(initial=0) > path.stat().st_size:
            raise ValueError("its records lie behind the end of the file")
    except (OSError, KeyError, RuntimeError, IndexError, ValueError, TypeError, ArithmeticError) as error:
        raise NotACacheError(f"{path}: {array}: {why(error)}; copy it anew, or export the cache again") from None
    return Records(offsets.reshape(parts, slots), sizes.reshape(parts, slots))


def why(error: Exception) -> str:
    """What HDF5 found wrong, in a line."""
    said = " ".join(str(error).split())
    if "truncated" in said:
        return "is cut off: it is shorter than when it was written"
    if "signature" in said:
        return "is no HDF5 file"
    return f"is damaged ({said[:120]})"
