"""SAM's mask decoder up to the location tokens, for the boxes of many images at once.

It equals the official transformer (segment_anything/modeling/transformer.py) to float rounding, with a fraction of the
operations:

- The input image of the first layer is the same for all boxes, so its projections are computed once per image.
- Later layers have an image per box. There, queries are projected into the image's width instead of projecting cells:
  `q . (W x + b)` is `(W^T q) . x`, because `q . b` is the same for all cells and cancels in the softmax; values
  `W x + b` are projected after the weighted sum, because the weights sum to one.
- Where the image attends to the 7 queries, their values go through the output projection, not the 4,096 cells.
- The last attention is computed for the requested queries only.

Boxes do not attend to each other, so the boxes of several images form one batch without padding.
"""

# n boxes of a chunk, K queries of a box (7: IoU, four masks, two corners), P cells (g * g), C width (256), H heads (8),
# c width of a head

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from regionspot.cache.errors import unknown_name
from regionspot.pipeline.backbones.batch_size import free_bytes
from regionspot.pipeline.backbones.protocols import ALL, TOKENS

IOU_TOKEN = 0  # query index: the IoU token first, then the four mask tokens (MaskDecoder.predict_masks)
FIRST_MASK_TOKEN = 1
MASK_TOKENS = 4
QUERIES = 1 + MASK_TOKENS + 2  # the two corners of a box are last
TOKEN_SLOT = 0  # the single-mask output of the mask decoder's four; the paper's choice
ALL_OUTPUT_QUERIES = [IOU_TOKEN, *range(FIRST_MASK_TOKEN, FIRST_MASK_TOKEN + MASK_TOKENS)]

# Memory of a chunk of boxes; one box of SAM ViT-B takes 15 MB for cells and scores. On a CPU a chunk of 16 is a tenth
# faster than one of 4, and larger ones are not faster, if the allocator reuses their memory (extraction/malloc.py).
CHUNK_BYTES = {"cpu": 256_000_000, "cuda": 2_000_000_000}
MAX_FREE_SHARE = 0.1  # of a GPU's free memory; the next batch of images is encoded at the same time


@dataclass(frozen=True)
class DecodedBoxes:
    """The decoder's output for a chunk of boxes.

    boxes    the chunk's position among all boxes of the call
    queries  float32 (n, requested queries, C)
    cells    float32 (n, P, C): the image embedding of each box, from which masks are computed
    """

    boxes: slice
    queries: Tensor
    cells: Tensor


