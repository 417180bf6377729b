"""The fusion head, trained with a second loss that draws its attention into the boxes.

At inference it is the fusion head: same weights, same names, so the authors' code loads its checkpoints. The loss of a
region is minus the logarithm of the share of its attention that lies in its box, mean over layers and attention heads;
that of a batch is the sum over images of the mean over regions, scaled like the focal loss (fusion/losses.py).
Attention supervised by boxes: Liu et al. 2017, "Attention Correctness in Neural Image Captioning".

B images, R regions (padded), T feature map tokens, H attention heads
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from regionspot.fusion.head import FusionHead, HeadConfig
from regionspot.fusion.heads.pooling import map_side, patch_shares

SMALLEST_SHARE = 1e-6  # limits the loss of attention that is nowhere in the box


class AttentionLossHead(FusionHead):
    """In training mode, it returns its vectors and the loss, multiplied by `attention_loss`."""

    def __init__(self, config: HeadConfig, attention_loss: float) -> None:
        super().__init__(config)
        if not attention_loss > 0:
            raise ValueError(f"attention_loss is {attention_loss}, expected more than 0")
        self.attention_loss = attention_loss
        self._attention: list[Tensor] = []  # of each layer, (B, H, R, T)
        for layer in self.decoder.layers:
            attention = layer.multihead_attn
            assert isinstance(attention, nn.MultiheadAttention)
            attention.register_forward_pre_hook(_with_weights, with_kwargs=True)
            attention.register_forward_hook(self._keep)

    def forward(  # type: ignore[override]
        self, tokens: Tensor, region_mask: Tensor | None, feature_map: Tensor, boxes: Tensor
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Vectors (B, R, E), in training mode with the loss; the arguments are those of every head."""
        vectors = super().forward(tokens, region_mask, feature_map)
        if not self.training:
            return vectors
        inside = patch_shares(boxes, map_side(feature_map))[:, None]
        # One layer at a time: (B, H, R, T) of all layers together would be the largest tensor of a step.
        shares = [(weights[..., 1:].float() * inside).sum(dim=-1) for weights in self._attention]
        self._attention.clear()
        losses = -torch.cat(shares, dim=1).clamp(min=SMALLEST_SHARE).log().mean(dim=1)
        known = tokens.new_ones(losses.shape) if region_mask is None else region_mask
        of_images = (losses * known).sum(dim=1) / known.sum(dim=1).clamp(min=1)
        return vectors, self.attention_loss * of_images.sum()

    def _keep(self, module: nn.Module, arguments: Any, output: tuple[Tensor, Tensor]) -> None:
        if self.training:
            self._attention.append(output[1])


def _with_weights(module: nn.Module, arguments: Any, named: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    """Ask the attention for its weights, which the decoder does not need. They are those after dropout."""
    return (arguments, {**named, "need_weights": True, "average_attn_weights": False}) if module.training else None
