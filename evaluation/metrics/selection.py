"""Which (region, class) pairs of an image become its detections, and with what score.

A region is not given one class: AP ranks all pairs of a region and a class, and an image may have only so many
detections. Published figures differ in how they select them:

best               the pairs with the best scores
reference          as the authors of RegionSpot do: first the 900 pairs with the best class probabilities, without the
                   score of the box, then the best scores of these (regionspot/detector.py, inference_pred_box)
tokenize-anything  as Tokenize-Anything's evaluation does: pairs with a class probability over 0.001, of these what
                   non-maximum suppression at an IoU of 0.5 leaves of each class, then the best scores
                   (scripts/eval_cls.py, Predictor.get_results)

The score is the class probability times the score of the box, if it has one, or the square root of that. The square
root changes no order and therefore no AP; it is there for others' files of results.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from regionspot.evaluation.metrics.detections import DETECTIONS_PER_IMAGE, Detections

REFERENCE_PAIRS = 900
MIN_PROBABILITY, NMS_IOU = 0.001, 0.5  # of Tokenize-Anything

Rule = Literal["best", "reference", "tokenize-anything"]
Score = Literal["product", "sqrt"]
Floats = NDArray[np.float32]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Selection:
    """The rule, the score and the limit of an image's detections."""

    rule: Rule = "best"
    score: Score = "product"
    limit: int = DETECTIONS_PER_IMAGE

    def pairs(self, probabilities: Floats, boxes_xyxy: Floats, box_scores: Floats | None) -> tuple[Ints, Ints, Floats]:
        """The selected pairs of one image: regions, classes and scores, best first, at most `limit`.

        probabilities  (R, C), softmax over the classes
        boxes_xyxy     (R, 4)
        box_scores     (R,), or None for boxes without a score

        Equal scores are ordered by region, then by class.
        """
        scores = probabilities if box_scores is None else probabilities * box_scores[:, None]
        if self.score == "sqrt":
            scores = np.sqrt(scores)
        flat = scores.reshape(-1)
        if self.rule == "reference":
            candidates = np.sort(_best(probabilities.reshape(-1), REFERENCE_PAIRS))
        elif self.rule == "tokenize-anything":
            candidates = _suppressed(np.flatnonzero(probabilities > MIN_PROBABILITY), scores, boxes_xyxy)
        else:
            candidates = np.arange(flat.size)
        best = candidates[_best(flat[candidates], self.limit)]
        regions, classes = np.divmod(best, max(1, scores.shape[1]))
        return regions, classes, flat[best]

    def rule_text(self) -> str:
        """The rule, for a protocol."""
        first = {
            "best": "",
            "reference": f" of the {REFERENCE_PAIRS} best class probabilities, as the authors of RegionSpot",
            "tokenize-anything": (
                f" of class probabilities over {MIN_PROBABILITY} after NMS per class at IoU {NMS_IOU}, as "
                "Tokenize-Anything"
            ),
        }
        return f"the {self.limit:,} best scores{first[self.rule]}"

    def score_text(self, with_box_scores: bool) -> str:
        """The score, for a protocol."""
        score = "softmax over all classes of the scaled cosine between region and class name"
        if with_box_scores:
            score += ", times the detector's score of the box"
        return f"square root of: {score}" if self.score == "sqrt" else score


BEST = Selection()


def _best(scores: Floats, limit: int) -> Ints:
    """Indices of the `limit` best scores, best first; equal scores in order."""
    best = np.argpartition(-scores, limit)[:limit] if scores.size > limit else np.arange(scores.size)
    ordered: Ints = best[np.lexsort((best, -scores[best]))]
    return ordered


def _suppressed(pairs: Ints, scores: Floats, boxes_xyxy: Floats) -> Ints:
    """The flat indices `pairs` without those whose box overlaps one of the same class with a better score."""
    import torch
    from torchvision.ops import batched_nms

    regions, classes = np.divmod(pairs, max(1, scores.shape[1]))
    # float64: `batched_nms` moves the boxes of each class to a place of their own, which costs digits.
    boxes, ranks = torch.from_numpy(boxes_xyxy[regions].astype(np.float64)), torch.from_numpy(scores.reshape(-1)[pairs])
    kept: NDArray[np.int64] = batched_nms(boxes, ranks.double(), torch.from_numpy(classes), NMS_IOU).numpy()
    return np.sort(pairs[kept])


def detections_of_image(
    image_id: int,
    boxes_xyxy: Floats,
    probabilities: Floats,
    category_ids: Ints,
    box_scores: Floats | None = None,
    selection: Selection = BEST,
) -> Detections:
    """The selected detections of one image, each with the box of its region.

    boxes_xyxy (R, 4) in original pixels, probabilities (R, C), category_ids (C,) the dataset's ids of the classes.
    """
    regions, classes, scores = selection.pairs(probabilities, boxes_xyxy, box_scores)
    xywh = boxes_xyxy.astype(np.float64)
    xywh[:, 2:] -= xywh[:, :2]
    return Detections(
        image_ids=np.full(len(regions), image_id, np.int64),
        category_ids=category_ids[classes],
        boxes_xywh=xywh[regions],
        scores=scores.astype(np.float32),
        regions=regions,
    )
