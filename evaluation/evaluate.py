"""Evaluation as on the command line: find the files, load the head or baseline, check that they fit together.

`report.results` then computes and writes the results.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import partial
from typing import Any, get_args

from regionspot.cache.errors import InputError, unknown_name
from regionspot.cache.format.manifest import Manifest
from regionspot.evaluation.inference.baselines import Baseline
from regionspot.evaluation.inference.on_workers import infer_on_workers
from regionspot.evaluation.inference.resumable import ScoringMethod, infer
from regionspot.evaluation.loading import load_method
from regionspot.evaluation.metrics.average_precision import Engine
from regionspot.evaluation.metrics.detections import DETECTIONS_PER_IMAGE
from regionspot.evaluation.metrics.ground_truth import read_ground_truth
from regionspot.evaluation.metrics.selection import Rule, Score, Selection
from regionspot.evaluation.options import EvaluationOptions
from regionspot.evaluation.report.protocol import Metric, Protocol
from regionspot.evaluation.report.results import check_results_folder, evaluate_method
from regionspot.pipeline.backbones.protocols import MaskThreshold
from regionspot.pipeline.datasets.registry import annotation_file_of, image_folder_of, read_split
from regionspot.pipeline.distributed.cluster import check_scheduler

__all__ = ["EvaluationOptions", "evaluate"]

log = logging.getLogger(__name__)

# Fixed AP has no limit per image, but all pairs of a region and a class of LVIS val are too many to keep: 300 boxes of
# 1,203 classes are 361,000 pairs an image. The limit is stated in the protocol.
FIXED_DETECTIONS_PER_IMAGE = 3000


def evaluate(options: EvaluationOptions) -> dict[str, Any]:
    """Evaluate, write the files of results and return their content, as `evaluate_method` does.

    Raises InputError and its subclasses, with a message of one line, for files and options that do not fit together.
    """
    _check_options(options)
    selection = _selection(options)
    check_results_folder(options.out, (options.annotations, options.boxes, options.checkpoint, options.cache))
    manifest = _read_manifest(options)
    annotations = options.annotations or annotation_file_of(options.data, manifest)
    image_folder = image_folder_of(options.dataset, options.data, options.split, manifest)
    # Before models are loaded and run for hours.
    ground_truth = read_ground_truth(annotations, federated=options.metric == "lvis")
    if options.masks and options.cache is None and options.baseline in (None, "dense-mask"):
        if options.metric == "coco" and not any("segmentation" in each for each in ground_truth.annotations):
            log.info("%s: has no masks; only boxes are evaluated", annotations)
            options = replace(options, masks=False)
        else:
            ground_truth.require_masks()
    method, vocabulary, trained_classes = load_method(options, manifest, image_folder)
    inference = infer
    if check_scheduler(options.scheduler) != "none":
        inference = partial(infer_on_workers, options.scheduler, _load_method, options.with_absolute_paths())
    protocol = Protocol(
        metric=options.metric,
        engine=options.engine,
        fixed=options.fixed,
        selection=selection,
        boxes=options.boxes,
        templates=vocabulary.templates,
        names_from=options.names_from,
        trained_classes=trained_classes,
        sha256=manifest.source["files"],
    )
    return evaluate_method(
        method,
        ground_truth,
        options.out,
        protocol,
        max_failures=options.max_failures,
        image_folder=None if options.cache else image_folder,
        inference=inference,
    )


def _load_method(options: EvaluationOptions) -> ScoringMethod:
    """In a worker: the method that the command evaluates."""
    manifest = _read_manifest(options)
    image_folder = image_folder_of(options.dataset, options.data, options.split, manifest)
    return load_method(options, manifest, image_folder)[0]


def _read_manifest(options: EvaluationOptions) -> Manifest:
    return read_split(
        options.dataset,
        options.data,
        options.split,
        options.annotations,
        options.boxes,
        max_failures=options.max_failures,
    )


def _selection(options: EvaluationOptions) -> Selection:
    score: Score = "sqrt" if options.selection == "tokenize-anything" else "product"
    limit = FIXED_DETECTIONS_PER_IMAGE if options.fixed else DETECTIONS_PER_IMAGE
    return Selection(options.selection, options.score or score, options.detections_per_image or limit)


def _check_options(options: EvaluationOptions) -> None:
    for name, kind in (
        ("metric", Metric),
        ("engine", Engine),
        ("selection", Rule),
        ("score", Score),
        ("baseline", Baseline),
        ("mask_threshold", MaskThreshold),
    ):
        value = getattr(options, name)
        if value is not None and value not in get_args(kind):
            raise unknown_name(name, value, get_args(kind))
    if options.cache is not None and options.baseline not in (None, "dense"):
        lack = "a cache holds no masks" if options.baseline == "dense-mask" else "not from a cache"
        raise InputError(f"baseline {options.baseline}: runs from images, {lack}; leave --cache out")
    if options.detections_per_image is not None and options.detections_per_image < 1:
        raise InputError(f"{options.detections_per_image} detections per image were requested, expected at least 1")
    if options.fixed and options.metric != "lvis":
        raise InputError("fixed AP: is an LVIS AP; leave it out, or evaluate LVIS's annotations by eval-lvis")
