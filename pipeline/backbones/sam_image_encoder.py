"""SAM's image encoder, computed so that little but the products themselves costs time.

It equals the official one (segment_anything/modeling/image_encoder.py) to float rounding. That one writes out the
scores of 4,096 places against 4,096, 0.8 GB in float32, reads them five times, and projects the padding of its windows
as if it were image. Here:

- Attention is one fused kernel. Its relative positions, a bias `q . R_h[y, y'] + q . R_w[x, x']`, become part of the
  product of queries and keys: the query is extended by its two rows of biases, the key by two one-hot vectors that pick
  its row and column.
- On a CPU that would treble the work of global attention. There it goes head by head over some rows of queries at a
  time, whose biases are written out into one small buffer that stays in the core's cache.
- Windows are cut after the projection to queries, keys and values and before the one back. What is padded would be
  projected from zeros: its keys and values are the projection's bias, which is what takes their place.

The residual stream stays in float32 whatever the products are computed in.
"""

# B images, g side of the grid (64), P = g * g places, C width, H heads, c width of a head, w side of a window (14)

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from regionspot.pipeline.backbones.dtypes import DTYPES

_QUERIES = 256  # of global attention at a time on a CPU: their biases are 4 MB, about a core's own cache
_MLP_ROWS = 1024  # places in an MLP at a time on a CPU: 12 MB of hidden values, where 4,096 would take fresh pages


