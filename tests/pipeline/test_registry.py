"""Backbones by name: ours, those of other packages, and unknown names."""

import importlib
import sys

import numpy as np
import pytest
import torch

from regionspot.cache.errors import InputError
from regionspot.cache.tools.resume import open_or_create
from regionspot.evaluation.inference.head_features import head_features
from regionspot.fusion.checkpoint import HeadInfo
from regionspot.pipeline.backbones import registry
from regionspot.pipeline.backbones.bundle import Backbones
from regionspot.pipeline.backbones.clip import load_encoder
from regionspot.pipeline.backbones.protocols import BackboneConfig
from regionspot.pipeline.backbones.registry import (
    ENCODERS,
    LOCALIZERS,
    register_encoder,
    register_localizer,
    stored_name,
)
from regionspot.pipeline.backbones.sam import load_localizer
from regionspot.pipeline.datasets.registry import image_folder_of, read_dataset
from regionspot.pipeline.extraction.extract import extract

MODULE = """
import torch
from torchvision.transforms.v2 import functional as transforms


class Grey:
    def __init__(self, config):
        self.name, self.device, self.map_shape, self.batch_size = "grey", torch.device(config.device), (4, 1), 2
        self.provenance = {"model": "grey", "dtype": config.dtype, "preprocess": config.preprocess.name}

    def preprocess(self, image):
        return transforms.resize(transforms.pil_to_tensor(image.convert("L")).float(), [2, 2])

    def encode(self, batch):
        return batch.flatten(1)[:, :, None]


class Nothing:
    def __init__(self, config):
        self.name = "nothing"
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An importable module with two backbones; restores the registries after the test."""
    (tmp_path / "their_models.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    before = dict(ENCODERS.entries), dict(LOCALIZERS.entries)
    yield tmp_path
    for backbones, entries in zip((ENCODERS, LOCALIZERS), before, strict=True):
        backbones.entries.clear()
        backbones.entries.update(entries)
    sys.modules.pop("their_models", None)


def test_a_class_is_an_encoder_by_its_import_path(package):
    encoder = load_encoder("their_models:Grey", dtype="auto", preprocess="reference")
    assert encoder.provenance == {"model": "grey", "dtype": encoder.provenance["dtype"], "preprocess": "reference"}
    assert encoder.provenance["dtype"] in ("float32", "bfloat16")
    sets = Backbones.load("toy", device="cpu", localizer="none", encoders=["their_models:Grey"]).feature_sets()
    assert [(feature_set.name, feature_set.shape) for feature_set in sets] == [("grey", (4, 1))]


def test_a_registered_builder_gets_the_config(package):
    from their_models import Grey

    configs = []
    register_encoder("my_grey", lambda config: configs.append(config) or Grey(config))
    load_encoder("my_grey", "some.pt", "cpu", "bfloat16")
    assert configs == [BackboneConfig("my_grey", "some.pt", "cpu", "bfloat16", configs[0].preprocess, "first")]
    with pytest.raises(InputError, match="encoder 'my_grey': is registered already"):
        register_encoder("my_grey", Grey)
    with pytest.raises(InputError, match="localizer 'toy_sam': is registered already"):
        register_localizer("toy_sam", Grey)
    with pytest.raises(InputError, match="a name consists of letters, digits"):
        register_encoder("my:grey", Grey)


def test_an_installed_package_adds_an_encoder_by_an_entry_point(package):
    installed = package / "their_package-1.0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: their-package\nVersion: 1.0\n")
    (installed / "entry_points.txt").write_text("[regionspot.encoders]\ntheir_grey = their_models:Grey\n")
    importlib.invalidate_caches()
    assert load_encoder("their_grey").map_shape == (4, 1)
    assert "their_grey" in ENCODERS.names()
    with pytest.raises(InputError, match="their_grey"):
        load_encoder("their_gray")


def test_a_class_with_missing_members_is_refused_with_their_names(package):
    with pytest.raises(InputError, match="lacks batch_size, device, encode, map_shape, preprocess, provenance"):
        load_encoder("their_models:Nothing")
    with pytest.raises(InputError, match=r"lacks .*outputs_of_images"):
        load_localizer("their_models:Grey")


