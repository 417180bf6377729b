"""A feature set as a dask array with one chunk per part: numpy operations without loading the whole set.

    features = cache.dask("clip_vit_l_14")          # (N, 257, 1024) float16
    norms = da.linalg.norm(features[:, 0], axis=1).compute()

Chunks are read by our own reader: dask over a Zarr library reaches a tenth of its throughput.
"""

from __future__ import annotations

import pickle
import threading
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Protocol
from weakref import WeakValueDictionary

import numpy as np
from numpy.typing import ArrayLike, NDArray

from regionspot.cache.errors import NotExtractedError
from regionspot.cache.format.encodings import decode
from regionspot.cache.format.schema import FeatureSet
from regionspot.cache.reading.feature_reader import FeatureReader

if TYPE_CHECKING:
    from dask.array import Array


class ReopenableCache(Protocol):
    """A FeatureCache: pickled as its address, it is opened again where it is unpickled."""

    def reader(self, name: str) -> FeatureReader: ...


# Open caches by their pickle: a worker process opens each one once, threads of this process use the one already open.
_opened: WeakValueDictionary[bytes, ReopenableCache] = WeakValueDictionary()
_kept: list[ReopenableCache] = []
_opening = threading.Lock()


def dask_array(cache: ReopenableCache, name: str) -> Array:
    """The features of a set, in chunks of one part.

    map set     (N, T, D), one row per image of the manifest
    token set   (M, C), one row per region of the manifest

    float16 features stay float16, all others are converted to float32. Images that could not be read are NaN. Workers
    receive the cache's address, so all of them must be able to read it.

    Raises InputError for an unknown set, NotExtractedError while parts of it are not written.
    """
    from dask.array import map_blocks  # half a second to import
    from dask.base import tokenize

    reader = cache.reader(name)
    feature_set, n_parts = reader.feature_set, reader.geometry.n_parts
    if pending := n_parts - len(reader.written_parts()):
        raise NotExtractedError(
            f"{reader.address}: {pending:,} of {n_parts:,} parts of {name} are not written yet; run the same "
            "`regionspot extract` again to resume"
        )
    key = pickle.dumps(cache)
    _opened[key] = cache
    sizes = [_entries(reader, part) for part in range(n_parts)]
    array: Array = map_blocks(
        _read_chunk,
        key,
        name,
        chunks=(tuple(sizes), *((width,) for width in feature_set.shape)),
        dtype=decoded_dtype(feature_set),
        meta=np.empty((0,) * (1 + len(feature_set.shape)), decoded_dtype(feature_set)),
        name=f"{name}-{tokenize(key)}",
    )
    return array


def decoded_dtype(feature_set: FeatureSet) -> np.dtype[Any]:
    """float16 for features stored as float16, else float32."""
    return np.dtype("float16" if feature_set.dtype == "float16" else "float32")


def read_decoded(reader: FeatureReader, rows: ArrayLike) -> NDArray[Any]:
    """Decoded features of the images at `rows`: (B, T, D) of a map set; of a token set (M, C), all their regions.

    Raises what `FeatureCache.read` raises.
    """
    feature_set, rows = reader.feature_set, np.asarray(rows, np.int64)
    counts = np.ones(len(rows), np.int64) if feature_set.kind == "map" else reader.manifest.region_count[rows]
    offsets = np.concatenate([[0], np.cumsum(counts)])
    codes = np.empty((offsets[-1], *feature_set.shape), feature_set.stored)
    scales = np.empty(codes.shape[:-1] if feature_set.has_scales else (offsets[-1], 0), "<f2")
    reader.read(rows.tolist(), _by_image(codes, offsets), _by_image(scales, offsets))
    if feature_set.dtype in ("float16", "float32"):
        return codes
    return decode(codes, feature_set, scales)


def _by_image(array: NDArray[Any], offsets: NDArray[np.int64]) -> list[NDArray[np.uint8]]:
    """The bytes of each image's entries, offsets[image] to offsets[image + 1]."""
    return [array[first:last].reshape(-1).view(np.uint8) for first, last in pairwise(offsets)]


def _entries(reader: FeatureReader, part: int) -> int:
    """Number of images of a part; for a token set, of regions."""
    rows = reader.geometry.rows(part)
    if reader.feature_set.kind == "map":
        return len(rows)
    return int(reader.manifest.offsets[rows.stop] - reader.manifest.offsets[rows.start])


def _read_chunk(key: bytes, name: str, block_id: tuple[int, ...]) -> NDArray[Any]:
    with _opening:
        cache = _opened.get(key)
        if cache is None:
            cache = _opened[key] = pickle.loads(key)
            _kept.append(cache)  # as long as the worker process lives
    return _read_part(cache.reader(name), block_id[0])


def _read_part(reader: FeatureReader, part: int) -> NDArray[Any]:
    """All features of a part, NaN for images that could not be read."""
    feature_set, rows = reader.feature_set, reader.geometry.rows(part)
    failed = [failure.row for failure in reader.record(part).failures]
    if not failed:
        return read_decoded(reader, rows)
    values = np.full((_entries(reader, part), *feature_set.shape), np.nan, decoded_dtype(feature_set))
    valid = np.setdiff1d(rows, failed)
    counts = 1 if feature_set.kind == "map" else reader.manifest.region_count[rows.start : rows.stop]
    values[np.repeat(np.isin(rows, valid), counts)] = read_decoded(reader, valid)
    return values
