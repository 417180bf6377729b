"""A cache as one HDF5 file, for clusters that count files, and back; equal to the byte.

    export_hdf5(FeatureCache.open("o365.zarr"), "o365.h5")
    FeatureCache.open("o365.h5")                             # reads as the folder does
    import_hdf5("o365.h5", "o365.zarr")                      # the same files again

An HDF5 file that was being written when its writer was killed never opens again. So it gets its name when it is whole
and flushed, and is not written into after that. `hdf5_storage.py` says what lies where in it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from regionspot.cache.errors import CacheError, CacheExistsError, InputError, NotACacheError
from regionspot.cache.format.header import load_header
from regionspot.cache.format.schema import FeatureSet
from regionspot.cache.format.zarr_metadata import damaged_files
from regionspot.cache.outputs import require_apart
from regionspot.cache.progress import Progress
from regionspot.cache.storage.atomic_files import partial_path, remove_abandoned, sync_folder
from regionspot.cache.storage.base import Storage
from regionspot.cache.storage.hdf5_shards import SLOTS
from regionspot.cache.storage.hdf5_storage import DATA, FORMAT, FORMAT_VERSION, INDEX, INDEX_CRC
from regionspot.cache.storage.local import LocalStorage
from regionspot.cache.storage.open import HDF5_SUFFIXES
from regionspot.cache.storage.zarr_shard import ZSTD_LEVEL
from regionspot.cache.store import FeatureCache
from regionspot.cache.tools.copy_parts import Place, commit_part, records_of, require_equal

if TYPE_CHECKING:
    import h5py

ZSTD_FILTER = 32015  # registered with the HDF Group; hdf5plugin brings it along for other readers

_BLOCK = 8 << 20  # bytes copied at once


def export_hdf5(cache: FeatureCache, out: str | Path) -> Path:
    """Write all of a cache into one HDF5 file: manifest, provenance, and the parts that are written by now.

    Every record is compared with its checksum on the way, and one is in memory at a time. The file has its name only
    once it is whole. Raises CacheError when `out` exists or cannot be written, CorruptPartError for a damaged part,
    NotACacheError for a damaged manifest.
    """
    out = Path(out)
    if out.suffix not in HDF5_SUFFIXES:
        raise InputError(f"{out}: a cache in one file ends in .h5, so that it is opened as such; name it so")
    require_apart(out, [cache.path])
    with _written_beside(out) as building:
        _write(cache, building)
        with building.open("rb") as file:
            os.fsync(file.fileno())
    return out


def import_hdf5(file: str | Path, out: str | Path) -> Path:
    """Make a folder of a cache in one file: the same files that it was made from, checked on the way.

    Raises NotACacheError for a file that is no cache, CorruptPartError for a damaged part, CacheError when `out`
    exists or cannot be written.
    """
    source, out = FeatureCache.open(file), Path(out)
    with _written_beside(out) as building:
        storage = LocalStorage(building)
        for name in _made_with_the_cache(source.storage):
            storage.write(name, source.storage.read(name))
        target = FeatureCache.open(building, "a")
        parts = [(name, part) for name in source.feature_sets for part in _written_parts(source, name)]
        progress = Progress(len(parts), "parts")
        for name, part in parts:
            commit_part(Place(source, name, part), Place(target, name, part), link=False, before_publish=lambda: None)
            progress.step()
    return out


@contextmanager
def _written_beside(out: Path) -> Iterator[Path]:
    """A path beside `out` that gets this name when the block is left, and is removed when it fails."""
    building = partial_path(out)
    try:
        if out.exists():
            raise CacheExistsError(f"{out}: exists already; give another place")
        out.parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(out.parent, f"{out.name}.")
        yield building
        os.rename(building, out)
        sync_folder(out.parent)
    except (OSError, RuntimeError) as error:
        if isinstance(error, CacheError):
            raise
        why = getattr(error, "strerror", None) or " ".join(str(error).split())  # h5py gives HDF5's words alone
        raise CacheError(f"{out}: cannot be written: {why}; give a place with space where you may write") from error
    finally:
        if building.is_dir():
            shutil.rmtree(building, ignore_errors=True)
        else:
            building.unlink(missing_ok=True)


def _written_parts(cache: FeatureCache, name: str) -> list[int]:
    pending = set(cache.pending_parts([name]))
    return [part for part in range(cache.n_parts) if part not in pending]


def _made_with_the_cache(storage: Storage) -> list[str]:
    """All files but those of the parts. Raises NotACacheError for one that is not as it was made."""
    header = load_header(storage)
    damaged, _ = damaged_files(storage, header, storage.readers)
    for name, damage in damaged.items():
        raise NotACacheError(f"{storage.address}/{name}: {damage}; put it back from a copy of the cache")
    return ["zarr.json", *header.files]


def _write(cache: FeatureCache, path: Path) -> None:
    import h5py  # for whoever wants such a file

    whole = _made_with_the_cache(cache.storage)
    shards: dict[str, int] = {}
    parts = {name: _written_parts(cache, name) for name in cache.feature_sets}
    progress = Progress(sum(map(len, parts.values())), "parts")
    # Of the newer forms the oldest: chunks are found without a tree, and metadata carries checksums.
    with h5py.File(path, "w", libver=("v110", "v110")) as file:
        file.attrs[FORMAT] = FORMAT_VERSION
        for name, written in parts.items():
            arrays = _create_arrays(file, cache, cache.feature_sets[name])
            for part in written:
                place = Place(cache, name, part)
                shards |= _write_records(arrays, place)
                whole += [place.files()[-1], place.record]
                progress.step()
        _write_columns(file, cache.storage)
        _write_files(file, cache.storage, whole, shards)
        provenance = json.loads(cache.storage.read("zarr.json"))["attributes"]
        text = json.dumps(provenance, ensure_ascii=False, allow_nan=False)
        file.create_dataset("provenance", data=text, dtype=h5py.string_dtype())


def _create_arrays(file: h5py.File, cache: FeatureCache, feature_set: FeatureSet) -> list[h5py.Dataset]:
    """The datasets of a feature set, in the order of its shards: records, and the scales of int8."""
    shape = cache.geometry.array_shape(feature_set)
    arrays = [
        _create_array(file, feature_set.array, shape, (1, *feature_set.record_shape), feature_set.stored, feature_set)
    ]
    if feature_set.has_scales:
        scales = (1, *feature_set.scale_shape)
        arrays.append(_create_array(file, feature_set.scales, shape[:-1], scales, np.dtype("<f2"), None))
    for array in arrays:
        attributes = json.loads(cache.storage.read(f"{array.name[1:]}/zarr.json"))["attributes"]
        for name, value in attributes.items():  # others may have added some that HDF5 has no type for
            array.attrs[name] = value if isinstance(value, str | int | float) else json.dumps(value)
        array.attrs[SLOTS] = cache.geometry.slots(feature_set)
    return arrays


def _create_array(
    file: h5py.File,
    name: str,
    shape: tuple[int, ...],
    chunk: tuple[int, ...],
    dtype: np.dtype[Any],
    compressed: FeatureSet | None,
) -> h5py.Dataset:
    from h5py import h5d, h5p, h5z

    properties = h5p.create(h5p.DATASET_CREATE)
    properties.set_fill_time(h5d.FILL_TIME_NEVER)  # every chunk that there is, is written whole
    if compressed is not None and compressed.compression:
        # Optional, or HDF5 would refuse to name a filter that it cannot run here; records come compressed already.
        properties.set_filter(ZSTD_FILTER, h5z.FLAG_OPTIONAL, (ZSTD_LEVEL,))
    return file.create_dataset(name, shape, dtype, chunks=chunk, dcpl=properties)


def _write_records(arrays: Sequence[h5py.Dataset], place: Place) -> dict[str, int]:
    """Write the records of a part as chunks; the sizes of the shards that they lay in. Raises CorruptPartError."""
    record = place.cache.record(place.part, place.name)
    found = np.zeros(place.slots, np.uint32)
    shards = place.files()[:-1]
    for array, shard in zip(arrays, shards, strict=True):
        columns = array.chunks[1] if place.feature_set.kind == "token" else 0
        first = place.part * place.slots if place.feature_set.kind == "map" else place.part
        rest = (0,) * (array.ndim - 2)
        for slot, stored in records_of(place, shard):
            at = (first, slot * columns, *rest) if columns else (first + slot, 0, *rest)
            array.id.write_direct_chunk(at, stored)
            found[slot] = google_crc32c.extend(int(found[slot]), stored)
    require_equal(place, found)
    return {shard: record.files[shard] for shard in shards}


def _write_columns(file: h5py.File, storage: Storage) -> None:
    """The manifest as datasets with checksums, for readers that are not ours, which take it from the files."""
    import zarr  # takes a second

    for folder in ("images", "regions"):
        group = zarr.open_group(storage.zarr_store(), path=folder, mode="r", zarr_format=3, use_consolidated=False)
        for name, column in sorted(group.arrays()):
            dtype = _hdf5_dtype(column)
            checked = {"chunks": column.chunks, "fletcher32": True} if column.size else {}
            dataset = file.create_dataset(f"{folder}/{name}", column.shape, dtype, **checked)
            for first, values in _blocks(column):
                dataset[first : first + len(values)] = values if dtype == values.dtype else _encoded(values)


def _hdf5_dtype(column: Any) -> Any:
    """The column's own; for text one of a fixed length, so that its bytes are under the checksum."""
    import h5py

    if column.dtype.kind in "biuf":
        return column.dtype
    longest = max((len(each) for _, values in _blocks(column) for each in _encoded(values)), default=1)
    return h5py.string_dtype("utf-8", max(1, longest))