class SamEncoder:
    """The image encoder of one SAM. `encoder` is segment_anything's ImageEncoderViT, on its device, in float32.

    compile   by torch.compile, which takes minutes when the first batch comes, and again for another batch size
    flex      global attention by PyTorch's flex_attention: no wider products, but slow unless compiled for a GPU
    """

    def __init__(self, encoder: Any, dtype: str, compile: bool = False, flex: bool = False) -> None:
        self._patch_embed, self._neck = encoder.patch_embed, encoder.neck
        self._positions: Tensor = encoder.pos_embed.detach()
        self._dtype = DTYPES[dtype]
        self._blocks = [_Block(block, encoder.pos_embed.shape[1], self._dtype, flex) for block in encoder.blocks]
        self._run = torch.compile(self._forward) if compile else self._forward

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """float32 (B, 256, g, g) of float32 (B, 3, pixels, pixels), normalised and padded."""
        return self._run(images)

    def _forward(self, images: Tensor) -> Tensor:
        with torch.autocast(images.device.type, self._dtype, enabled=self._dtype != torch.float32):
            x = self._patch_embed(images)
        x = (x.float() + self._positions).contiguous()  # the convolution leaves channels first in memory
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
        self._windows = math.ceil(grid / self._side)  # along one side; one of them when attention is global
        self._flex = flex and self._windows == 1
        self._bias_h = _relative(attention.rel_pos_h.detach(), self._side).to(dtype)
        self._bias_w = _relative(attention.rel_pos_w.detach(), self._side).to(dtype)
        places = torch.arange(self._side**2, device=self._bias_h.device)
        one_hot = torch.eye(self._side, dtype=dtype, device=self._bias_h.device)
        self._picks = torch.cat([one_hot[places // self._side], one_hot[places % self._side]], 1)  # (w * w, 2 w)

    def __call__(self, x: Tensor) -> Tensor:
        x += self._attention(self._norm1(x))
        rows = x.view(-1, x.shape[3])
        for some in torch.split(rows, _MLP_ROWS if x.device.type == "cpu" else len(rows)):
            some += self._down(F.gelu(self._up(self._norm2(some))))
        return x

    def _attention(self, x: Tensor) -> Tensor:
        images, grid, _, _ = x.shape
        qkv = self._cut(self._qkv(x))  # (n windows of all images, w * w, 3 C)
        split = qkv.view(*qkv.shape[:2], 3, self._heads, -1).permute(2, 0, 3, 1, 4)  # (3, n, H, w * w, c)
        seen = self._kernel(x.device)(*(each.contiguous() for each in split))
        return self._out(self._joined(seen.transpose(1, 2).flatten(2), images, grid)).view_as(x)

    def _kernel(self, device: torch.device) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        if self._flex:
            return self._attend_flexibly
        return self._attend_by_rows if device.type == "cpu" and self._windows == 1 else self._attend

    def _cut(self, qkv: Tensor) -> Tensor:
        images, grid, _, width = qkv.shape
        if self._windows == 1 and grid == self._side:
            return qkv.view(images, grid * grid, width)
        padded = self._windows * self._side
        if padded != grid:
            whole = self._qkv.bias.to(qkv.dtype).expand(images, padded, padded, width).contiguous()
            whole[:, :grid, :grid] = qkv
            qkv = whole
        cut = qkv.view(images, self._windows, self._side, self._windows, self._side, width)
        return cut.transpose(2, 3).reshape(-1, self._side**2, width)

    def _joined(self, windows: Tensor, images: int, grid: int) -> Tensor:
        if self._windows == 1 and grid == self._side:
            return windows
        cut = windows.view(images, self._windows, self._windows, self._side, self._side, -1)
        return cut.transpose(2, 3).reshape(images, *[self._windows * self._side] * 2, -1)[:, :grid, :grid]

    def _attend(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """(n, H, w * w, c): softmax attention with relative positions, all in one kernel."""
        extended = torch.cat([queries * self._scale, *(bias.flatten(2, 3) for bias in self._biases(queries))], 3)
        picked = torch.cat([keys, self._picks.expand(*keys.shape[:2], -1, -1)], 3)
        # The kernel wants values as wide as keys; what the zeros give is cut off again.
        padded = F.pad(values, (0, picked.shape[3] - values.shape[3]))
        return F.scaled_dot_product_attention(extended, picked, padded, scale=1.0)[..., : values.shape[3]]

    def _attend_flexibly(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """The same by a kernel that is compiled with the biases in it, which it adds to each score on the way."""
        from torch.nn.attention.flex_attention import flex_attention  # brings the compiler with it

        side = self._side
        of_rows, of_columns = (each.flatten(2, 3) for each in self._biases(queries))

        def biased(score: Tensor, image: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return score + of_rows[image, head, query, key // side] + of_columns[image, head, query, key % side]

        seen: Tensor = flex_attention(queries, keys, values, score_mod=biased, scale=self._scale)
        return seen

    def _attend_by_rows(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """The same for one head and some rows of queries at a time."""
        side, seen = self._side, torch.empty_like(queries)
        rows = min(max(1, _QUERIES // side), side)
        bias = torch.empty(rows, side, side, side, dtype=queries.dtype)
        of_rows, of_columns = (each.flatten(0, 1) for each in self._biases(queries))
        heads = (each.flatten(0, 1) for each in (queries, keys, values, seen))
        for head, (q, k, v, out) in enumerate(zip(*heads, strict=True)):
            for first in range(0, side, rows):
                grid = slice(first, min(first + rows, side))
                some, here = slice(grid.start * side, grid.stop * side), bias[: grid.stop - first]
                torch.add(of_rows[head, grid, :, :, None], of_columns[head, grid, :, None, :], out=here)
                out[some] = F.scaled_dot_product_attention(
                    q[None, some], k[None], v[None], here.flatten(2).flatten(0, 1)[None]
                )[0]
        return seen

    def _biases(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """(n, H, w, w, w) twice: the bias of each query, at its row and column, towards every row and every column."""
        grid = queries.view(*queries.shape[:2], self._side, self._side, -1)  # unscaled, as the official encoder has it
        rows = torch.einsum("nhyxc,ykc->nhyxk", grid, self._bias_h)
        return rows, torch.einsum("nhyxc,xkc->nhyxk", grid, self._bias_w)


class _Linear:
    """A linear layer whose weights are held in the dtype that it computes in."""

    def __init__(self, linear: Any, dtype: torch.dtype) -> None:
        self.weight, self.bias = linear.weight.detach().to(dtype), linear.bias.detach().to(dtype)

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x.to(self.weight.dtype), self.weight, self.bias)


def _relative(table: Tensor, side: int) -> Tensor:
    """(w, w, c): the embedding of each distance, from query `i` to key `k`, out of the (2 w - 1, c) table.

    Tables of another length, of a model that was trained on a smaller grid, are interpolated as get_rel_pos does.
    """
    if len(table) != 2 * side - 1:
        table = F.interpolate(table.T[None], size=2 * side - 1, mode="linear")[0].T
    places = torch.arange(side, device=table.device)
    return table[places[:, None] - places[None] + side - 1]
