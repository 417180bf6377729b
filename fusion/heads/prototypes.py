"""Few-shot names without training: a region is compared with the mean of the examples of each class.

A class is the mean of its examples (prototypical networks, Snell et al. 2017). The vector of a region is the mean of
the text embeddings of the nearest classes, weighted by similarity (ConSE, Norouzi et al. 2014). So a name that the text
encoder does not know works like any other, and a class without examples is found by its name's likeness to others.

Only the map is used. Location tokens alone name 2 % of the toy world's regions, and add nothing to the map's 56 %.

B images, R regions (padded), T feature map tokens, D width, E text embedding, K classes with examples, N regions
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regionspot.fusion.heads.pooling import pool_boxes

# Few enough that the crowd of dissimilar classes in a large vocabulary has no weight.
NEAREST = 20


class PrototypeHead(nn.Module):
    """Has no parameters. `PrototypeSums` computes the buffers: `prototypes` (K, D) of length 1, `texts` (K, E).

    classes    K, set by fusion/training/fit.py
    sharpness  factor of the cosines before their softmax. On the toy world 5 is best; 20 is as accurate for classes
               with examples, but not for others
    """

    mean: Tensor
    deviation: Tensor
    prototypes: Tensor
    texts: Tensor
    sharpness: Tensor

    def __init__(self, token_dim: int, width: int, text_dim: int, classes: int = 0, sharpness: float = 5.0) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("deviation", torch.ones(width))
        self.register_buffer("prototypes", torch.zeros(classes, width))
        self.register_buffer("texts", torch.zeros(classes, text_dim))
        self.register_buffer("sharpness", torch.tensor(float(sharpness)))

    def forward(self, tokens: Tensor, region_mask: Tensor | None, feature_map: Tensor, boxes: Tensor) -> Tensor:
        """Vectors (B, R, E); the arguments are those of every head (fusion/heads/__init__.py)."""
        pooled = pool_boxes(feature_map.float(), boxes).squeeze(2)
        features = F.normalize((pooled - self.mean) / self.deviation, dim=-1)
        cosines, nearest = (features @ self.prototypes.T).topk(min(NEAREST, len(self.prototypes)), dim=-1)
        weights = (self.sharpness * cosines).softmax(dim=-1)
        return (weights[..., None, :] @ self.texts[nearest]).squeeze(-2)


class PrototypeSums:
    """Sums over the examples of V classes, in float64: one pass over a cache gives the prototypes."""

    def __init__(self, classes: int, width: int, device: torch.device) -> None:
        self.counts = torch.zeros(classes, dtype=torch.int64, device=device)
        self.sums = torch.zeros(classes, width, dtype=torch.float64, device=device)
        self.squares = torch.zeros(width, dtype=torch.float64, device=device)

    def add(self, feature_map: Tensor, boxes: Tensor, categories: Tensor) -> None:
        """Regions of a batch: boxes (B, R, 4) on maps (B, T, D), categories int (B, R), negative where unknown."""
        known = categories >= 0
        features, classes = pool_boxes(feature_map.float(), boxes).squeeze(2)[known].double(), categories[known].long()
        self.counts += torch.bincount(classes, minlength=len(self.counts))
        self.sums.index_add_(0, classes, features)
        self.squares += features.square().sum(dim=0)

    def fill(self, head: PrototypeHead, texts: Tensor) -> None:
        """Set the buffers of a head for the classes that have examples; texts (V, E)."""
        total, examples = self.counts.sum(), self.counts > 0
        mean = self.sums.sum(dim=0) / total
        # A channel may be constant, for example in a map of one colour.
        deviation = (self.squares / total - mean.square()).clamp(min=0).sqrt().clamp(min=1e-6)
        prototypes = (self.sums[examples] / self.counts[examples, None] - mean) / deviation
        head.mean.copy_(mean)
        head.deviation.copy_(deviation)
        head.prototypes.copy_(F.normalize(prototypes, dim=-1))
        head.texts.copy_(texts[examples])
