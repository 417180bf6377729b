"""Training losses of the toy backbones: masks for SAM, names for CLIP.

CLIP's feature map has two more losses, on its patches and on its mean over each box. The patches of a large CLIP learn
what they show from hundreds of millions of images; the toy CLIP is trained for an hour, and without these losses its
map holds no shapes.
"""

# B images or boxes, S mask slots, N names

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from regionspot.pipeline.toy.samples import GROUPS, NOTHING


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
    """Cross-entropy of each group of names against equal shares of all that are present; words have weight 0.5."""
    sizes = [len(group) for group in GROUPS]
    losses = []
    for group, true in zip(torch.split(logits, sizes, dim=1), torch.split(truth, sizes, dim=1), strict=True):
        losses.append(F.cross_entropy(group, true / true.sum(dim=1, keepdim=True)))
    return losses[0] + 0.5 * torch.stack(losses[1:]).sum()


def word_loss(logits: Tensor, words: Tensor) -> Tensor:
    """Sum of the cross-entropies of shape, colour and texture: logits (..., 18), words int64 (..., 3).

    Entries with NOTHING are ignored.
    """
    groups = torch.split(logits.flatten(0, -2), [len(group) for group in GROUPS[1:]], dim=1)
    losses = [
        F.cross_entropy(group, word.flatten(), ignore_index=NOTHING)
        for group, word in zip(groups, words.unbind(-1), strict=True)
    ]
    return torch.stack(losses).sum()
