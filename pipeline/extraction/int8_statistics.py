"""The first sample that int8 is standardised by: features of a few images, taken before there is a cache.

The images are spread evenly over the manifest, so every run and every worker takes the same ones. Whoever comes to a
cache that has its statistics already takes those, and no sample.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from regionspot.cache.errors import InputError
from regionspot.cache.format.encodings import statistics_of
from regionspot.cache.format.header import load_header
from regionspot.cache.format.manifest import Manifest
from regionspot.cache.format.schema import FeatureSet, ImageFeatures
from regionspot.cache.storage.open import open_storage

log = logging.getLogger(__name__)

# 64 maps of 257 tokens are 16,000 rows, plenty for a channel's mean and deviation; 64 images delay no run.
SAMPLE_IMAGES = 64

# Features of the sets named, of the images at these rows, in order; one that could not be read says why.
SampleFeatures = Callable[[list[int], list[str]], Iterator[ImageFeatures]]


def ready_to_store(
    address: str | Path, manifest: Manifest, feature_sets: Sequence[FeatureSet], features_of: SampleFeatures
) -> list[FeatureSet]:
    """The feature sets with all that a cache at `address` has to know of them before it is made or they are added.

    An int8 set that the cache does not hold yet gets the statistics of a sample; others are left as they are, for a
    cache goes on with its own. Raises InputError when no image of the sample can be read, NotACacheError when
    something else is at `address`.
    """
    storage = open_storage(address)
    held = load_header(storage).feature_sets if storage.exists("") else {}
    lacking = [each for each in feature_sets if each.dtype == "int8" and each.statistics is None]
    new = with_statistics([each for each in lacking if each.name not in held], manifest, features_of)
    known = {each.name: each for each in new}
    return [known.get(each.name, each) for each in feature_sets]


def with_statistics(
    feature_sets: Sequence[FeatureSet], manifest: Manifest, features_of: SampleFeatures
) -> list[FeatureSet]:
    """The feature sets with the statistics of a sample of the manifest's images, in one pass over these.

    Raises InputError when none of them can be read.
    """
    if not feature_sets:
        return []
    rows, names = sample_rows(manifest), [each.name for each in feature_sets]
    log.info("%s: statistics of %d images for int8", ", ".join(names), len(rows))
    taken: dict[str, list[NDArray[Any]]] = {name: [] for name in names}
    failure = ""
    for image in features_of(rows, names):
        if image.failure is not None:
            failure = image.failure
            continue
        for name in names:
            taken[name].append(np.asarray(image.features[name]))
    if not taken[names[0]]:
        raise InputError(
            f"{manifest.dataset}/{manifest.split}: int8 needs a sample, and none of {len(rows)} images could be read "
            f"(the last: {failure}); check --data"
        )
    return [replace(each, statistics=statistics_of(taken[each.name])) for each in feature_sets]


def sample_rows(manifest: Manifest) -> list[int]:
    """Rows spread evenly over the images that have regions, at most SAMPLE_IMAGES; over all where none has."""
    rows = np.flatnonzero(manifest.region_count)
    rows = rows if len(rows) else np.arange(len(manifest))
    places = np.linspace(0, len(rows) - 1, min(SAMPLE_IMAGES, len(rows)))
    return [int(row) for row in rows[places.round().astype(np.int64)]]
