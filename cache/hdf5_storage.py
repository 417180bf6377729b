"""A whole cache in one HDF5 file, seen as the tree of files that it was made from.

    features/<set>/<array>   a dataset of its own, a chunk a record: what any HDF5 tool reads
    images/  regions/        the manifest's columns, likewise
    provenance               what zarr.json says of the cache, as JSON
    files/data               every other file of the tree, one behind another
    files/index              name, offset in `data` and size of each; a shard has no offset, it is put together

A shard is its part's chunks in their order and an index made anew, to the byte what it was. HDF5 says at which offsets
of the file its chunks lie, so records are read from there as from a shard: HDF5's own code runs only once a dataset,
and is none that a fork or several threads could trip over.
"""

from __future__ import annotations

import os
import re
from bisect import bisect_right
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from regionspot.cache.errors import CacheError, NotACacheError
from regionspot.cache.machine import available_memory
from regionspot.cache.shard import with_crc
from regionspot.cache.shard_files import MappedShard, ShardFile
from regionspot.cache.storage import NewFile, Storage

FORM = "regionspot_hdf5"  # the root's attribute that tells such a file, and its version
FORM_VERSION = 1
INDEX, DATA = "files/index", "files/data"
SLOTS = "records_of_a_part"  # attribute of a dataset of records

_SHARD = re.compile(r"(?P<array>features/[^/]+/(?:feature_map|token|scale))/c\.(?P<part>\d+)(?:\.0)*")
_KEPT_SHARDS = 4096  # of a few hundred bytes each: most parts lie in one piece


class Hdf5Storage(Storage):
    """The files in an HDF5 file, to read. Opened by the first that is asked for; no position in it is shared."""

    readers = 2
    on_disk = True

    def __init__(self, path: Path) -> None:
        self.path, self.address = path, str(path)
        self._contents: _Contents | None = None
        self._tables: dict[str, _Records] = {}
        self._shards = lru_cache(maxsize=_KEPT_SHARDS)(self._load_shard)

    def __reduce__(self) -> tuple[Any, ...]:
        return Hdf5Storage, (self.path,)

    def local_path(self, name: str) -> Path | None:
        return None

    def read(self, name: str) -> bytes:
        data = bytearray(self.size(name))
        self.read_into(name, 0, memoryview(data))
        return bytes(data)

    def read_into(self, name: str, offset: int, out: memoryview) -> None:
        out = out.cast("B")
        place, size = self._entry(name)
        if offset + len(out) > size:
            raise EOFError(f"{name} ends before byte {offset + len(out)}")
        if place < 0:
            self._read_shard(self._shards(name), offset, out)
        else:
            self._read(self._open().data + place + offset, out)

    def announce(self, name: str, offset: int, size: int) -> None:
        shard = self._shards(name)
        run = bisect_right(shard.begins, offset) - 1
        if run < len(shard.places):
            self._open().file.announce(shard.places[run] + offset - shard.begins[run], size)

    def size(self, name: str) -> int:
        return self._entry(name)[1] if name else self.path.stat().st_size

    def names(self, folder: str) -> list[str]:
        return self._open().folders.get(folder, [])

    def zarr_store(self, read_only: bool = True) -> Any:
        from zarr.core.buffer import default_buffer_prototype  # zarr takes a second to import
        from zarr.storage import MemoryStore

        from regionspot.cache.zarr_view import ZarrView

        empty = default_buffer_prototype().buffer.from_bytes(b"")
        return ZarrView(self, MemoryStore(dict.fromkeys(self._open().files, empty), read_only=True))

    def check_writable(self) -> None:
        raise self._read_only()

    def create(self, name: str) -> NewFile:
        raise self._read_only()

    def write(self, name: str, data: bytes) -> None:
        raise self._read_only()

    def write_new(self, name: str, data: bytes) -> bool:
        raise self._read_only()

    def remove(self, name: str) -> None:
        raise self._read_only()

    def remove_abandoned(self, folder: str) -> None:
        raise self._read_only()

    def _read_only(self) -> CacheError:
        return CacheError(
            f"{self.path}: a cache in one file is only read; `regionspot cache import` makes a folder of it, to go on"
        )

    def _open(self) -> _Contents:
        if self._contents is None:
            self._contents = _load_contents(self.path)
        return self._contents

    def _entry(self, name: str) -> tuple[int, int]:
        """Offset, below 0 for a shard, and size of a file."""
        try:
            return self._open().files[name]
        except KeyError:
            raise FileNotFoundError(f"{self.path}: holds no {name}") from None

    def _read_shard(self, shard: _Shard, offset: int, out: memoryview) -> None:
        while out:
            run = bisect_right(shard.begins, offset) - 1
            into = offset - shard.begins[run]
            length = min(len(out), shard.begins[run + 1] - offset if run + 1 < len(shard.begins) else len(out))
            if run + 1 == len(shard.begins):
                out[:length] = shard.index()[into : into + length]
            else:
                self._read(shard.places[run] + into, out[:length])
            out, offset = out[length:], offset + length

    def _read(self, offset: int, out: memoryview) -> None:
        if not 0 <= offset <= self._open().file.size - len(out):
            raise EOFError(f"{self.path} ends before byte {offset + len(out)}")
        self._open().file.read_into(offset, np.frombuffer(out, np.uint8))

    def _load_shard(self, name: str) -> _Shard:
        found = _SHARD.fullmatch(name)
        if found is None:
            raise NotACacheError(f"{self.path}: {name} is no shard; the file is damaged: export the cache again")
        array = found["array"]
        if array not in self._tables:
            self._tables[array] = _load_records(self.path, array)
        return _Shard.of(self._tables[array], int(found["part"]))


