"""The folder of a cache, made once with zarr-python: its groups and the empty feature arrays.

zarr-python writes the metadata here, so that what our own part writers fill later is Zarr to everybody else. It does
not flush what it writes, so the folder is built beside its place, flushed as a whole and then renamed.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import zarr
from zarr.codecs import Crc32cCodec

from regionspot.cache.columns import CHUNK_KEYS, write_images, write_regions
from regionspot.cache.durable import partial_path, remove_abandoned, sync_folder, sync_tree
from regionspot.cache.errors import CacheError
from regionspot.cache.header import Header
from regionspot.cache.manifest import Manifest
from regionspot.cache.schema import FeatureSet, Geometry


def create_cache(path: Path, manifest: Manifest, header: Header) -> None:
    """Make the whole folder beside its place and rename it, so that `path` appears complete or not at all.

    Raises CacheError when it exists already or cannot be written there.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(path.parent, f"{path.name}.")
        if path.exists():
            raise CacheError(f"{path}: exists already; give another folder, or open it to go on with it")
        _create_in(partial_path(path), path, manifest, header)
    except OSError as error:
        raise CacheError(
            f"{path}: cannot be created: {error.strerror}; give a folder with space where you may write"
        ) from error


def _create_in(building: Path, path: Path, manifest: Manifest, header: Header) -> None:
    try:
        group = zarr.create_group(building, zarr_format=3)
        for name in ("images", "regions", "features"):
            group.create_group(name)
        write_images(group, manifest)
        write_regions(group, manifest, header.geometry)
        for feature_set in header.feature_sets.values():
            _create_arrays(building / "features" / feature_set.name, feature_set, header.geometry)
            (building / "parts" / feature_set.name).mkdir(parents=True)
        header.save(building)
        sync_tree(building)
        os.rename(building, path)
        sync_folder(path.parent)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise


def add_feature_set(cache: Path, feature_set: FeatureSet, geometry: Geometry) -> None:
    """Make the arrays of a further feature set; it is part of the cache once the header names it."""
    final = cache / "features" / feature_set.name
    building = partial_path(final)
    try:
        _create_arrays(building, feature_set, geometry)
        sync_tree(building)
        if final.exists():
            shutil.rmtree(final)  # of a run killed before the header named it: no part can be in it
        os.rename(building, final)
        sync_folder(final.parent)
        (cache / "parts" / feature_set.name).mkdir(parents=True, exist_ok=True)
        sync_folder(cache / "parts")
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise


def _create_arrays(folder: Path, feature_set: FeatureSet, geometry: Geometry) -> None:
    """The group of one feature set with its two empty arrays; our own writers fill them, part by part."""
    group = zarr.create_group(folder, zarr_format=3)
    group.create_array(
        Path(feature_set.array).name,
        shape=geometry.array_shape(feature_set),
        chunks=(1, *feature_set.record_shape),
        shards=geometry.shard_shape(feature_set),
        dtype=feature_set.dtype,
        fill_value=0,
        filters=None,
        compressors=None,  # float16 features shrink by 2 to 15 % and would be read at a tenth of the speed
        chunk_key_encoding=CHUNK_KEYS,
    )
    slots = geometry.slots(feature_set)
    group.create_array(
        Path(feature_set.checksums).name,
        shape=(geometry.pictures,) if feature_set.kind == "map" else (geometry.n_parts, slots),
        chunks=(slots,) if feature_set.kind == "map" else (1, slots),
        dtype="uint32",
        fill_value=0,
        filters=None,
        compressors=[Crc32cCodec()],
        chunk_key_encoding=CHUNK_KEYS,
    )
