"""The feature cache: format, reading, writing, storage and tools. Independent of SAM and CLIP.

    cache = FeatureCache.open("o365_train.zarr")
    batch = cache.read(cache.valid_rows()[:64])      # numpy: tokens, feature_map, region_mask, categories, ...
    for batch in cache.loader(64, seed=1): ...       # one epoch, shuffled and prefetched

Importing this package imports neither torch nor zarr; opening a cache imports zarr.
"""

from regionspot.cache.errors import (
    CacheError,
    CorruptPartError,
    InputError,
    NotACacheError,
    NotExtractedError,
    ProvenanceMismatchError,
    RegionSpotError,
    SchemaVersionError,
)
from regionspot.cache.format.encodings import decode
from regionspot.cache.format.manifest import NO_CATEGORY, Category, Manifest, Ragged
from regionspot.cache.format.part_record import PartRecord
from regionspot.cache.format.schema import Failure, FeatureSet, ImageFeatures
from regionspot.cache.reading.batch import Batch
from regionspot.cache.reading.loader import Loader
from regionspot.cache.store import FeatureCache

__all__ = [
    "NO_CATEGORY",
    "Batch",
    "CacheError",
    "Category",
    "CorruptPartError",
    "Failure",
    "FeatureCache",
    "FeatureSet",
    "ImageFeatures",
    "InputError",
    "Loader",
    "Manifest",
    "NotACacheError",
    "NotExtractedError",
    "PartRecord",
    "ProvenanceMismatchError",
    "Ragged",
    "RegionSpotError",
    "SchemaVersionError",
    "decode",
]
