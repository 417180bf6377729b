"""The head, its logits, loss and gradients compared with the authors' code (../shared/golden)."""

import json
import zlib

import numpy as np
import pytest
import torch

from regionspot.fusion.head import HEADS, FusionHead, similarity_logits
from regionspot.fusion.losses import region_loss

RELATIVE = 5e-6  # four times the rounding error on a CPU


def rand(tag: str, *shape: int) -> torch.Tensor:
    rng = np.random.RandomState(zlib.crc32(tag.encode()))
    return torch.from_numpy(rng.standard_normal(shape).astype(np.float32))


@pytest.fixture(scope="module")
def facts(golden):
    return json.loads((golden / "golden.json").read_text())


@pytest.fixture(scope="module")
def inputs(facts):
    prefix = facts["prefix"]
    text = rand(prefix + "text", 37, 512)
    return {
        "tokens": rand(prefix + "tokens", 2, 5, 256),
        "feature_map": rand(prefix + "featuremap", 2, 197, 768),
        "text": text / text.norm(dim=-1, keepdim=True),
    }


@pytest.fixture(scope="module")
def head(facts, from_formula):
    head = FusionHead(HEADS["bb"]).eval()
    head.load_state_dict(from_formula(head.state_dict(), facts["prefix"], 1.0))
    return head


@pytest.fixture(scope="module")
def expected(golden):
    return np.load(golden / "fusion_head.npz")


def test_golden_state_dict_has_the_authors_names_and_count(facts, head):
    assert set(head.state_dict()) == set(facts["fusion"]["keys"])
    assert sum(p.numel() for p in head.parameters()) == facts["fusion"]["n_params"] == 24_226_304


def test_golden_semantic_vectors_and_logits_equal_the_authors(head, inputs, expected):
    with torch.no_grad():
        semantic = head(inputs["tokens"], None, inputs["feature_map"])
        logits = similarity_logits(semantic, inputs["text"])
    for ours, theirs in ((semantic, expected["semantic"]), (logits, expected["logits"])):
        assert np.abs(ours.numpy() - theirs).max() <= RELATIVE * np.abs(theirs).max()


def test_golden_loss_and_every_gradient_norm_equal_the_authors(head, inputs, expected, facts):
    head.zero_grad()
    mask = torch.ones(2, 5, dtype=torch.bool)
    semantic = head(inputs["tokens"], mask, inputs["feature_map"])
    loss = region_loss(semantic, inputs["text"], torch.from_numpy(expected["labels"]))
    loss.backward()
    assert loss.item() == pytest.approx(facts["fusion"]["loss"], rel=RELATIVE)
    norms = {name: parameter.grad.norm().item() for name, parameter in head.named_parameters()}
    assert norms == pytest.approx(facts["fusion"]["grad_norms"], rel=RELATIVE)


def test_golden_numbers_do_not_depend_on_padding(head, inputs, expected):
    """A third image has two regions and three rows of padding."""
    tokens = torch.cat([inputs["tokens"], inputs["tokens"][:1]])
    tokens[2, 2:] = 7.0
    mask = torch.ones(3, 5, dtype=torch.bool)
    mask[2, 2:] = False
    feature_map = torch.cat([inputs["feature_map"], inputs["feature_map"][:1]])
    with torch.no_grad():
        semantic = head(tokens, mask, feature_map)
        alone = head(tokens[2:, :2], None, feature_map[2:])
    assert np.abs(semantic[:2].numpy() - expected["semantic"]).max() <= RELATIVE * np.abs(expected["semantic"]).max()
    torch.testing.assert_close(semantic[2:, :2], alone, rtol=RELATIVE, atol=5 * RELATIVE)
