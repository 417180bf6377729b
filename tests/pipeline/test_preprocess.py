"""The "reference" preset resizes images and boxes exactly as RegionSpot's authors do."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from segment_anything.utils.transforms import ResizeLongestSide
from torch.nn import functional as F

from regionspot.cache.errors import InputError, ProvenanceMismatchError
from regionspot.cache.format.manifest import Manifest
from regionspot.cache.tools.resume import open_or_create
from regionspot.evaluation.inference.head_features import head_features
from regionspot.evaluation.inference.region_spot import RegionSpot
from regionspot.fusion.checkpoint import HeadInfo, save_checkpoint
from regionspot.fusion.heads import HeadSpec
from regionspot.pipeline.backbones.clip import load_encoder
from regionspot.pipeline.backbones.sam import load_localizer
from regionspot.pipeline.datasets.region_table import manifest_of_images
from regionspot.pipeline.extraction.extract import Backbones
from regionspot.pipeline.images import preprocess
from regionspot.pipeline.images.preprocess import PREPROCESS, get_preprocess

REFERENCE = PREPROCESS["reference"]
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
# (height, width) before and after detectron2 0.6's ResizeShortestEdge(800, 1333).
REDUCED = {
    (480, 640): (800, 1067),
    (640, 480): (1067, 800),
    (427, 640): (800, 1199),
    (375, 500): (800, 1067),
    (612, 612): (800, 800),
    (333, 1000): (444, 1333),
    (1000, 333): (1333, 444),
    (800, 1333): (800, 1333),
    (3000, 4000): (800, 1067),
    (1, 1): (800, 800),
}
NARROW = (20, 30_000)  # rounds to less than a pixel, where detectron2 fails


@pytest.fixture(scope="module")
def image() -> Image.Image:
    coarse = np.random.default_rng(0).integers(0, 256, (13, 17, 3), np.uint8)
    return Image.fromarray(coarse).resize((341, 260), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def boxes() -> np.ndarray:
    corners = np.random.default_rng(1).uniform(0, 120, (50, 2))
    return np.concatenate([corners, corners + np.array([221, 140])], axis=1).astype(np.float32)


@pytest.fixture(scope="module")
def reduced(image) -> Image.Image:
    return image.resize((1049, 800), Image.Resampling.BILINEAR)


def test_the_first_size_equals_detectron2():
    assert {size: REFERENCE.first_size(size) for size in REDUCED} == REDUCED
    assert REFERENCE.first_size(NARROW) == (1, 1333)


def test_the_sam_input_is_the_official_transform_of_the_reduced_image(image, reduced):
    expected = ResizeLongestSide(1024).apply_image(np.asarray(reduced))
    pixels = REFERENCE.sam_input(image, 1024).permute(1, 2, 0).numpy()
    assert np.array_equal(pixels, expected)
    assert pixels.shape[:2] == REFERENCE.sam_size((image.height, image.width), 1024)
    assert not np.array_equal(pixels, get_preprocess("direct").sam_input(image, 1024).permute(1, 2, 0).numpy())


def test_boxes_are_scaled_by_both_steps(boxes):
    in_reduced = (boxes.astype(np.float64) * [1049 / 341, 800 / 260, 1049 / 341, 800 / 260]).astype(np.float32)
    expected = ResizeLongestSide(1024).apply_boxes(in_reduced, (800, 1049)).astype(np.float32)
    assert np.array_equal(REFERENCE.scale_boxes(boxes, (260, 341), 1024), expected)


def test_the_clip_input_is_the_reduced_image_without_antialiasing(image, reduced):
    floats = torch.from_numpy(np.array(reduced)).permute(2, 0, 1)[None] / 255
    square = F.interpolate(floats, (64, 64), mode="bilinear", align_corners=False)[0]
    expected = (square - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    square = REFERENCE.clip_input(image, 64, MEAN, STD)
    assert torch.allclose(square, expected, atol=1e-5)
    assert not torch.allclose(square, get_preprocess("direct").clip_input(image, 64, MEAN, STD), atol=0.05)


def test_sam_gives_the_same_tokens_by_reference_and_directly_on_the_reduced_image(image, reduced, boxes):
    direct, by_reference = (load_localizer("toy_sam", preprocess=name) for name in ("direct", "reference"))
    in_reduced = (boxes.astype(np.float64) * [1049 / 341, 800 / 260, 1049 / 341, 800 / 260]).astype(np.float32)
    expected = direct.tokens_of_images(direct.encode([direct.preprocess(reduced)]), [in_reduced], [(800, 1049)])[0]
    embedding = by_reference.encode([by_reference.preprocess(image)])[0]
    assert torch.equal(by_reference.tokens_of_images(embedding[None], [boxes], [(260, 341)])[0], expected)
    tokens, masks = by_reference.tokens_and_masks(embedding, boxes[:3], (260, 341))
    assert torch.allclose(tokens, expected[:3], atol=1e-5)
    assert masks.shape == (3, 260, 341)


def test_masks_by_the_authors_are_those_of_the_reduced_image_resized_to_the_nearest_pixel(image, reduced, boxes):
    direct, by_reference = (load_localizer("toy_sam", preprocess=name) for name in ("direct", "reference"))
    in_reduced = (boxes[:3].astype(np.float64) * [1049 / 341, 800 / 260, 1049 / 341, 800 / 260]).astype(np.float32)
    _, large = direct.tokens_and_masks(direct.encode([direct.preprocess(reduced)])[0], in_reduced, (800, 1049))
    rows, columns = np.arange(260) * 800 // 260, np.arange(341) * 1049 // 341
    embedding = by_reference.encode([by_reference.preprocess(image)])[0]
    _, masks = by_reference.tokens_and_masks(embedding, boxes[:3], (260, 341), "reference")
    assert np.array_equal(masks, large[:, rows][:, :, columns])
    _, by_sam = by_reference.tokens_and_masks(embedding, boxes[:3], (260, 341))
    assert 0 < np.mean(by_sam != masks) < 0.05


def test_resizing_in_strips_is_bit_identical_to_resizing_at_once(image, monkeypatch):
    whole = get_preprocess("direct").clip_input(image, 64, MEAN, STD)
    monkeypatch.setattr(preprocess, "STRIP_PIXELS", 7 * image.width)
    assert torch.equal(get_preprocess("direct").clip_input(image, 64, MEAN, STD), whole)


@pytest.mark.parametrize("load", [load_localizer, load_encoder], ids=["localizer", "encoder"])
def test_an_unknown_preset_is_refused(load):
    with pytest.raises(InputError, match=r"^preprocess 'sharp': unknown; expected one of direct, reference$"):
        load("toy_sam" if load is load_localizer else "toy_clip", preprocess="sharp")


def one_image() -> Manifest:
    sizes = np.array([10])
    return manifest_of_images("coco", "val", np.array([1]), ["1.jpg"], sizes, sizes, ())


def test_features_of_two_presets_cannot_share_a_cache(tmp_path):
    direct, by_reference = (Backbones.load("toy", device="cpu", preprocess=name) for name in PREPROCESS)
    provenances = {feature_set.name: feature_set.provenance for feature_set in by_reference.feature_sets()}
    assert {provenance["preprocess"] for provenance in provenances.values()} == {"reference"}
    assert "shorter edge 800, longer at most 1333" in provenances["toy_sam"]["resize"]
    assert "not antialiased" in provenances["toy_clip"]["resize"]
    open_or_create(tmp_path / "c.zarr", one_image(), direct.feature_sets(), 4)
    with pytest.raises(ProvenanceMismatchError, match="preprocess"):
        open_or_create(tmp_path / "c.zarr", one_image(), by_reference.feature_sets(), 4)


def test_a_head_is_evaluated_with_the_preset_of_its_training_features(tmp_path):
    info = HeadInfo(
        preset="toy", localizer="toy_sam", encoder="toy_clip", caches=({"map": {"preprocess": "reference"}},)
    )
    released, unstated = HeadInfo(preset="bl"), replace(info, caches=())
    for trained, expected in ((info, "reference"), (unstated, "direct"), (released, "reference")):
        features = head_features(tmp_path, trained)
        assert (features.tokens.preprocess, features.maps.preprocess) == (expected, expected)
    spec = HeadSpec(token_dim=128, width=192, text_dim=128, options={"layers": 1, "ffn": 64})
    save_checkpoint(tmp_path / "head.safetensors", spec, spec.build(), info)
    identities = [
        RegionSpot.load(tmp_path / "head.safetensors", "random:0", "cpu", preprocess=preset).identity()
        for preset in (None, "direct")
    ]
    assert [identity["localizer"]["preprocess"] for identity in identities] == ["reference", "direct"]
    assert [identity["encoder"]["preprocess"] for identity in identities] == ["reference", "direct"]
