"""Evaluate a scoring method: inference, figures, and the files of results.

results.json     all figures and the protocol, from which tables and reports are made
classes.csv      a row per class
detections.json  in the results format of COCO and LVIS, for other tools
sheet.png        a few images with the names of their regions
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from regionspot.cache.outputs import check_output_file, check_output_folder
from regionspot.cache.storage.atomic_files import write_file
from regionspot.evaluation.inference.resumable import InferenceResult, ScoringMethod, infer
from regionspot.evaluation.metrics.ground_truth import GroundTruth
from regionspot.evaluation.metrics.results_file import write_results_json
from regionspot.evaluation.report.drawing import save_image
from regionspot.evaluation.report.figures import measure
from regionspot.evaluation.report.protocol import Protocol
from regionspot.evaluation.report.sheet import detections_sheet
from regionspot.pipeline.datasets.failure_limit import EVALUATION_LIMIT, FailureLimit
from regionspot.pipeline.images.decode import stored_exif

RESULTS, CLASSES, DETECTIONS, SHEET = "results.json", "classes.csv", "detections.json", "sheet.png"
SHEET_IMAGES = 9
# Stages that any method on the same images could share: reading images or features, and the encoders.
SHARED_STAGES = ("decode", "read", "encode")


def check_results_folder(out: Path, inputs: Iterable[str | Path | None]) -> None:
    """Raises InputError if the results cannot be written into the folder `out`, or would overwrite an input."""
    inputs = list(inputs)
    check_output_folder(out, [path for path in inputs if path is not None and Path(path).is_dir()])
    if out.is_dir():
        for name in (RESULTS, CLASSES, DETECTIONS, SHEET):
            check_output_file(out / name, inputs)


def evaluate_method(
    method: ScoringMethod,
    ground_truth: GroundTruth,
    out: Path,
    protocol: Protocol,
    *,
    max_failures: FailureLimit = EVALUATION_LIMIT,
    image_folder: Path | None = None,
    inference: Callable[..., InferenceResult] = infer,
) -> dict[str, Any]:
    """Evaluate, write the files of results into `out`, and return the content of results.json.

    Resumes an earlier run of the same evaluation. With `image_folder`, the first images with the best class of each
    region are drawn into `sheet.png`. `inference` is called in place of `infer`.

    Raises AnnotationError for invalid ground truth, InputError if too many images are unreadable or `out` cannot be
    written.
    """
    if method.identity.get("masks"):
        ground_truth.require_masks()  # now, not after hours of inference
    names, manifest = ground_truth.image_names, method.manifest
    result = inference(method, out / "parts", selection=protocol.selection, max_failures=max_failures)
    begin = time.perf_counter()
    figures = measure(protocol, ground_truth, manifest, result)
    seconds = time.perf_counter() - begin
    write_results_json(out / DETECTIONS, result.detections, names)
    with (out / DETECTIONS).open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    results = {
        "method": method.name,
        **figures.as_json(),
        "protocol": protocol.record(method, ground_truth.path, figures.bbox.engine, sha256),
        "images": len(manifest),
        "unreadable": {str(names.get(image_id, image_id)): reason for image_id, reason in result.failures.items()},
        "regions": len(manifest.boxes_xyxy),
        "detections": len(result.detections),
        "seconds": {**result.seconds, "ap": seconds},
        "seconds_per_image": _seconds_per_image(result),
        "identity": method.identity,
    }
    write_file(out / CLASSES, figures.classes_csv().encode())
    if image_folder is not None:
        exif = stored_exif(method.features.values())
        sheet = detections_sheet(manifest, image_folder, result.detections, SHEET_IMAGES, title=method.name, exif=exif)
        save_image(sheet, out / SHEET)
    # Last on purpose: where it is, the other files are of the same evaluation.
    write_file(out / RESULTS, (json.dumps(results, indent=1, allow_nan=False) + "\n").encode())
    return results


def _seconds_per_image(result: InferenceResult) -> dict[str, float]:
    """From the file on disk to scores, and without the stages that all methods could share."""
    not_shared = sum(seconds for stage, seconds in result.seconds.items() if stage not in SHARED_STAGES)
    images = max(1, result.images)
    return {"in_all": sum(result.seconds.values()) / images, "on_shared_maps": not_shared / images}
