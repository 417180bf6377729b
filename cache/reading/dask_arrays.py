"""A feature set as one dask array, a chunk a part: what numpy could do with it, without its having to fit in memory.

    features = cache.dask("clip_vit_l_14")          # (N, 257, 1024) float16
    norms = da.linalg.norm(features[:, 0], axis=1).compute()

Chunks are read by our own reader, at its speed: through a Zarr library's general path dask reads a tenth of that.
"""

from __future__ import annotations

import pickle
import threading
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import numpy as np
from numpy.typing import NDArray

from regionspot.cache.errors import InputError, NotExtractedError
from regionspot.cache.format.schema import FeatureSet
from regionspot.cache.reading.decoded import decoded_dtype, read_decoded
from regionspot.cache.store import FeatureCache

if TYPE_CHECKING:
    from dask.array import Array

# Caches by what opens them again. A worker process opens one once, threads of this process use the one that is open.
_opened: WeakValueDictionary[bytes, FeatureCache] = WeakValueDictionary()
_kept: list[FeatureCache] = []
_opening = threading.Lock()


def dask_array(cache: FeatureCache, name: str) -> Array:
    """The features of a set, in chunks of one part.

    map set     (N, T, D), an image a row of the manifest
    token set   (M, C), a region a row of the manifest's region columns

    float16 features stay so, all others come as float32. Those of images that could not be read are NaN. What dask
    sends to its workers is the cache's address, so it must lie where they all can read it.

    Raises InputError for a set that is not there, NotExtractedError while parts of it are not written.
    """
    from dask.array import map_blocks  # half a second to import
    from dask.base import tokenize

    feature_set = _whole_set(cache, name)
    key = pickle.dumps(cache)
    _opened[key] = cache
    sizes = [_entries(cache, feature_set, part) for part in range(cache.n_parts)]
    array: Array = map_blocks(
        _read_part,
        key,
        name,
        chunks=(tuple(sizes), *((width,) for width in feature_set.shape)),
        dtype=decoded_dtype(feature_set),
        meta=np.empty((0,) * (1 + len(feature_set.shape)), decoded_dtype(feature_set)),
        name=f"{name}-{tokenize(key)}",
    )
    return array


def _whole_set(cache: FeatureCache, name: str) -> FeatureSet:
    if name not in cache.feature_sets:
        held = ", ".join(cache.feature_sets) or "none"
        raise InputError(f"{cache.path}: there is no feature set {name!r}; it has {held}")
    pending = cache.pending_parts([name])
    if pending:
        raise NotExtractedError(
            f"{cache.path}: {len(pending):,} of {cache.n_parts:,} parts of {name} are not written yet; run the same "
            "`regionspot extract` again to resume"
        )
    return cache.feature_sets[name]


def _entries(cache: FeatureCache, feature_set: FeatureSet, part: int) -> int:
    """Images of a part, or regions, whichever the set has a row for."""
    rows = cache.part_rows(part)
    if feature_set.kind == "map":
        return len(rows)
    return int(cache.manifest.offsets[rows.stop] - cache.manifest.offsets[rows.start])


def _read_part(key: bytes, name: str, block_id: tuple[int, ...]) -> NDArray[Any]:
    return read_part(_cache_of(key), name, block_id[0])


def read_part(cache: FeatureCache, name: str, part: int) -> NDArray[Any]:
    """All features of a part, NaN those of images that could not be read."""
    feature_set, rows = cache.feature_sets[name], cache.part_rows(part)
    failed = [failure.row for failure in cache.record(part, name).failures]
    if not failed:
        return read_decoded(cache, name, rows)
    values = np.full((_entries(cache, feature_set, part), *feature_set.shape), np.nan, decoded_dtype(feature_set))
    valid = np.setdiff1d(rows, failed)
    counts = 1 if feature_set.kind == "map" else cache.manifest.region_count[rows.start : rows.stop]
    values[np.repeat(np.isin(rows, valid), counts)] = read_decoded(cache, name, valid)
    return values


def _cache_of(key: bytes) -> FeatureCache:
    with _opening:
        cache = _opened.get(key)
        if cache is None:
            cache = _opened[key] = pickle.loads(key)
            _kept.append(cache)  # a worker's for as long as it lives
    return cache
