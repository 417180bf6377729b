"""The SAM 2 localizer equals Meta's own predictor, on a small model of the `sam2` package."""

from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("sam2", reason="regionspot[sam2] is not installed")

from regionspot.cache.errors import InputError, WeightsError
from regionspot.pipeline.backbones import sam2
from regionspot.pipeline.backbones.protocols import Localizer, MaskingLocalizer
from regionspot.pipeline.backbones.sam import load_localizer

SMALL = (
    "model.image_size=256",
    "model.image_encoder.trunk.stages=[1,1,2,1]",
    "model.image_encoder.trunk.global_att_blocks=[3]",
    "model.memory_attention.num_layers=1",
)
BOXES = np.array([[10, 20, 100, 60], [0, 0, 119.5, 79], [50.25, 60, 90, 79], [3, 3, 9, 9]], np.float32)
SIZE = (80, 120)
RELATIVE = 1e-5


def error(actual, expected) -> float:
    assert actual.shape == expected.shape
    return float((actual - expected).abs().max() / expected.abs().max())


@pytest.fixture(scope="module")
def image():
    noise = np.random.default_rng(0).integers(0, 255, (10, 15, 3), np.uint8)
    return Image.fromarray(noise).resize((120, 80), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module", params=["sam2_hiera_tiny", "sam2.1_hiera_tiny"])
def localizer(request):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sam2, "build_sam2", partial(sam2.build_sam2, overrides=SMALL))
        return load_localizer(request.param, "random:0", tokens="all")


@pytest.fixture(scope="module")
def embeddings(localizer, image):
    return localizer.encode([localizer.preprocess(image), localizer.preprocess(image.rotate(180))])


@pytest.fixture(scope="module")
def predictor(localizer, image):
    from sam2.sam2_image_predictor import SAM2ImagePredictor

    predictor = SAM2ImagePredictor(localizer._model)
    predictor._bb_feat_sizes = [(64, 64), (32, 32), (16, 16)]  # its own are those of 1,024 pixels
    predictor.set_image(image)
    return predictor


def test_the_embedding_equals_the_official_predictor(predictor, embeddings):
    assert error(embeddings[:1], predictor.get_image_embedding()) <= RELATIVE


def test_all_four_tokens_and_ious_equal_the_official_predictor(localizer, predictor, embeddings, monkeypatch):
    outputs, official = [], localizer._model.sam_mask_decoder.predict_masks
    decoder = localizer._model.sam_mask_decoder
    monkeypatch.setattr(decoder, "predict_masks", lambda **inputs: outputs.append(official(**inputs)) or outputs[-1])
    predictor.predict(box=BOXES, multimask_output=False)
    _, ious, tokens, _ = outputs[-1]
    name = localizer.name
    ours = localizer.outputs_of_images(embeddings, [BOXES, BOXES[:0]], [SIZE, SIZE])
    assert error(ours[0][name], tokens[:, 0]) <= RELATIVE
    assert error(ours[0][f"{name}_slots"], tokens.flatten(1)) <= RELATIVE
    assert error(ours[0][f"{name}_iou"], ious) <= RELATIVE
    assert {key: tuple(values.shape) for key, values in ours[1].items()} == {
        key: (0, *shape) for key, shape in localizer.outputs.items()
    }
    assert tokens[:, 0].std(0).max() > 0.1  # the boxes' tokens differ


def test_tokens_do_not_depend_on_the_batch(localizer, embeddings):
    together = localizer.tokens_of_images(embeddings, [BOXES, BOXES[:2]], [SIZE, SIZE])
    alone = localizer.tokens_of_images(embeddings[1:], [BOXES[:2]], [SIZE])
    assert error(together[1], alone[0]) <= RELATIVE
    assert error(together[0][:2], alone[0]) > 0.01


def test_it_is_a_localizer_without_masks(localizer):
    assert isinstance(localizer, Localizer)
    assert not isinstance(localizer, MaskingLocalizer)
    assert localizer.provenance["resize"] == "antialiased bilinear on floats to 256 x 256, aspect not kept"
    assert "sam2" in localizer.provenance["versions"]


def test_weights_of_another_model_are_refused(monkeypatch, tmp_path):
    path = tmp_path / "sam2.pt"
    torch.save({"model": {"image_encoder.trunk.pos_embed": torch.zeros(1, 96, 7, 7)}}, path)
    monkeypatch.setattr(sam2, "build_sam2", partial(sam2.build_sam2, overrides=SMALL))
    with pytest.raises(WeightsError, match=r"does not fit sam2\.1_hiera_tiny"):
        load_localizer("sam2.1_hiera_tiny", str(path))


def test_unknown_tokens_are_refused(monkeypatch):
    monkeypatch.setattr(sam2, "build_sam2", partial(sam2.build_sam2, overrides=SMALL))
    with pytest.raises(InputError, match="tokens 'some': unknown; expected one of first, all"):
        load_localizer("sam2.1_hiera_tiny", "random:0", tokens="some")