class _Descriptor:
    """A file by positioned reads, closed when nobody holds it any more."""

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

    def announce(self, offset: int, size: int) -> None:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self.fd, offset, size, os.POSIX_FADV_WILLNEED)


@dataclass(frozen=True)
class _Contents:
    """files: offset behind `data`, -1 for a shard, and size of each; folders: the names of those in each."""

    file: ShardFile
    data: int
    files: dict[str, tuple[int, int]]
    folders: dict[str, list[str]]


@dataclass(frozen=True)
class _Records:
    """Where the records of an array lie in the file, part after part: int64 (parts, slots), -1 where there is none."""

    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]


@dataclass(frozen=True)
class _Shard:
    """A shard in pieces: begins[i] is where in it a run of adjacent records begins that lies at places[i] of the file.

    The last of `begins` is where its index begins.
    """

    records: _Records
    part: int
    begins: list[int]
    places: list[int]

    @classmethod
    def of(cls, records: _Records, part: int) -> _Shard:
        there = records.offsets[part] >= 0
        offsets, sizes = records.offsets[part][there], records.sizes[part][there]
        ends = np.cumsum(sizes)
        first = np.ones(len(offsets), bool)
        first[1:] = offsets[1:] != offsets[:-1] + sizes[:-1]
        end = int(ends[-1]) if len(ends) else 0
        return cls(records, part, [*(ends - sizes)[first].tolist(), end], offsets[first].tolist())

    def index(self) -> bytes:
        """The index behind the records, as `ShardWriter` wrote it."""
        sizes = self.records.sizes[self.part]
        empty = self.records.offsets[self.part] < 0
        index = np.stack([np.cumsum(sizes) - sizes, sizes], axis=1).astype("<u8")
        index[empty] = np.uint64(2**64 - 1)
        return with_crc(index.tobytes())


def _load_contents(path: Path) -> _Contents:
    import h5py  # for whoever has such a file

    try:
        # A copy from a map is the faster one, where all of it stays in memory; a disk is better asked for pieces.
        file = MappedShard(path) if path.stat().st_size <= available_memory() // 2 else _Descriptor(path)
        with h5py.File(path, "r", locking=False) as group:
            if group.attrs.get(FORM) != FORM_VERSION:
                found = group.attrs.get(FORM)
                what = "is an HDF5 file of something else" if found is None else f"has form {found}, not {FORM_VERSION}"
                raise NotACacheError(f"{path}: {what}; give one that `regionspot cache export` made")
            index, data = group[INDEX][:], group[DATA].id.get_offset() or 0
        files = {
            name.decode(): (int(offset), int(size))
            for name, offset, size in zip(index["name"], index["offset"], index["size"], strict=True)
        }
        # A shard is nowhere in `data`, and its index nowhere in the file.
        if any(size < 0 or (offset >= 0 and data + offset + size > file.size) for offset, size in files.values()):
            raise ValueError(f"{INDEX} speaks of files behind its end")
    except FileNotFoundError:
        raise
    except (OSError, KeyError, RuntimeError, ValueError, TypeError, AttributeError) as error:
        raise NotACacheError(f"{path}: {_why(error)}; copy it anew, or export the cache again") from None
    folders: dict[str, list[str]] = {}
    for name in files:
        folder, _, last = name.rpartition("/")
        folders.setdefault(folder, []).append(last)
    return _Contents(file, data, files, folders)


def _load_records(path: Path, array: str) -> _Records:
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
    except (OSError, KeyError, RuntimeError, IndexError, ValueError, TypeError, ArithmeticError) as error:
        raise NotACacheError(f"{path}: {array}: {_why(error)}; copy it anew, or export the cache again") from None
    return _Records(offsets.reshape(parts, slots), sizes.reshape(parts, slots))


def _why(error: Exception) -> str:
    """What HDF5 found wrong, in a line."""
    said = " ".join(str(error).split())
    if "truncated" in said:
        return "is cut off: it is shorter than when it was written"
    if "signature" in said:
        return "is no HDF5 file"
    return f"is damaged ({said[:120]})"
