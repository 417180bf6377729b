"""A faster SAM image encoder.

It equals the official one (segment_anything/modeling/image_encoder.py) to float rounding. The official one stores the
attention scores of 4,096 x 4,096 positions, 0.8 GB in float32, reads them five times, and projects the padding of its
windows. Here:

- Attention is one fused kernel. The relative position bias `q . R_h[y, y'] + q . R_w[x, x']` becomes part of the
  product of queries and keys: a query is extended by its biases for all rows and columns, a key by two one-hot vectors
  that select its row and column.
- On a CPU that would triple the work of global attention. There it is computed head by head for a few rows of queries,
  whose biases fit into a small buffer in the core's cache.
- Only the projected queries, keys and values are split into windows. Padding is zero before the projection, so padded
  keys and values equal the projection's bias.

The residual stream is float32 for every dtype.
"""

# B images, g side of the grid (64), C width, H heads, c width of a head, w side of a window (14), n windows in all

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from regionspot.pipeline.backbones.dtypes import DTYPES

_QUERIES = 256  # of global attention at a time on a CPU: their biases are 4 MB, about the size of a core's cache
_MLP_ROWS = 1024  # positions in an MLP at a time on a CPU: 12 MB of hidden values; 4,096 would need new memory pages


class SamEncoder:
    """The image encoder of one SAM. `encoder` is segment_anything's ImageEncoderViT, on its device, in float32.

    compile   use torch.compile, which takes minutes at the first batch of each batch size
    flex      use PyTorch's flex_attention for global attention: smaller products, but slow unless compiled for a GPU
    """

    def __init__(self, encoder: Any, dtype: str, compile: bool = False, flex: bool = False) -> None:
        self._patch_embed, self._neck = encoder.patch_embed, encoder.neck
        self._positions: Tensor = encoder.pos_embed.detach()
        self._dtype = DTYPES[dtype]
        self._blocks = [_Block(block, encoder.pos_embed.shape[1], self._dtype, flex) for block in encoder.blocks]
        self._run = torch.compile(self._forward) if compile else self._forward

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """float32 (B, 3, pixels, pixels), normalised and padded, to float32 (B, 256, g, g)."""
        return self._run(images)

    def _forward(self, images: Tensor) -> Tensor:
        with torch.autocast(images.device.type, self._dtype, enabled=self._dtype != torch.float32):
            x = self._patch_embed(images)
        x = (x.float() + self._positions).contiguous()  # the convolution's output has channels first in memory
        for block in self._blocks:
            x = block(x)
        with torch.autocast(images.device.type, self._dtype, enabled=self._dtype != torch.float32):
            embedding: Tensor = self._neck(x.permute(0, 3, 1, 2))
        return embedding.float()


