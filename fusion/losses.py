"""The focal loss of RegionSpot, over the regions whose class is known.

Scaled like the authors' loss: the sum over images and classes of the mean over the regions of an image. The authors
repeat regions until all images of a batch have the same number; here the mean runs over the known regions of the image.
The result is the same for equal counts, and otherwise every image has the same weight.

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
    """Loss of a batch, a float32 scalar; 0 for a batch without any known region.

    semantic    (B, R, E)  the head's output
    text        (V, E)     L2-normalised
    categories  (B, R)     integer class index; negative (padding or unknown class) is ignored
    """
    known = categories >= 0
    # clamp(min=1) only changes images without a known region, none of whose rows are selected.
    weights = (1.0 / known.sum(dim=1, keepdim=True).clamp(min=1)).expand(known.shape)[known]
    logits = similarity_logits(semantic[known], text, scale)
    return (focal_loss(logits, categories[known].long(), alpha, gamma) * weights).sum()


def focal_loss(logits: Tensor, categories: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """Sigmoid focal loss (Lin et al. 2017, eq. 5) of each region, summed over classes: (K, V), int64 (K,) -> (K,).

    Stable for any logit: softplus and sigmoid of +-x avoid log(0) and 1 - 1. All classes are first counted as negative,
    then the positive one is corrected: this avoids a one-hot tensor of K x 13,204.
    """
    positive = logits.gather(1, categories[:, None]).squeeze(1)
    all_as_negative = (1 - alpha) * logits.sigmoid() ** gamma * F.softplus(logits)
    positive_loss = alpha * (-positive).sigmoid() ** gamma * F.softplus(-positive)
    positive_as_negative = (1 - alpha) * positive.sigmoid() ** gamma * F.softplus(positive)
    return all_as_negative.sum(dim=1) + positive_loss - positive_as_negative
