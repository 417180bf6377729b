"""Heads without attention, on a region's token and the feature map under its box.

What they lack against the fusion head: a region sees neither the other regions nor the map outside its box.

B images, R regions (padded), C location token, T feature map tokens, D width, E text embedding, G cells on a side
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from regionspot.fusion.heads.pooling import pool_boxes


class LinearHead(nn.Module):
    """A linear map of the token and the mean of the map in the box, each normalised."""

    def __init__(self, token_dim: int, width: int, text_dim: int) -> None:
        super().__init__()
        self.token_norm, self.map_norm = nn.LayerNorm(token_dim), nn.LayerNorm(width)
        self.projector: nn.Module = nn.Linear(token_dim + width, text_dim)

    def forward(self, tokens: Tensor, region_mask: Tensor | None, feature_map: Tensor, boxes: Tensor) -> Tensor:
        """Vectors (B, R, E); the arguments are those of every head (fusion/heads/__init__.py)."""
        dtype = self.token_norm.weight.dtype
        pooled = pool_boxes(feature_map.to(dtype), boxes).squeeze(2)
        inputs = torch.cat([self.token_norm(tokens.to(dtype)), self.map_norm(pooled.to(dtype))], dim=-1)
        vectors: Tensor = self.projector(inputs)
        return vectors


class MlpHead(LinearHead):
    """The same inputs, with one hidden layer."""

    def __init__(self, token_dim: int, width: int, text_dim: int, hidden: int = 1024, dropout: float = 0.1) -> None:
        super().__init__(token_dim, width, text_dim)
        self.projector = nn.Sequential(
            nn.Linear(token_dim + width, hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, text_dim)
        )


class RoiPoolHead(nn.Module):
    """The map in each cell of a grid in the box, together with the token: a hidden layer that knows where things are.

    The channels of the cells are reduced before they are joined; otherwise the first layer would be `grid`^2 as large.
    """

    def __init__(
        self,
        token_dim: int,
        width: int,
        text_dim: int,
        grid: int = 3,
        channels: int = 256,
        hidden: int = 1024,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.grid = grid
        self.token_norm, self.map_norm = nn.LayerNorm(token_dim), nn.LayerNorm(width)
        self.reduce = nn.Linear(width, channels)
        self.projector = nn.Sequential(
            nn.Linear(token_dim + grid * grid * channels, hidden),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, text_dim),
        )

    def forward(self, tokens: Tensor, region_mask: Tensor | None, feature_map: Tensor, boxes: Tensor) -> Tensor:
        """Vectors (B, R, E); the arguments are those of every head (fusion/heads/__init__.py)."""
        dtype = self.token_norm.weight.dtype
        # Every patch is reduced once, and pooled then: boxes overlap, and a mean commutes with a linear map.
        cells = pool_boxes(self.reduce(self.map_norm(feature_map.to(dtype))), boxes, self.grid).flatten(2)
        vectors: Tensor = self.projector(torch.cat([self.token_norm(tokens.to(dtype)), cells.to(dtype)], dim=-1))
        return vectors
