"""Read-only storage: a whole cache in one HDF5 file, presented as its tree of files.

    features/<set>/<array>   a dataset, one chunk per record, readable by any HDF5 tool
    images/  regions/        the manifest's columns as datasets
    provenance               the attributes in zarr.json, as JSON
    files/data               every other file of the tree, concatenated
    files/index              name, offset in `data` and size of each file; a shard has offset -1

A shard is assembled from its part's chunks and a rebuilt index; it equals the original bytes. The HDF5 library only
reports the chunks' offsets, once per dataset; records are read without it, which is safe with threads and after a fork.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

from regionspot.cache.errors import CacheError, NotACacheError
from regionspot.cache.storage.base import NewFile, ShardFile, Storage
from regionspot.cache.storage.hdf5_shards import ChunkTable, Hdf5Shard, describe_error, load_chunks, open_file

FORMAT = "regionspot_hdf5"  # attribute of the root: the format's version
FORMAT_VERSION = 1
INDEX, DATA = "files/index", "files/data"
INDEX_CRC = "crc32c"  # attribute of the index

_SHARD = re.compile(r"(?P<array>features/[^/]+/(?:feature_map|token|scale))/c\.(?P<part>\d+)(?:\.0)*")
_CACHED_SHARDS = 4096  # a few hundred bytes each: most parts are one run of chunks


class Hdf5Storage(Storage):
    """The files in an HDF5 file, read-only. The file is opened on first use."""

    readers = 2
    on_disk = True
    writable = False

    def __init__(self, path: Path) -> None:
        self.path, self.address = path, str(path)
        self._contents: _Contents | None = None
        self._tables: dict[str, ChunkTable] = {}
        self._shards = lru_cache(maxsize=_CACHED_SHARDS)(self._load_shard)

    def __reduce__(self) -> tuple[Any, ...]:
        return Hdf5Storage, (self.path,)

    def local_path(self, name: str) -> Path | None:
        return None

    def read(self, name: str) -> bytes:
        data = bytearray(self.size(name))
        self.read_into(name, 0, memoryview(data))
        return bytes(data)

    def read_into(self, name: str, offset: int, out: memoryview) -> None:
        file_offset, size = self._entry(name)
        buffer = np.frombuffer(out, np.uint8)
        if offset + buffer.size > size:
            raise EOFError(f"{name} ends before byte {offset + buffer.size}")
        if file_offset < 0:
            self._shards(name).read_into(offset, buffer)
        else:
            contents = self._open()
            contents.file.read_into(contents.data + file_offset + offset, buffer)

    def open_shard(self, name: str) -> Hdf5Shard:
        if self._entry(name)[0] >= 0:
            raise NotACacheError(f"{self.path}: {name} is not a shard; the file is damaged: export the cache again")
        return self._shards(name)

    def size(self, name: str) -> int:
        return self._entry(name)[1] if name else self.path.stat().st_size

    def list_files(self, folder: str) -> list[str]:
        return self._open().folders.get(folder, [])

    def zarr_store(self, read_only: bool = True) -> Any:
        from zarr.core.buffer import default_buffer_prototype  # importing zarr takes a second
        from zarr.storage import MemoryStore

        from regionspot.cache.storage.zarr_store import ReadOnlyZarrStore

        empty = default_buffer_prototype().buffer.from_bytes(b"")
        return ReadOnlyZarrStore(self, MemoryStore(dict.fromkeys(self._open().files, empty), read_only=True))

    def repair_hint(self, part: int) -> str:
        return "copy the file again, or export the cache again"

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
            f"{self.path}: a cache in one file is read-only; convert it to a folder with `regionspot cache import`"
        )

    def _open(self) -> _Contents:
        if self._contents is None:
            self._contents = _load_contents(self.path)
        return self._contents

    def _entry(self, name: str) -> tuple[int, int]:
        """Offset (-1 for a shard) and size of a file."""
        try:
            return self._open().files[name]
        except KeyError:
            raise FileNotFoundError(f"{self.path}: has no file {name}") from None

    def _load_shard(self, name: str) -> Hdf5Shard:
        match = _SHARD.fullmatch(name)
        array, part = (match["array"], int(match["part"])) if match else ("", 0)
        if array and array not in self._tables:
            self._tables[array] = load_chunks(self.path, array)
        if not array or part >= len(self._tables[array].offsets):
            raise NotACacheError(f"{self.path}: {name} is not a shard; the file is damaged: export the cache again")
        return Hdf5Shard.of(self._open().file, self._tables[array], part)


@dataclass(frozen=True)
class _Contents:
    """files: offset after `data` (-1 for a shard) and size of each file; folders: base names of the files in each."""

    file: ShardFile
    data: int
    files: dict[str, tuple[int, int]]
    folders: dict[str, list[str]]


def _load_contents(path: Path) -> _Contents:
    import h5py  # imported on demand: an optional dependency

    try:
        file = open_file(path)
        with h5py.File(path, "r", locking=False) as group:
            if (version := group.attrs.get(FORMAT)) != FORMAT_VERSION:
                reason = "is not a cache" if version is None else f"has format version {version}, not {FORMAT_VERSION}"
                raise NotACacheError(f"{path}: {reason}; give a file that `regionspot cache export` wrote")
            index, data = group[INDEX][:], group[DATA].id.get_offset() or 0
            if google_crc32c.value(index.tobytes()) != group[INDEX].attrs[INDEX_CRC]:
                raise ValueError(f"{INDEX} does not match its checksum")
        files = {
            name.decode(): (int(offset), int(size))
            for name, offset, size in zip(index["name"], index["offset"], index["size"], strict=True)
        }
        # A shard is not in `data`, and its index is not in the file.
        if any(size < 0 or (offset >= 0 and data + offset + size > file.size) for offset, size in files.values()):
            raise ValueError(f"{INDEX} lists files beyond its end")
    except FileNotFoundError:
        raise
    except (OSError, KeyError, RuntimeError, ValueError, TypeError, AttributeError) as error:
        raise NotACacheError(f"{path}: {describe_error(error)}; copy it again, or export the cache again") from None
    folders: dict[str, list[str]] = {}
    for name in files:
        folder, _, last = name.rpartition("/")
        folders.setdefault(folder, []).append(last)
    return _Contents(file, data, files, folders)
