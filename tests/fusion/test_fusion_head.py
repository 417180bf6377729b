"""The fusion head and its loss: shapes, padding, precision."""

import pytest
import torch
import torch.nn.functional as F

from regionspot.cache.errors import InputError
from regionspot.fusion.head import HEADS, FusionHead, HeadConfig, similarity_logits
from regionspot.fusion.losses import focal_loss, region_loss

SMALL = HeadConfig(token_dim=12, width=16, text_dim=8, layers=2, heads=4, ffn=24)


@pytest.fixture
def head():
    torch.manual_seed(0)
    return FusionHead(SMALL).eval()


def unit(*shape: int) -> torch.Tensor:
    return F.normalize(torch.randn(*shape), dim=-1)


@pytest.mark.parametrize(("preset", "count"), [("bb", 24_226_304), ("bl", 38_853_376), ("bl336", 38_853_376)])
def test_each_preset_has_the_published_number_of_parameters(preset, count):
    with torch.device("meta"):
        head = FusionHead(HEADS[preset])
    assert sum(parameter.numel() for parameter in head.parameters()) == count


def test_a_width_that_is_not_a_multiple_of_the_heads_is_refused():
    with pytest.raises(InputError, match=r"width 100 .* 8 heads"):
        HeadConfig(width=100, text_dim=8)


def test_padding_does_not_change_the_vectors_of_the_regions(head):
    tokens, feature_map = torch.randn(1, 3, 12), torch.randn(1, 5, 16)
    padded = torch.cat([tokens, torch.full((1, 4, 12), 50.0)], dim=1)
    mask = torch.tensor([[True] * 3 + [False] * 4])
    torch.testing.assert_close(head(padded, mask, feature_map)[:, :3], head(tokens, None, feature_map))


def test_an_image_without_regions_gives_no_nan(head):
    mask = torch.tensor([[True, True], [False, False]])
    semantic = head(torch.randn(2, 2, 12), mask, torch.randn(2, 5, 16))
    loss = region_loss(semantic, unit(3, 8), torch.tensor([[0, 2], [-1, -1]]))
    loss.backward()
    assert torch.isfinite(semantic).all()
    assert all(torch.isfinite(parameter.grad).all() for parameter in head.parameters())


def test_no_row_of_the_attention_mask_is_fully_masked(head):
    """Some attention kernels return NaN for a fully masked row."""
    masks = []
    head.decoder.register_forward_pre_hook(
        lambda _, args, kwargs: masks.append(kwargs["tgt_key_padding_mask"]), with_kwargs=True
    )
    head(torch.randn(2, 2, 12), torch.tensor([[True, False], [False, False]]), torch.randn(2, 5, 16))
    assert masks[0].tolist() == [[False, True], [False, False]]


def test_a_float32_head_accepts_half_precision_features(head):
    tokens, feature_map = torch.randn(2, 3, 12).half(), torch.randn(2, 5, 16).half()
    semantic = head(tokens, None, feature_map)
    torch.testing.assert_close(semantic, head(tokens.float(), None, feature_map.float()))
    assert semantic.dtype == torch.float32


def test_logits_stay_float32_under_autocast():
    semantic, text = torch.randn(4, 8), unit(5, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = similarity_logits(semantic.bfloat16().float(), text)
    torch.testing.assert_close(logits, 100 * F.normalize(semantic.bfloat16().float(), dim=-1) @ text.T)


def test_focal_loss_equals_its_definition():
    logits, categories = 3 * torch.randn(6, 9, dtype=torch.float64), torch.randint(0, 9, (6,))
    target = F.one_hot(categories, 9).double()
    p_t = logits.sigmoid() * target + (1 - logits.sigmoid()) * (1 - target)
    weight = 0.25 * target + 0.75 * (1 - target)
    expected = (-weight * (1 - p_t) ** 2 * p_t.log()).sum(dim=1)
    torch.testing.assert_close(focal_loss(logits, categories), expected)


def test_focal_loss_is_finite_at_the_largest_logits():
    logits = torch.tensor([[100.0, -100.0], [-100.0, 100.0]], requires_grad=True)
    loss = focal_loss(logits, torch.tensor([1, 1]))
    loss.sum().backward()
    assert loss.tolist() == pytest.approx([0.75 * 100 + 0.25 * 100, 0.0], abs=1e-3)
    assert torch.isfinite(logits.grad).all()


def test_the_loss_ignores_regions_of_unknown_class():
    semantic, text = torch.randn(2, 3, 8), unit(5, 8)
    categories = torch.tensor([[1, -1, 4], [2, -1, -1]])
    expected = region_loss(semantic[:1, [0, 2]], text, torch.tensor([[1, 4]])) + region_loss(
        semantic[1:, :1], text, torch.tensor([[2]])
    )
    torch.testing.assert_close(region_loss(semantic, text, categories), expected)


def test_repeated_regions_do_not_change_the_loss():
    """The authors repeat regions instead of padding."""
    semantic, text = torch.randn(1, 2, 8), unit(5, 8)
    once = region_loss(semantic, text, torch.tensor([[0, 3]]))
    repeated = region_loss(semantic.repeat(1, 4, 1), text, torch.tensor([[0, 3] * 4]))
    torch.testing.assert_close(once, repeated)


def test_the_loss_of_a_batch_without_known_regions_is_0():
    semantic = torch.randn(2, 3, 8, requires_grad=True)
    loss = region_loss(semantic, unit(5, 8), torch.full((2, 3), -1))
    loss.backward()
    assert loss.item() == 0
    assert not semantic.grad.any()