@pytest.mark.parametrize("name", ["their_models:Red", "no_such_package:Grey"])
def test_a_wrong_import_path_is_refused_in_one_line(package, name):
    with pytest.raises(InputError, match=f"encoder '{name}': .* cannot be imported") as error:
        load_encoder(name)
    assert "\n" not in str(error.value)


def test_an_unknown_name_is_refused_with_all_names_and_the_extras_they_need(monkeypatch):
    monkeypatch.setattr(registry, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="unknown; expected one of sam_vit_b") as error:
        load_localizer("sam_vit_x")
    assert r"mobile_sam, toy_sam, sam2_hiera_tiny (needs regionspot[sam2])" in str(error.value)
    assert "\n" not in str(error.value)
    with pytest.raises(InputError, match=r"needs the package sam2, .*; pip install 'regionspot\[sam2\]'"):
        load_localizer("sam2.1_hiera_tiny")
    with pytest.raises(InputError, match=r"toy_clip, open_clip:MODEL\[:TAG\], package.module:Class"):
        load_encoder("clip_x")


def test_a_name_in_a_checkpoint_imports_nothing():
    """A stored name has no colon, so a checkpoint cannot determine what is imported when it is opened."""
    with pytest.raises(InputError, match="unknown"):
        load_encoder(stored_name("their_models:Grey"))


def test_all_tokens_equal_the_official_decoder_and_the_first_does_not_change():
    localizer = load_localizer("toy_sam", "random:0", tokens="all")
    name, sam = localizer.name, localizer._sam
    assert localizer.outputs == {name: (128,), f"{name}_slots": (512,), f"{name}_iou": (4,)}
    embeddings = torch.randn(2, 128, 16, 16, generator=torch.Generator().manual_seed(0))
    boxes = [np.array([[10, 20, 100, 60], [3, 3, 9, 9], [0, 0, 120, 80]], np.float32), np.zeros((0, 4), np.float32)]
    outputs = localizer.outputs_of_images(embeddings, boxes, [(80, 120), (50, 50)])
    corners, dense = sam.prompt_encoder(points=None, boxes=localizer._scale(boxes[0], (80, 120)), masks=None)
    queries = []
    handle = sam.mask_decoder.transformer.register_forward_hook(lambda *call: queries.append(call[2][0]))
    _, ious = sam.mask_decoder.predict_masks(embeddings[:1], sam.prompt_encoder.get_dense_pe(), corners, dense)
    handle.remove()
    official = {name: queries[0][:, 1], f"{name}_slots": queries[0][:, 1:5].flatten(1), f"{name}_iou": ious}
    for feature_set, expected in official.items():
        assert float((outputs[0][feature_set] - expected).abs().max() / expected.abs().max()) <= 1e-5
        assert outputs[1][feature_set].shape == (0, *expected.shape[1:])
    alone = load_localizer("toy_sam", "random:0").tokens_of_images(embeddings, boxes, [(80, 120), (50, 50)])
    assert float((outputs[0][name] - alone[0]).abs().max() / alone[0].abs().max()) <= 1e-5
    assert localizer.provenance == load_localizer("toy_sam", "random:0").provenance


def test_all_tokens_are_added_to_a_cache_without_changing_its_location_tokens(world, tmp_path):
    manifest, image_folder = read_dataset("toy", world, "train").head(4), image_folder_of("toy", world)
    rows, stored = np.arange(4), []
    for tokens in ("first", "all"):
        backbones = Backbones.load("toy", device="cpu", tokens=tokens)
        cache = open_or_create(tmp_path / "a.zarr", manifest, backbones.feature_sets(), 2)
        extract(cache, image_folder, backbones)
        stored.append({name: cache.read(rows, token_set=name).tokens for name in backbones.localizer.outputs})
    first, read = stored[0]["toy_sam"], stored[1]
    assert np.array_equal(read["toy_sam"], first)
    assert np.abs(read["toy_sam_slots"][..., :128] - first).max() <= 2e-3 * np.abs(first).max()
    assert np.isfinite(read["toy_sam_iou"]).all()
    assert read["toy_sam_iou"].shape == (*first.shape[:2], 4)
    # A head released by the authors names no feature set; it was trained on location tokens.
    features = head_features(tmp_path, HeadInfo(preset="toy"))
    assert (features.tokens.name, features.maps.name) == ("toy_sam", "toy_clip")
