"""SAM's mask decoder, as far as a location token needs it, for the boxes of many images at once.

It equals the official transformer (segment_anything/modeling/transformer.py) to float rounding and does a fraction of
its work, by algebra alone:

- The first layer sees the same image whatever the box, so what it makes of the image is made once an image.
- Later layers see an image of each box's own. There, attention is taken in the width of the image's cells: a query
  `q` meets keys `W x + b` as `(W^T q) . x`, for `q . b` is the same everywhere and cancels in the softmax; values
  `W x + b` are projected after the weighted sum, for the weights sum to one. No cell is ever projected.
- Where the image attends to the 7 queries, their values go through the output projection, not the 4,096 cells.
- The last attention is taken for the wanted queries only.

Boxes never see each other, so those of several images stand in one batch without padding.
"""

# n boxes of a chunk, K queries of a box (7: IoU, four masks, two corners), P cells (g * g), C width (256), H heads (8)

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

IOU_TOKEN = 0  # place of each query: the IoU token first, then the four mask tokens (MaskDecoder.predict_masks)
FIRST_MASK_TOKEN = 1
MASK_TOKENS = 4
QUERIES = 1 + MASK_TOKENS + 2  # the two corners of a box come last
TOKEN_SLOT = 0  # the single-mask output of the mask decoder's four; the paper's choice
EVERY_QUERY = [IOU_TOKEN, *range(FIRST_MASK_TOKEN, FIRST_MASK_TOKEN + MASK_TOKENS)]

# What a chunk of boxes may take; one of SAM ViT-B carries 15 MB of cells and scores. On a CPU 16 together are a tenth
# faster than 4 and more gain nothing, as long as their memory is not new each time (allocator.py).
CHUNK_BYTES = {"cpu": 256_000_000, "cuda": 2_000_000_000}
FREE_SHARE = 0.1  # of a GPU's free memory at most: the next batch of images is under way beside it


