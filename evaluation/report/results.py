"""Evaluate a scoring method: inference, LVIS AP, and the files of results.

`results.json` holds AP and the protocol; `detections.json` is in LVIS's own results format, for other tools.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from regionspot.cache.outputs import check_output_file, check_output_folder
from regionspot.cache.storage.atomic_files import write_file
from regionspot.evaluation.inference.resumable import InferenceResult, ScoringMethod, infer
from regionspot.evaluation.metrics.average_precision import average_precision
from regionspot.evaluation.metrics.detections import DETECTIONS_PER_IMAGE, write_results_json
from regionspot.evaluation.metrics.ground_truth import GroundTruth, read_ground_truth
from regionspot.evaluation.report.drawing import save_image
from regionspot.evaluation.report.sheet import detections_sheet
from regionspot.pipeline.datasets.failure_limit import EVALUATION_LIMIT, FailureLimit
from regionspot.pipeline.images.decode import stored_exif

RESULTS, DETECTIONS, SHEET = "results.json", "detections.json", "sheet.png"
SHEET_IMAGES = 9
# Stages that any method on the same images could share: reading images or features, and the encoders.
SHARED_STAGES = ("decode", "read", "encode")


def check_results_folder(out: Path, inputs: Iterable[str | Path | None]) -> None:
    """Raises InputError if the results cannot be written into the folder `out`, or would overwrite an input."""
    inputs = list(inputs)
    check_output_folder(out, [path for path in inputs if path is not None and Path(path).is_dir()])
    if out.is_dir():
        for name in (RESULTS, DETECTIONS, SHEET):
            check_output_file(out / name, inputs)


def evaluate_method(
    method: ScoringMethod,
    annotations: Path | GroundTruth,
    out: Path,
    *,
    boxes: str = "ground truth",
    templates: tuple[str, ...] = (),
    names_from: str = "name",
    max_failures: FailureLimit = EVALUATION_LIMIT,
    image_folder: Path | None = None,
    inference: Callable[..., InferenceResult] = infer,
) -> dict[str, Any]:
    """Evaluate, write `results.json` and `detections.json` into `out`, and return the content of results.json.

    Resumes an earlier run of the same evaluation. `boxes`, `templates` and `names_from` are only recorded. With
    `image_folder`, the first images with the best class of each region are drawn into `sheet.png`. `inference` is
    called in place of `infer`.

    Raises AnnotationError for invalid ground truth, InputError if too many images are unreadable or `out` cannot be
    written.
    """
    ground_truth = annotations if isinstance(annotations, GroundTruth) else read_ground_truth(annotations)
    if method.identity.get("masks"):
        ground_truth.require_masks()  # now, not after hours of inference
    names, manifest = ground_truth.image_names, method.manifest
    result = inference(method, out / "parts", max_failures=max_failures)
    begin = time.perf_counter()
    boxes_ap = average_precision(ground_truth, result.detections, "bbox", manifest.image_ids)
    ap = {"bbox": boxes_ap.values, "segm": None}
    if result.detections.masks is not None:
        ap["segm"] = average_precision(ground_truth, result.detections, "segm", manifest.image_ids).values
    results = {
        "method": method.name,
        **ap,
        "protocol": _protocol(method, ground_truth.path, boxes, templates, names_from, boxes_ap.engine),
        "pictures": len(manifest),
        "unreadable": {str(names.get(image_id, image_id)): reason for image_id, reason in result.failures.items()},
        "regions": len(manifest.boxes_xyxy),
        "detections": len(result.detections),
        "seconds": {**result.seconds, "ap": time.perf_counter() - begin},
        "seconds_per_picture": _seconds_per_image(result),
        "identity": method.identity,
    }
    write_results_json(out / DETECTIONS, result.detections, names)
    if image_folder is not None:
        exif = stored_exif(method.features.values())
        sheet = detections_sheet(manifest, image_folder, result.detections, SHEET_IMAGES, title=method.name, exif=exif)
        save_image(sheet, out / SHEET)
    write_file(out / RESULTS, (json.dumps(results, indent=1, allow_nan=False) + "\n").encode())
    return results


def _protocol(
    method: ScoringMethod, annotations: Path, boxes: str, templates: tuple[str, ...], names_from: str, engine: str
) -> dict[str, Any]:
    """Everything a reader must know to compare the AP with another one."""
    manifest = method.manifest
    score = "softmax over all classes of the scaled cosine between region and class name"
    return {
        "ap": f"standard LVIS AP, federated, by {engine}",
        "dataset": manifest.dataset,
        "split": manifest.split,
        "annotations": annotations.name,
        "pictures": len(manifest),
        "boxes": boxes,
        "boxes_per_picture": round(len(manifest.boxes_xyxy) / max(1, len(manifest)), 2),
        "candidates_per_box": f"all {len(manifest.categories)} classes",
        "score": score if manifest.scores is None else f"{score}, times the detector's score of the box",
        "detections_per_picture": DETECTIONS_PER_IMAGE,
        "box": "as given, not refined",
        "mask": "SAM's single mask for the box",
        **_provenance(method.features),
        "unreadable_pictures": "count as images without detections",
        "templates": len(templates),
        "prompts_from": names_from,
    }


def _provenance(features: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Preprocessing, dtype and EXIF rule: one value, or one per backbone if they differ; without unknown fields."""
    summary = {}
    for field in ("preprocess", "dtype", "exif"):
        values = {name: str(provenance[field]) for name, provenance in features.items() if field in provenance}
        if len(values) == len(features) and len(set(values.values())) == 1:
            summary[field] = next(iter(values.values()))
        elif values:
            summary[field] = ", ".join(f"{name} {value}" for name, value in values.items())
    return summary


def _seconds_per_image(result: InferenceResult) -> dict[str, float]:
    """From the file on disk to scores, and without the stages that all methods could share."""
    not_shared = sum(seconds for stage, seconds in result.seconds.items() if stage not in SHARED_STAGES)
    images = max(1, result.images)
    return {"in_all": sum(result.seconds.values()) / images, "on_shared_maps": not_shared / images}
