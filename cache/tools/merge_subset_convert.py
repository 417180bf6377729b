"""New caches made from those that are there: several put together, some images of one, another encoding, a copy.

Each is a cache of its own, made at once with all of its images and then filled by `copy_features`: a run that was
killed is simply run again, and so is one whose sources were not extracted to the end. What it was made from stands in
its manifest's source, which decides nothing: annotations that list the same images go on with it.
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
from regionspot.cache.tools.copy_features import CopySummary, copy_features, read_stored
from regionspot.cache.tools.resume import open_or_create

SAMPLE = 64  # images that int8's statistics are taken from


def merge(paths: Sequence[str | Path], out: str | Path, part_size: int | None = None) -> CopySummary:
    """Put the images of several caches one after another into a new one at `out`, or go on with it.

    part_size   of the new one (default: the first cache's)

    Raises InputError where an image is in two of them or their categories differ, ProvenanceMismatchError where
    their feature sets were not made and encoded alike.
    """
    caches = [FeatureCache.open(path) for path in paths]
    if not caches:
        raise InputError("no cache was given to merge; give at least one")
    first = caches[0]
    for other in caches[1:]:
        _require_same_sets(first, other)
    manifest = Manifest.concatenate([cache.manifest for cache in caches])
    size = first.part_size if part_size is None else part_size
    return _make(caches, out, _noted(manifest, "merge", caches), first.feature_sets, size)


def subset(path: str | Path, out: str | Path, rows: ArrayLike, part_size: int | None = None) -> CopySummary:
    """Take the images at `rows`, in that order, into a new cache at `out`, or go on with it.

    Raises InputError for rows that do not exist, are named twice, or are none.
    """
    cache = FeatureCache.open(path)
    wanted = np.asarray(rows, dtype=np.int64).reshape(-1)
    if len(outside := wanted[(wanted < 0) | (wanted >= len(cache))]):
        raise InputError(f"{path}: there is no row {outside[0]}: this cache has rows 0 to {len(cache) - 1}")
    found, counts = np.unique(wanted, return_counts=True)
    if (counts > 1).any():
        row = int(found[counts > 1][0])
        raise InputError(
            f"{path}: image {cache.manifest.image_ids[row]} (row {row}) is asked for more than once; name it once"
        )
    manifest = _noted(cache.manifest.select(wanted), "subset", [cache])
    return _make([cache], out, manifest, cache.feature_sets, cache.part_size if part_size is None else part_size)


def convert(path: str | Path, out: str | Path, encodings: Mapping[str, Encoding]) -> CopySummary:
    """Store feature sets in other encodings in a new cache at `out`, or go on with it; sets not named stay as they are.

    What int8 standardises by comes from SAMPLE images at even distances. Raises InputError for sets that the cache
    does not hold, encodings that there are not, and values too large for one.
    """
    cache = FeatureCache.open(path)
    if not encodings:
        raise InputError(f"{path}: no feature set is named that is to be stored otherwise; it has {_names(cache)}")
    if unknown := encodings.keys() - cache.feature_sets.keys():
        raise InputError(f"{path}: there is no feature set {min(unknown)!r}; it has {_names(cache)}")
    sets = {name: _encoded(cache, name, encodings.get(name)) for name in cache.feature_sets}
    return _make([cache], out, _noted(cache.manifest, "convert", [cache]), sets, cache.part_size)


def copy(path: str | Path, out: str | Path) -> CopySummary:
    """Copy a cache to another place, also to or from an object store, or go on with that.

    Every record is compared with its checksum on the way; no file is shared with the first one.
    """
    cache = FeatureCache.open(path)
    return _make([cache], out, cache.manifest, cache.feature_sets, cache.part_size, link=False)


def encodings_of(words: Sequence[str]) -> dict[str, Encoding]:
    """Encodings by feature set, as people write them: `clip_vit_l_14=int8`. Raises InputError for what is none."""
    named = {}
    for word in words:
        name, equals, encoding = word.partition("=")
        if not equals or name in named:
            raise InputError(f"{word!r}: expected a feature set and its encoding once, like clip_vit_l_14=int8")
        named[name] = Encoding.parse(encoding)
    return named


def _make(
    sources: Sequence[FeatureCache],
    out: str | Path,
    manifest: Manifest,
    feature_sets: Mapping[str, FeatureSet],
    part_size: int,
    link: bool = True,
) -> CopySummary:
    require_apart(Path(out), [source.path for source in sources])
    made = open_or_create(out, manifest, feature_sets.values(), part_size)
    return copy_features(sources, made, link=link)


def _noted(manifest: Manifest, operation: str, sources: Sequence[FeatureCache]) -> Manifest:
    """The manifest with what it was made from in its source, behind what stands there already."""
    before = [note for cache in sources for note in cache.manifest.source.get("made_from", [])]
    note = {"operation": operation, "caches": [_identity(cache.manifest) for cache in sources]}
    return replace(manifest, source={**manifest.source, "made_from": [*before, note]})


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
            f"{other.path}: has feature sets {_names(other)}, {first.path} has {_names(first)}; merge what has the same"
        )
    for name, feature_set in first.feature_sets.items():
        require_same_features(str(other.path), other.feature_sets[name], feature_set)


def _names(cache: FeatureCache) -> str:
    return ", ".join(cache.feature_sets) or "none"


def _encoded(cache: FeatureCache, name: str, encoding: Encoding | None) -> FeatureSet:
    """A feature set in another encoding, with statistics of its own where it needs them."""
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
        raise InputError(f"{cache.path}: holds no features of {feature_set.name} yet to take int8's statistics from")
    rows = valid[np.linspace(0, len(valid) - 1, min(SAMPLE, len(valid))).astype(np.int64)]
    reader = open_reader(cache.storage, feature_set, cache.manifest, cache.geometry, cache.check)
    sample = (read_stored(reader, cache.manifest, row) for row in rows.tolist())
    return statistics_of(decode(each.codes, feature_set, each.scales) for each in sample)
