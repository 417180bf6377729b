"""The fusion head: the location token of a region attends to the feature map of its image.

The only trained part of RegionSpot. Submodules have the authors' names, so state dicts are interchangeable in both
directions; `nn.TransformerDecoder` with post-norm layers gives exactly these names and numbers.

Legend: B images, R regions (padded), C location token, T feature map tokens, D width, E text embedding, V classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from regionspot.cache.errors import InputError

LOGIT_SCALE = 100.0  # exp of CLIP's trained logit_scale, which is at its maximum in all of OpenAI's models


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """Shapes of a head. The frozen backbones determine the first three; the others are free.

    Raises InputError if `width` is not a multiple of `heads`.
    """

    token_dim: int = 256  # width of SAM's mask decoder (segment_anything/build_sam.py)
    width: int  # of the feature map, before CLIP's projection
    text_dim: int
    layers: int = 3
    heads: int = 8
    ffn: int = 2048
    dropout: float = 0.1

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise InputError(f"head: width {self.width} of the feature map is not a multiple of its {self.heads} heads")


# CLIP ViT-B/16 is 768 wide and ViT-L/14 1024, with text embeddings of 512 and 768 (Radford et al. 2021, table 20).
HEADS = {
    "bb": HeadConfig(width=768, text_dim=512),
    "bl": HeadConfig(width=1024, text_dim=768),
    "bl336": HeadConfig(width=1024, text_dim=768),
    # The toy backbones: 24 channels per attention head.
    "toy": HeadConfig(token_dim=128, width=192, text_dim=128, layers=2, ffn=512),
}


class FusionHead(nn.Module):
    """Maps location tokens and a feature map to one vector per region in the text encoder's embedding space."""

    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        self.config = config
        layer = nn.TransformerDecoderLayer(config.width, config.heads, config.ffn, config.dropout, batch_first=True)
        self.to_clip = nn.Linear(config.token_dim, config.width)
        self.decoder = nn.TransformerDecoder(layer, config.layers, norm=nn.LayerNorm(config.width))
        self.projector = nn.Linear(config.width, config.text_dim)

    def forward(
        self, tokens: Tensor, region_mask: Tensor | None, feature_map: Tensor, boxes: Tensor | None = None
    ) -> Tensor:
        """Semantic vectors (B, R, E), not normalised.

        tokens       (B, R, C)  location tokens, any float dtype
        region_mask  (B, R)     bool, False for padding; None: no padding. The vectors of padding are meaningless, but
                                finite
        feature_map  (B, T, D)  any float dtype
        boxes        not used: a token knows its box
        """
        dtype = self.to_clip.weight.dtype
        queries = self.to_clip(tokens.to(dtype))
        decoded = self.decoder(queries, feature_map.to(dtype), tgt_key_padding_mask=padding(region_mask))
        semantic: Tensor = self.projector(decoded)
        return semantic


def similarity_logits(semantic: Tensor, text: Tensor, scale: float = LOGIT_SCALE) -> Tensor:
    """Scaled cosine similarity (..., V) of regions (..., E) and L2-normalised class embeddings (V, E), in float32.

    Autocast is disabled: the resolution of bfloat16 near 100 is 0.5, too coarse to distinguish two classes.
    """
    with torch.autocast(semantic.device.type, enabled=False):
        semantic = semantic.float()
        # The authors' guard against division by zero; it affects the numbers.
        unit = semantic / (semantic.norm(dim=-1, keepdim=True) + 1e-7)
        logits: Tensor = scale * unit @ text.float().T
    return logits


def padding(region_mask: Tensor | None) -> Tensor | None:
    """True where attention is masked out. An image without regions attends to its padding: a softmax over no elements
    is NaN in some attention kernels, and multiplying by a weight of zero does not remove NaN."""
    if region_mask is None:
        return None
    return ~region_mask & region_mask.any(dim=1, keepdim=True)
