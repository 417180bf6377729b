"""Names for embedded regions: the nearest of the given names, or "unknown"."""

# n regions, E text embedding

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from torch import Tensor

from regionspot.evaluation.inference.regions import UNKNOWN, Region, Regions
from regionspot.fusion.head import similarity_logits
from regionspot.fusion.vocabulary import Vocabulary

log = logging.getLogger(__name__)


def name_regions(
    embedded: Tensor,
    boxes: Sequence[Sequence[float]],
    rles: Sequence[dict[str, Any] | None],
    vocabulary: Vocabulary,
    scale: float,
    top: int,
    unknown_below: float | None,
) -> Regions:
    """The n regions with these embeddings (n, E) of unit length, named by the nearest text embeddings.

    scale   of the cosines, before the softmax

    boxes, rles, top and unknown_below are those of `Region` and `RegionSpot.predict`.
    """
    text = vocabulary.embeddings.to(embedded.device)
    logits = similarity_logits(embedded, text, scale)
    probabilities = logits.softmax(dim=-1).cpu().numpy()
    similarities = (logits / scale).cpu().numpy()
    vectors = embedded.float().cpu().numpy()
    regions = []
    for index, (box, rle) in enumerate(zip(boxes, rles, strict=True)):
        best = np.argsort(-probabilities[index], kind="stable")[: max(1, top)]
        scores = tuple((vocabulary.names[name], float(probabilities[index, name])) for name in best)
        similarity = float(similarities[index, best[0]])
        name = UNKNOWN if unknown_below is not None and similarity < unknown_below else scores[0][0]
        x1, y1, x2, y2 = box
        regions.append(Region((x1, y1, x2, y2), name, scores[0][1], scores, similarity, vectors[index], rle))
    return Regions(regions, vocabulary.names)


def threshold_at_precision(similarities: ArrayLike, correct: ArrayLike, precision: float = 0.9) -> float:
    """The `unknown_below` with which at least this share of the names that are given is correct.

    similarities  of the regions of labelled images that were not trained on, among them things that none of the names
                  fits, as often as they occur
    correct       bool, whether each region has the right name

    The lowest such threshold, which leaves the fewest regions unknown; infinity if no threshold reaches the precision.
    """
    values, right = np.asarray(similarities, np.float64), np.asarray(correct, np.float64)
    order = np.argsort(-values, kind="stable")
    reached = right[order].cumsum() / np.arange(1, len(order) + 1) >= precision
    # Equal values are kept or dropped together, so only the last of them can be a threshold.
    last_of_equal = np.append(np.diff(values[order]) != 0, True)
    kept = np.flatnonzero(reached & last_of_equal)
    return float(values[order][kept[-1]]) if len(kept) else float("inf")


def without_repetitions(names: Sequence[str]) -> Sequence[str]:
    """The names, each once: a repeated name would split its probability. White space is normalised first."""
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        return names  # `vocabulary` raises the error
    unique = dict.fromkeys(" ".join(name.split()) for name in names)
    if len(unique) < len(names):
        log.warning("%d of %d names are repeated and count once", len(names) - len(unique), len(names))
    return list(unique)
