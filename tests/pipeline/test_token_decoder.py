"""The token decoder equals SAM's official mask decoder for any number of boxes and images."""

import copy

import pytest
import torch

from regionspot.pipeline.backbones import sam_token_decoder as token_decoder
from regionspot.pipeline.backbones.builders import build_sam
from regionspot.pipeline.backbones.sam_token_decoder import ALL_OUTPUT_QUERIES, FIRST_MASK_TOKEN, TokenDecoder

RELATIVE = 1e-5


def random_sam(gain):
    """The toy SAM with random weights; a gain above 1 gives attention with sharp peaks."""
    sam, random = build_sam("toy_sam").eval().requires_grad_(False), torch.Generator().manual_seed(0)
    for name, weight in sam.state_dict().items():
        noise = torch.randn(weight.shape, generator=random)
        if "norm" in name and name.endswith("weight"):
            weight.copy_(1 + 0.1 * noise)
        else:
            weight.copy_(gain * noise / weight[0].numel() ** 0.5 if weight.dim() >= 2 else 0.02 * noise)
    return sam


@pytest.fixture(scope="module")
def sam():
    return random_sam(1.0)


def images_of(sam, count, seed=0):
    side, width = sam.prompt_encoder.image_embedding_size[0], sam.mask_decoder.transformer_dim
    return torch.randn(count, width, side, side, generator=torch.Generator().manual_seed(seed))


def boxes_of(sam, count, seed=0):
    corners = torch.rand(count, 4, generator=torch.Generator().manual_seed(seed)) * sam.image_encoder.img_size
    return torch.cat([torch.minimum(corners[:, :2], corners[:, 2:]), torch.maximum(corners[:, :2], corners[:, 2:])], 1)


@torch.no_grad()
def official(sam, embedding, boxes, dtype=torch.float32):
    """Queries and cells of segment_anything's MaskDecoder.predict_masks, before the masks."""
    decoder, prompts = sam.mask_decoder, sam.prompt_encoder
    corners, no_mask = prompts(points=None, boxes=boxes, masks=None)
    outputs = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight]).expand(len(boxes), -1, -1)
    positions = prompts.get_dense_pe().expand(len(boxes), -1, -1, -1)
    inputs = embedding + no_mask, positions, torch.cat([outputs, corners], dim=1)
    return copy.deepcopy(decoder.transformer).to(dtype)(*(tensor.to(dtype) for tensor in inputs))


def decoded(sam, embeddings, boxes, image, queries=ALL_OUTPUT_QUERIES, chunk=16):
    return list(TokenDecoder(sam).decode(embeddings, boxes, image, queries, chunk))


def error(actual, expected):
    assert actual.shape == expected.shape
    return float((actual - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("count", [1, 2, 16, 17, 64, 2000])
def test_tokens_equal_the_official_decoder_for_any_number_of_boxes(sam, count):
    embeddings, boxes = images_of(sam, 1), boxes_of(sam, count)
    tokens = torch.cat([part.queries for part in decoded(sam, embeddings, boxes, [0] * count, chunk=128)])
    sample = torch.linspace(0, count - 1, min(count, 50)).long()
    expected, _ = official(sam, embeddings, boxes[sample])
    assert error(tokens[sample], expected[:, ALL_OUTPUT_QUERIES]) < RELATIVE


def test_the_cells_for_masks_equal_the_official_decoder(sam):
    embeddings, boxes = images_of(sam, 1), boxes_of(sam, 5)
    _, expected = official(sam, embeddings, boxes)
    (part,) = decoded(sam, embeddings, boxes, [0] * 5)
    assert error(part.cells, expected) < RELATIVE


def test_rounding_errors_of_sharp_attention_are_no_larger_than_the_official_decoders():
    sharp = random_sam(4.0)  # amplifies rounding errors, also the official decoder's
    embeddings, boxes = images_of(sharp, 1), boxes_of(sharp, 8)
    exact, theirs = (
        official(sharp, embeddings, boxes, dtype)[0][:, ALL_OUTPUT_QUERIES] for dtype in (torch.float64, torch.float32)
    )
    (ours,) = decoded(sharp, embeddings, boxes, [0] * 8)
    assert error(ours.queries, exact) < 2 * error(theirs, exact) < 1e-2


def test_boxes_of_several_images_are_decoded_together(sam):
    counts = [3, 0, 7, 1]  # the second image has no box, a chunk has boxes of several
    embeddings, boxes = images_of(sam, len(counts)), boxes_of(sam, sum(counts))
    image = [row for row, count in enumerate(counts) for _ in range(count)]
    parts = decoded(sam, embeddings, boxes, image, [FIRST_MASK_TOKEN], chunk=4)
    assert [(part.boxes.start, part.boxes.stop) for part in parts] == [(0, 4), (4, 8), (8, 11)]
    tokens = torch.cat([part.queries[:, 0] for part in parts])
    expected = [
        official(sam, embeddings[row : row + 1], box[None])[0][:, FIRST_MASK_TOKEN]
        for row, box in zip(image, boxes, strict=True)
    ]
    assert error(tokens, torch.cat(expected)) < RELATIVE


def test_no_boxes_give_no_tokens(sam):
    assert decoded(sam, images_of(sam, 2), boxes_of(sam, 0), []) == []


def test_the_chunk_size_follows_from_the_memory_limit(sam, monkeypatch):
    embeddings, boxes = images_of(sam, 1), boxes_of(sam, 9)
    cells, width = sam.prompt_encoder.image_embedding_size[0] ** 2, sam.mask_decoder.transformer_dim
    heads = sam.mask_decoder.transformer.num_heads
    monkeypatch.setitem(token_decoder.CHUNK_BYTES, "cpu", 4 * 12 * cells * (width + 7 * heads))
    parts = decoded(sam, embeddings, boxes, [0] * 9, chunk=None)
    assert [part.boxes.stop - part.boxes.start for part in parts] == [4, 4, 1]
    monkeypatch.setitem(token_decoder.CHUNK_BYTES, "cpu", 1)
    assert len(decoded(sam, embeddings, boxes, [0] * 9, chunk=None)) == 9
