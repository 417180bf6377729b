"""An evaluation as it is asked for on the command line: which files, boxes, head or baseline make the method.

The numbers themselves are made in `results`; here is only what has to be found, loaded and fit together first.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from regionspot.cache.errors import AnnotationError, InputError, ProvenanceMismatchError, unknown_name
from regionspot.cache.format.manifest import Manifest
from regionspot.cache.machine import compute_device
from regionspot.cache.store import FeatureCache
from regionspot.evaluation.inference.baselines import CropBaseline, PooledBaseline
from regionspot.evaluation.inference.head_features import features_of
from regionspot.evaluation.inference.methods import HeadOnCache, HeadOnImages
from regionspot.evaluation.inference.region_spot import RegionSpot
from regionspot.evaluation.inference.resumable import Method
from regionspot.evaluation.inference.vocabularies import cache_vocabulary
from regionspot.evaluation.metrics.ground_truth import read_ground_truth
from regionspot.evaluation.results import check_out, evaluate_method
from regionspot.fusion.checkpoint import HeadInfo, load_checkpoint
from regionspot.fusion.templates import template_set
from regionspot.fusion.vocabulary import Vocabulary, build_vocabulary
from regionspot.pipeline.backbones.builders import get_preset
from regionspot.pipeline.backbones.clip import load_text_encoder
from regionspot.pipeline.backbones.dtypes import AUTO
from regionspot.pipeline.datasets.failure_limit import EVALUATION_LIMIT, FailureLimit
from regionspot.pipeline.datasets.proposals import GROUND_TRUTH
from regionspot.pipeline.datasets.registry import image_folder_of, read_split
from regionspot.pipeline.images.decode import Exif, parse_exif

log = logging.getLogger(__name__)

Baseline = Literal["crop", "pooled"]


@dataclass(frozen=True, kw_only=True)
class LvisEvaluation:
    """One evaluation, as it is asked for on the command line.

    data, dataset, split, annotations   as for `read_dataset`; the dataset must be in LVIS's form
    out          folder of results.json, detections.json and the parts that a later run goes on with
    checkpoint   the head; may be left out for a baseline, then `preset` names the encoder
    baseline     "crop" or "pooled" instead of the head
    cache        read features from here instead of running the backbones; then there are no masks
    boxes        "gt", or a detector's proposals file
    limit        only the first images; AP is then that of these images alone
    templates    a template set; None: those that the head was trained with
    exif, preprocess, dtype   of images; by default (None, None, "auto") those of the features that the head was trained
                 on, which are always those of `cache`; a baseline: "auto", "direct", what suits the device
    check_weights  refuse weights and features other than those that the head was trained on; else that is only said
    """

    data: Path
    out: Path
    dataset: str = "lvis"
    split: str = "val"
    annotations: Path | None = None
    checkpoint: Path | None = None
    preset: str | None = None
    baseline: Baseline | None = None
    cache: str | Path | None = None
    boxes: str = GROUND_TRUTH
    limit: int | None = None
    masks: bool = True
    templates: str | None = None
    exif: Exif | None = None
    weights: str | None = None
    sam_weights: str | None = None
    clip_weights: str | None = None
    device: str | None = None
    dtype: str = AUTO
    preprocess: str | None = None
    check_weights: bool = True
    max_failures: FailureLimit = EVALUATION_LIMIT


def evaluate_lvis(asked: LvisEvaluation) -> dict[str, Any]:
    """Evaluate as asked; `evaluate_method` says what is written, returned and raised.

    Raises InputError, one line, for whatever of the files or options does not fit.
    """
    _check_options(asked)
    check_out(asked.out, (asked.annotations, asked.boxes, asked.checkpoint, asked.cache))
    manifest = _manifest(asked)
    annotations = asked.annotations or _annotation_file(asked.data, manifest)
    images = image_folder_of(asked.dataset, asked.data, asked.split, manifest)
    truth = read_ground_truth(annotations)  # before models are loaded, let alone run for hours
    if asked.masks and asked.cache is None and asked.baseline is None:
        truth.require_masks()
    method, vocabulary = _method(asked, manifest, images)
    return evaluate_method(
        method,
        truth,
        asked.out,
        boxes="ground truth" if asked.boxes == GROUND_TRUTH else f"detector proposals, {Path(asked.boxes).name}",
        templates=vocabulary.templates,
        max_failures=asked.max_failures,
        images=None if asked.cache else images,
    )


def _check_options(asked: LvisEvaluation) -> None:
    if asked.baseline is not None and asked.baseline not in get_args(Baseline):
        raise unknown_name("baseline", asked.baseline, get_args(Baseline))
    if asked.cache is not None and asked.baseline is not None:
        raise InputError(f"baseline {asked.baseline}: runs from images, not from a cache; leave --cache away")


def _manifest(asked: LvisEvaluation) -> Manifest:
    """The split with the boxes asked for, whole; `limit` cuts it later."""
    return read_split(
        asked.dataset, asked.data, asked.split, asked.annotations, asked.boxes, max_failures=asked.max_failures
    )


def _annotation_file(data: Path, manifest: Manifest) -> Path:
    """The file that `read_dataset` found: the first of the manifest's sources."""
    name: str = next(iter(manifest.source["files"]))
    for folder in (data, data / "annotations"):
        if (folder / name).is_file():
            return folder / name
    raise AnnotationError(f"{data}: {name} is not here any more; name it with --annotations")