def _encoded(texts: NDArray[Any]) -> list[bytes]:
    return [str(text).encode() for text in texts]


def _blocks(column: Any) -> Iterator[tuple[int, NDArray[Any]]]:
    """A Zarr array chunk by chunk: where it begins, and its values."""
    for first in range(0, column.shape[0], column.chunks[0]):
        yield first, np.asarray(column[first : first + column.chunks[0]])


def _write_files(file: h5py.File, storage: Storage, names: Sequence[str], shards: Mapping[str, int]) -> None:
    """All files of the tree but the shards, one behind another, and where each lies."""
    sizes = [storage.size(name) for name in names]
    entries = [*zip(names, np.cumsum([0, *sizes[:-1]]).tolist(), sizes, strict=True)]
    entries += [(name, -1, size) for name, size in shards.items()]
    longest = max(len(name.encode()) for name, _, _ in entries)
    index = np.array(
        [(name.encode(), offset, size) for name, offset, size in sorted(entries)],
        dtype=[("name", f"S{longest}"), ("offset", "<i8"), ("size", "<i8")],
    )
    # Of the list: without it a damaged name would be a file that is not there, and its part one not yet written.
    file.create_dataset(INDEX, data=index).attrs[INDEX_CRC] = google_crc32c.value(index.tobytes())
    data = file.create_dataset(DATA, (sum(sizes),), "u1")
    for name, offset, size in entries[: len(names)]:
        for start in range(0, size, _BLOCK):
            block = bytearray(min(_BLOCK, size - start))
            storage.read_into(name, start, memoryview(block))
            data[offset + start : offset + start + len(block)] = np.frombuffer(block, np.uint8)
