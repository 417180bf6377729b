"""The focal loss of RegionSpot, over the regions whose class is known.

Scaled like the authors' loss: the sum over images and classes of the mean over the regions of an image. The authors
repeat the regions of an image until all images of a batch have the same number, and their mean runs over the repeated
ones. Here padding has no weight, so that every region of an image has the same. The two are equal for images with the
same number of regions; a batch with repeated regions (batches.py, `repeated_regions`) gives the authors' loss and
gradients for all others too.

Legend: B images, R regions (padded), N of known class, E text embedding, V classes, K of them that count in a step.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from regionspot.fusion.head import LOGIT_SCALE, similarity_logits


def region_loss(
    semantic: Tensor,
    text: Tensor,
    categories: Tensor,
    *,
    known: Tensor | None = None,
    class_ids: Tensor | None = None,
    ignored: Tensor | None = None,
    scale: float = LOGIT_SCALE,
    alpha: float = 0.25,
    gamma: float = 2.0,
) -> Tensor:
    """Loss of a batch, a float32 scalar; 0 for a batch without any known region.

    semantic    (B, R, E)  the head's output; may be anything, also NaN, where the category is negative
    text        (V, E)     L2-normalised
    categories  (B, R)     integer class index; negative (padding or unknown class) is ignored
    known       (N,)       int64, indices of the regions of known class in the flattened (B * R); default: found here,
                           for which a GPU stops the host
    class_ids   (K,)       int64, the classes that count: all of the batch and some negatives (negatives.py); default:
                           all V
    ignored     (B, K)     bool, True where the class, in the order of `class_ids`, is no negative for the regions of
                           that image; a region of the class itself counts
    """
    is_known = categories >= 0
    if known is None:
        known = is_known.flatten().nonzero().squeeze(1)
    images = known // categories.shape[1]
    weights = 1.0 / is_known.sum(dim=1)[images]
    classes = categories.flatten()[known].long()
    if class_ids is not None:
        text, position = text[class_ids], torch.full((len(text),), len(class_ids), device=text.device)
        position[class_ids] = torch.arange(len(class_ids), device=text.device)
        classes = position[classes]  # a class that is missing from `class_ids` is out of range, which `gather` reports
    logits = similarity_logits(semantic.flatten(0, 1)[known], text, scale)
    losses = focal_loss(logits, classes, alpha, gamma, ignored=None if ignored is None else ignored[images])
    return (losses * weights).sum()


def focal_loss(
    logits: Tensor, categories: Tensor, alpha: float = 0.25, gamma: float = 2.0, *, ignored: Tensor | None = None
) -> Tensor:
    """Sigmoid focal loss (Lin et al. 2017, eq. 5) of each region, summed over classes: (N, V), int64 (N,) -> (N,).

    ignored  (N, V)  bool, classes that are no negatives for a region

    Stable for any logit: softplus and sigmoid of +-x avoid log(0) and 1 - 1. All classes are first counted as negative,
    then the positive one is corrected: this avoids a one-hot tensor of N x 13,204.
    """
    index = categories[:, None]
    as_negative = (1 - alpha) * logits.sigmoid() ** gamma * F.softplus(logits)
    if ignored is not None:
        as_negative = as_negative.masked_fill(ignored, 0)
    positive = logits.gather(1, index).squeeze(1)
    positive_loss = alpha * (-positive).sigmoid() ** gamma * F.softplus(-positive)
    return as_negative.sum(dim=1) + positive_loss - as_negative.gather(1, index).squeeze(1)
