"""The focal loss of RegionSpot, over the regions whose class is known.

Scaled as the authors do: summed over images and classes, the mean over the regions of an image. They repeat
regions until all images of a batch have equally many; here each image's mean runs over its own known regions,
which is the same number where counts are equal, and gives each image the same weight where they are not.

Legend: B images, R regions (padded), E text embedding, V classes, K known regions of the batch.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from regionspot.fusion.head import LOGIT_SCALE, similarity_logits


def region_loss(
    semantic: Tensor,
    text: Tensor,
    categories: Tensor,
    *,
    scale: float = LOGIT_SCALE,
    alpha: float = 0.25,
    gamma: float = 2.0,
) -> Tensor:
    """Loss of a batch, a float32 scalar; a batch without any known region gives 0.

    semantic    (B, R, E)  the head's output
    text        (V, E)     L2-normalised
    categories  (B, R)     integer class index, negative where padding or class unknown: no part of the loss
    """
    known = categories >= 0
    # max(1) only meets images without a known region; none of their rows are picked.
    weights = (1.0 / known.sum(dim=1, keepdim=True).clamp(min=1)).expand(known.shape)[known]
    logits = similarity_logits(semantic[known], text, scale)
    return (focal_loss(logits, categories[known].long(), alpha, gamma) * weights).sum()


def focal_loss(logits: Tensor, categories: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """Sigmoid focal loss (Lin et al. 2017, eq. 5) of each region, summed over classes: (K, V), int64 (K,) -> (K,).

    Stable for any logit: softplus and sigmoid of +-x never form log(0) or 1 - 1. All classes are counted as wrong
    ones first, then the right one is put straight: there is no one-hot of K x 13,204 to fill and multiply by.
    """
    right = logits.gather(1, categories[:, None]).squeeze(1)
    as_wrong = (1 - alpha) * logits.sigmoid() ** gamma * F.softplus(logits)
    as_right = alpha * (-right).sigmoid() ** gamma * F.softplus(-right)
    right_as_wrong = (1 - alpha) * right.sigmoid() ** gamma * F.softplus(right)
    return as_wrong.sum(dim=1) + as_right - right_as_wrong
