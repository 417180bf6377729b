"""The fusion head, guided by the boxes: its cross-attention looks at the region it names.

The fusion head has to learn from location tokens where a region is. Boxes are known anyway, and three changes use them.
docs/heads.md has their sources and what each gains:

    box_bias         the logits of the cross-attention fall with the part of a patch that lies outside the box, by a
                     learnt strength for each attention head and layer, so that some heads may look around
    pooled_residual  the mean of the map in the box takes a linear path to the output, past the decoder
    region_attention off by default: without self-attention between regions, the name of a region does not depend on
                     which other boxes the caller asked about

With the first two off and the third on, this is the fusion head.

B images, R regions (padded), C location token, T feature map tokens, D width, E text embedding, H attention heads
"""

from __future__ import annotations

import torch
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
        pooled_residual: bool = True,
        region_attention: bool = False,
    ) -> None:
        super().__init__()
        self.to_clip = nn.Linear(token_dim, width)
        self.layers = nn.ModuleList(
            GuidedLayer(width, heads, ffn, dropout, box_bias, region_attention) for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        self.projector = nn.Linear(width, text_dim)
        self.residual = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, text_dim)) if pooled_residual else None

    def forward(self, tokens: Tensor, region_mask: Tensor | None, feature_map: Tensor, boxes: Tensor) -> Tensor:
        """Vectors (B, R, E); the arguments are those of every head (fusion/heads/__init__.py)."""
        dtype = self.to_clip.weight.dtype
        feature_map = feature_map.to(dtype)
        outside = 1 - patch_shares(boxes, map_side(feature_map)).to(dtype)
        regions = self.to_clip(tokens.to(dtype))
        for layer in self.layers:
            regions = layer(regions, padding(region_mask), feature_map, outside)
        vectors: Tensor = self.projector(self.norm(regions))
        if self.residual is not None:
            vectors = vectors + self.residual(pool_boxes(feature_map, boxes).squeeze(2))
        return vectors


class GuidedLayer(nn.Module):
    """A post-norm decoder layer (Vaswani et al. 2017) whose attention to the map is biased by the boxes.

    A bias that is the logarithm of a spatial prior: Gao et al. 2021, "Fast Convergence of DETR with Spatially Modulated
    Co-Attention"; here the prior is the box itself.
    """

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

    def forward(self, regions: Tensor, padded: Tensor | None, feature_map: Tensor, outside: Tensor) -> Tensor:
        """Regions (B, R, D) from regions (B, R, D), padded (B, R), map (B, T, D) and outside (B, R, T - 1)."""
        if self.region_attention is not None:
            attended = self.region_attention(regions, regions, regions, key_padding_mask=padded, need_weights=False)[0]
            regions = self.region_norm(regions + self.dropout(attended))
        bias = None
        if self.strength is not None:
            # The class token, which is first, has no place in the image.
            by_head = self.strength[:, None, None] * -nn.functional.pad(outside, (1, 0))[:, None]
            bias = by_head.flatten(0, 1)  # (B * H, R, T)
        attended = self.map_attention(regions, feature_map, feature_map, attn_mask=bias, need_weights=False)[0]
        regions = self.map_norm(regions + self.dropout(attended))
        hidden: Tensor = self.norm(regions + self.ffn(regions))
        return hidden
