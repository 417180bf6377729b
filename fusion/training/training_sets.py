"""The training sets of a run, one per cache: their feature sets and usable rows, and whether they fit together.

The features of one run must have been made with the same models and options (cache/format/compatibility.py), and each
vocabulary by the text encoder that belongs to the maps: otherwise training raises no error and the head learns nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from regionspot.cache.errors import InputError
from regionspot.cache.format.compatibility import compare, description
from regionspot.cache.format.manifest import Manifest
from regionspot.cache.format.schema import FLIP, FeatureSet
from regionspot.cache.store import FeatureCache
from regionspot.fusion.checkpoint import Checkpoint, HeadInfo, load_checkpoint
from regionspot.fusion.heads.pooling import relative_boxes
from regionspot.fusion.heads.spec import HeadSpec, without_folder
from regionspot.fusion.training.config import TrainConfig
from regionspot.fusion.vocabulary import Vocabulary

log = logging.getLogger(__name__)

_CHUNK = 1_000_000  # regions: numpy converts an index to 64 bits, and a large dataset has 30 million


@dataclass(frozen=True, eq=False)
class TrainingSet:
    """What training reads from one cache.

    rows   int64 (n,), extracted images with at least one region of known class
    """

    cache: FeatureCache
    maps: FeatureSet
    tokens: FeatureSet
    rows: NDArray[np.int64]

    def relative_boxes(
        self, rows: NDArray[np.int64], boxes_xyxy: NDArray[np.float32], region_mask: NDArray[np.bool_]
    ) -> NDArray[np.float32]:
        """float32 (B, R, 4): boxes of the images at `rows` on their maps, relative to the image; padding is 0.

        The boxes of a cache are those of the original images; here they are mirrored where the maps are.
        """
        boxes = relative_boxes(boxes_xyxy, self.cache.manifest.heights[rows], self.cache.manifest.widths[rows])
        if self.maps.name.endswith(FLIP):
            boxes = boxes[..., [2, 1, 0, 3]]
            boxes[..., ::2] = 1 - boxes[..., ::2]
            boxes[~region_mask] = 0
        return boxes


def open_training_set(cache: FeatureCache, map_set: str | None = None, token_set: str | None = None) -> TrainingSet:
    """Select the feature sets (default: the only one of each kind) and the usable rows of a cache.

    Raises InputError if a feature set is missing or ambiguous, if the two were extracted with different EXIF rules, or
    if no image is usable.
    """
    maps, tokens = _feature_set(cache, "map", map_set), _feature_set(cache, "token", token_set)
    require_same_orientation(cache, tokens, maps)
    valid = cache.valid_rows([maps.name, tokens.name])
    rows = valid[_has_known_class(cache.manifest)[valid]]
    if not len(rows):
        raise InputError(
            f"{cache.path}: none of its {len(cache):,} images is extracted and has a region of known class; "
            "run `regionspot extract` with an annotated dataset first"
        )
    return TrainingSet(cache, maps, tokens, rows)


def open_flipped(original: TrainingSet) -> TrainingSet:
    """The mirrored view of a training set, from the same cache. Raises InputError if the cache does not have it."""
    cache, maps, tokens = original.cache, original.maps.name + FLIP, original.tokens.name + FLIP
    if missing := [name for name in (maps, tokens) if name not in cache.feature_sets]:
        raise InputError(
            f"{cache.path}: --views flip needs the feature sets {maps} and {tokens}, and {' and '.join(missing)} is "
            "missing; run the `regionspot extract` of this cache again with --views flip, or train without it"
        )
    return open_training_set(cache, maps, tokens)


def _has_known_class(manifest: Manifest) -> NDArray[np.bool_]:
    """bool (N,): whether an image has a region of known class."""
    known: NDArray[np.bool_] = manifest.offsets[1:] > manifest.offsets[:-1]
    # Only the regions of unknown class, which are few or none in a dataset, need more than a flag for each image.
    unknown = np.flatnonzero(manifest.category_index < 0)
    images, counts = np.unique(np.searchsorted(manifest.offsets, unknown, side="right") - 1, return_counts=True)
    known[images] = manifest.offsets[images + 1] - manifest.offsets[images] > counts
    return known


def _feature_set(cache: FeatureCache, kind: Literal["map", "token"], name: str | None) -> FeatureSet:
    of_kind = {feature_set.name: feature_set for feature_set in cache.feature_sets.values() if feature_set.kind == kind}
    if name is None and len(of_kind) == 1:
        return next(iter(of_kind.values()))
    if name is None or name not in of_kind:
        problem = "training needs one; name it" if name is None else f"{name!r} is not one of them"
        raise InputError(f"{cache.path}: its {kind} feature sets are: {', '.join(of_kind) or 'none'}; {problem}")
    return of_kind[name]


def require_same_orientation(cache: FeatureCache, tokens: FeatureSet, maps: FeatureSet) -> None:
    """Raises InputError if tokens and maps were extracted with different EXIF rules."""
    rules = [feature_set.provenance.get("exif") for feature_set in (tokens, maps)]
    if None not in rules and rules[0] != rules[1]:
        raise InputError(
            f"{cache.path}: {tokens.name} was extracted with --exif {rules[0]} and {maps.name} with --exif {rules[1]}, "
            "so their images may be rotated differently; extract both again with one rule"
        )


def head_spec_for(
    training_sets: Sequence[TrainingSet], vocabularies: Sequence[Vocabulary], config: TrainConfig
) -> HeadSpec:
    """The head for these features and vocabularies. Raises InputError if they do not fit together."""
    if not training_sets:
        raise InputError("training: no cache is given; give at least one with --cache")
    if len(vocabularies) != len(training_sets):
        raise InputError(
            f"training: {len(training_sets)} caches but {len(vocabularies)} vocabularies, expected one for each cache"
        )
    first, text_dim = training_sets[0], vocabularies[0].embeddings.shape[1]
    for training_set, vocabulary in zip(training_sets, vocabularies, strict=True):
        require_same_backbones(training_set, first)
        _require_matching_vocabulary(training_set, vocabulary, text_dim)
    decoder = {"layers": config.layers, "heads": config.heads, "ffn": config.ffn, "dropout": config.dropout}
    return HeadSpec(
        type=config.head,
        token_dim=first.tokens.shape[-1],
        width=first.maps.shape[-1],
        text_dim=text_dim,
        options=(decoder if config.head in ("fusion", "guided") else {}) | dict(config.head_options),
    )


def initial_head(checkpoint: Path, spec: HeadSpec, first: TrainingSet) -> Checkpoint:
    """A trained head, ours or a released one, from whose weights the training of a head `spec` starts.

    Raises WeightsError for a file that cannot be read; InputError for a head of another type or other shapes, or one
    that was trained on features of other backbones than those of `first`.
    """
    loaded = load_checkpoint(checkpoint, head_class=spec.type if spec.own_class else None)
    expected, actual = ({"type": one.type, **one.as_json()} for one in (spec, loaded.spec))
    for name in sorted((expected.keys() | actual.keys()) - {"dropout", "attention_loss"}):  # of training only
        if expected.get(name) != actual.get(name):
            raise InputError(
                f"{checkpoint}: the {name} of its head is {actual.get(name)}, of these features and options "
                f"{expected.get(name)}; start from a head of the same preset and options"
            )
    for features in (first.maps, first.tokens):
        trained_on = loaded.info.weights_sha256.get(features.name)
        named = (loaded.info.localizer, loaded.info.encoder)
        if named != (None, None) and features.name not in named:
            raise InputError(
                f"{checkpoint}: was trained on {' and '.join(filter(None, named))}, not on {features.name} as "
                f"{first.cache.path} has it; start from a head of the same backbones"
            )
        if trained_on and _weights(features) not in (None, trained_on):
            raise InputError(
                f"{checkpoint}: was trained on {features.name} with weights {trained_on[:12]}, the features of "
                f"{first.cache.path} come from {(_weights(features) or '')[:12]}; start from a head of the same weights"
            )
    return loaded


def require_same_backbones(training_set: TrainingSet, first: TrainingSet) -> None:
    path, first_path = training_set.cache.path, first.cache.path
    for features, expected in ((training_set.maps, first.maps), (training_set.tokens, first.tokens)):
        if features.name.removesuffix(FLIP) != expected.name.removesuffix(FLIP):
            raise InputError(
                f"{path}: its {features.kind} features are {features.name}, those of {first_path} are {expected.name}; "
                "train on features of the same backbones"
            )
        comparison = compare(description(expected), description(features))
        if comparison.differences:
            raise InputError(
                f"{path}: its {features.name} {features.shape} features differ from those of {first_path}: "
                f"{comparison.text('{field} is {found}, there {expected}')}; train on features of the same backbones "
                f"and options: extract this cache again with {comparison.options() or 'the same options'}"
            )
        if comparison.missing:
            log.warning(
                "%s and %s: only one of them states these fields of its %s features: %s; assumed to be the same",
                first_path,
                path,
                features.name,
                ", ".join(comparison.missing),
            )


def _require_matching_vocabulary(training_set: TrainingSet, vocabulary: Vocabulary, text_dim: int) -> None:
    path, maps = training_set.cache.path, training_set.maps
    classes, width = len(training_set.cache.categories), vocabulary.embeddings.shape[1]
    if len(vocabulary) != classes:
        raise InputError(
            f"{path}: has {classes} classes but its vocabulary has {len(vocabulary)}; build it from the cache"
        )
    if width != text_dim:
        raise InputError(f"{path}: its vocabulary is {width} wide, that of the first cache {text_dim}")
    if vocabulary.encoder_sha256 and _weights(maps) not in (None, vocabulary.encoder_sha256):
        raise InputError(
            f"{path}: its maps are {maps.name} {maps.shape} with weights {(_weights(maps) or 'unknown')[:12]}, its "
            f"vocabulary comes from a text encoder with weights {vocabulary.encoder_sha256[:12]}; take both from the "
            "same model"
        )


def _weights(feature_set: FeatureSet) -> str | None:
    sha256 = feature_set.provenance.get("weights_sha256")
    return None if sha256 is None else str(sha256)


def run_identity(
    training_sets: Sequence[TrainingSet],
    vocabularies: Sequence[Vocabulary],
    shares: NDArray[np.float64],
    config: TrainConfig,
    preset: str | None,
) -> dict[str, Any]:
    """Everything that decides the numbers of a run, for `run.json`. No paths: a cache may be moved."""
    caches = [
        {
            "dataset": training_set.cache.manifest.dataset,
            "split": training_set.cache.manifest.split,
            "manifest": training_set.cache.manifest.digest(),
            "pictures": len(training_set.rows),
            "share": round(float(share), 9),
            "map": _record(training_set.maps),
            "token": _record(training_set.tokens),
            "vocabulary": vocabulary.digest,
        }
        for training_set, vocabulary, share in zip(training_sets, vocabularies, shares, strict=True)
    ]
    return {"preset": preset, "config": {**asdict(config), "head": without_folder(config.head)}, "caches": caches}


def _record(feature_set: FeatureSet) -> dict[str, Any]:
    """The entry of a feature set in run.json and in the head's checkpoint."""
    return {"name": feature_set.name, "encoding": feature_set.dtype, **description(feature_set)}


