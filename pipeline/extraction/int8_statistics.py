"""Channel statistics of new int8 feature sets, from a sample of images that is encoded before the cache exists.

The sample is spread evenly over the manifest, so every run and worker takes the same images. A cache that already has
the statistics keeps them.
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
from regionspot.cache.format.manifest import Manifest
from regionspot.cache.format.schema import FeatureSet, ImageFeatures
from regionspot.pipeline.extraction.plan import stored_feature_sets

log = logging.getLogger(__name__)

# 64 maps of 257 tokens are 16,000 rows, enough for the mean and deviation of a channel.
SAMPLE_IMAGES = 64

# Yields the features of the images at these rows, in order, for the feature sets of these names.
EncodeSample = Callable[[list[int], list[str]], Iterator[ImageFeatures]]


def add_int8_statistics(
    address: str | Path, manifest: Manifest, feature_sets: Sequence[FeatureSet], encode_sample: EncodeSample
) -> list[FeatureSet]:
    """The feature sets, with statistics added to int8 sets that the cache at `address` does not have yet.

    Raises InputError when no image of the sample can be read, NotACacheError when `address` is something else.
    """
    stored = stored_feature_sets(address)
    new = [
        feature_set
        for feature_set in feature_sets
        if feature_set.dtype == "int8" and feature_set.statistics is None and feature_set.name not in stored
    ]
    complete = {feature_set.name: feature_set for feature_set in _with_statistics(new, manifest, encode_sample)}
    return [complete.get(feature_set.name, feature_set) for feature_set in feature_sets]


def _with_statistics(
    feature_sets: Sequence[FeatureSet], manifest: Manifest, encode_sample: EncodeSample
) -> list[FeatureSet]:
    if not feature_sets:
        return []
    rows, names = sample_rows(manifest), [feature_set.name for feature_set in feature_sets]
    log.info("%s: statistics of %d images for int8", ", ".join(names), len(rows))
    samples: dict[str, list[NDArray[Any]]] = {name: [] for name in names}
    failure = ""
    for image in encode_sample(rows, names):
        if image.failure is not None:
            failure = image.failure
            continue
        for name in names:
            samples[name].append(np.asarray(image.features[name]))
    if not samples[names[0]]:
        raise InputError(
            f"{manifest.dataset}/{manifest.split}: int8 needs a sample, and none of {len(rows)} images could be read "
            f"(the last: {failure}); check --data"
        )
    return [replace(feature_set, statistics=statistics_of(samples[feature_set.name])) for feature_set in feature_sets]


def sample_rows(manifest: Manifest) -> list[int]:
    """At most SAMPLE_IMAGES rows spread evenly over the images with regions; over all images if none has regions."""
    rows = np.flatnonzero(manifest.region_count)
    rows = rows if len(rows) else np.arange(len(manifest))
    places = np.linspace(0, len(rows) - 1, min(SAMPLE_IMAGES, len(rows)))
    return [int(row) for row in rows[places.round().astype(np.int64)]]
