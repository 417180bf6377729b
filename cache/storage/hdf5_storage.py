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

import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

from regionspot.cache.errors import CacheError, NotACacheError
from regionspot.cache.storage.base import NewFile, ShardFile, Storage
from regionspot.cache.storage.hdf5_shards import PiecedShard, Records, load_records, open_file, why

FORM = "regionspot_hdf5"  # the root's attribute that tells such a file, and its version
FORM_VERSION = 1
INDEX, DATA = "files/index", "files/data"
INDEX_CRC = "crc32c"  # attribute of the index

_SHARD = re.compile(r"(?P<array>features/[^/]+/(?:feature_map|token|scale))/c\.(?P<part>\d+)(?:\.0)*")
_KEPT_SHARDS = 4096  # of a few hundred bytes each: most parts lie in one piece


class Hdf5Storage(Storage):
    """The files in an HDF5 file, to read. Opened by the first that is asked for; no position in it is shared."""

    readers = 2
    on_disk = True
    writable = False

    def __init__(self, path: Path) -> None:
        self.path, self.address = path, str(path)
        self._contents: _Contents | None = None
        self._tables: dict[str, Records] = {}
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
        place, size = self._entry(name)
        wanted = np.frombuffer(out, np.uint8)
        if offset + wanted.size > size:
            raise EOFError(f"{name} ends before byte {offset + wanted.size}")
        if place < 0:
            self._shards(name).read_into(offset, wanted)
        else:
            contents = self._open()
            contents.file.read_into(contents.data + place + offset, wanted)

    def open_shard(self, name: str) -> PiecedShard:
        if self._entry(name)[0] >= 0:
            raise NotACacheError(f"{self.path}: {name} is no shard; the file is damaged: export the cache again")
        return self._shards(name)

    def size(self, name: str) -> int:
        return self._entry(name)[1] if name else self.path.stat().st_size

    def list_files(self, folder: str) -> list[str]:
        return self._open().folders.get(folder, [])

    def zarr_store(self, read_only: bool = True) -> Any:
        from zarr.core.buffer import default_buffer_prototype  # zarr takes a second to import
        from zarr.storage import MemoryStore

        from regionspot.cache.storage.zarr_store import ZarrView

        empty = default_buffer_prototype().buffer.from_bytes(b"")
        return ZarrView(self, MemoryStore(dict.fromkeys(self._open().files, empty), read_only=True))

    def repair_hint(self, part: int) -> str:
        return "copy the file anew, or export the cache again"

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
            f"{self.path}: a cache in one file is only read; `regionspot cache import` makes a folder of it"
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

    def _load_shard(self, name: str) -> PiecedShard:
        found = _SHARD.fullmatch(name)
        array, part = (found["array"], int(found["part"])) if found else ("", 0)
        if array and array not in self._tables:
            self._tables[array] = load_records(self.path, array)
        if not array or part >= len(self._tables[array].offsets):
            raise NotACacheError(f"{self.path}: {name} is no shard; the file is damaged: export the cache again")
        return PiecedShard.of(self._open().file, self._tables[array], part)


@dataclass(frozen=True)
class _Contents:
    """files: offset behind `data`, -1 for a shard, and size of each; folders: the names of those in each."""

    file: ShardFile
    data: int
    files: dict[str, tuple[int, int]]
    folders: dict[str, list[str]]


def _load_contents(path: Path) -> _Contents:
    import h5py  # for whoever has such a file

    try:
        file = open_file(path)
        with h5py.File(path, "r", locking=False) as group:
            if group.attrs.get(FORM) != FORM_VERSION:
                found = group.attrs.get(FORM)
                what = "is an HDF5 file of something else" if found is None else f"has form {found}, not {FORM_VERSION}"
                raise NotACacheError(f"{path}: {what}; give one that `regionspot cache export` made")
            index, data = group[INDEX][:], group[DATA].id.get_offset() or 0
            if google_crc32c.value(index.tobytes()) != group[INDEX].attrs[INDEX_CRC]:
                raise ValueError(f"{INDEX} does not match its checksum")
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
        raise NotACacheError(f"{path}: {why(error)}; copy it anew, or export the cache again") from None
    folders: dict[str, list[str]] = {}
    for name in files:
        folder, _, last = name.rpartition("/")
        folders.setdefault(folder, []).append(last)
    return _Contents(file, data, files, folders)
