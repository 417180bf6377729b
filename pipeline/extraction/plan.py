"""ExtractionPlan: which parts are missing and how many bytes they take, known before the first image is opened.

The manifest determines the shape of every array, so a disk that would fill up after three days is refused at once.
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

# zstd saves 2 to 15 % on features of real images; the plan assumes the least.
_COMPRESSED = 0.98
_SLACK = 1.01  # for records, checksums and file system blocks


@dataclass(frozen=True)
class ExtractionPlan:
    """What is left to extract.

    parts   at least one feature set is missing in each
    bytes   to write, by feature set
    """

    parts: tuple[int, ...]
    images: int
    regions: int
    bytes: dict[str, int]

    @property
    def total_bytes(self) -> int:
        return sum(self.bytes.values())


def check_part_size(address: str | Path, part_size: int) -> None:
    """Raises InputError when the cache at `address` has another part size, which no later run can change."""
    storage = open_storage(address)
    if not storage.exists(""):
        return
    geometry = load_header(storage).geometry
    # A cache with fewer images than the part size has one part, of all its images.
    if geometry.part_size != min(part_size, geometry.images):
        raise InputError(
            f"{address}: has parts of {geometry.part_size} images, not of {part_size} as --part-size asks; remove "
            "--part-size, or give another cache"
        )


def stored_feature_sets(address: str | Path) -> dict[str, FeatureSet]:
    """The feature sets of the cache at `address`, by name; empty if the cache does not exist."""
    storage = open_storage(address)
    return load_header(storage).feature_sets if storage.exists("") else {}


def plan_extraction(
    address: str | Path,
    manifest: Manifest,
    feature_sets: Sequence[FeatureSet],
    part_size: int,
    select: Callable[[Geometry], Collection[int]] | None = None,
) -> ExtractionPlan:
    """Plan the extraction of these feature sets into the cache at `address`, which need not exist.

    select   returns the parts to extract from a cache of this geometry; None: all parts

    A cache that was made with a smaller limit is planned as if it had grown to `manifest` already. Raises what opening
    a cache raises.
    """
    written: dict[str, set[int]] = {feature_set.name: set() for feature_set in feature_sets}
    geometry = Geometry.of(manifest.offsets, part_size)
    if open_storage(address).exists(""):
        cache = FeatureCache.open(address)
        if needs_growth(cache.manifest, manifest):
            geometry = Geometry.of(manifest.offsets, extended_part_size(cache.geometry, part_size))
        else:
            manifest, geometry = cache.manifest, cache.geometry
        unchanged = {part for part in range(cache.n_parts) if cache.part_rows(part) == geometry.rows(part)}
        for name in written.keys() & cache.feature_sets.keys():
            written[name] = unchanged - set(cache.pending_parts([name]))
    selected = set(select(geometry) if select else range(geometry.n_parts))
    missing = {name: sorted(selected - parts) for name, parts in written.items()}
    parts = sorted(set().union(*missing.values()))
    row_ranges = [geometry.rows(part) for part in parts]
    return ExtractionPlan(
        parts=tuple(parts),
        images=sum(map(len, row_ranges)),
        regions=int(sum(manifest.offsets[rows.stop] - manifest.offsets[rows.start] for rows in row_ranges)),
        bytes={
            feature_set.name: part_bytes(feature_set, manifest.offsets, geometry, missing[feature_set.name])
            for feature_set in feature_sets
        },
    )


def part_bytes(feature_set: FeatureSet, offsets: NDArray[np.int64], geometry: Geometry, parts: Collection[int]) -> int:
    """Upper bound on the bytes of these parts' shards: whole inner chunks, shard indices and int8 scales.

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


def require_disk_space(address: str | Path, plan: ExtractionPlan) -> None:
    """Raises InputError when the disk has fewer free bytes than the plan needs; object stores are not checked."""
    storage = open_storage(address)
    if not isinstance(storage, LocalStorage):
        return
    folder = Path(storage.folder)
    disk = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free, needed = shutil.disk_usage(disk).free, int(plan.total_bytes * _SLACK)
    if needed > free:
        raise InputError(
            f"{address}: {plan.images:,} images need {size_text(needed)}, {disk} has {size_text(free)} free; free some "
            "space, use another disk, int8 (--encoding int8 halves the size) or fewer --parts, or continue anyway with "
            "--no-room-check"
        )
