"""The folder of a cache, made once with zarr-python: its groups and the empty feature arrays.

zarr-python writes the metadata here, so that what our own part writers fill later is Zarr to everybody else. It does
not flush what it writes, so on a disk the folder is built beside its place, flushed as a whole and then renamed. For
an object store, which renames nothing, it is built in a temporary folder and uploaded, the root's zarr.json last.
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

# What the numbers mean, told where somebody without our code looks first.
ATTRIBUTES: dict[str, dict[str, Any]] = {
    "bfloat16": {"regionspot_dtype": "bfloat16", "decode": "float32 whose upper 16 bits these are"},
    "int8": {
        "regionspot_dtype": "int8",
        "decode": "code * scale[row] * deviation[channel] + mean[channel]; deviation and mean are the statistics in "
        "this feature set's entry in the root's attributes",
    },
}


def create_cache(storage: Storage, manifest: Manifest, header: Header) -> None:
    """Make all files of an empty cache, so that it appears complete or not at all.

    Raises CacheError when it exists already or cannot be written there.
    """
    try:
        if isinstance(storage, LocalStorage):
            _create_in_place(storage.folder, manifest, header)
        else:
            _create_by_upload(storage, manifest, header)
    except OSError as error:
        raise CacheError(
            f"{storage.address}: cannot be created: {error.strerror or error}; give a place with space where you may "
            "write"
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
        if path.exists():  # made by another run meanwhile: a folder with files in it is never replaced
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
    """Put every file under `folder` into the storage, `last` when all others are there; whether it was put.

    False says that somebody else was first with `last`. No file is replaced. One of the same bytes will do, of a run
    that was killed while it did the same, or does it just now; so a cache is never made up of two.

    Raises FileExistsError where a file of other bytes lies, OSError for what the store refuses.
    """
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    names.remove(last)

    def put(name: str) -> None:
        data = (folder / name).read_bytes()
        if not storage.write_new(name, data) and storage.read(name) != data:
            told = f"{name} of something else lies there; remove all that does, or give another place"
            raise FileExistsError(errno.EEXIST, told, f"{storage.address}/{name}")

    with ThreadPoolExecutor(storage.readers) as pool:
        try:
            list(pool.map(put, names))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return storage.write_new(last, (folder / last).read_bytes())


def _exists_already(address: str) -> CacheExistsError:
    return CacheExistsError(f"{address}: exists already; give another place, or open it to resume")


def build_cache(building: Path, manifest: Manifest, header: Header) -> None:
    """All files of an empty cache in a folder that nobody else sees."""
    group = zarr.create_group(building, zarr_format=3)
    for name in ("images", "regions", "features"):
        group.create_group(name)
    write_images(group, manifest)
    write_regions(group, manifest, header.geometry)
    for feature_set in header.feature_sets.values():
        _create_arrays(building / "features" / feature_set.name, feature_set, header.geometry)
    replace(header, files=_checksums(building, building)).save(LocalStorage(building))


def _checksums(root: Path, folder: Path) -> dict[str, int]:
    """crc32c of every file under `folder` by its name from `root`, but of the root's zarr.json, which holds them."""
    names = sorted(path.relative_to(root).as_posix() for path in folder.rglob("*") if path.is_file())
    return {name: file_crc((root / name).read_bytes()) for name in names if name != "zarr.json"}


def add_feature_set(storage: Storage, feature_set: FeatureSet, geometry: Geometry) -> dict[str, int]:
    """Make the arrays of a further feature set; it is part of the cache once the header names it.

    Returns the crc32c of the files made, for the header. Raises OSError when the store refuses them.
    """
    name = f"features/{feature_set.name}"
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root, name)
        _create_arrays(folder, feature_set, geometry)
        made = _checksums(Path(root), folder)
        for file in made:  # over those of a run killed before the header named the set: no part can be in it
            storage.write(file, Path(root, file).read_bytes())
    return made


def _create_arrays(folder: Path, feature_set: FeatureSet, geometry: Geometry) -> None:
    """The group of one feature set with its empty arrays; our own writers fill them, part by part.

    Raises InputError for an int8 set without statistics, which nothing could be written into.
    """
    if feature_set.dtype == "int8":
        require_statistics(feature_set)
    group = zarr.create_group(folder, zarr_format=3)
    shape, shard = geometry.array_shape(feature_set), geometry.shard_shape(feature_set)
    # float16 features shrink by 2 to 15 % and would be read at a tenth of the speed, so they lie as they are.
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
    """An empty array whose shard is a part; `shapes` are those of the array, of a record and of a shard."""
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
