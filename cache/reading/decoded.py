"""Features of one set as plain numbers, whatever their encoding, for who wants neither batches nor a device."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from regionspot.cache.format.encodings import decode
from regionspot.cache.format.schema import FeatureSet
from regionspot.cache.reading.feature_reader import open_reader
from regionspot.cache.store import FeatureCache


def decoded_dtype(feature_set: FeatureSet) -> np.dtype[Any]:
    """What features are handed out as: float16 where they are stored so, else float32."""
    return np.dtype("float16" if feature_set.dtype == "float16" else "float32")


def read_decoded(cache: FeatureCache, name: str, rows: ArrayLike) -> NDArray[Any]:
    """Features of the images at `rows`: (B, T, D) of a map set, (M, C) of a token set, the regions one after another.

    Raises what `FeatureCache.read` raises for rows whose features cannot be had.
    """
    feature_set, wanted = cache.feature_sets[name], np.asarray(rows, np.int64)
    counts = np.ones(len(wanted), np.int64) if feature_set.kind == "map" else cache.manifest.region_count[wanted]
    offsets = np.concatenate([[0], np.cumsum(counts)])
    codes = np.empty((offsets[-1], *feature_set.shape), feature_set.stored)
    scales = np.empty(codes.shape[:-1] if feature_set.has_scales else (offsets[-1], 0), "<f2")
    reader = open_reader(cache.storage, feature_set, cache.manifest, cache.geometry, cache.check, cache.access)
    reader.read(wanted.tolist(), _by_row(codes, offsets), _by_row(scales, offsets))
    if feature_set.dtype in ("float16", "float32"):
        return codes
    return decode(codes, feature_set, scales)


def _by_row(array: NDArray[Any], offsets: NDArray[np.int64]) -> list[NDArray[np.uint8]]:
    """The bytes of each image's entries, which lie at offsets[row] to offsets[row + 1]."""
    return [array[first:last].reshape(-1).view(np.uint8) for first, last in pairwise(offsets)]
