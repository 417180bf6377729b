"""From a method to its numbers: inference, LVIS AP, and the protocol that the numbers were measured under.

`results.json` says what was evaluated and how; `detections.json` is in LVIS's own results form, for any other tool.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from regionspot.cache.outputs import check_output_file, check_output_folder
from regionspot.cache.storage.atomic_files import write_file
from regionspot.evaluation.inference.resumable import Inference, Method, infer
from regionspot.evaluation.metrics.detections import DETECTIONS_PER_IMAGE, write_results_json
from regionspot.evaluation.metrics.ground_truth import GroundTruth, read_ground_truth
from regionspot.evaluation.metrics.lvis_ap import lvis_ap
from regionspot.evaluation.report.drawing import save_image
from regionspot.evaluation.report.sheet import judged_sheet
from regionspot.pipeline.datasets.failure_limit import EVALUATION_LIMIT, FailureLimit
from regionspot.pipeline.images.decode import stored_exif

RESULTS, DETECTIONS, SHEET = "results.json", "detections.json", "sheet.png"
SHEET_IMAGES = 9
# Stages that any method on the same images would share: opening them, and the two encoders' maps.
SHARED_STAGES = ("photo", "read", "sam", "clip")


def check_out(out: Path, inputs: Iterable[str | Path | None]) -> None:
    """Raises InputError where the results cannot be written into the folder `out`, or would replace an input."""
    inputs = list(inputs)
    check_output_folder(out, [each for each in inputs if each is not None and Path(each).is_dir()])
    if out.is_dir():
        for name in (RESULTS, DETECTIONS, SHEET):
            check_output_file(out / name, inputs)


def evaluate_method(
    method: Method,
    annotations: Path | GroundTruth,
    out: Path,
    *,
    boxes: str = "ground truth",
    templates: tuple[str, ...] = (),
    max_failures: FailureLimit = EVALUATION_LIMIT,
    images: Path | None = None,
) -> dict[str, Any]:
    """Evaluate, write `results.json` and `detections.json` into `out`, and return what results.json holds.

    Goes on where an earlier run of the same evaluation stopped. `boxes` and `templates` are only written down. With
    the image folder, the first images with their best names go into `sheet.png`.

    Raises AnnotationError for a truth that cannot be evaluated, InputError where too many images are unreadable or
    `out` cannot be written.
    """
    truth = annotations if isinstance(annotations, GroundTruth) else read_ground_truth(annotations)
    if method.identity.get("masks"):
        truth.require_masks()  # not after hours of inference
    names = truth.image_names
    found = infer(method, out / "parts", max_failures=max_failures)
    begin = time.perf_counter()
    ap = {"bbox": lvis_ap(truth, found.detections, "bbox", method.manifest.image_ids).values, "segm": None}
    if found.detections.masks is not None:
        ap["segm"] = lvis_ap(truth, found.detections, "segm", method.manifest.image_ids).values
    seconds = {**found.seconds, "ap": time.perf_counter() - begin}
    results = {
        "method": method.name,
        **ap,
        "protocol": _protocol(method, truth.path, boxes, templates),
        "pictures": len(method.manifest),
        "unreadable": {str(names.get(image, image)): reason for image, reason in found.failures.items()},
        "regions": len(method.manifest.boxes_xyxy),
        "detections": len(found.detections),
        "seconds": seconds,
        "seconds_per_picture": _seconds_per_picture(found),
        "identity": method.identity,
    }
    write_results_json(out / DETECTIONS, found.detections, names)
    if images is not None:
        exif = stored_exif(method.features.values())
        sheet = judged_sheet(method.manifest, images, found.detections, SHEET_IMAGES, title=method.name, exif=exif)
        save_image(sheet, out / SHEET)
    write_file(out / RESULTS, (json.dumps(results, indent=1, allow_nan=False) + "\n").encode())
    return results


def _protocol(method: Method, annotations: Path, boxes: str, templates: tuple[str, ...]) -> dict[str, Any]:
    """Everything that a reader must know to compare the number with another."""
    manifest = method.manifest
    scores = "softmax over all classes of the scaled cosine between region and class name"
    return {
        "ap": f"standard LVIS AP, federated, by lvis {version('lvis')}",
        "dataset": manifest.dataset,
        "split": manifest.split,
        "annotations": annotations.name,
        "pictures": len(manifest),
        "boxes": boxes,
        "boxes_per_picture": round(len(manifest.boxes_xyxy) / max(1, len(manifest)), 2),
        "candidates_per_box": f"all {len(manifest.categories)} classes",
        "score": scores if manifest.scores is None else f"{scores}, times the detector's score of the box",
        "detections_per_picture": DETECTIONS_PER_IMAGE,
        "box": "as given, not refined",
        "mask": "SAM's single mask for the box",
        **_stated(method.features),
        "unreadable_pictures": "count as images without detections",
        "templates": len(templates),
    }


def _stated(features: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """How the features were made: one value, or one a backbone where they differ; nothing where none states it."""
    told = {}
    for field in ("preprocess", "dtype", "exif"):
        values = {name: str(provenance[field]) for name, provenance in features.items() if field in provenance}
        if len(values) == len(features) and len(set(values.values())) == 1:
            told[field] = next(iter(values.values()))
        elif values:
            told[field] = ", ".join(f"{name} {value}" for name, value in values.items())
    return told


def _seconds_per_picture(found: Inference) -> dict[str, float]:
    """From the file on disk to scores, and what of it comes on top of maps that all methods could share."""
    own = sum(spent for stage, spent in found.seconds.items() if stage not in SHARED_STAGES)
    images = max(1, found.images)
    return {"in_all": sum(found.seconds.values()) / images, "on_shared_maps": own / images}
