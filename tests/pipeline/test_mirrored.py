"""`extract --views flip`: the features of mirrored images, beside those of the original ones."""

from dataclasses import replace

import numpy as np
import pytest
from makers import files_under
from PIL import Image

from regionspot.cache import FeatureCache
from regionspot.pipeline.datasets.registry import image_folder_of
from regionspot.pipeline.extraction.config import ExtractConfig
from regionspot.pipeline.extraction.extract import Extraction
from regionspot.pipeline.images.decode import read_image

IMAGES = 3


@pytest.fixture(scope="module")
def flipped_path(world, tmp_path_factory):
    """A cache to which the mirrored view was added, and its files before that."""
    path = tmp_path_factory.mktemp("flipped") / "c.zarr"
    config = ExtractConfig(str(path), "toy", str(world), limit=IMAGES, preset="toy", part_size=2, dtype="bfloat16")
    Extraction.load(config).run()
    before = files_under(path / "features")
    Extraction.load(replace(config, dtype="auto", views="flip")).run()
    return path, before


def test_mirrored_features_equal_those_of_a_mirrored_image_file(world, manifest, flipped_path, tmp_path):
    manifest, boxes = manifest.head(IMAGES), manifest.head(IMAGES).boxes_xyxy.copy()
    for row, path in enumerate(manifest.paths):
        image = read_image(image_folder_of("toy", world) / str(path))
        image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(tmp_path / f"{row}.png")
        regions = manifest.regions(row)
        boxes[regions] = np.float32([[image.width - x2, y1, image.width - x1, y2] for x1, y1, x2, y2 in boxes[regions]])
    paths = np.array([f"{row}.png" for row in range(IMAGES)], dtype=manifest.paths.dtype)
    config = ExtractConfig(str(tmp_path / "files.zarr"), preset="toy", part_size=2, dtype="bfloat16")
    Extraction(config, replace(manifest, paths=paths, boxes_xyxy=boxes), tmp_path, config.load_backbones()).run()
    expected = FeatureCache.open(config.cache).read(np.arange(IMAGES))
    cache = FeatureCache.open(flipped_path[0])
    mirrored = cache.read(np.arange(IMAGES), map_set="toy_clip.flip", token_set="toy_sam.flip")
    assert np.array_equal(mirrored.feature_map, expected.feature_map)
    assert np.array_equal(mirrored.tokens, expected.tokens)
    original = cache.read(np.arange(IMAGES), map_set="toy_clip", token_set="toy_sam")
    assert not np.array_equal(mirrored.feature_map, original.feature_map)


def test_the_mirrored_view_is_added_beside_the_original_in_its_dtype(flipped_path):
    path, before = flipped_path
    after = files_under(path / "features")
    assert {name: after[name] for name in before} == before
    for name, feature_set in FeatureCache.open(path).feature_sets.items():
        assert feature_set.provenance["dtype"] == "bfloat16"
        assert feature_set.provenance.get("view") == ("flip" if name.endswith(".flip") else None)
