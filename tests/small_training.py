"""A small cache, vocabulary and configuration to train on, shared by the tests of training."""

import numpy as np
import torch
import torch.nn.functional as F
from makers import make_manifest

from regionspot.cache.format.feature_dtypes import Statistics
from regionspot.cache.format.manifest import Category
from regionspot.cache.format.schema import FeatureSet, ImageFeatures
from regionspot.cache.store import FeatureCache
from regionspot.fusion.training.config import TrainConfig
from regionspot.fusion.vocabulary import Vocabulary

CLASSES, IMAGES = 6, 21
CONFIG = TrainConfig(lr=2e-3, iterations=40, warmup=4, batch_size=4, layers=1, heads=4, ffn=32, dropout=0.1)


def small_manifest(images: int, seed: int):
    """Image 3 has no region and image 5 none of known class."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(1, 5, images)
    counts[3] = 0
    offsets = np.concatenate([[0], np.cumsum(counts)])
    class_index = rng.integers(0, CLASSES, offsets[-1]).astype(np.int32)
    class_index[offsets[5] : offsets[6]] = -1
    classes = tuple(Category(index + 1, f"class {index}") for index in range(CLASSES))
    corners = 400 * np.random.default_rng(0).random((offsets[-1], 2, 2), dtype=np.float32)
    boxes = np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1)
    columns = {"category_index": class_index, "categories": classes, "boxes_xyxy": boxes}
    return make_manifest(counts, dataset=f"small{seed}", **columns)


def feature_sets(width: int = 16, weights: str = "w" * 64, dtype: str = "float16") -> list[FeatureSet]:
    # Close to the statistics of the features below.
    statistics = [Statistics(np.zeros(n), np.ones(n)) if dtype == "int8" else None for n in (width, 8)]
    return [
        FeatureSet("maps", "map", (5, width), dtype, {"weights_sha256": weights}, statistics=statistics[0]),
        FeatureSet("tokens", "token", (8,), dtype, {"weights_sha256": "t" * 64}, statistics=statistics[1]),
    ]


def make_cache(path, seed=0, images=IMAGES, **sets) -> FeatureCache:
    """The token of a region encodes its class. Image 7 is a failed image."""
    manifest = small_manifest(images, seed)
    cache = FeatureCache.create(path, manifest, feature_sets(**sets), part_size=8)
    rng = np.random.default_rng(seed)
    class_tokens = np.random.default_rng(99).standard_normal((CLASSES + 1, 8))

    def image(row):
        if row == 7:
            return ImageFeatures(row, {}, "broken JPEG")
        tokens = class_tokens[manifest.category_index[manifest.regions(row)]]
        tokens = tokens + 0.1 * rng.standard_normal(tokens.shape)
        maps = rng.standard_normal(cache.feature_sets["maps"].shape)
        return ImageFeatures(row, {"maps": maps, "tokens": tokens})

    for part in range(cache.n_parts):
        cache.write_part(part, (image(row) for row in cache.part_rows(part)), ["maps", "tokens"])
    return FeatureCache.open(path)


def make_vocabulary(classes: int = CLASSES, encoder_sha256: str = "w" * 64) -> Vocabulary:
    embeddings = F.normalize(torch.randn(classes, 8, generator=torch.Generator().manual_seed(0)), dim=-1)
    return Vocabulary(tuple(f"class {i}" for i in range(classes)), ("{}.",), embeddings, "d" * 64, encoder_sha256)