def _method(asked: LvisEvaluation, manifest: Manifest, images: Path) -> tuple[Method, Vocabulary]:
    device = str(compute_device(asked.device))
    if asked.cache is not None:
        return _from_cache(asked, asked.cache, manifest, device)
    if asked.baseline is not None:
        return _baseline(asked, asked.baseline, manifest.head(asked.limit), images, device)
    return _from_images(asked, manifest.head(asked.limit), images, device)


def _from_images(
    asked: LvisEvaluation, manifest: Manifest, images: Path, device: str
) -> tuple[HeadOnImages, Vocabulary]:
    spot = RegionSpot.load(
        _checkpoint(asked),
        asked.weights,
        device,
        preset=asked.preset,
        sam_weights=asked.sam_weights,
        clip_weights=asked.clip_weights,
        dtype=asked.dtype,
        preprocess=asked.preprocess,
        check_weights=asked.check_weights,
    )
    exif = asked.exif or parse_exif(spot.exif or "auto")
    if spot.exif not in (None, exif):
        log.warning(
            "%s: was trained on images turned by --exif %s; evaluated with %s, as asked for",
            asked.checkpoint,
            spot.exif,
            exif,
        )
    vocabulary = spot.vocabulary(_names(manifest), asked.templates)
    return HeadOnImages(spot, manifest, images, vocabulary, masks=asked.masks, exif=exif), vocabulary


def _baseline(
    asked: LvisEvaluation, baseline: str, manifest: Manifest, images: Path, device: str
) -> tuple[CropBaseline | PooledBaseline, Vocabulary]:
    dtype = asked.dtype
    if asked.checkpoint is not None:
        info = load_checkpoint(asked.checkpoint, asked.preset).info
        maps = features_of(asked.checkpoint, info).maps
        name, dtype = maps.name, maps.dtype if asked.dtype == AUTO else asked.dtype
    else:
        info = HeadInfo(preset=asked.preset)
        if asked.preset is None:
            raise InputError("a baseline without a checkpoint needs its encoder; give --preset")
        name = get_preset(asked.preset).encoder
    source, rule = asked.clip_weights or asked.weights, asked.preprocess or "direct"
    encoder = load_text_encoder(name, source, device, dtype, preprocess=rule)
    vocabulary = build_vocabulary(_names(manifest), _templates(asked, info), encoder)
    kind = CropBaseline if baseline == "crop" else PooledBaseline
    return kind(encoder, manifest, images, vocabulary, exif=asked.exif or "auto"), vocabulary


def _from_cache(
    asked: LvisEvaluation, path: str | Path, manifest: Manifest, device: str
) -> tuple[HeadOnCache, Vocabulary]:
    checkpoint, cache = load_checkpoint(_checkpoint(asked), asked.preset), FeatureCache.open(path)
    _require_same_boxes(asked, cache, manifest)
    trained = features_of(_checkpoint(asked), checkpoint.info)
    trained.require_cache(cache, strict=asked.check_weights)
    sets = trained.tokens.name, trained.maps.name
    _require_as_extracted(asked, cache, sets)
    source = asked.clip_weights or asked.weights
    vocabulary = cache_vocabulary(cache, sets[1], _templates(asked, checkpoint.info), source, device)
    method = HeadOnCache(checkpoint.head, cache, vocabulary, sets, limit=asked.limit, device=device)
    return method, vocabulary


def _require_as_extracted(asked: LvisEvaluation, cache: FeatureCache, sets: Sequence[str]) -> None:
    """An option that says how images become features has no say over those that were extracted already."""
    given = {"exif": asked.exif, "preprocess": asked.preprocess, "dtype": None if asked.dtype == AUTO else asked.dtype}
    for name in sets:
        stated = cache.feature_sets[name].provenance
        for option, value in given.items():
            if value is not None and stated.get(option, value) != value:
                raise ProvenanceMismatchError(
                    f"{cache.path}: its {name} features were extracted with --{option} {stated[option]}, asked for is "
                    f"{value}; leave --{option} out, or evaluate from images without --cache"
                )


def _require_same_boxes(asked: LvisEvaluation, cache: FeatureCache, manifest: Manifest) -> None:
    """The cache may hold a part of the split, but of its images the very boxes that are asked for."""
    rows = np.flatnonzero(np.isin(manifest.image_ids, cache.manifest.image_ids))
    if manifest.select(rows).digest() != cache.manifest.digest():
        raise ProvenanceMismatchError(
            f"{cache.path}: was extracted from other images, boxes or classes than {asked.dataset} {asked.split} "
            f"with boxes {asked.boxes}; extract with these, or evaluate from images without --cache"
        )


def _names(manifest: Manifest) -> list[str]:
    return [category.name for category in manifest.categories]


def _templates(asked: LvisEvaluation, info: HeadInfo) -> Sequence[str]:
    if asked.templates:
        return template_set(asked.templates)
    return info.templates or template_set("reference")


def _checkpoint(asked: LvisEvaluation) -> Path:
    if asked.checkpoint is None:
        raise InputError("evaluation needs a checkpoint, or a baseline and a preset; give --checkpoint")
    return asked.checkpoint
