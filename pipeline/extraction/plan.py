"""What an extraction still has to do and how many bytes that takes, known before the first image is opened.

Every array of a cache has its shape from the manifest, so a disk that will be full after three days is refused in the
first second.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from regionspot.cache.errors import InputError
from regionspot.cache.format.header import load_header
from regionspot.cache.format.manifest import Manifest
from regionspot.cache.format.manifest_diff import needs_growth
from regionspot.cache.format.schema import TOKEN_CHUNK, FeatureSet, Geometry
from regionspot.cache.storage.local import LocalStorage
from regionspot.cache.storage.open import open_storage
from regionspot.cache.storage.zarr_shard import index_bytes
from regionspot.cache.store import FeatureCache
from regionspot.cache.tools.extend import extended_part_size
from regionspot.cache.tools.info import size_text

# Features of real images lose 2 to 15 % to zstd; the disk must hold the worst of it.
_COMPRESSED = 0.98
_SLACK = 1.01  # records, checksums and the file system's blocks


@dataclass(frozen=True)
class ExtractionPlan:
    """What is left to do: `parts` of which at least one feature set is missing, and what they come to.

    bytes   of all that will be written, by feature set
    """

    parts: tuple[int, ...]
    images: int
    regions: int
    bytes: dict[str, int]

    @property
    def total_bytes(self) -> int:
        return sum(self.bytes.values())


def check_part_size(address: str | Path, part_size: int) -> None:
    """Raises InputError where the cache at `address` has parts of another size, which no later run can change."""
    storage = open_storage(address)
    if not storage.exists(""):
        return
    held = load_header(storage).geometry
    # A cache of fewer images than that has one part, which holds them all.
    if held.part_size != min(part_size, held.images):
        raise InputError(
            f"{address}: has parts of {held.part_size} images, --part-size {part_size} was asked for; leave that "
            "out, or name another cache"
        )


def held_sets(address: str | Path) -> dict[str, FeatureSet]:
    """The feature sets of the cache at `address`, by name; none where there is nothing yet."""
    storage = open_storage(address)
    return load_header(storage).feature_sets if storage.exists("") else {}


def outstanding(
    address: str | Path,
    manifest: Manifest,
    feature_sets: Sequence[FeatureSet],
    part_size: int,
    choose: Callable[[Geometry], Collection[int]] | None = None,
) -> ExtractionPlan:
    """What the feature sets lack in the cache at `address`, all of them where there is none yet.

    choose   gives the parts that are wanted of a cache of this geometry; None: all

    A cache that was made with a limit is taken as it will be when it has grown. Raises what opening a cache raises.
    """
    done: dict[str, set[int]] = {each.name: set() for each in feature_sets}
    geometry = Geometry.of(manifest.offsets, part_size)
    if open_storage(address).exists(""):
        cache = FeatureCache.open(address)
        if needs_growth(cache.manifest, manifest):
            geometry = Geometry.of(manifest.offsets, extended_part_size(cache.geometry, part_size))
        else:
            manifest, geometry = cache.manifest, cache.geometry
        same = {part for part in range(cache.n_parts) if cache.part_rows(part) == geometry.rows(part)}
        for name in done.keys() & cache.feature_sets.keys():
            done[name] = same - set(cache.pending_parts([name]))
    lacking = {name: [part for part in range(geometry.n_parts) if part not in parts] for name, parts in done.items()}
    wanted = set(choose(geometry) if choose else range(geometry.n_parts))
    missing = {name: [part for part in parts if part in wanted] for name, parts in lacking.items()}
    parts = sorted(set().union(*missing.values()))
    rows = [geometry.rows(part) for part in parts]
    return ExtractionPlan(
        parts=tuple(parts),
        images=sum(map(len, rows)),
        regions=int(sum(manifest.offsets[each.stop] - manifest.offsets[each.start] for each in rows)),
        bytes={each.name: part_bytes(each, manifest.offsets, geometry, missing[each.name]) for each in feature_sets},
    )


def part_bytes(feature_set: FeatureSet, offsets: NDArray[np.int64], geometry: Geometry, parts: Collection[int]) -> int:
    """Bytes that the shards of these parts take, at most: whole inner chunks, their indices and scales.

    offsets   int64 (N + 1,) of the regions
    """
    records = 0
    for rows in map(geometry.rows, parts):
        regions = int(offsets[rows.stop] - offsets[rows.start])
        records += len(rows) if feature_set.kind == "map" else math.ceil(regions / TOKEN_CHUNK)
    values = math.prod(feature_set.record_shape) * feature_set.stored.itemsize
    scales = 2 * math.prod(feature_set.scale_shape) if feature_set.has_scales else 0
    index = index_bytes(geometry.slots(feature_set)) * (2 if feature_set.has_scales else 1)
    share = _COMPRESSED if feature_set.compression else 1.0
    return int(records * (values + scales) * share) + len(parts) * index


def require_room(address: str | Path, needed: ExtractionPlan) -> None:
    """Raises InputError where a disk has fewer bytes free than the features will take. An object store is not asked."""
    storage = open_storage(address)
    if not isinstance(storage, LocalStorage):
        return
    folder = Path(storage.folder)
    disk = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    free, asked = shutil.disk_usage(disk).free, int(needed.total_bytes * _SLACK)
    if asked > free:
        raise InputError(
            f"{address}: {size_text(asked)} are needed for {needed.images:,} images, {disk} has {size_text(free)} "
            "free; make room, choose another disk, int8 (--encoding int8 halves it) or some --parts, or go on all the "
            "same with --no-room-check"
        )
