"""Evaluation as on the command line: find the files, load the head or baseline, check that they fit together.

`report.results` then computes and writes the results.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias, TypeVar, get_args

import numpy as np

from regionspot.cache.errors import AnnotationError, InputError, ProvenanceMismatchError, unknown_name
from regionspot.cache.format.manifest import Manifest
from regionspot.cache.machine import compute_device
from regionspot.cache.store import FeatureCache
from regionspot.evaluation.inference.baselines import Baseline, CropBaseline, DenseOnCache, MapBaseline
from regionspot.evaluation.inference.cache_vocabulary import NamesFrom, cache_vocabulary, category_vocabulary
from regionspot.evaluation.inference.head_features import head_features
from regionspot.evaluation.inference.methods import HeadOnCache, HeadOnImages
from regionspot.evaluation.inference.on_workers import infer_on_workers
from regionspot.evaluation.inference.region_spot import RegionSpot
from regionspot.evaluation.inference.resumable import ScoringMethod, infer
from regionspot.evaluation.metrics.average_precision import Engine
from regionspot.evaluation.metrics.detections import DETECTIONS_PER_IMAGE
from regionspot.evaluation.metrics.ground_truth import read_ground_truth
from regionspot.evaluation.metrics.selection import Rule, Score, Selection
from regionspot.evaluation.report.protocol import Metric, Protocol
from regionspot.evaluation.report.results import check_results_folder, evaluate_method
from regionspot.fusion.checkpoint import HeadInfo, load_checkpoint
from regionspot.fusion.templates import template_set
from regionspot.fusion.vocabulary import Vocabulary
from regionspot.pipeline.backbones.builders import get_preset
from regionspot.pipeline.backbones.clip import load_text_encoder
from regionspot.pipeline.backbones.dense import dense_set
from regionspot.pipeline.backbones.dtypes import AUTO
from regionspot.pipeline.backbones.sam import load_localizer
from regionspot.pipeline.datasets.failure_limit import EVALUATION_LIMIT, FailureLimit
from regionspot.pipeline.datasets.proposals import GROUND_TRUTH
from regionspot.pipeline.datasets.registry import image_folder_of, read_split
from regionspot.pipeline.distributed.cluster import check_scheduler
from regionspot.pipeline.extraction.config import absolute, absolute_if_exists, absolute_weights
from regionspot.pipeline.images.decode import Exif, parse_exif

log = logging.getLogger(__name__)

Model = TypeVar("Model")
# Fixed AP has no limit per image, but all pairs of a region and a class of LVIS val are too many to keep: 300 boxes of
# 1,203 classes are 361,000 pairs an image. The limit is stated in the protocol.
FIXED_DETECTIONS_PER_IMAGE = 3000

_Loaded: TypeAlias = tuple[ScoringMethod, Vocabulary, tuple[str, ...]]  # the last: names of the classes trained on


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """The options of an evaluation.

    data, dataset, split, annotations   as for `read_dataset`; the dataset must be in COCO's format
    out          folder of results.json, detections.json and the parts for resuming
    metric, engine, fixed   as in `Protocol`; "lvis" needs LVIS's format
    selection, score, detections_per_image   of an image's detections, as in `Selection`. None: the square root for
                 "tokenize-anything", else the product; and 300, or 3,000 for fixed AP
    checkpoint   the head; may be None for a baseline, then `preset` names the encoder
    head_class   `file.py:Class` or `package.module:Class` of a head of the user's own class, whose code is then run
    baseline     one of baselines.py instead of the head; only "dense-mask" has masks, only "dense" takes a cache
    cache        read features from this cache instead of running the backbones; without masks then
    boxes        "gt", or a detector's proposals file
    limit        evaluate only the first images, against their own ground truth
    templates    a template set; None: those that the head was trained with
    names_from   "name", "synonyms" or "definitions": what the prompts contain
    exif, preprocess, dtype   of images; by default (None, None, "auto") those of the head's training features, which
                 are always those of `cache`; for a baseline: "auto", "direct", the default of the device
    check_weights  refuse other weights and features than the head was trained on; False: only log the difference
    scheduler    workers, see pipeline/distributed/cluster.py; `out` must be on a disk that they share
    """

    data: Path
    out: Path
    metric: Metric = "lvis"
    engine: Engine = "hotcoco"
    fixed: bool = False
    selection: Rule = "best"
    score: Score | None = None
    detections_per_image: int | None = None
    dataset: str = "lvis"
    split: str = "val"
    annotations: Path | None = None
    checkpoint: Path | None = None
    head_class: str | None = None
    preset: str | None = None
    baseline: Baseline | None = None
    cache: str | Path | None = None
    boxes: str = GROUND_TRUTH
    limit: int | None = None
    masks: bool = True
    templates: str | None = None
    names_from: NamesFrom = "name"
    exif: Exif | None = None
    weights: str | None = None
    sam_weights: str | None = None
    clip_weights: str | None = None
    device: str | None = None
    dtype: str = AUTO
    preprocess: str | None = None
    check_weights: bool = True
    max_failures: FailureLimit = EVALUATION_LIMIT
    scheduler: str = "none"

    def with_absolute_paths(self) -> EvaluationOptions:
        """The same evaluation for processes with another working directory."""
        file, _, head = (self.head_class or "").rpartition(":")
        return replace(
            self,
            data=self.data.absolute(),
            out=self.out.absolute(),
            annotations=self.annotations and self.annotations.absolute(),
            checkpoint=self.checkpoint and self.checkpoint.absolute(),
            head_class=f"{absolute(file)}:{head}" if file.endswith(".py") else self.head_class,
            cache=self.cache and absolute(str(self.cache)),
            boxes=self.boxes if self.boxes == GROUND_TRUTH else absolute_if_exists(self.boxes),
            weights=absolute_weights(self.weights),
            sam_weights=absolute_weights(self.sam_weights),
            clip_weights=absolute_weights(self.clip_weights),
        )


def evaluate(options: EvaluationOptions) -> dict[str, Any]:
    """Evaluate, write the files of results and return their content, as `evaluate_method` does.

    Raises InputError and its subclasses, with a message of one line, for files and options that do not fit together.
    """
    _check_options(options)
    selection = _selection(options)
    check_results_folder(options.out, (options.annotations, options.boxes, options.checkpoint, options.cache))
    manifest = _read_manifest(options)
    annotations = options.annotations or _annotation_file(options.data, manifest)
    image_folder = image_folder_of(options.dataset, options.data, options.split, manifest)
    # Before models are loaded and run for hours.
    ground_truth = read_ground_truth(annotations, federated=options.metric == "lvis")
    if options.masks and options.cache is None and options.baseline in (None, "dense-mask"):
        if options.metric == "coco" and not any("segmentation" in each for each in ground_truth.annotations):
            log.info("%s: has no masks; only boxes are evaluated", annotations)
            options = replace(options, masks=False)
        else:
            ground_truth.require_masks()
    method, vocabulary, trained_classes = _method(options, manifest, image_folder)
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
    return _method(options, manifest, image_folder)[0]


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


def _annotation_file(data: Path, manifest: Manifest) -> Path:
    """The annotation file that the manifest was read from: the first of its sources."""
    name: str = next(iter(manifest.source["files"]))
    for folder in (data, data / "annotations"):
        if (folder / name).is_file():
            return folder / name
    raise AnnotationError(f"{data}: {name} no longer exists; name it with --annotations")


def _method(options: EvaluationOptions, manifest: Manifest, image_folder: Path) -> _Loaded:
    device = str(compute_device(options.device))
    if options.cache is not None:
        from_cache = _from_cache if options.baseline is None else _baseline_from_cache
        return from_cache(options, options.cache, manifest, device)
    if options.baseline is not None:
        return _baseline(options, options.baseline, manifest.head(options.limit), image_folder, device)
    return _from_images(options, manifest.head(options.limit), image_folder, device)


def _from_images(options: EvaluationOptions, manifest: Manifest, image_folder: Path, device: str) -> _Loaded:
    spot = RegionSpot.load(
        _checkpoint(options),
        options.weights,
        device,
        preset=options.preset,
        head_class=options.head_class,
        sam_weights=options.sam_weights,
        clip_weights=options.clip_weights,
        dtype=options.dtype,
        preprocess=options.preprocess,
        check_weights=options.check_weights,
    )
    exif = options.exif or parse_exif(spot.exif or "auto")
    if spot.exif not in (None, exif):
        log.warning(
            "%s: was trained on images with --exif %s; evaluated with --exif %s",
            options.checkpoint,
            spot.exif,
            exif,
        )
    templates = template_set(options.templates) if options.templates else spot.templates
    vocabulary = category_vocabulary(manifest.categories, templates, spot.encoder, options.names_from)
    method = HeadOnImages(spot, manifest, image_folder, vocabulary, masks=options.masks, exif=exif)
    return method, vocabulary, spot.trained_classes


@dataclass(frozen=True)
class _BaselineModels:
    """The backbones of a baseline: those of the checkpoint, if there is one, or else of the preset."""

    encoder: str
    encoder_dtype: str
    localizer: str
    localizer_dtype: str
    info: HeadInfo

    @classmethod
    def of(cls, options: EvaluationOptions) -> _BaselineModels:
        if options.checkpoint is not None:
            info = load_checkpoint(options.checkpoint, options.preset, options.head_class).info
            features = head_features(options.checkpoint, info)
            maps, tokens = features.maps, features.tokens
            return cls(maps.name, maps.dtype, tokens.name, tokens.dtype, info)
        if options.preset is None:
            raise InputError("a baseline without a checkpoint needs an encoder; give --preset")
        preset = get_preset(options.preset)
        return cls(preset.encoder, AUTO, preset.localizer, AUTO, HeadInfo(preset=options.preset))


def _baseline(
    options: EvaluationOptions, baseline: Baseline, manifest: Manifest, image_folder: Path, device: str
) -> _Loaded:
    models = _BaselineModels.of(options)

    def load(load_model: Callable[..., Model], name: str, source: str | None, dtype: str) -> Model:
        dtype = dtype if options.dtype == AUTO else options.dtype
        return load_model(name, source or options.weights, device, dtype, preprocess=options.preprocess or "direct")

    encoder = load(load_text_encoder, models.encoder, options.clip_weights, models.encoder_dtype)
    templates = _templates(options, models.info)
    vocabulary = category_vocabulary(manifest.categories, templates, encoder, options.names_from)
    exif = options.exif or "auto"
    if baseline == "crop":
        return CropBaseline(encoder, manifest, image_folder, vocabulary, exif=exif), vocabulary, ()
    localizer, masks = None, False
    if baseline == "dense-mask":
        localizer = load(load_localizer, models.localizer, options.sam_weights, models.localizer_dtype)
        masks = options.masks
    method = MapBaseline(
        baseline, encoder, manifest, image_folder, vocabulary, localizer=localizer, masks=masks, exif=exif
    )
    return method, vocabulary, ()


def _baseline_from_cache(options: EvaluationOptions, path: str | Path, manifest: Manifest, device: str) -> _Loaded:
    models, cache = _BaselineModels.of(options), FeatureCache.open(path)
    _require_same_boxes(options, cache, manifest)
    dense_maps = dense_set(models.encoder)
    if dense_maps not in cache.feature_sets:
        names = ", ".join(cache.feature_sets) or "none"
        raise InputError(
            f"{cache.path}: holds the feature sets {names}, and --baseline dense needs {dense_maps}; run the "
            "`regionspot extract` of this cache again with --map dense"
        )
    _check_extraction_options(options, cache, [dense_maps])
    source, templates = options.clip_weights or options.weights, _templates(options, models.info)
    vocabulary = cache_vocabulary(cache, models.encoder, templates, source, device, options.names_from)
    return DenseOnCache(cache, dense_maps, vocabulary, limit=options.limit, device=device), vocabulary, ()


def _from_cache(options: EvaluationOptions, path: str | Path, manifest: Manifest, device: str) -> _Loaded:
    checkpoint = load_checkpoint(_checkpoint(options), options.preset, options.head_class)
    cache = FeatureCache.open(path)
    _require_same_boxes(options, cache, manifest)
    features = head_features(_checkpoint(options), checkpoint.info)
    features.require_cache(cache, strict=options.check_weights)
    token_set, map_set = features.tokens.name, features.maps.name
    _check_extraction_options(options, cache, (token_set, map_set))
    source = options.clip_weights or options.weights
    templates = _templates(options, checkpoint.info)
    vocabulary = cache_vocabulary(cache, map_set, templates, source, device, options.names_from)
    head = checkpoint.head.requires_grad_(False)  # torch rounds differently otherwise, also without autograd
    method = HeadOnCache(head, cache, vocabulary, token_set, map_set, limit=options.limit, device=device)
    return method, vocabulary, checkpoint.info.classes


def _check_extraction_options(options: EvaluationOptions, cache: FeatureCache, feature_sets: Sequence[str]) -> None:
    """Raises ProvenanceMismatchError if an extraction option contradicts the features of the cache."""
    dtype = None if options.dtype == AUTO else options.dtype
    given = {"exif": options.exif, "preprocess": options.preprocess, "dtype": dtype}
    for name in feature_sets:
        provenance = cache.feature_sets[name].provenance
        for option, value in given.items():
            if value is not None and provenance.get(option, value) != value:
                raise ProvenanceMismatchError(
                    f"{cache.path}: its {name} features were extracted with --{option} {provenance[option]}, not "
                    f"{value}; leave --{option} out, or evaluate from images without --cache"
                )


def _require_same_boxes(options: EvaluationOptions, cache: FeatureCache, manifest: Manifest) -> None:
    """Raises ProvenanceMismatchError unless the cache holds the given boxes; it may hold a subset of the images."""
    rows = np.flatnonzero(np.isin(manifest.image_ids, cache.manifest.image_ids))
    if manifest.select(rows).digest() != cache.manifest.digest():
        raise ProvenanceMismatchError(
            f"{cache.path}: was extracted from other images, boxes or classes than {options.dataset} {options.split} "
            f"with boxes {options.boxes}; extract with these, or evaluate from images without --cache"
        )


def _templates(options: EvaluationOptions, info: HeadInfo) -> Sequence[str]:
    if options.templates:
        return template_set(options.templates)
    return info.templates or template_set("reference")


def _checkpoint(options: EvaluationOptions) -> Path:
    if options.checkpoint is None:
        raise InputError("evaluation needs a checkpoint, or a baseline and a preset; give --checkpoint")
    return options.checkpoint
