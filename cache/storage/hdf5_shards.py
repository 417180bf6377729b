"""Shards of a cache in one HDF5 file, assembled from the dataset's chunks.

The HDF5 library is used once per dataset, for the offsets of its chunks; records are then read directly from the file.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from regionspot.cache.errors import NotACacheError
from regionspot.cache.machine import available_memory
from regionspot.cache.storage.base import ShardFile
from regionspot.cache.storage.shard_files import MappedShard, PreadFile
from regionspot.cache.storage.zarr_shard import index_bytes, with_crc

SLOTS = "records_of_a_part"  # attribute of a dataset: number of slots of each part


def open_file(path: Path) -> ShardFile:
    """Open a file for reads: mapped if all of it fits into memory, else by `pread`."""
    return MappedShard(path) if path.stat().st_size <= available_memory() // 2 else PreadFile(path)


@dataclass(frozen=True)
class ChunkTable:
    """Offsets in the file and sizes of an array's chunks: int64 (parts, slots), offset -1 for an empty slot."""

    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]


@dataclass(eq=False)
class Hdf5Shard:
    """A part's chunks presented as one shard: runs of adjacent chunks, then the index.

    starts    offset of each run in the shard, and last that of the index
    offsets   offset of each run in the file
    """

    file: ShardFile
    chunks: ChunkTable
    part: int
    starts: list[int]
    offsets: list[int]
    size: int
    is_snapshot = True

    @classmethod
    def of(cls, file: ShardFile, chunks: ChunkTable, part: int) -> Hdf5Shard:
        filled = chunks.offsets[part] >= 0
        offsets, sizes = chunks.offsets[part][filled], chunks.sizes[part][filled]
        ends = np.cumsum(sizes)
        first = np.ones(len(offsets), bool)
        first[1:] = offsets[1:] != offsets[:-1] + sizes[:-1]
        end = int(ends[-1]) if len(ends) else 0
        starts = [*(ends - sizes)[first].tolist(), end]
        return cls(file, chunks, part, starts, offsets[first].tolist(), end + index_bytes(len(filled)))

    def read_into(self, offset: int, out: NDArray[np.uint8]) -> None:
        """Fill the contiguous `out`. Raises EOFError when the shard or the file is too short."""
        if offset + out.size > self.size:
            raise EOFError(f"the shard ends before byte {offset + out.size}")
        while out.size:
            run = bisect_right(self.starts, offset) - 1
            skip = offset - self.starts[run]
            if run == len(self.offsets):
                out[:] = np.frombuffer(self.index(), np.uint8)[skip : skip + out.size]
                return
            piece = out[: self.starts[run + 1] - offset]
            self.file.read_into(self.offsets[run] + skip, piece)
            out, offset = out[piece.size :], offset + piece.size

    def prefetch(self, offset: int, size: int) -> None:
        run = bisect_right(self.starts, offset) - 1
        if run < len(self.offsets):
            self.file.prefetch(self.offsets[run] + offset - self.starts[run], size)

    def index(self) -> bytes:
        """The shard's index, equal to the bytes that `ShardWriter` wrote."""
        sizes = self.chunks.sizes[self.part]
        empty = self.chunks.offsets[self.part] < 0
        index = np.stack([np.cumsum(sizes) - sizes, sizes], axis=1).astype("<u8")
        index[empty] = np.uint64(2**64 - 1)
        return with_crc(index.tobytes())


def load_chunks(path: Path, array: str) -> ChunkTable:
    """Read the offsets of a dataset's chunks from HDF5: 5 microseconds each, once."""
    import h5py  # imported on demand: an optional dependency

    try:
        with h5py.File(path, "r", locking=False) as group:
            dataset = group[array]
            slots = int(dataset.attrs[SLOTS])
            chunks = -(-dataset.shape[0] // dataset.chunks[0]), -(-dataset.shape[1] // dataset.chunks[1])
            parts = -(-chunks[0] * chunks[1] // slots)
            offsets, sizes = np.full(parts * slots, -1, np.int64), np.zeros(parts * slots, np.int64)

            def add(chunk: Any) -> None:
                row, column = chunk.chunk_offset[0], chunk.chunk_offset[1] // dataset.chunks[1]
                number = row * chunks[1] + column
                offsets[number], sizes[number] = chunk.byte_offset, chunk.size

            dataset.id.chunk_iter(add)
        if (offsets + sizes).max(initial=0) > path.stat().st_size:
            raise ValueError("its chunks lie beyond the end of the file")
    except (OSError, KeyError, RuntimeError, IndexError, ValueError, TypeError, ArithmeticError) as error:
        raise NotACacheError(
            f"{path}: {array}: {describe_error(error)}; copy it again, or export the cache again"
        ) from None
    return ChunkTable(offsets.reshape(parts, slots), sizes.reshape(parts, slots))


def describe_error(error: Exception) -> str:
    """One line for an error of the HDF5 library."""
    message = " ".join(str(error).split())
    if "truncated" in message:
        return "is truncated"
    if "signature" in message:
        return "is not an HDF5 file"
    return f"is damaged ({message[:120]})"
