"""Creating the folder of a cache with zarr-python: its groups and the empty feature arrays.

zarr-python writes the metadata, so that the parts written later by our own writers are valid Zarr. It does not flush
files to disk, so a local cache is built in a temporary folder beside its path, flushed and then renamed. For an object
store, which cannot rename, it is built in a temporary folder and uploaded, the root's zarr.json last.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.codecs import Crc32cCodec, ZstdCodec

from regionspot.cache.errors import CacheError, CacheExistsError
from regionspot.cache.format.encodings import require_statistics
from regionspot.cache.format.header import Header
from regionspot.cache.format.manifest import Manifest
from regionspot.cache.format.manifest_arrays import CHUNK_KEYS, write_images, write_regions
from regionspot.cache.format.schema import FeatureSet, Geometry
from regionspot.cache.storage.atomic_files import file_crc, partial_path, remove_abandoned, sync_folder, sync_tree
from regionspot.cache.storage.base import Storage
from regionspot.cache.storage.folder_swap import recover_swap
from regionspot.cache.storage.local import LocalStorage
from regionspot.cache.storage.zarr_shard import ZSTD_LEVEL

# Array attributes that explain the encoding to readers without this package.
ATTRIBUTES: dict[str, dict[str, Any]] = {
    "bfloat16": {"regionspot_dtype": "bfloat16", "decode": "float32 whose upper 16 bits these are"},
    "int8": {
        "regionspot_dtype": "int8",
        "decode": "code * scale[row] * deviation[channel] + mean[channel]; deviation and mean are the statistics in "
        "this feature set's entry in the root's attributes",
    },
}


def create_cache(storage: Storage, manifest: Manifest, header: Header) -> None:
    """Create all files of an empty cache, atomically.

    Raises CacheError when it exists already or cannot be written.
    """
    try:
        if isinstance(storage, LocalStorage):
            _create_in_place(storage.folder, manifest, header)
        else:
            _create_by_upload(storage, manifest, header)
    except OSError as error:
        raise CacheError(
            f"{storage.address}: cannot be created: {error.strerror or error}; give a writable folder with free space"
        ) from error


def _create_in_place(path: Path, manifest: Manifest, header: Header) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(path.parent, f"{path.name}.")
    recover_swap(path)
    if path.exists():
        raise _exists_already(str(path))
    building = partial_path(path)
    try:
        build_cache(building, manifest, header)
        sync_tree(building)
        _rename_new(building, path)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise


def _rename_new(building: Path, path: Path) -> None:
    try:
        os.rename(building, path)
    except OSError as error:
        if path.exists():  # created by another run just now; os.rename does not replace a folder with files
            raise _exists_already(str(path)) from None
        raise error
    sync_folder(path.parent)


def _create_by_upload(storage: Storage, manifest: Manifest, header: Header) -> None:
    if storage.exists("zarr.json"):
        raise _exists_already(storage.address)
    with tempfile.TemporaryDirectory() as folder:
        build_cache(Path(folder), manifest, header)
        if not upload_tree(Path(folder), storage, last="zarr.json"):
            raise _exists_already(storage.address)


def upload_tree(folder: Path, storage: Storage, last: str) -> bool:
    """Upload every file under `folder`, `last` after all others; False if `last` already exists.

    No file is replaced. An existing file with the same bytes is accepted: it is from a killed or concurrent run that
    uploads the same. So a cache never mixes files of two different runs.

    Raises FileExistsError for an existing file with other bytes, OSError if the storage refuses.
    """
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    names.remove(last)

    def put(name: str) -> None:
        data = (folder / name).read_bytes()
        if not storage.write_new(name, data) and storage.read(name) != data:
            message = f"{name} exists with other content; remove all files there, or give another address"
            raise FileExistsError(errno.EEXIST, message, f"{storage.address}/{name}")

    with ThreadPoolExecutor(storage.readers) as pool:
        try:
            list(pool.map(put, names))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return storage.write_new(last, (folder / last).read_bytes())


def _exists_already(address: str) -> CacheExistsError:
    return CacheExistsError(f"{address}: exists already; give another path, or open it to resume")


def build_cache(building: Path, manifest: Manifest, header: Header) -> None:
    """Write all files of an empty cache into a temporary folder."""
    group = zarr.create_group(building, zarr_format=3)
    for name in ("images", "regions", "features"):
        group.create_group(name)
    write_images(group, manifest)
    write_regions(group, manifest, header.geometry)
    for feature_set in header.feature_sets.values():
        _create_arrays(building / "features" / feature_set.name, feature_set, header.geometry)
    replace(header, files=_checksums(building, building)).save(LocalStorage(building))


def _checksums(root: Path, folder: Path) -> dict[str, int]:
    """crc32c of each file under `folder`, by its path from `root`; without the root's zarr.json, which holds them."""
    names = sorted(path.relative_to(root).as_posix() for path in folder.rglob("*") if path.is_file())
    return {name: file_crc((root / name).read_bytes()) for name in names if name != "zarr.json"}


def create_feature_set(storage: Storage, feature_set: FeatureSet, geometry: Geometry) -> dict[str, int]:
    """Create the arrays of another feature set; it belongs to the cache once the header names it.

    Returns the crc32c of the files, for the header. Raises OSError if the storage refuses.
    """
    name = f"features/{feature_set.name}"
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root, name)
        _create_arrays(folder, feature_set, geometry)
        checksums = _checksums(Path(root), folder)
        for file in checksums:  # replaces files of a run killed before the header named the set: it has no parts yet
            storage.write(file, Path(root, file).read_bytes())
    return checksums


def _create_arrays(folder: Path, feature_set: FeatureSet, geometry: Geometry) -> None:
    """Create the group of a feature set with its empty arrays.

    Raises InputError for an int8 set without statistics.
    """
    if feature_set.dtype == "int8":
        require_statistics(feature_set)
    group = zarr.create_group(folder, zarr_format=3)
    shape, shard = geometry.array_shape(feature_set), geometry.shard_shape(feature_set)
    # Uncompressed by default: zstd saves 2 to 15 % of float16 features and reads at a tenth of the speed.
    codec = ZstdCodec(level=ZSTD_LEVEL) if feature_set.compression else None
    _create_shards(
        group,
        feature_set.array,
        (shape, feature_set.record_shape, shard),
        feature_set.stored,
        codec,
        ATTRIBUTES.get(feature_set.dtype),
    )
    if feature_set.has_scales:
        scales = (shape[:-1], feature_set.scale_shape, shard[:-1])
        _create_shards(group, feature_set.scales, scales, np.dtype("<f2"))
    slots = geometry.slots(feature_set)
    group.create_array(
        Path(feature_set.checksums).name,
        shape=(geometry.images,) if feature_set.kind == "map" else (geometry.n_parts, slots),
        chunks=(slots,) if feature_set.kind == "map" else (1, slots),
        dtype="uint32",
        fill_value=0,
        filters=None,
        compressors=[Crc32cCodec()],
        chunk_key_encoding=CHUNK_KEYS,
    )


def _create_shards(
    group: zarr.Group,
    path: str,
    shapes: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]],
    dtype: np.dtype[Any],
    codec: ZstdCodec | None = None,
    attributes: dict[str, Any] | None = None,
) -> None:
    """Create an empty array with one shard per part; `shapes` are those of the array, of a record and of a shard."""
    array, record, shard = shapes
    group.create_array(
        Path(path).name,
        shape=array,
        chunks=(1, *record),
        shards=shard,
        dtype=dtype,
        fill_value=0,
        filters=None,
        compressors=codec,
        chunk_key_encoding=CHUNK_KEYS,
        attributes=attributes,
    )
