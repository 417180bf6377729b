"""What training learns from: caches with their vocabularies, whether they belong together, and what they are.

Features of one run must have been made alike (cache/format/compatibility.py) and each vocabulary by the text encoder
that belongs to the maps: a mixture would train without complaint and recognise nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from regionspot.cache.errors import InputError
from regionspot.cache.format.compatibility import compare, description
from regionspot.cache.format.schema import FeatureSet
from regionspot.cache.reading.batch_reader import BatchReader
from regionspot.cache.store import FeatureCache
from regionspot.fusion.checkpoint import HeadInfo
from regionspot.fusion.config import TrainConfig
from regionspot.fusion.head import HeadConfig
from regionspot.fusion.vocabulary import Vocabulary

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Source:
    """What one cache offers to training: `rows` are extracted images with at least one region of known class."""

    cache: FeatureCache
    maps: FeatureSet
    tokens: FeatureSet
    rows: NDArray[np.int64]
    reader: BatchReader


def open_source(cache: FeatureCache, map_set: str | None = None, token_set: str | None = None) -> Source:
    """Pick the feature sets (default: the only one of their kind) and the usable rows of a cache.

    Raises InputError when it holds no such set, several to choose from, two that saw the images turned differently, or
    no image to learn from.
    """
    maps, tokens = _feature_set(cache, "map", map_set), _feature_set(cache, "token", token_set)
    require_same_orientation(cache, tokens, maps)
    valid = cache.valid_rows([maps.name, tokens.name])
    known = np.concatenate([[0], np.cumsum(cache.manifest.category_index >= 0)])[cache.manifest.offsets]
    rows = valid[np.diff(known)[valid] > 0]
    if not len(rows):
        raise InputError(
            f"{cache.path}: none of its {len(cache):,} images is extracted and has a region of known class; "
            "run `regionspot extract` with an annotated dataset first"
        )
    return Source(cache, maps, tokens, rows, cache.batch_reader(maps.name, tokens.name))


def _feature_set(cache: FeatureCache, kind: Literal["map", "token"], name: str | None) -> FeatureSet:
    of_kind = {each.name: each for each in cache.feature_sets.values() if each.kind == kind}
    if name is None and len(of_kind) == 1:
        return next(iter(of_kind.values()))
    if name is None or name not in of_kind:
        asked = "training needs one; name it" if name is None else f"{name!r} was asked for"
        raise InputError(f"{cache.path}: its {kind} feature sets are: {', '.join(of_kind) or 'none'}; {asked}")
    return of_kind[name]


def require_same_orientation(cache: FeatureCache, tokens: FeatureSet, maps: FeatureSet) -> None:
    """Raises InputError for tokens and maps of images that were turned by different EXIF rules."""
    rules = [each.provenance.get("exif") for each in (tokens, maps)]
    if None not in rules and rules[0] != rules[1]:
        raise InputError(
            f"{cache.path}: {tokens.name} was extracted with --exif {rules[0]} and {maps.name} with --exif {rules[1]}, "
            "so their images are not turned alike; extract both again with one rule"
        )


def head_config_for(sources: Sequence[Source], vocabularies: Sequence[Vocabulary], config: TrainConfig) -> HeadConfig:
    """The head that these features and vocabularies need. Raises InputError where they do not belong together."""
    if not sources:
        raise InputError("training: there is no cache to learn from; give at least one with --cache")
    if len(vocabularies) != len(sources):
        raise InputError(f"training: {len(sources)} caches but {len(vocabularies)} vocabularies, expected one a cache")
    text_dim = vocabularies[0].embeddings.shape[1]
    for source, vocabulary in zip(sources, vocabularies, strict=True):
        _require_same_backbones(source, sources[0])
        _require_fitting_vocabulary(source, vocabulary, text_dim)
    first = sources[0]
    return HeadConfig(
        token_dim=first.tokens.shape[-1],
        width=first.maps.shape[-1],
        text_dim=text_dim,
        layers=config.layers,
        heads=config.heads,
        ffn=config.ffn,
        dropout=config.dropout,
    )


def _require_same_backbones(source: Source, first: Source) -> None:
    for ours, theirs in ((source.maps, first.maps), (source.tokens, first.tokens)):
        here, there = source.cache.path, first.cache.path
        if ours.name != theirs.name:
            raise InputError(
                f"{here}: its {ours.kind} features are {ours.name}, those of {there} are {theirs.name}; "
                "train on features of the same backbones"
            )
        compared = compare(description(theirs), description(ours))
        if compared.deciding:
            raise InputError(
                f"{here}: its {ours.name} {ours.shape} features were made otherwise than those of {there}: "
                f"{compared.text('{field} is {found}, there {expected}')}; train on features of the same backbones, "
                f"made alike: extract this cache again with {compared.options() or 'the same options'}"
            )
        if compared.unstated:
            log.warning(
                "%s and %s: only one of them states of its %s features: %s; trained on as if they were made alike",
                there,
                here,
                ours.name,
                ", ".join(compared.unstated),
            )


def _require_fitting_vocabulary(source: Source, vocabulary: Vocabulary, text_dim: int) -> None:
    path, classes, width = source.cache.path, len(source.cache.categories), vocabulary.embeddings.shape[1]
    if len(vocabulary) != classes:
        raise InputError(f"{path}: has {classes} classes but its vocabulary {len(vocabulary)}; build it from the cache")
    if width != text_dim:
        raise InputError(f"{path}: its vocabulary is {width} wide, that of the first cache {text_dim}")
    if vocabulary.encoder_sha256 and _weights(source.maps) not in (None, vocabulary.encoder_sha256):
        raise InputError(
            f"{path}: its maps are {_describe(source.maps)}, its vocabulary comes from a text encoder with weights "
            f"{vocabulary.encoder_sha256[:12]}; take both from the same model"
        )


def _weights(feature_set: FeatureSet) -> str | None:
    sha256 = feature_set.provenance.get("weights_sha256")
    return None if sha256 is None else str(sha256)


def _describe(feature_set: FeatureSet) -> str:
    return f"{feature_set.name} {feature_set.shape} with weights {(_weights(feature_set) or 'unknown')[:12]}"


def run_identity(
    sources: Sequence[Source],
    vocabularies: Sequence[Vocabulary],
    shares: NDArray[np.float64],
    config: TrainConfig,
    preset: str | None,
) -> dict[str, Any]:
    """All that decides the numbers of a run, for `run.json`. Paths are no part of it: a cache may be moved."""
    caches = [
        {
            "dataset": source.cache.manifest.dataset,
            "split": source.cache.manifest.split,
            "manifest": source.cache.manifest.digest(),
            "pictures": len(source.rows),
            "share": round(float(share), 9),
            "map": _record(source.maps),
            "token": _record(source.tokens),
            "vocabulary": vocabulary.digest,
        }
        for source, vocabulary, share in zip(sources, vocabularies, shares, strict=True)
    ]
    return {"preset": preset, "config": asdict(config), "caches": caches}


def _record(feature_set: FeatureSet) -> dict[str, Any]:
    """What run.json and the head keep of a feature set: its description, its name, and how it was stored."""
    return {"name": feature_set.name, "encoding": feature_set.dtype, **description(feature_set)}


def run_info(sources: Sequence[Source], vocabularies: Sequence[Vocabulary], identity: dict[str, Any]) -> HeadInfo:
    """What is kept with the head that these sources give."""
    maps, tokens = sources[0].maps, sources[0].tokens
    weights = {each.name: sha256 for each in (maps, tokens) if (sha256 := _weights(each)) is not None}
    return HeadInfo(
        preset=identity["preset"],
        localizer=tokens.name,
        encoder=maps.name,
        weights_sha256=weights,
        caches=tuple(identity["caches"]),
        vocabularies=tuple(vocabulary.digest for vocabulary in vocabularies),
        templates=vocabularies[0].templates,
    )
