"""The figures of an evaluation, as its protocol asks for them."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from regionspot.cache.format.manifest import Category, Manifest
from regionspot.evaluation.inference.resumable import InferenceResult
from regionspot.evaluation.metrics.accuracy import UNKNOWN, accuracies
from regionspot.evaluation.metrics.average_precision import (
    ApResult,
    IouType,
    average_precision,
    coco_ap,
    fixed_ap,
)
from regionspot.evaluation.metrics.ground_truth import GroundTruth
from regionspot.evaluation.metrics.seen_classes import seen_classes, zero_shot_split
from regionspot.evaluation.report.protocol import Protocol


@dataclass(frozen=True, eq=False)
class Figures:
    """What was measured; None for what the protocol does not have.

    categories              K, by ascending id, as in the `classes` of the AP
    bbox, segm              AP of boxes, and of masks if the method makes them
    fixed_bbox, fixed_segm  fixed AP
    accuracy                see `accuracies`, and "regions"; of annotated boxes only
    seen                    bool (K,): whether the head was trained on the class
    """

    categories: tuple[Category, ...]
    bbox: ApResult
    segm: ApResult | None
    fixed_bbox: ApResult | None
    fixed_segm: ApResult | None
    accuracy: dict[str, float] | None
    seen: NDArray[np.bool_] | None

    def as_json(self) -> dict[str, Any]:
        """The part of results.json with the figures."""
        results = {name: getattr(self, name) for name in ("bbox", "segm", "fixed_bbox", "fixed_segm")}
        split = None
        if self.seen is not None:
            split = zero_shot_split(self.seen, [result for result in (self.bbox, self.segm) if result])
        return {
            **{name: result and result.values for name, result in results.items()},
            "accuracy": self.accuracy,
            "zero_shot_split": split,
        }

    def classes_csv(self) -> str:
        """A row per class; AP from 0 to 1, empty without ground truth, masks or knowledge of the training."""
        classes, no_masks = self.bbox.classes, np.full(len(self.categories), np.nan)
        masks = (self.segm.classes.ap, self.segm.classes.ap50) if self.segm else (no_masks, no_masks)
        figures = zip(classes.ap, classes.ap50, *masks, strict=True)
        seen = [""] * len(self.categories) if self.seen is None else np.where(self.seen, "yes", "no")
        text = io.StringIO()
        rows = csv.writer(text, lineterminator="\n")
        rows.writerow(("id", "name", "frequency", "boxes", "AP", "AP50", "mask_AP", "mask_AP50", "seen_in_training"))
        for category, boxes, of_class, is_seen in zip(self.categories, classes.boxes, figures, seen, strict=True):
            shown = ("" if np.isnan(figure) else f"{figure:.6f}" for figure in of_class)
            rows.writerow((category.id, category.name, category.frequency or "", boxes, *shown, is_seen))
        return text.getvalue()


def measure(protocol: Protocol, ground_truth: GroundTruth, manifest: Manifest, result: InferenceResult) -> Figures:
    """All figures of the protocol. Raises the errors of `average_precision`."""
    category_ids = [category.id for category in manifest.categories]
    assert category_ids == np.sort(ground_truth.category_ids).tolist(), "manifest and ground truth are of one file"
    arguments = (ground_truth, result.detections)

    def ap(iou_type: IouType) -> ApResult:
        if protocol.metric == "coco":
            return coco_ap(*arguments, iou_type, manifest.image_ids)
        return average_precision(*arguments, iou_type, manifest.image_ids, protocol.engine)

    def fixed(iou_type: IouType) -> ApResult:
        return fixed_ap(*arguments, iou_type, manifest.image_ids, protocol.engine)

    masks, trained = result.detections.masks is not None, protocol.trained_classes
    ranks = result.class_ranks
    accuracy = accuracies(ranks, manifest.category_index) if protocol.has_true_boxes else {}
    return Figures(
        manifest.categories,
        bbox=ap("bbox"),
        segm=ap("segm") if masks else None,
        fixed_bbox=fixed("bbox") if protocol.fixed else None,
        fixed_segm=fixed("segm") if protocol.fixed and masks else None,
        accuracy={**accuracy, "regions": int((ranks != UNKNOWN).sum())} if accuracy else None,
        seen=seen_classes(manifest.categories, trained) if trained else None,
    )
