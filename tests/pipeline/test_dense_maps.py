"""`extract --map dense`: CLIP's dense maps beside its feature maps."""

import pickle
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from makers import cache_content, extracted_content, files_under
from PIL import Image

from regionspot.cache import FeatureCache
from regionspot.cache.errors import InputError
from regionspot.cache.format.feature_dtypes import Encoding
from regionspot.cache.reading.dask_arrays import read_decoded
from regionspot.cache.tools.verify import verify
from regionspot.pipeline.backbones.bundle import Backbones
from regionspot.pipeline.backbones.clip import load_encoder
from regionspot.pipeline.datasets.registry import image_folder_of
from regionspot.pipeline.extraction.config import ExtractConfig
from regionspot.pipeline.extraction.extract import Extraction
from regionspot.pipeline.images.decode import read_image

CONFIG = ExtractConfig(part_size=4, dense=True)


@pytest.fixture(scope="module")
def dense_backbones(backbones):
    return replace(backbones, dense=True, reload=None)


@pytest.fixture(scope="module")
def in_one_run(world, manifest, dense_backbones, tmp_path_factory):
    """A cache in which feature maps, dense maps and tokens come from one run."""
    path = tmp_path_factory.mktemp("dense") / "c.zarr"
    Extraction(replace(CONFIG, cache=str(path)), manifest, image_folder_of("toy", world), dense_backbones).run()
    return FeatureCache.open(path)


def dense_maps(encoder, manifest, world, flip=False):
    """float32 (N, P, E): the dense maps of the toy world's images."""
    folder, inputs = image_folder_of("toy", world), []
    for path in manifest.paths:
        image = read_image(folder / str(path))
        inputs.append(encoder.preprocess(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else image))
    return encoder.encode_with_dense(torch.stack(inputs))[1].numpy()


def test_dense_maps_come_with_feature_maps_that_are_equal_to_the_bit(in_one_run, undisturbed, manifest, world):
    encoder = load_encoder("toy_clip")
    dense_set = in_one_run.feature_sets["toy_clip_dense_map"]
    assert dense_set.shape == (144, 128) == encoder.dense_shape
    assert dense_set.provenance["class_token"] is False
    assert dense_set.provenance["logit_scale"] == encoder.logit_scale
    stored = read_decoded(in_one_run.reader("toy_clip_dense_map"), range(10))
    np.testing.assert_allclose(stored, dense_maps(encoder, manifest, world), rtol=1e-3, atol=0.01)
    for name in ("toy_clip", "toy_sam"):
        folder = f"features/{name}"
        assert files_under(in_one_run.path / folder) == files_under(undisturbed.path / folder)
    assert not verify(in_one_run.path).problems


def test_dense_maps_are_added_to_an_existing_cache_part_by_part(
    in_one_run, undisturbed, world, manifest, dense_backbones, tmp_path
):
    path = shutil.copytree(undisturbed.path, tmp_path / "c.zarr")
    before = files_under(path, r"^(zarr\.json|claims|runs|summary)")
    for parts in ("1", None):
        config = replace(CONFIG, cache=str(path), parts=parts)
        Extraction(config, manifest, image_folder_of("toy", world), dense_backbones).run()
    after = files_under(path)
    assert {name: after[name] for name in before} == before
    added = {name: data for name, data in cache_content(path).items() if "dense_map" in name}
    assert added == {name: data for name, data in extracted_content(in_one_run.path).items() if "dense_map" in name}
    assert not verify(path).problems


def test_dense_maps_of_mirrored_images_are_stored_in_int8(world, manifest, tmp_path):
    config = ExtractConfig(
        str(tmp_path / "c.zarr"), preset="toy", localizer="none", dense=True, views="flip", encoding=Encoding("int8")
    )
    three = manifest.head(3)
    Extraction(config, three, image_folder_of("toy", world), config.load_backbones()).run()
    cache = FeatureCache.open(config.cache)
    assert set(cache.feature_sets) == {"toy_clip.flip", "toy_clip_dense_map.flip"}
    stored = read_decoded(cache.reader("toy_clip_dense_map.flip"), range(3))
    expected = dense_maps(load_encoder("toy_clip"), three, world, flip=True)
    assert np.abs(stored - expected).max() < 0.02 * np.abs(expected).max()


def test_a_worker_extracts_dense_maps_too():
    config = pickle.loads(pickle.dumps(replace(CONFIG, preset="toy", localizer="none")))
    backbones = config.load_backbones()
    assert [each.name for each in config.feature_sets(backbones)] == ["toy_clip", "toy_clip_dense_map"]
    assert backbones.reload().dense


def test_an_encoder_without_dense_maps_is_refused():
    class OnlyMaps:
        name, map_shape = "only_maps", (5, 8)

    with pytest.raises(InputError, match=r"encoder only_maps: has no dense map, .* leave out --map dense"):
        Backbones(None, (OnlyMaps(),), dense=True)
    with pytest.raises(InputError, match="--map dense: needs an encoder, and there is none"):
        Backbones(dense=True)
