"""The fusion head, guided by the boxes: its cross-attention looks at the region it names.

The fusion head has to learn from location tokens where a region is. Boxes are known anyway, and these options use them;
docs/heads.md has the reason, source and effect of each:

    box_bias         the logits of the cross-attention fall with the part of a patch that lies outside the box, by a
                     learnt strength for each attention head and layer, so that some heads may look around
    pooled_residual  the mean of the map in the box takes a path to the output, past the decoder: a linear map that is
                     trained, or with "clip" CLIP's own layer norm and projection, frozen; the last layer after the
                     decoder starts at zero then, so that training starts at zero-shot CLIP
    region_attention off by default: without self-attention, the name of a region does not depend on which other boxes
                     the caller asked about
    positions        sine positions: of boxes in the queries of the cross-attention, of patches in its keys, never in
                     its values

With all but the third off, this is the fusion head.

B images, R regions (padded), C location token, T feature map tokens, D width, E text embedding, H attention heads
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regionspot.fusion.head import padding
from regionspot.fusion.heads.pooling import map_side, patch_shares, pool_boxes

STRENGTH = 6.0  # at the start: a patch outside the box has exp(-6) of the weight of one inside


class GuidedHead(nn.Module):
    """Cross-attention of location tokens to the feature map, with a bias by the boxes."""

    def __init__(
        self,
        token_dim: int,
        width: int,
        text_dim: int,
        layers: int = 3,
        heads: int = 8,
        ffn: int = 2048,
        dropout: float = 0.1,
        box_bias: bool = True,
        pooled_residual: bool | Literal["clip"] = True,
        region_attention: bool = False,
        positions: bool = False,
    ) -> None:
        super().__init__()
        if pooled_residual not in (True, False, "clip"):
            raise ValueError(f"pooled_residual is {pooled_residual!r}, expected true, false or clip")
        if positions and width % 8:
            raise ValueError(f"positions need a width that is a multiple of 8, not {width}")
        self.to_clip = nn.Linear(token_dim, width)
        self.layers = nn.ModuleList(
            GuidedLayer(width, heads, ffn, dropout, box_bias, region_attention) for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        self.projector = nn.Linear(width, text_dim)
        self.positions = positions
        self.residual: nn.Module | None = None
        if pooled_residual == "clip":
            self.residual = ClipProjection(width, text_dim)
            for parameter in self.projector.parameters():
                nn.init.zeros_(parameter)
        elif pooled_residual:
            self.residual = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, text_dim))

    def forward(self, tokens: Tensor, region_mask: Tensor | None, feature_map: Tensor, boxes: Tensor) -> Tensor:
        """Vectors (B, R, E); the arguments are those of every head (fusion/heads/__init__.py)."""
        dtype = self.to_clip.weight.dtype
        keys = feature_map = feature_map.to(dtype)
        side, of_boxes = map_side(feature_map), None
        if self.positions:
            width = feature_map.shape[-1]
            # The class token, which is first, has no place in the image.
            of_patches = F.pad(sine_positions(patch_boxes(side, boxes.device), width), (0, 0, 1, 0))
            keys, of_boxes = feature_map + of_patches.to(dtype), sine_positions(boxes, width).to(dtype)
        outside = 1 - patch_shares(boxes, side).to(dtype)
        regions = self.to_clip(tokens.to(dtype))
        for layer in self.layers:
            regions = layer(regions, padding(region_mask), keys, feature_map, outside, of_boxes)
        vectors: Tensor = self.projector(self.norm(regions))
        if self.residual is not None:
            vectors = vectors + self.residual(pool_boxes(feature_map, boxes).squeeze(2))
        return vectors


class GuidedLayer(nn.Module):
    """A post-norm decoder layer (Vaswani et al. 2017) whose attention to the map is biased by the boxes."""

    def __init__(
        self, width: int, heads: int, ffn: int, dropout: float, box_bias: bool, region_attention: bool
    ) -> None:
        super().__init__()
        self.strength = nn.Parameter(torch.full((heads,), STRENGTH)) if box_bias else None
        self.region_attention = None
        if region_attention:
            self.region_attention = nn.MultiheadAttention(width, heads, dropout, batch_first=True)
            self.region_norm = nn.LayerNorm(width)
        self.map_attention = nn.MultiheadAttention(width, heads, dropout, batch_first=True)
        self.map_norm, self.norm, self.dropout = nn.LayerNorm(width), nn.LayerNorm(width), nn.Dropout(dropout)
        self.ffn = nn.Sequential(
            nn.Linear(width, ffn), nn.ReLU(), nn.Dropout(dropout), nn.Linear(ffn, width), nn.Dropout(dropout)
        )

    def forward(
        self,
        regions: Tensor,
        padded: Tensor | None,
        keys: Tensor,
        feature_map: Tensor,
        outside: Tensor,
        positions: Tensor | None,
    ) -> Tensor:
        """Regions (B, R, D) from regions and their positions (B, R, D), padded (B, R), keys and map (B, T, D), outside
        (B, R, T - 1)."""
        if self.region_attention is not None:
            attended = self.region_attention(regions, regions, regions, key_padding_mask=padded, need_weights=False)[0]
            regions = self.region_norm(regions + self.dropout(attended))
        bias = None
        if self.strength is not None:
            by_head = self.strength[:, None, None] * -F.pad(outside, (1, 0))[:, None]  # the class token has none
            bias = by_head.flatten(0, 1)  # (B * H, R, T)
        queries = regions if positions is None else regions + positions
        attended = self.map_attention(queries, keys, feature_map, attn_mask=bias, need_weights=False)[0]
        regions = self.map_norm(regions + self.dropout(attended))
        hidden: Tensor = self.norm(regions + self.ffn(regions))
        return hidden


class ClipProjection(nn.Module):
    """The encoder's own way from its map into the text space: layer norm and projection, of length 1 at the end.

    Not trained, but saved with the head. The affine part of the layer norm is part of `weight` (E, D) and `bias` (E,),
    which `train` sets (fusion/training/train.py).
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, width: int, text_dim: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.zeros(text_dim, width))
        self.register_buffer("bias", torch.zeros(text_dim))

    def forward(self, pooled: Tensor) -> Tensor:
        """(..., E) from map features (..., D)."""
        return F.normalize(F.linear(F.layer_norm(pooled, pooled.shape[-1:]), self.weight, self.bias), dim=-1)


def sine_positions(boxes: Tensor, width: int) -> Tensor:
    """float32 (..., width) of relative boxes (..., 4): sine and cosine of each edge at width / 8 frequencies, from half
    a period over the image to 16 periods."""
    frequencies = torch.pi * torch.logspace(0, 5, width // 8, base=2, device=boxes.device)
    phases = (boxes.float()[..., None] * frequencies).flatten(-2)
    return torch.cat([phases.sin(), phases.cos()], dim=-1)


def patch_boxes(side: int, device: torch.device) -> Tensor:
    """float32 (S * S, 4): the relative box of each patch, in row-major order."""
    edges = torch.arange(side + 1, device=device) / side
    y, x = torch.meshgrid(torch.arange(side, device=device), torch.arange(side, device=device), indexing="ij")
    return torch.stack([edges[x], edges[y], edges[x + 1], edges[y + 1]], dim=-1).flatten(0, 1)