class TokenDecoder:
    """The transformer of one SAM mask decoder, in float32. `sam` is segment_anything's own model."""

    def __init__(self, sam: Any) -> None:
        decoder, prompts = sam.mask_decoder, sam.prompt_encoder
        transformer = decoder.transformer
        self._prompts = prompts
        self._outputs: Tensor = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight]).detach()
        self._positions: Tensor = prompts.get_dense_pe().detach()[0].flatten(1).T.contiguous()  # (P, C)
        self._no_mask: Tensor = prompts.no_mask_embed.weight.detach()
        self._first, *self._later = (_Layer(layer) for layer in transformer.layers)
        self._last = _Attention(transformer.final_attn_token_to_image)
        self._norm = transformer.norm_final_attn
        self.width: int = self._outputs.shape[1]

    @torch.no_grad()
    def decode(
        self,
        embeddings: Tensor,
        prompts: Tensor,
        image: Sequence[int],
        queries: Sequence[int],
        chunk: int | None = None,
        labels: Tensor | None = None,
    ) -> Iterator[DecodedBoxes]:
        """Yields the requested queries of all prompts, `chunk` prompts at a time (default: as many as fit into memory).

        embeddings  float32 (B, C, g, g) of the image encoder
        prompts     float32, in pixels of the encoder's input: boxes XYXY (n, 4), or with `labels` k points (n, k, 2)
        image       n ascending indices into `embeddings`: the image of each prompt
        queries     indices of queries: IOU_TOKEN, FIRST_MASK_TOKEN + 0..3
        labels      int (n, k): 1 for a point of the region, 0 for one outside of it
        """
        chunk = chunk or self._chunk_size(prompts.device)
        projected: dict[int, _ProjectedImage] = {}
        for start in range(0, len(prompts), chunk):
            part = slice(start, min(start + chunk, len(prompts)))
            images = list(image[part])
            projected = {i: projected.get(i) or self._project_image(embeddings[i]) for i in dict.fromkeys(images)}
            embedded = self._embed(prompts[part], None if labels is None else labels[part])
            yield DecodedBoxes(part, *self._decode_chunk(embedded, [projected[i] for i in images], list(queries)))

    def _embed(self, prompts: Tensor, labels: Tensor | None) -> Tensor:
        """float32 (n, k, C): two corners of each box, or k - 1 points and the empty one after them."""
        points, boxes = (None, prompts) if labels is None else ((prompts, labels), None)
        embedded: Tensor = self._prompts(points=points, boxes=boxes, masks=None)[0]
        return embedded

    def _chunk_size(self, device: torch.device) -> int:
        cells, width = self._positions.shape
        # At the peak, three copies of the cells, and of the scores of the 7 queries in 8 heads.
        bytes_per_box = 4 * cells * 3 * (width + self._last.heads * QUERIES)
        limit = CHUNK_BYTES.get(device.type, CHUNK_BYTES["cpu"])
        if device.type == "cuda":
            limit = min(limit, int(MAX_FREE_SHARE * free_bytes(device)))
        # A power of two, so that a little more or less free memory gives the same chunks and the same rounding.
        return 1 << max(1, limit // bytes_per_box).bit_length() - 1

    def _project_image(self, embedding: Tensor) -> _ProjectedImage:
        cells = embedding.flatten(1).T + self._no_mask
        with_positions = cells + self._positions
        first = self._first
        return _ProjectedImage(
            cells,
            keys=first.to_image.project_keys(with_positions),
            values=first.to_image.project_values(cells),
            queries=first.from_image.project_queries(with_positions),
        )

    def _decode_chunk(
        self, prompts: Tensor, images: Sequence[_ProjectedImage], indices: list[int]
    ) -> tuple[Tensor, Tensor]:
        positions = torch.cat([self._outputs.expand(len(prompts), -1, -1), prompts], dim=1)  # of the queries
        queries, cells = self._first_layer(positions, _runs(images))
        for layer in self._later:
            queries, cells = self._later_layer(layer, queries, cells, positions)
        # Selected one by one: a list as an index would be copied to the device, and the host would wait for it.
        with_positions, queries = (
            torch.stack([tensor[:, i] for i in indices], 1) for tensor in (queries + positions, queries)
        )
        attended = self._last.attend_cells(with_positions, cells, self._positions)
        return self._norm(queries + attended), cells

    def _first_layer(self, positions: Tensor, runs: Sequence[tuple[slice, _ProjectedImage]]) -> tuple[Tensor, Tensor]:
        layer = self._first
        queries = layer.norm1(layer.own(positions, positions, positions))
        with_positions = queries + positions
        attended = torch.cat([layer.to_image.attend_image(with_positions[boxes], image) for boxes, image in runs])
        queries = layer.norm3_of_mlp(layer.norm2(queries + attended))
        keys, values = queries + positions, layer.from_image.folded_values(queries)
        cells = torch.empty(len(positions), len(self._positions), self.width, device=positions.device)
        for boxes, image in runs:
            weights = layer.from_image.weights_of_image(keys[boxes], image)
            torch.baddbmm(image.cells.expand(len(weights), -1, -1), weights.mT, values[boxes], out=cells[boxes])
        return queries, layer.norm4(cells)

    def _later_layer(self, layer: _Layer, queries: Tensor, cells: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        with_positions = queries + positions
        queries = layer.norm1(queries + layer.own(with_positions, with_positions, queries))
        queries = layer.norm2(queries + layer.to_image.attend_cells(queries + positions, cells, self._positions))
        queries = layer.norm3_of_mlp(queries)
        weights = layer.from_image.weights_of_cells(queries + positions, cells, self._positions)
        cells.baddbmm_(weights.mT, layer.from_image.folded_values(queries))
        return queries, layer.norm4(cells)


class RegionTokens:
    """The token decoder of one SAM, and the feature sets made of its output.

    The published method stores the first of the four mask tokens, that of the single mask. The other three stand for
    whole, part and subpart, and the IoU token gives the predicted quality of each mask; one pass computes all of them.

    name    of the feature set of location tokens
    sam     has `prompt_encoder` and `mask_decoder` as segment_anything's Sam
    tokens  one of protocols.TOKENS; raises InputError otherwise

    outputs  shape by feature set: the location token (C,); with "all" also `NAME_slots`, the four mask tokens one after
             another, (4 * C,), and `NAME_iou`, the predicted IoU of each of the four masks, (4,)
    """

    def __init__(self, name: str, sam: Any, tokens: str) -> None:
        if tokens not in TOKENS:
            raise unknown_name("tokens", tokens, TOKENS)
        self.decoder = TokenDecoder(sam)
        self.width: int = self.decoder.width
        self._name, self._iou_head = name, sam.mask_decoder.iou_prediction_head
        self.outputs: dict[str, tuple[int, ...]] = {name: (self.width,)}
        if tokens == ALL:
            self.outputs |= {f"{name}_slots": (MASK_TOKENS * self.width,), f"{name}_iou": (MASK_TOKENS,)}

    @torch.no_grad()
    def first(self, embeddings: Tensor, boxes: Sequence[Tensor]) -> list[Tensor]:
        """B tensors float32 (n, C): the location tokens.

        embeddings  (B, C, g, g) of the image encoder
        boxes       B tensors float32 (n, 4), in pixels of its input
        """
        queries = self._decode(embeddings, boxes, [FIRST_MASK_TOKEN + TOKEN_SLOT])
        return list(torch.split(queries[:, 0], [len(image_boxes) for image_boxes in boxes]))

    @torch.no_grad()
    def all_outputs(self, embeddings: Tensor, boxes: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        """All `outputs` of each image: float32 (n, *shape) by feature set."""
        if len(self.outputs) == 1:
            return [{self._name: tokens} for tokens in self.first(embeddings, boxes)]
        queries = self._decode(embeddings, boxes, ALL_OUTPUT_QUERIES)
        slots = queries[:, FIRST_MASK_TOKEN:]
        outputs = (slots[:, TOKEN_SLOT], slots.flatten(1), self._iou_head(queries[:, IOU_TOKEN]))
        counts = [len(image_boxes) for image_boxes in boxes]
        images = zip(*(torch.split(values, counts) for values in outputs), strict=True)
        return [dict(zip(self.outputs, image, strict=True)) for image in images]

    def _decode(self, embeddings: Tensor, boxes: Sequence[Tensor], queries: Sequence[int]) -> Tensor:
        """float32 (boxes of all images, queries, C): decode the boxes of all images together."""
        all_boxes = torch.cat(list(boxes))
        image = [row for row, image_boxes in enumerate(boxes) for _ in range(len(image_boxes))]
        decoded = self.decoder.decode(embeddings.to(all_boxes.device).float(), all_boxes, image, queries)
        empty = torch.zeros(0, len(queries), self.width, device=all_boxes.device)
        return torch.cat([empty, *(part.queries for part in decoded)])


def _scores(queries: Tensor, cells: Tensor, positions: Tensor) -> Tensor:
    """(n, Q, P): queries (n, Q, C) times cells (n, P, C) plus positions (P, C), without computing that sum."""
    return (queries @ positions.mT).baddbmm_(queries, cells.mT)


@dataclass(frozen=True)
class _ProjectedImage:
    """Cells (P, C) of one image, and the first layer's keys, values and queries of them, (H, P, c) each."""

    cells: Tensor
    keys: Tensor
    values: Tensor
    queries: Tensor


def _runs(images: Sequence[_ProjectedImage]) -> list[tuple[slice, _ProjectedImage]]:
    """Slices of consecutive boxes of the same image."""
    starts = [box for box, image in enumerate(images) if not box or image is not images[box - 1]]
    return [(slice(a, b), images[a]) for a, b in zip(starts, [*starts[1:], len(images)], strict=True)]


class _Layer:
    """The parts of one TwoWayAttentionBlock."""

    def __init__(self, block: Any) -> None:
        self.norm1, self.norm2, self.norm3, self.norm4 = block.norm1, block.norm2, block.norm3, block.norm4
        self.own, self._mlp = block.self_attn, block.mlp
        self.to_image = _Attention(block.cross_attn_token_to_image)
        self.from_image = _Attention(block.cross_attn_image_to_token)

    def norm3_of_mlp(self, queries: Tensor) -> Tensor:
        normalised: Tensor = self.norm3(queries + self._mlp(queries))
        return normalised


class _Attention:
    """One Attention, with its query, key and value weights by head: (H, c, C)."""

    def __init__(self, attention: Any) -> None:
        self.heads: int = attention.num_heads
        self._scale = 1 / math.sqrt(attention.internal_dim // self.heads)
        self._q, self._q_bias = self._by_head(attention.q_proj)
        self._k, self._k_bias = self._by_head(attention.k_proj)
        self._v, self._v_bias = self._by_head(attention.v_proj)
        self._out: Tensor = attention.out_proj.weight.detach()
        self._out_bias: Tensor = attention.out_proj.bias.detach()

    def _by_head(self, linear: Any) -> tuple[Tensor, Tensor]:
        weight, bias = linear.weight.detach(), linear.bias.detach()
        return weight.view(self.heads, -1, weight.shape[1]), bias.view(self.heads, -1, 1)

    def project_keys(self, cells: Tensor) -> Tensor:
        return cells @ self._k.mT  # without the bias, which adds the same to all cells' scores

    def project_values(self, cells: Tensor) -> Tensor:
        return cells @ self._v.mT + self._v_bias.mT

    def project_queries(self, cells: Tensor) -> Tensor:
        return cells @ self._q.mT + self._q_bias.mT

    def attend_image(self, queries: Tensor, image: _ProjectedImage) -> Tensor:
        """(n, K, C): attention of queries (n, K, C) to the same image."""
        n, count, _ = queries.shape
        projected = self._scaled_queries(queries.flatten(0, 1))  # (H, n * K, c)
        weights = (projected @ image.keys.mT).softmax(-1)
        return self._project_output(weights @ image.values).view(n, count, -1)

    def attend_cells(self, queries: Tensor, cells: Tensor, positions: Tensor) -> Tensor:
        """(n, K, C): attention of queries (n, K, C) to each box's cells (n, P, C) with `positions` (P, C)."""
        n, count, _ = queries.shape
        folded = self._scaled_queries(queries.flatten(0, 1)) @ self._k  # (H, n * K, C)
        folded = folded.view(self.heads, n, count, -1).transpose(0, 1).flatten(1, 2)  # (n, H * K, C)
        attended = _scores(folded, cells, positions).softmax(-1) @ cells
        attended = attended.view(n, self.heads, count, -1).transpose(0, 1).flatten(1, 2)  # (H, n * K, C)
        return self._project_output(attended @ self._v.mT + self._v_bias.mT).view(n, count, -1)

    def weights_of_image(self, keys: Tensor, image: _ProjectedImage) -> Tensor:
        """(n, H * K, P): attention weights of the same image's cells on keys (n, K, C), by head."""
        n, count, _ = keys.shape
        scores = self._scaled_keys(keys.flatten(0, 1)) @ image.queries.mT  # (H, n * K, P)
        return scores.view(self.heads, n, count, -1).transpose(0, 1).softmax(2).flatten(1, 2)

    def weights_of_cells(self, keys: Tensor, cells: Tensor, positions: Tensor) -> Tensor:
        """(n, H * K, P): attention weights of each box's cells (n, P, C) on keys (n, K, C), by head."""
        n, count, _ = keys.shape
        projected = self._scaled_keys(keys.flatten(0, 1))  # (H, n * K, c)
        folded = (projected @ self._q).view(self.heads, n, count, -1).transpose(0, 1).flatten(1, 2)  # (n, H * K, C)
        constant = (projected @ self._q_bias).view(self.heads, n, count, 1).transpose(0, 1).flatten(1, 2)
        scores = _scores(folded, cells, positions).add_(constant)
        return scores.view(n, self.heads, count, -1).softmax(2).flatten(1, 2)

    def folded_values(self, queries: Tensor) -> Tensor:
        """(n, H * K, C): the values of the queries after the output projection and its bias."""
        n, count, _ = queries.shape
        values = queries.flatten(0, 1) @ self._v.mT + self._v_bias.mT  # (H, n * K, c)
        # The weights sum to one in each head, so each head adds a share of the bias.
        projected = values @ self._out_by_head() + self._out_bias / self.heads
        return projected.view(self.heads, n, count, -1).transpose(0, 1).flatten(1, 2)

    def _out_by_head(self) -> Tensor:
        return self._out.T.reshape(self.heads, -1, self._out.shape[0])

    def _scaled_queries(self, queries: Tensor) -> Tensor:
        return (queries @ self._q.mT + self._q_bias.mT) * self._scale

    def _scaled_keys(self, keys: Tensor) -> Tensor:
        return (keys @ self._k.mT + self._k_bias.mT) * self._scale

    def _project_output(self, heads: Tensor) -> Tensor:
        """(m, C): the output projection of (H, m, c)."""
        return F.linear(heads.transpose(0, 1).flatten(1), self._out, self._out_bias)
