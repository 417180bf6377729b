"""A cache of the toy world with dense maps, and a head for it, made once for the tests of search and of the page."""

from __future__ import annotations

from pathlib import Path

import pytest

from regionspot.cache.store import FeatureCache


@pytest.fixture(scope="session")
def dense_cache(world, tmp_path_factory) -> Path:
    """A read-only cache of the 8 validation images of `world`, by the toy backbones: tokens, maps and dense maps."""
    from regionspot.pipeline.backbones.bundle import Backbones
    from regionspot.pipeline.datasets.registry import image_folder_of, read_dataset
    from regionspot.pipeline.extraction.extract import extract

    manifest = read_dataset("toy", world, "val")
    backbones = Backbones.load("toy", device="cpu", dense=True)
    path = tmp_path_factory.mktemp("dense") / "val.zarr"
    cache = FeatureCache.create(path, manifest, backbones.feature_sets("auto"), part_size=4)
    extract(cache, image_folder_of("toy", world, "val", manifest), backbones)
    return path
