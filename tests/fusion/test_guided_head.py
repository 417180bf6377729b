"""The guided head and the attention loss: their options, and what a region's vector depends on."""

from dataclasses import replace

import pytest
import torch
from small_training import CONFIG, make_cache, make_vocabulary

from regionspot.cache.errors import InputError
from regionspot.fusion.checkpoint import load_checkpoint
from regionspot.fusion.head import HEADS, FusionHead, HeadConfig
from regionspot.fusion.heads import HeadSpec
from regionspot.fusion.heads.guided import GuidedHead
from regionspot.fusion.heads.pooling import patch_shares
from regionspot.fusion.training.train import train

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


@pytest.mark.parametrize("preset", HEADS)
def test_its_defaults_fit_every_preset(preset):
    sizes = HEADS[preset]
    with torch.device("meta"):
        head = GuidedHead(sizes.token_dim, sizes.width, sizes.text_dim)
        tokens, boxes = torch.zeros(1, 2, sizes.token_dim), torch.zeros(1, 2, 4)
        assert head(tokens, None, torch.zeros(1, 257, sizes.width), boxes).shape == (1, 2, sizes.text_dim)


# The attention loss of the fusion head


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return make_cache(tmp_path_factory.mktemp("guided") / "a.zarr")


def attentive(**options) -> FusionHead:
    torch.manual_seed(0)
    return HeadSpec(options={**SIZES, "dropout": 0.0, "attention_loss": 2.0} | options, **SHAPES).build()


def test_the_attention_loss_is_that_of_the_share_of_attention_in_the_boxes():
    head = attentive(layers=1)
    vectors, loss = head(TOKENS, MASK, MAPS, BOXES)
    layer = head.decoder.layers[0]
    queries = layer.norm1((hidden := head.to_clip(TOKENS)) + layer._sa_block(hidden, None, ~MASK))
    weights = layer.multihead_attn(queries, MAPS, MAPS, average_attn_weights=False)[1]
    shares = (weights[..., 1:] * patch_shares(BOXES, 4)[:, None]).sum(dim=-1)
    expected = sum(-shares[image, :, mask].log().mean() for image, mask in enumerate(MASK))
    torch.testing.assert_close(loss, 2.0 * expected)
    torch.testing.assert_close(vectors, head.eval()(TOKENS, MASK, MAPS, BOXES))


def test_the_attention_loss_draws_attention_into_the_boxes():
    head = attentive()
    optimizer = torch.optim.Adam(head.parameters(), lr=1e-2)
    losses = []
    for _ in range(10):
        _, loss = head(TOKENS, MASK, MAPS, BOXES)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


def test_a_head_trained_with_the_attention_loss_is_a_fusion_head(cache, tmp_path):
    """Same names and numbers, so that the authors' code loads it, and plain training can start from it."""
    config = replace(CONFIG, iterations=3, head_options={"attention_loss": 0.1})
    run = train([cache], [make_vocabulary()], tmp_path / "with", config)
    head = load_checkpoint(run.checkpoint).head
    plain = FusionHead(HeadConfig(token_dim=8, width=16, text_dim=8, layers=1, heads=4, ffn=32)).eval()
    plain.load_state_dict(head.state_dict())
    tokens = rand(2, 3, 8, seed=5)
    assert torch.equal(head(tokens, MASK, MAPS, BOXES), plain(tokens, MASK, MAPS))
    other = train([cache], [make_vocabulary()], tmp_path / "plain", replace(CONFIG, iterations=3), init=run.checkpoint)
    assert other.loss < run.loss  # which includes the attention loss


@pytest.mark.parametrize("value", [-1.0, "much"])
def test_an_attention_loss_that_is_not_positive_is_refused(value):
    with pytest.raises(InputError, match=r"attention_loss"):
        attentive(attention_loss=value)
