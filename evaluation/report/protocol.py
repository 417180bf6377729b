"""The protocol of an evaluation: everything that a reader must know to reproduce its figures and to compare them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from regionspot.evaluation.inference.resumable import ScoringMethod
from regionspot.evaluation.metrics.average_precision import COCO_LIMITS, DETECTIONS_PER_CLASS, Engine
from regionspot.evaluation.metrics.detections import DETECTIONS_PER_IMAGE
from regionspot.evaluation.metrics.selection import BEST, Selection
from regionspot.pipeline.datasets.proposals import GROUND_TRUTH

Metric = Literal["lvis", "coco"]

_MASK_THRESHOLDS = {
    "sam": "thresholded at the size of the image",
    "reference": "thresholded at a shorter edge of 800, longer at most 1333, then resized by nearest neighbour, as the "
    "authors of RegionSpot",
}


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """What an evaluation computes, and from which boxes. The images and features are those of the method.

    metric      "lvis": federated AP; "coco": all classes count in all images
    engine      of LVIS AP
    fixed       fixed AP as well: no limit per image, 10,000 detections of a class over all images
    selection   of an image's detections. Fixed AP needs more of them than the 300 of LVIS AP
    boxes       "gt" for the annotated boxes, with accuracies, or a detector's proposals file
    templates, names_from   of the prompts
    trained_classes   names of the classes that the head was trained on; empty: unknown, and no zero-shot split
    sha256      of the annotation and proposals files, by name
    """

    metric: Metric = "lvis"
    engine: Engine = "hotcoco"
    fixed: bool = False
    selection: Selection = BEST
    boxes: str = GROUND_TRUTH
    templates: tuple[str, ...] = ()
    names_from: str = "name"
    trained_classes: tuple[str, ...] = ()
    sha256: Mapping[str, str]

    @property
    def has_true_boxes(self) -> bool:
        """Whether the boxes are the annotated ones, whose class is known."""
        return self.boxes == GROUND_TRUTH

    def record(self, method: ScoringMethod, annotations: Path, engine: str, detections_sha256: str) -> dict[str, Any]:
        """The protocol with what the method and the engine add, for results.json and `protocol_text`."""
        manifest = method.manifest
        images, regions = len(manifest), len(manifest.boxes_xyxy)
        mask_threshold = method.identity.get("mask_threshold")
        counted = f"best {DETECTIONS_PER_IMAGE} detections of an image"
        if self.metric == "coco":
            counted = f"all classes in all images, best {COCO_LIMITS[-1]} detections of an image and class"
        record: dict[str, Any] = {
            "ap": f"LVIS AP, federated, {counted}" if self.metric == "lvis" else f"COCO AP, {counted}",
            "fixed_ap": (
                f"LVIS AP of the best {DETECTIONS_PER_CLASS:,} detections of a class over all images, without a limit "
                f"per image; {self.selection.limit:,} of an image are kept"
            ),
            "engine": engine,
            "dataset": manifest.dataset,
            "split": manifest.split,
            "annotations": annotations.name,
            "images": images,
            "unreadable_images": "count as images without detections",
            "boxes": "ground truth" if self.has_true_boxes else f"detector proposals, {Path(self.boxes).name}",
            "boxes_per_image": round(regions / max(1, images), 2),
            "box": "as given, not refined",
            "mask": f"SAM's single mask for the box, {_MASK_THRESHOLDS[mask_threshold]}" if mask_threshold else None,
            "candidates_per_box": f"all {len(manifest.categories)} classes",
            "score": self.selection.score_text(manifest.scores is not None),
            "selection": self.selection.rule_text(),
            "detections_per_image": self.selection.limit,
            **_of_features(method.features),
            "templates": len(self.templates),
            "prompts_from": self.names_from,
            "sha256": {**self.sha256, "detections.json": detections_sha256},
        }
        if not self.fixed:
            del record["fixed_ap"]
        if not mask_threshold:
            del record["mask"]
        return record


def protocol_lines(record: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a protocol's record by their name for readers, with a line for each hash."""
    hashes = {f"sha256 of {file}": sha256 for file, sha256 in record["sha256"].items()}
    return {name.replace("_", " "): value for name, value in record.items() if name != "sha256"} | hashes


def protocol_text(record: Mapping[str, Any]) -> str:
    """One line per field of a protocol's record."""
    lines = protocol_lines(record)
    width = max(map(len, lines))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in lines.items())


def _of_features(features: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Preprocessing, dtype and EXIF rule: one value, or one per backbone if they differ; without unknown fields."""
    summary = {}
    for field in ("preprocess", "dtype", "exif"):
        values = {name: str(provenance[field]) for name, provenance in features.items() if field in provenance}
        if len(values) == len(features) and len(set(values.values())) == 1:
            summary[field] = next(iter(values.values()))
        elif values:
            summary[field] = ", ".join(f"{name} {value}" for name, value in values.items())
    return summary
