"""Creates a cache from existing ones: merge several, take a subset, convert the encoding, or copy.

The new cache is created with all of its images and then filled by `copy_features`: run the command again to resume
after a kill, or after its sources were completed. `made_from` in the manifest's source records the origin; it is not
compared when the cache is used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from regionspot.cache.errors import InputError
from regionspot.cache.format.compatibility import require_same_features
from regionspot.cache.format.encodings import decode, statistics_of
from regionspot.cache.format.feature_dtypes import Encoding, Statistics
from regionspot.cache.format.manifest import Manifest
from regionspot.cache.format.schema import FeatureSet
from regionspot.cache.outputs import require_apart
from regionspot.cache.reading.feature_reader import open_reader
from regionspot.cache.store import FeatureCache
from regionspot.cache.tools.copy_features import CopySummary, copy_features, read_encoded
from regionspot.cache.tools.resume import open_or_create

SAMPLE = 64  # images for the statistics of int8


def merge(paths: Sequence[str | Path], out: str | Path, part_size: int | None = None) -> CopySummary:
    """Concatenate caches into a new one at `out`, or resume that.

    part_size   of the new cache (default: the first cache's)

    Raises InputError if an image is in two of them or their categories differ, ProvenanceMismatchError if their feature
    sets differ in provenance or encoding.
    """
    caches = [FeatureCache.open(path) for path in paths]
    if not caches:
        raise InputError("no cache to merge was given; give at least one")
    first = caches[0]
    for other in caches[1:]:
        _require_same_sets(first, other)
    manifest = Manifest.concatenate([cache.manifest for cache in caches])
    size = first.part_size if part_size is None else part_size
    return _create_and_fill(caches, out, _with_history(manifest, "merge", caches), first.feature_sets, size)


def subset(path: str | Path, out: str | Path, rows: ArrayLike, part_size: int | None = None) -> CopySummary:
    """Copy the images at `rows`, in that order, into a new cache at `out`, or resume that.

    Raises InputError for rows that do not exist or are given twice, and for no rows.
    """
    cache = FeatureCache.open(path)
    selected = np.asarray(rows, dtype=np.int64).reshape(-1)
    if len(outside := selected[(selected < 0) | (selected >= len(cache))]):
        raise InputError(f"{path}: there is no row {outside[0]}: this cache has rows 0 to {len(cache) - 1}")
    distinct, counts = np.unique(selected, return_counts=True)
    if (counts > 1).any():
        row = int(distinct[counts > 1][0])
        raise InputError(
            f"{path}: image {cache.manifest.image_ids[row]} (row {row}) is given more than once; give it once"
        )
    manifest = _with_history(cache.manifest.select(selected), "subset", [cache])
    return _create_and_fill(
        [cache], out, manifest, cache.feature_sets, cache.part_size if part_size is None else part_size
    )


def convert(path: str | Path, out: str | Path, encodings: Mapping[str, Encoding]) -> CopySummary:
    """Copy a cache to `out` with other encodings of the named feature sets, or resume that.

    The statistics of int8 come from SAMPLE evenly spaced images. Raises InputError for an unknown feature set or
    encoding and for values that overflow it.
    """
    cache = FeatureCache.open(path)
    if not encodings:
        raise InputError(f"{path}: name a feature set and its new encoding; it has {_names(cache)}")
    if unknown := encodings.keys() - cache.feature_sets.keys():
        raise InputError(f"{path}: there is no feature set {min(unknown)!r}; it has {_names(cache)}")
    sets = {name: _with_encoding(cache, name, encodings.get(name)) for name in cache.feature_sets}
    return _create_and_fill([cache], out, _with_history(cache.manifest, "convert", [cache]), sets, cache.part_size)


def copy(path: str | Path, out: str | Path) -> CopySummary:
    """Copy a cache, also to or from an object store, or resume that.

    Every record is compared with its checksum; no file is hard-linked.
    """
    cache = FeatureCache.open(path)
    return _create_and_fill([cache], out, cache.manifest, cache.feature_sets, cache.part_size, link=False)


def parse_encodings(texts: Sequence[str]) -> dict[str, Encoding]:
    """Parse encodings by feature set, such as `clip_vit_l_14=int8`. Raises InputError."""
    encodings = {}
    for text in texts:
        name, equals, encoding = text.partition("=")
        if not equals or name in encodings:
            raise InputError(f"{text!r}: expected a feature set and its encoding once, like clip_vit_l_14=int8")
        encodings[name] = Encoding.parse(encoding)
    return encodings


def _create_and_fill(
    sources: Sequence[FeatureCache],
    out: str | Path,
    manifest: Manifest,
    feature_sets: Mapping[str, FeatureSet],
    part_size: int,
    link: bool = True,
) -> CopySummary:
    require_apart(Path(out), [source.path for source in sources])
    destination = open_or_create(out, manifest, feature_sets.values(), part_size)
    return copy_features(sources, destination, link=link)


def _with_history(manifest: Manifest, operation: str, sources: Sequence[FeatureCache]) -> Manifest:
    """The manifest with this operation appended to `made_from` in its source."""
    earlier = [entry for cache in sources for entry in cache.manifest.source.get("made_from", [])]
    entry = {"operation": operation, "caches": [_identity(cache.manifest) for cache in sources]}
    return replace(manifest, source={**manifest.source, "made_from": [*earlier, entry]})


def _identity(manifest: Manifest) -> dict[str, Any]:
    return {
        "dataset": manifest.dataset,
        "split": manifest.split,
        "pictures": len(manifest),
        "digest": manifest.digest(),
        "files": manifest.source.get("files", {}),
    }


def _require_same_sets(first: FeatureCache, other: FeatureCache) -> None:
    if first.feature_sets.keys() != other.feature_sets.keys():
        raise InputError(
            f"{other.path}: has feature sets {_names(other)}, {first.path} has {_names(first)}; merge caches "
            "with the same feature sets"
        )
    for name, feature_set in first.feature_sets.items():
        require_same_features(str(other.path), other.feature_sets[name], feature_set)


def _names(cache: FeatureCache) -> str:
    return ", ".join(cache.feature_sets) or "none"


def _with_encoding(cache: FeatureCache, name: str, encoding: Encoding | None) -> FeatureSet:
    """The feature set in another encoding, with statistics where it needs them."""
    feature_set = cache.feature_sets[name]
    if encoding is None:
        return feature_set
    statistics = None
    if encoding.dtype == "int8":
        statistics = feature_set.statistics or _statistics(cache, feature_set)
    return replace(feature_set, dtype=encoding.dtype, compression=encoding.compression, statistics=statistics)


def _statistics(cache: FeatureCache, feature_set: FeatureSet) -> Statistics:
    valid = cache.valid_rows([feature_set.name])
    if feature_set.kind == "token":
        valid = valid[cache.manifest.region_count[valid] > 0]
    if not len(valid):
        raise InputError(f"{cache.path}: has no features of {feature_set.name} yet for the statistics of int8")
    rows = valid[np.linspace(0, len(valid) - 1, min(SAMPLE, len(valid))).astype(np.int64)]
    reader = open_reader(cache.storage, feature_set, cache.manifest, cache.geometry, cache.check)
    sample = (read_encoded(reader, cache.manifest, row) for row in rows.tolist())
    return statistics_of(decode(features.codes, feature_set, features.scales) for features in sample)
