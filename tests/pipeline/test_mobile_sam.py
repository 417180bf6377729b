"""MobileSAM is SAM with another image encoder; its official file has other names."""

import itertools

import pytest
import torch
from timm.models.tiny_vit import tiny_vit_5m_224

from regionspot.cache.errors import WeightsError
from regionspot.pipeline.backbones.builders import build_sam
from regionspot.pipeline.backbones.mobile_sam import DEPTHS, TinyVitEncoder, convert_mobile_sam
from regionspot.pipeline.backbones.protocols import MaskingLocalizer
from regionspot.pipeline.backbones.sam import load_localizer

CONVOLUTION = ("c.weight", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var", "bn.num_batches_tracked")
BLOCK = (
    "attn.attention_biases",
    *(f"attn.{part}.{kind}" for part in ("norm", "qkv", "proj") for kind in ("weight", "bias")),
    *(f"mlp.{part}.{kind}" for part in ("norm", "fc1", "fc2") for kind in ("weight", "bias")),
    *(f"local_conv.{name}" for name in CONVOLUTION),
)


def official_encoder_names() -> list[str]:
    """Names in the state dict of mobile_sam/modeling/tiny_vit_sam.py, with the prefix of the whole model."""
    names = [f"patch_embed.seq.{index}.{name}" for index in (0, 2) for name in CONVOLUTION]
    for layer, depth in enumerate(DEPTHS):
        in_block = [f"conv{n}.{name}" for n in (1, 2, 3) for name in CONVOLUTION] if layer == 0 else BLOCK
        names += [f"layers.{layer}.blocks.{block}.{name}" for block, name in itertools.product(range(depth), in_block)]
        if layer < len(DEPTHS) - 1:
            names += [f"layers.{layer}.downsample.conv{n}.{name}" for n in (1, 2, 3) for name in CONVOLUTION]
    names += ["norm_head.weight", "norm_head.bias", "head.weight", "head.bias"]
    names += ["neck.0.weight", "neck.1.weight", "neck.1.bias", "neck.2.weight", "neck.3.weight", "neck.3.bias"]
    return [f"image_encoder.{name}" for name in names]


@pytest.fixture(scope="module")
def localizer():
    return load_localizer("mobile_sam", "random:0")


def test_the_official_names_are_converted_to_those_of_the_model():
    expected = {name for name in build_sam("mobile_sam").state_dict() if name.startswith("image_encoder.")}
    assert convert_mobile_sam(dict.fromkeys(official_encoder_names(), torch.zeros(1))).keys() == expected


def test_an_official_file_is_read_and_the_decoder_is_sams(localizer, tmp_path):
    weights = localizer._sam.state_dict()
    official_name = {new: old for old in official_encoder_names() for new in convert_mobile_sam({old: torch.zeros(1)})}
    official = {official_name.get(name, name): tensor for name, tensor in weights.items()}
    path = tmp_path / "mobile_sam.pt"
    torch.save({**official, "image_encoder.head.weight": torch.zeros(1000, 320)}, path)
    again = load_localizer("mobile_sam", str(tmp_path))
    assert all(torch.equal(tensor, weights[name]) for name, tensor in again._sam.state_dict().items())
    assert again.provenance["model"] == "mobile_sam"
    decoder = {name for name in build_sam("sam_vit_b").state_dict() if not name.startswith("image_encoder.")}
    assert decoder < weights.keys()
    torch.save(build_sam("toy_sam").state_dict(), path)
    with pytest.raises(WeightsError, match="does not fit mobile_sam"):
        load_localizer("mobile_sam", str(path))


def test_the_encoder_equals_timms_tiny_vit_up_to_its_last_stage(localizer):
    """The last stage does not reduce the grid, so it has four times the cells."""
    torch.manual_seed(0)
    ours, theirs = localizer._sam.image_encoder, tiny_vit_5m_224().eval()
    shared = {name: tensor for name, tensor in ours.state_dict().items() if not name.startswith("neck.")}
    theirs.load_state_dict(shared, strict=False)
    image = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        stem = ours.patch_embed(image)
        assert torch.equal(ours.stages[:3](stem), theirs.stages[:3](theirs.patch_embed(image)))
        assert ours.stages(stem).shape == (1, 320, 14, 14)
        assert theirs.stages(stem).shape == (1, 320, 7, 7)
        assert ours(image).shape == (1, 256, 14, 14)


def test_it_is_a_localizer_with_masks_and_sams_input(localizer):
    assert isinstance(localizer, MaskingLocalizer)
    assert isinstance(localizer._sam.image_encoder, TinyVitEncoder)
    assert (localizer.pixels, localizer.token_dim) == (1024, 256)
    assert "long side 1024" in localizer.provenance["resize"]
