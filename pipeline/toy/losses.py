"""What the toy backbones are trained to do: masks for SAM, names for CLIP.

The patches of CLIP have a loss of their own. A large CLIP's patches know what they show, and where they are, from
hundreds of millions of images; ours have minutes, and without it a head finds nothing to read in the map.
"""

# B images or boxes, S mask slots, P patches, N names

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from regionspot.pipeline.toy.rendering import GROUND
from regionspot.pipeline.toy.samples import GROUPS


def mask_loss(logits: Tensor, quality: Tensor, masks: Tensor) -> Tensor:
    """SAM's loss (Kirillov et al. 2023, appendix A): 20 focal + dice + IoU error; the best of slots 1 to 3 lightly."""
    fine = F.interpolate(logits[:, :1], size=masks.shape[-2:], mode="bilinear", align_corners=False)
    coarse = F.avg_pool2d(masks[:, None], masks.shape[-1] // logits.shape[-1]).expand_as(logits)
    with torch.no_grad():
        drawn, real = logits > 0, coarse > 0.5
        iou = (drawn & real).sum(dim=(2, 3)) / (drawn | real).sum(dim=(2, 3)).clamp(min=1)
    other = _focal_and_dice(logits[:, 1:], coarse[:, 1:]).amin(dim=1)
    return _focal_and_dice(fine, masks[:, None]).mean() + 0.2 * other.mean() + 0.2 * F.mse_loss(quality, iou)


def _focal_and_dice(logits: Tensor, truth: Tensor) -> Tensor:
    """(B, slots) for maps (B, slots, h, w)."""
    chance = logits.sigmoid()
    wrong = (truth - chance).square()
    focal = (wrong * F.binary_cross_entropy_with_logits(logits, truth, reduction="none")).mean(dim=(2, 3))
    overlap, total = (chance * truth).sum(dim=(2, 3)), (chance + truth).sum(dim=(2, 3))
    return 20 * focal + 1 - (2 * overlap + 1) / (total + 1)


def name_loss(logits: Tensor, truth: Tensor) -> Tensor:
    """Cross-entropy of each group of names, all that are true sharing the probability; whole names count in full."""
    sizes = [len(group) for group in GROUPS]
    losses = []
    for said, true in zip(torch.split(logits, sizes, dim=1), torch.split(truth, sizes, dim=1), strict=True):
        losses.append(F.cross_entropy(said, true / true.sum(dim=1, keepdim=True)))
    return losses[0] + 0.5 * torch.stack(losses[1:]).sum()


def patch_loss(logits: Tensor, local: Tensor) -> Tensor:
    """Cross-entropy of the shape, the colour and the texture that each patch shows, ground left out."""
    groups = torch.split(logits, [len(group) for group in GROUPS], dim=2)[1:]
    losses = [
        F.cross_entropy(said.flatten(0, 1), true.flatten(), ignore_index=GROUND)
        for said, true in zip(groups, local.unbind(2), strict=True)
    ]
    return 0.5 * torch.stack(losses).sum()
