"""Exports a cache to one HDF5 file, for clusters with file quotas, and imports it byte-identically.

    export_hdf5(FeatureCache.open("o365.zarr"), "o365.h5")
    FeatureCache.open("o365.h5")                             # reads like the folder
    import_hdf5("o365.h5", "o365.zarr")                      # the same files again

An HDF5 file whose writer was killed cannot be opened. So the file is renamed into place when it is complete, and never
changed afterwards. hdf5_storage.py documents its layout.
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
from regionspot.cache.tools.copy_parts import PartRef, copy_part, read_records, require_checksums

if TYPE_CHECKING:
    import h5py

ZSTD_FILTER = 32015  # registered with the HDF Group; other readers get it from hdf5plugin

_BLOCK = 8 << 20  # bytes per copy


def export_hdf5(cache: FeatureCache, out: str | Path) -> Path:
    """Write a cache into one HDF5 file: manifest, provenance, and all parts written so far.

    Every record is compared with its checksum; one is in memory at a time. The file appears when it is complete. Raises
    CacheError when `out` exists or cannot be written, CorruptPartError for a damaged part, NotACacheError for a damaged
    manifest.
    """
    out = Path(out)
    if out.suffix not in HDF5_SUFFIXES:
        raise InputError(f"{out}: the name of a cache in one file ends in .h5; add that")
    require_apart(out, [cache.path])
    with _temporary_path(out) as building:
        _write(cache, building)
        with building.open("rb") as file:
            os.fsync(file.fileno())
    return out


def import_hdf5(file: str | Path, out: str | Path) -> Path:
    """Convert a cache in one file to a folder with the original files, verifying each record.

    Raises NotACacheError for a file that is not a cache, CorruptPartError for a damaged part, CacheError when `out`
    exists or cannot be written.
    """
    source, out = FeatureCache.open(file), Path(out)
    with _temporary_path(out) as building:
        storage = LocalStorage(building)
        for name in _manifest_files(source.storage):
            storage.write(name, source.storage.read(name))
        target = FeatureCache.open(building, "a")
        parts = [(name, part) for name in source.feature_sets for part in _written_parts(source, name)]
        progress = Progress(len(parts), "parts")
        for name, part in parts:
            copy_part(PartRef(source, name, part), PartRef(target, name, part), link=False, before_publish=lambda: None)
            progress.step()
    return out


@contextmanager
def _temporary_path(out: Path) -> Iterator[Path]:
    """A path that is renamed to `out` on success and removed on failure."""
    building = partial_path(out)
    try:
        if out.exists():
            raise CacheExistsError(f"{out}: exists already; give another path")
        out.parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(out.parent, f"{out.name}.")
        yield building
        os.rename(building, out)
        sync_folder(out.parent)
    except (OSError, RuntimeError) as error:
        if isinstance(error, CacheError):
            raise
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())  # h5py has no strerror
        raise CacheError(f"{out}: cannot be written: {reason}; give a writable path with enough space") from error
    finally:
        if building.is_dir():
            shutil.rmtree(building, ignore_errors=True)
        else:
            building.unlink(missing_ok=True)


def _written_parts(cache: FeatureCache, name: str) -> list[int]:
    pending = set(cache.pending_parts([name]))
    return [part for part in range(cache.n_parts) if part not in pending]


def _manifest_files(storage: Storage) -> list[str]:
    """All files except those of the parts. Raises NotACacheError if one is damaged."""
    header = load_header(storage)
    damaged, _ = damaged_files(storage, header, storage.readers)
    for name, damage in damaged.items():
        raise NotACacheError(f"{storage.address}/{name}: {damage}; restore it from a copy of the cache")
    return ["zarr.json", *header.files]


def _write(cache: FeatureCache, path: Path) -> None:
    import h5py  # imported on demand: an optional dependency

    files = _manifest_files(cache.storage)
    shards: dict[str, int] = {}
    parts = {name: _written_parts(cache, name) for name in cache.feature_sets}
    progress = Progress(sum(map(len, parts.values())), "parts")
    # The oldest version that indexes chunks without a B-tree and has checksums of metadata.
    with h5py.File(path, "w", libver=("v110", "v110")) as file:
        file.attrs[FORMAT] = FORMAT_VERSION
        for name, written in parts.items():
            arrays = _create_arrays(file, cache, cache.feature_sets[name])
            for part in written:
                ref = PartRef(cache, name, part)
                shards |= _write_records(arrays, ref)
                files += [ref.files()[-1], ref.record_path]
                progress.step()
        _write_columns(file, cache.storage)
        _write_files(file, cache.storage, files, shards)
        provenance = json.loads(cache.storage.read("zarr.json"))["attributes"]
        text = json.dumps(provenance, ensure_ascii=False, allow_nan=False)
        file.create_dataset("provenance", data=text, dtype=h5py.string_dtype())


def _create_arrays(file: h5py.File, cache: FeatureCache, feature_set: FeatureSet) -> list[h5py.Dataset]:
    """Create the datasets of a feature set, in the order of its shards: records, then the scales of int8."""
    shape = cache.geometry.array_shape(feature_set)
    arrays = [
        _create_array(file, feature_set.array, shape, (1, *feature_set.record_shape), feature_set.stored, feature_set)
    ]
    if feature_set.has_scales:
        scales = (1, *feature_set.scale_shape)
        arrays.append(_create_array(file, feature_set.scales, shape[:-1], scales, np.dtype("<f2"), None))
    for array in arrays:
        attributes = json.loads(cache.storage.read(f"{array.name[1:]}/zarr.json"))["attributes"]
        for name, value in attributes.items():  # others may have added some without an HDF5 type
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
    properties.set_fill_time(h5d.FILL_TIME_NEVER)  # every chunk is written whole
    if compressed is not None and compressed.compression:
        # Optional, because HDF5 rejects a mandatory filter that is not installed; records are compressed already.
        properties.set_filter(ZSTD_FILTER, h5z.FLAG_OPTIONAL, (ZSTD_LEVEL,))
    return file.create_dataset(name, shape, dtype, chunks=chunk, dcpl=properties)


def _write_records(arrays: Sequence[h5py.Dataset], ref: PartRef) -> dict[str, int]:
    """Write the records of a part as chunks; the sizes of their shards. Raises CorruptPartError."""
    record = ref.cache.record(ref.part, ref.name)
    crcs = np.zeros(ref.slots, np.uint32)
    shards = ref.files()[:-1]
    for array, shard in zip(arrays, shards, strict=True):
        columns = array.chunks[1] if ref.feature_set.kind == "token" else 0
        first = ref.part * ref.slots if ref.feature_set.kind == "map" else ref.part
        rest = (0,) * (array.ndim - 2)
        for slot, chunk in read_records(ref, shard):
            at = (first, slot * columns, *rest) if columns else (first + slot, 0, *rest)
            array.id.write_direct_chunk(at, chunk)
            crcs[slot] = google_crc32c.extend(int(crcs[slot]), chunk)
    require_checksums(ref, crcs)
    return {shard: record.files[shard] for shard in shards}


def _write_columns(file: h5py.File, storage: Storage) -> None:
    """Write the manifest as datasets with checksums, for other HDF5 readers."""
    import zarr  # importing it takes a second

    for folder in ("images", "regions"):
        group = zarr.open_group(storage.zarr_store(), path=folder, mode="r", zarr_format=3, use_consolidated=False)
        for name, column in sorted(group.arrays()):
            dtype = _hdf5_dtype(column)
            checked = {"chunks": column.chunks, "fletcher32": True} if column.size else {}
            dataset = file.create_dataset(f"{folder}/{name}", column.shape, dtype, **checked)
            for first, values in _blocks(column):
                dataset[first : first + len(values)] = values if dtype == values.dtype else _encoded(values)


def _hdf5_dtype(column: Any) -> Any:
    """The column's dtype; text has a fixed length, so that the checksum covers its bytes."""
    import h5py

    if column.dtype.kind in "biuf":
        return column.dtype
    longest = max((len(text) for _, values in _blocks(column) for text in _encoded(values)), default=1)
    return h5py.string_dtype("utf-8", max(1, longest))


