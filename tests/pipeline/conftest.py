"""Ten images of the toy world, the toy backbones, and the cache of an extraction without faults."""

import shutil
from pathlib import Path

import pytest

from regionspot.cache import FeatureCache, Manifest
from regionspot.pipeline.backbones.bundle import Backbones
from regionspot.pipeline.datasets.registry import image_folder_of, read_dataset
from regionspot.pipeline.extraction.config import ExtractConfig
from regionspot.pipeline.extraction.extract import Extraction


@pytest.fixture(scope="session")
def manifest(world) -> Manifest:
    return read_dataset("toy", world, "train").head(10)


@pytest.fixture(scope="session")
def backbones() -> Backbones:
    return Backbones.load("toy", device="cpu")


@pytest.fixture
def image_folder(world, tmp_path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(image_folder_of("toy", world), tmp_path / "photos"))


@pytest.fixture(scope="session")
def undisturbed(world, manifest, backbones, tmp_path_factory) -> FeatureCache:
    """Its parts have 4, 4 and 2 images."""
    path = str(tmp_path_factory.mktemp("undisturbed") / "c.zarr")
    Extraction(ExtractConfig(path, part_size=4), manifest, image_folder_of("toy", world), backbones).run()
    return FeatureCache.open(path)