def head_info(
    training_sets: Sequence[TrainingSet],
    vocabularies: Sequence[Vocabulary],
    identity: dict[str, Any],
    initial: HeadInfo | None,
) -> HeadInfo:
    """The information that is saved with the head of a run; `initial` is that of the head from which it starts."""
    maps, tokens = training_sets[0].maps, training_sets[0].tokens
    weights = {
        feature_set.name: sha256 for feature_set in (maps, tokens) if (sha256 := _weights(feature_set)) is not None
    }
    classes = set(initial.classes if initial else ())
    if initial is None or classes:  # else the classes of the first training are unknown
        classes |= {name for training_set in training_sets for name in _seen_classes(training_set.cache.manifest)}
    return HeadInfo(
        preset=identity["preset"],
        localizer=tokens.name,
        encoder=maps.name,
        weights_sha256=weights,
        caches=tuple(identity["caches"]),
        vocabularies=tuple(vocabulary.digest for vocabulary in vocabularies),
        templates=vocabularies[0].templates,
        classes=tuple(sorted(classes)),
    )


def _seen_classes(manifest: Manifest) -> list[str]:
    """Names of the classes with at least one region."""
    seen = np.zeros(len(manifest.categories) + 1, np.bool_)  # the last is that of NO_CATEGORY
    for start in range(0, len(manifest.category_index), _CHUNK):
        seen[manifest.category_index[start : start + _CHUNK]] = True
    return [category.name for category, is_seen in zip(manifest.categories, seen, strict=False) if is_seen]