class _Block:
    """One transformer block, over windows or over the whole image."""

    def __init__(self, block: Any, grid: int, dtype: torch.dtype, flex: bool) -> None:
        attention = block.attn
        self._norm1, self._norm2 = block.norm1, block.norm2
        self._qkv, self._out = _Linear(attention.qkv, dtype), _Linear(attention.proj, dtype)
        self._up, self._down = _Linear(block.mlp.lin1, dtype), _Linear(block.mlp.lin2, dtype)
        self._heads: int = attention.num_heads
        self._scale: float = attention.scale
        self._side: int = block.window_size or grid
        self._windows = math.ceil(grid / self._side)  # along one side; 1 for global attention
        self._flex = flex and self._windows == 1
        self._bias_h = _relative(attention.rel_pos_h.detach(), self._side).to(dtype)
        self._bias_w = _relative(attention.rel_pos_w.detach(), self._side).to(dtype)
        positions = torch.arange(self._side**2, device=self._bias_h.device)
        one_hot = torch.eye(self._side, dtype=dtype, device=self._bias_h.device)
        self._selectors = torch.cat([one_hot[positions // self._side], one_hot[positions % self._side]], 1)  # (w*w, 2w)

    def __call__(self, x: Tensor) -> Tensor:
        x += self._attention(self._norm1(x))
        rows = x.view(-1, x.shape[3])
        for chunk in torch.split(rows, _MLP_ROWS if x.device.type == "cpu" else len(rows)):
            chunk += self._down(F.gelu(self._up(self._norm2(chunk))))
        return x

    def _attention(self, x: Tensor) -> Tensor:
        images, grid, _, _ = x.shape
        qkv = self._split_windows(self._qkv(x))  # (n, w * w, 3 C)
        q, k, v = qkv.view(*qkv.shape[:2], 3, self._heads, -1).permute(2, 0, 3, 1, 4)  # (n, H, w * w, c) each
        attended = self._kernel(x.device)(q.contiguous(), k.contiguous(), v.contiguous())
        return self._out(self._join_windows(attended.transpose(1, 2).flatten(2), images, grid)).view_as(x)

    def _kernel(self, device: torch.device) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        if self._flex:
            return self._attend_flex
        return self._attend_by_rows if device.type == "cpu" and self._windows == 1 else self._attend

    def _split_windows(self, qkv: Tensor) -> Tensor:
        images, grid, _, width = qkv.shape
        if self._windows == 1 and grid == self._side:
            return qkv.view(images, grid * grid, width)
        padded_side = self._windows * self._side
        if padded_side != grid:
            padded = self._qkv.bias.to(qkv.dtype).expand(images, padded_side, padded_side, width).contiguous()
            padded[:, :grid, :grid] = qkv
            qkv = padded
        windows = qkv.view(images, self._windows, self._side, self._windows, self._side, width)
        return windows.transpose(2, 3).reshape(-1, self._side**2, width)

    def _join_windows(self, windows: Tensor, images: int, grid: int) -> Tensor:
        if self._windows == 1 and grid == self._side:
            return windows
        windows = windows.view(images, self._windows, self._windows, self._side, self._side, -1)
        return windows.transpose(2, 3).reshape(images, *[self._windows * self._side] * 2, -1)[:, :grid, :grid]

    def _attend(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """(n, H, w * w, c): softmax attention with relative positions, in one kernel."""
        queries = torch.cat([queries * self._scale, *(bias.flatten(2, 3) for bias in self._biases(queries))], 3)
        keys = torch.cat([keys, self._selectors.expand(*keys.shape[:2], -1, -1)], 3)
        # The kernel requires values as wide as keys.
        padded = F.pad(values, (0, keys.shape[3] - values.shape[3]))
        return F.scaled_dot_product_attention(queries, keys, padded, scale=1.0)[..., : values.shape[3]]

    def _attend_flex(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Like `_attend`, by a compiled kernel that adds the biases to each score."""
        from torch.nn.attention.flex_attention import flex_attention  # imports the compiler

        side = self._side
        row_bias, column_bias = (bias.flatten(2, 3) for bias in self._biases(queries))

        def add_bias(score: Tensor, image: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return score + row_bias[image, head, query, key // side] + column_bias[image, head, query, key % side]

        attended: Tensor = flex_attention(queries, keys, values, score_mod=add_bias, scale=self._scale)
        return attended

    def _attend_by_rows(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Like `_attend`, for one head and a few rows of queries at a time."""
        side, attended = self._side, torch.empty_like(queries)
        rows = min(max(1, _QUERIES // side), side)
        buffer = torch.empty(rows, side, side, side, dtype=queries.dtype)
        row_bias, column_bias = (bias.flatten(0, 1) for bias in self._biases(queries))
        heads = (tensor.flatten(0, 1) for tensor in (queries, keys, values, attended))
        for head, (q, k, v, out) in enumerate(zip(*heads, strict=True)):
            for first in range(0, side, rows):
                grid = slice(first, min(first + rows, side))
                chunk, bias = slice(grid.start * side, grid.stop * side), buffer[: grid.stop - first]
                torch.add(row_bias[head, grid, :, :, None], column_bias[head, grid, :, None, :], out=bias)
                out[chunk] = F.scaled_dot_product_attention(
                    q[None, chunk], k[None], v[None], bias.flatten(2).flatten(0, 1)[None]
                )[0]
        return attended

    def _biases(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """(n, H, w, w, w) twice: the biases of each query, at its row and column, for all rows and for all columns."""
        grid = queries.view(*queries.shape[:2], self._side, self._side, -1)  # unscaled, as in the official encoder
        rows = torch.einsum("nhyxc,ykc->nhyxk", grid, self._bias_h)
        return rows, torch.einsum("nhyxc,xkc->nhyxk", grid, self._bias_w)


class _Linear:
    """A linear layer with its weights in the compute dtype."""

    def __init__(self, linear: Any, dtype: torch.dtype) -> None:
        self.weight, self.bias = linear.weight.detach().to(dtype), linear.bias.detach().to(dtype)

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x.to(self.weight.dtype), self.weight, self.bias)


def _relative(table: Tensor, side: int) -> Tensor:
    """(w, w, c): the embedding of the distance from query `i` to key `k`, from the table (2 w - 1, c).

    A table of another length, from training on another grid, is interpolated as in get_rel_pos.
    """
    if len(table) != 2 * side - 1:
        table = F.interpolate(table.T[None], size=2 * side - 1, mode="linear")[0].T
    positions = torch.arange(side, device=table.device)
    return table[positions[:, None] - positions[None] + side - 1]
