"""The guided head: its options, and what a region's vector depends on."""

import pytest
import torch

from regionspot.fusion.head import FusionHead, HeadConfig
from regionspot.fusion.heads.guided import GuidedHead

SHAPES = {"token_dim": 6, "width": 16, "text_dim": 8}
SIZES = {"layers": 2, "heads": 2, "ffn": 32}
FUSION_NAMES = {  # of the fusion head's tensors, by ours
    "layers.": "decoder.layers.",
    "region_attention.": "self_attn.",
    "region_norm.": "norm1.",
    "map_attention.": "multihead_attn.",
    "map_norm.": "norm2.",
    "ffn.0.": "linear1.",
    "ffn.3.": "linear2.",
}


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def guided(**options) -> GuidedHead:
    torch.manual_seed(0)
    return GuidedHead(**SHAPES, **SIZES, **options).eval()


TOKENS, MAPS = rand(2, 3, 6, seed=1), rand(2, 17, 16, seed=2)
MASK = torch.tensor([[True, True, True], [True, True, False]])
BOXES = torch.tensor([[[0.0, 0.0, 0.5, 0.5], [0.3, 0.2, 0.9, 1.0], [0.1, 0.1, 0.12, 0.11]]] * 2) * MASK[..., None]


def test_without_its_options_it_is_the_fusion_head():
    ours = guided(box_bias=False, pooled_residual=False, region_attention=True)
    fusion = FusionHead(HeadConfig(**SHAPES, **SIZES, dropout=0.1)).eval()
    names = {}
    for name in ours.state_dict():
        theirs = name
        for own, other in FUSION_NAMES.items():
            theirs = theirs.replace(own, other)
        in_layer = theirs.startswith("decoder.")
        theirs = theirs.replace(".norm.", ".norm3.") if in_layer else theirs.replace("norm.", "decoder.norm.")
        names[theirs] = name
    assert names.keys() == fusion.state_dict().keys()
    fusion.load_state_dict({theirs: ours.state_dict()[name] for theirs, name in names.items()})
    vectors, expected = ours(TOKENS, MASK, MAPS, BOXES), fusion(TOKENS, MASK, MAPS)
    torch.testing.assert_close(vectors[MASK], expected[MASK], rtol=1e-5, atol=1e-6)


def test_the_vector_of_a_region_does_not_depend_on_the_other_regions():
    head = guided()
    together = head(TOKENS, MASK, MAPS, BOXES)
    for region in range(3):
        one = slice(region, region + 1)
        alone = head(TOKENS[:, one], MASK[:, one], MAPS, BOXES[:, one])
        torch.testing.assert_close(together[:, one][MASK[:, one]], alone[MASK[:, one]], rtol=1e-5, atol=1e-6)
    with_attention = guided(region_attention=True)
    alone = with_attention(TOKENS[:, :1], None, MAPS, BOXES[:, :1])
    assert not torch.allclose(with_attention(TOKENS, MASK, MAPS, BOXES)[:, :1], alone, atol=1e-3)


@pytest.mark.parametrize("option", ["box_bias", "pooled_residual"])
def test_a_region_sees_little_of_the_map_outside_its_box(option):
    """Region 0 covers the upper left quarter of 4 x 4 patches; the change is at the lower right."""
    changed = MAPS.clone()
    changed[:, 1:].view(2, 4, 4, 16)[:, 2:, 2:] += 3.0

    def change(head):
        difference = head(TOKENS, MASK, changed, BOXES) - head(TOKENS, MASK, MAPS, BOXES)
        return difference[:, 0].norm() / head(TOKENS, MASK, MAPS, BOXES)[:, 0].norm()

    options = {"box_bias": False, "pooled_residual": False}
    plain, one = change(guided(**options)), change(guided(**{**options, option: True}))
    assert one < plain / (10 if option == "box_bias" else 1)


def test_every_parameter_is_trained_and_padding_stays_finite():
    head = guided(region_attention=True).train()
    vectors = head(TOKENS, MASK, MAPS, BOXES)
    assert vectors.isfinite().all()
    vectors[MASK].square().sum().backward()
    assert [name for name, one in head.named_parameters() if not one.grad.isfinite().all() or not one.grad.any()] == []
