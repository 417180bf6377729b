"""How often the right class is among the best ones, of regions whose class is known: ground-truth boxes."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

UNKNOWN = -1


def class_ranks(probabilities: NDArray[np.float32], classes: NDArray[np.int32]) -> NDArray[np.int32]:
    """int32 (R,): the number of classes that are better than the right one, UNKNOWN where `classes` is negative.

    probabilities (R, C), classes (R,). Of equal probabilities the first is the better one, as for argmax.
    """
    known = classes >= 0
    right = np.maximum(classes, 0)[:, None]
    of_right = np.take_along_axis(probabilities, right, axis=1)
    before = np.arange(probabilities.shape[1]) < right
    ranks = ((probabilities > of_right) | ((probabilities == of_right) & before)).sum(axis=1)
    return np.where(known, ranks, UNKNOWN).astype(np.int32)


def accuracies(ranks: NDArray[np.int32], classes: NDArray[np.int32]) -> dict[str, float]:
    """Shares from 0 to 1 of the regions with a known rank; empty without any.

    top1, top5      the right class is the best one, or among the best five
    class_accuracy  mean over the classes of their top1
    """
    known = ranks != UNKNOWN
    ranks, classes = ranks[known], classes[known]
    if not len(ranks):
        return {}
    regions, right = np.bincount(classes), np.bincount(classes, weights=ranks == 0)
    of_classes = right[regions > 0] / regions[regions > 0]
    return {
        "top1": float((ranks == 0).mean()),
        "top5": float((ranks < 5).mean()),
        "class_accuracy": float(of_classes.mean()),
    }
