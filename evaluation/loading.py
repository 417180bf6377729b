"""The scoring method of an evaluation: a head on images or on a cache, or a baseline, checked against its features."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias, TypeVar

import numpy as np

from regionspot.cache.errors import InputError, ProvenanceMismatchError
from regionspot.cache.format.manifest import Manifest
from regionspot.cache.machine import compute_device
from regionspot.cache.store import FeatureCache
from regionspot.evaluation.inference.baselines import Baseline, CropBaseline, DenseOnCache, MapBaseline
from regionspot.evaluation.inference.cache_vocabulary import cache_vocabulary, category_vocabulary
from regionspot.evaluation.inference.head_features import head_features
from regionspot.evaluation.inference.methods import HeadOnCache, HeadOnImages
from regionspot.evaluation.inference.region_spot import RegionSpot
from regionspot.evaluation.inference.resumable import ScoringMethod
from regionspot.evaluation.options import EvaluationOptions
from regionspot.fusion.checkpoint import HeadInfo, load_checkpoint
from regionspot.fusion.templates import template_set
from regionspot.fusion.vocabulary import Vocabulary
from regionspot.pipeline.backbones.builders import get_preset
from regionspot.pipeline.backbones.clip import load_text_encoder
from regionspot.pipeline.backbones.dense import dense_set
from regionspot.pipeline.backbones.dtypes import AUTO
from regionspot.pipeline.backbones.sam import load_localizer
from regionspot.pipeline.images.decode import parse_exif

log = logging.getLogger(__name__)

Model = TypeVar("Model")
_Loaded: TypeAlias = tuple[ScoringMethod, Vocabulary, tuple[str, ...]]  # the last: names of the classes trained on


def load_method(options: EvaluationOptions, manifest: Manifest, image_folder: Path) -> _Loaded:
    """The method, the vocabulary of the manifest's classes, and names of the classes that the head was trained on.

    Raises InputError and its subclasses for weights, features and options that do not fit together.
    """
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
    method = HeadOnImages(
        spot,
        manifest,
        image_folder,
        vocabulary,
        masks=options.masks,
        mask_threshold=options.mask_threshold,
        exif=exif,
    )
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
        baseline,
        encoder,
        manifest,
        image_folder,
        vocabulary,
        localizer=localizer,
        masks=masks,
        mask_threshold=options.mask_threshold,
        exif=exif,
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