def _encoded(texts: NDArray[Any]) -> list[bytes]:
    return [str(text).encode() for text in texts]


def _blocks(column: Any) -> Iterator[tuple[int, NDArray[Any]]]:
    """Chunks of a Zarr array: first row and values."""
    for first in range(0, column.shape[0], column.chunks[0]):
        yield first, np.asarray(column[first : first + column.chunks[0]])


def _write_files(file: h5py.File, storage: Storage, names: Sequence[str], shards: Mapping[str, int]) -> None:
    """Write all files except the shards, concatenated, and their index."""
    sizes = [storage.size(name) for name in names]
    entries = [*zip(names, np.cumsum([0, *sizes[:-1]]).tolist(), sizes, strict=True)]
    entries += [(name, -1, size) for name, size in shards.items()]
    longest = max(len(name.encode()) for name, _, _ in entries)
    index = np.array(
        [(name.encode(), offset, size) for name, offset, size in sorted(entries)],
        dtype=[("name", f"S{longest}"), ("offset", "<i8"), ("size", "<i8")],
    )
    # Without this checksum, a part with a damaged file name would look pending.
    file.create_dataset(INDEX, data=index).attrs[INDEX_CRC] = google_crc32c.value(index.tobytes())
    data = file.create_dataset(DATA, (sum(sizes),), "u1")
    for name, offset, size in entries[: len(names)]:
        for start in range(0, size, _BLOCK):
            block = bytearray(min(_BLOCK, size - start))
            storage.read_into(name, start, memoryview(block))
            data[offset + start : offset + start + len(block)] = np.frombuffer(block, np.uint8)