@dataclass(frozen=True)
class DecodedBoxes:
    """What the decoder made of a run of boxes.

    boxes    their positions among all the boxes of the call
    queries  float32 (n, wanted, C)
    cells    float32 (n, P, C): the image as each box left it, which masks are made from
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
        self, embeddings: Tensor, boxes: Tensor, image: Sequence[int], wanted: Sequence[int], chunk: int | None = None
    ) -> Iterator[DecodedBoxes]:
        """The wanted queries of every box, in order, `chunk` boxes at a time; by default as many as memory bears.

        embeddings  float32 (B, C, g, g)  of the image encoder
        boxes       float32 (n, 4)        XYXY in pixels of the encoder's input
        image     n numbers, rising     which embedding a box belongs to
        wanted      positions of queries: IOU_TOKEN, FIRST_MASK_TOKEN + 0..3
        """
        chunk = chunk or self._boxes_at_a_time(boxes.device)
        shared: dict[int, _Shared] = {}
        for start in range(0, len(boxes), chunk):
            some = slice(start, min(start + chunk, len(boxes)))
            here = list(image[some])
            shared = {p: shared.get(p) or self._share(embeddings[p]) for p in dict.fromkeys(here)}
            yield DecodedBoxes(some, *self._chunk(boxes[some], [shared[p] for p in here], list(wanted)))

    def _boxes_at_a_time(self, device: torch.device) -> int:
        places, width = self._positions.shape
        # Three images of cells, and three sets of scores of the 7 queries in 8 heads, live at once.
        box = 4 * places * 3 * (width + self._last.heads * QUERIES)
        limit = CHUNK_BYTES.get(device.type, CHUNK_BYTES["cpu"])
        if device.type == "cuda":
            limit = min(limit, int(FREE_SHARE * free_bytes(device)))
        # A power of two: with a little more or less memory free, boxes are cut and so rounded alike.
        return 1 << max(1, limit // box).bit_length() - 1

    def _share(self, embedding: Tensor) -> _Shared:
        """What all boxes of an image have in common: its cells and the first layer's projections of them."""
        cells = embedding.flatten(1).T + self._no_mask
        placed = cells + self._positions
        first = self._first
        return _Shared(
            cells,
            keys=first.to_image.keys_of(placed),
            values=first.to_image.values_of(cells),
            queries=first.from_image.queries_of(placed),
        )

    def _chunk(self, boxes: Tensor, shared: Sequence[_Shared], wanted: list[int]) -> tuple[Tensor, Tensor]:
        corners, _ = self._prompts(points=None, boxes=boxes, masks=None)
        places = torch.cat([self._outputs.expand(len(boxes), -1, -1), corners], dim=1)  # the queries' own positions
        queries, cells = self._first_layer(places, _runs(shared))
        for layer in self._later:
            queries, cells = self._later_layer(layer, queries, cells, places)
        # Stacked one by one: a list as an index would be copied to the device, and the host wait for it.
        asked, queries = (torch.stack([each[:, w] for w in wanted], 1) for each in (queries + places, queries))
        attended = self._last.to_cells(asked, cells, self._positions)
        return self._norm(queries + attended), cells

    def _first_layer(self, places: Tensor, runs: Sequence[tuple[slice, _Shared]]) -> tuple[Tensor, Tensor]:
        layer = self._first
        queries = layer.norm1(layer.own(places, places, places))
        asked = queries + places
        seen = torch.cat([layer.to_image.to_shared(asked[boxes], one) for boxes, one in runs])
        queries = layer.norm3_of_mlp(layer.norm2(queries + seen))
        keys, values = queries + places, layer.from_image.folded_values(queries)
        cells = torch.empty(len(places), len(self._positions), self.width, device=places.device)
        for boxes, one in runs:
            weights = layer.from_image.weights_of_shared(keys[boxes], one)
            torch.baddbmm(one.cells.expand(len(weights), -1, -1), weights.mT, values[boxes], out=cells[boxes])
        return queries, layer.norm4(cells)

    def _later_layer(self, layer: _Layer, queries: Tensor, cells: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        asked = queries + places
        queries = layer.norm1(queries + layer.own(asked, asked, queries))
        queries = layer.norm2(queries + layer.to_image.to_cells(queries + places, cells, self._positions))
        queries = layer.norm3_of_mlp(queries)
        weights = layer.from_image.weights_of_cells(queries + places, cells, self._positions)
        cells.baddbmm_(weights.mT, layer.from_image.folded_values(queries))
        return queries, layer.norm4(cells)


class RegionTokens:
    """The token decoder of one SAM, and what of it is kept.

    name    of the feature set of location tokens
    sam     has `prompt_encoder` and `mask_decoder` as segment_anything's Sam has them
    tokens  one of models.TOKENS

    outputs  feature set to shape: the location token (C,); with "all" also `NAME_slots`, the four mask tokens one
             after another, (4 * C,), and `NAME_iou`, the IoU predicted of each of the four masks, (4,)

    Raises InputError for other `tokens`.
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

        embeddings  (B, C, g, g)  of the image encoder
        boxes       float32 (n, 4) each, in pixels of its input
        """
        queries = self._queries(embeddings, boxes, [FIRST_MASK_TOKEN + TOKEN_SLOT])
        return list(torch.split(queries[:, 0], [len(each) for each in boxes]))

    @torch.no_grad()
    def kept(self, embeddings: Tensor, boxes: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        """All that `outputs` names: of each image, float32 (n, *shape) by feature set."""
        if len(self.outputs) == 1:
            return [{self._name: tokens} for tokens in self.first(embeddings, boxes)]
        queries = self._queries(embeddings, boxes, EVERY_QUERY)
        slots = queries[:, FIRST_MASK_TOKEN:]
        found = (slots[:, TOKEN_SLOT], slots.flatten(1), self._iou_head(queries[:, IOU_TOKEN]))
        counts = [len(each) for each in boxes]
        images = zip(*(torch.split(values, counts) for values in found), strict=True)
        return [dict(zip(self.outputs, image, strict=True)) for image in images]

    def _queries(self, embeddings: Tensor, boxes: Sequence[Tensor], wanted: Sequence[int]) -> Tensor:
        """float32 (N, wanted, C). The boxes of all images go through the decoder together."""
        together = torch.cat(list(boxes))
        image = [row for row, each in enumerate(boxes) for _ in range(len(each))]
        decoded = self.decoder.decode(embeddings.to(together.device).float(), together, image, wanted)
        none = torch.zeros(0, len(wanted), self.width, device=together.device)
        return torch.cat([none, *(part.queries for part in decoded)])


def _met(asked: Tensor, cells: Tensor, positions: Tensor) -> Tensor:
    """(n, Q, P): (n, Q, C) by cells (n, P, C) plus positions (P, C), a sum that is never written out."""
    return (asked @ positions.mT).baddbmm_(asked, cells.mT)


@dataclass(frozen=True)
class _Shared:
    """Of one image: cells (P, C), and the first layer's keys, values and queries of them, (H, P, c) each."""

    cells: Tensor
    keys: Tensor
    values: Tensor
    queries: Tensor


def _runs(shared: Sequence[_Shared]) -> list[tuple[slice, _Shared]]:
    """Neighbouring boxes of the same image as slices."""
    starts = [at for at, one in enumerate(shared) if not at or one is not shared[at - 1]]
    return [(slice(a, b), shared[a]) for a, b in zip(starts, [*starts[1:], len(shared)], strict=True)]


class _Layer:
    """One TwoWayAttentionBlock, taken apart."""

    def __init__(self, block: Any) -> None:
        self.norm1, self.norm2, self.norm3, self.norm4 = block.norm1, block.norm2, block.norm3, block.norm4
        self.own, self._mlp = block.self_attn, block.mlp
        self.to_image = _Attention(block.cross_attn_token_to_image)
        self.from_image = _Attention(block.cross_attn_image_to_token)

    def norm3_of_mlp(self, queries: Tensor) -> Tensor:
        normed: Tensor = self.norm3(queries + self._mlp(queries))
        return normed


class _Attention:
    """The weights of one Attention by head: (H, c, C) of queries, keys and values, (H, C, c) of the output."""

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

    def keys_of(self, cells: Tensor) -> Tensor:
        return cells @ self._k.mT  # without the bias: it adds the same to all cells' scores

    def values_of(self, cells: Tensor) -> Tensor:
        return cells @ self._v.mT + self._v_bias.mT

    def queries_of(self, cells: Tensor) -> Tensor:
        return cells @ self._q.mT + self._q_bias.mT

    def to_shared(self, queries: Tensor, shared: _Shared) -> Tensor:
        """(n, K, C): queries (n, K, C) attending to an image that all of them share."""
        n, count, _ = queries.shape
        asked = self._scaled_queries(queries.flatten(0, 1))  # (H, n * K, c)
        weights = (asked @ shared.keys.mT).softmax(-1)
        return self._combined(weights @ shared.values).view(n, count, -1)

    def to_cells(self, queries: Tensor, cells: Tensor, positions: Tensor) -> Tensor:
        """(n, K, C): queries (n, K, C) attending to cells (n, P, C) of their own, which lie at `positions` (P, C)."""
        n, count, _ = queries.shape
        asked = self._scaled_queries(queries.flatten(0, 1)) @ self._k  # (H, n * K, C)
        asked = asked.view(self.heads, n, count, -1).transpose(0, 1).flatten(1, 2)  # (n, H * K, C)
        seen = _met(asked, cells, positions).softmax(-1) @ cells
        seen = seen.view(n, self.heads, count, -1).transpose(0, 1).flatten(1, 2)  # (H, n * K, C)
        return self._combined(seen @ self._v.mT + self._v_bias.mT).view(n, count, -1)

    def weights_of_shared(self, keys: Tensor, shared: _Shared) -> Tensor:
        """(n, H * K, P): how much every cell of a shared image takes from each key (n, K, C), by head."""
        n, count, _ = keys.shape
        met = self._scaled_keys(keys.flatten(0, 1)) @ shared.queries.mT  # (H, n * K, P)
        return met.view(self.heads, n, count, -1).transpose(0, 1).softmax(2).flatten(1, 2)

    def weights_of_cells(self, keys: Tensor, cells: Tensor, positions: Tensor) -> Tensor:
        """The same for cells (n, P, C) of each box's own."""
        n, count, _ = keys.shape
        split = self._scaled_keys(keys.flatten(0, 1))  # (H, n * K, c)
        folded = (split @ self._q).view(self.heads, n, count, -1).transpose(0, 1).flatten(1, 2)  # (n, H * K, C)
        constant = (split @ self._q_bias).view(self.heads, n, count, 1).transpose(0, 1).flatten(1, 2)
        met = _met(folded, cells, positions).add_(constant)
        return met.view(n, self.heads, count, -1).softmax(2).flatten(1, 2)

    def folded_values(self, queries: Tensor) -> Tensor:
        """(n, H * K, C): what a key gives to a cell that takes it whole, output projection and bias included."""
        n, count, _ = queries.shape
        values = queries.flatten(0, 1) @ self._v.mT + self._v_bias.mT  # (H, n * K, c)
        # Weights sum to one in each head, so the bias is given in shares.
        given = values @ self._out_by_head() + self._out_bias / self.heads
        return given.view(self.heads, n, count, -1).transpose(0, 1).flatten(1, 2)

    def _out_by_head(self) -> Tensor:
        return self._out.T.reshape(self.heads, -1, self._out.shape[0])

    def _scaled_queries(self, queries: Tensor) -> Tensor:
        return (queries @ self._q.mT + self._q_bias.mT) * self._scale

    def _scaled_keys(self, keys: Tensor) -> Tensor:
        return (keys @ self._k.mT + self._k_bias.mT) * self._scale

    def _combined(self, heads: Tensor) -> Tensor:
        """(m, C): the output projection of (H, m, c)."""
        return F.linear(heads.transpose(0, 1).flatten(1), self._out, self._out_bias)
