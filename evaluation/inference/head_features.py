"""The features that a head was trained on, as its checkpoint states or implies them.

A head needs features of the same models and options, so evaluation first compares them: with the features of a cache,
or with the backbones that are loaded to run on images.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regionspot.cache.errors import ProvenanceMismatchError, WeightsError
from regionspot.cache.format.compatibility import Comparison, compare, description
from regionspot.cache.store import FeatureCache
from regionspot.fusion.checkpoint import HeadInfo
from regionspot.fusion.training.training_sets import require_same_orientation
from regionspot.pipeline.backbones.builders import PRESETS, Preset
from regionspot.pipeline.backbones.dtypes import stored_dtype
from regionspot.pipeline.backbones.weights import OFFICIAL

log = logging.getLogger(__name__)

# Preprocessing of the training features if the checkpoint does not state it: the authors' for a released file, and the
# only one that older versions had for our files.
RELEASED_PREPROCESS, OLDER_PREPROCESS = "reference", "direct"


@dataclass(frozen=True)
class HeadFeatureSet:
    """One of the two feature sets that a head was trained on.

    name        of the feature set and its backbone
    fields      its known provenance, in the form of `compatibility.description`
    preprocess  preset of pipeline/images/preprocess.py, stated or implied
    implied     fields that the checkpoint implies but does not state: a difference logs a warning instead of an error
    """

    name: str
    fields: Mapping[str, Any]
    preprocess: str
    implied: tuple[str, ...] = ()

    @property
    def dtype(self) -> str:
        """The compute dtype of its backbone; "auto" if unknown."""
        return str(stored_dtype(self.fields))

    def is_incompatible(self, comparison: Comparison, allowed: Collection[str] = ()) -> bool:
        """Whether a field differs that is neither implied nor `allowed` to differ."""
        return any(difference.field not in (*self.implied, *allowed) for difference in comparison.differences)


@dataclass(frozen=True)
class HeadFeatures:
    """Both feature sets of a head; `checkpoint` is its path, for messages."""

    checkpoint: Path
    tokens: HeadFeatureSet
    maps: HeadFeatureSet

    @property
    def exif(self) -> str | None:
        """The EXIF rule of the images; None if unknown."""
        rule = self.maps.fields.get("exif", self.tokens.fields.get("exif"))
        return None if rule is None else str(rule)

    def require_cache(self, cache: FeatureCache, strict: bool = True) -> None:
        """Check that the features of `cache` are compatible with those that the head was trained on.

        strict   False: differences are only logged, but a missing feature set is still an error

        Raises ProvenanceMismatchError, and InputError if tokens and maps were extracted with different EXIF rules.
        """
        for trained in (self.tokens, self.maps):
            if trained.name not in cache.feature_sets:
                names = ", ".join(cache.feature_sets) or "none"
                raise ProvenanceMismatchError(
                    f"{cache.path}: holds the feature sets {names}; {self.checkpoint} was trained on {trained.name}: "
                    "extract it into this cache first, or use a head of this cache's preset"
                )
            comparison = compare(trained.fields, description(cache.feature_sets[trained.name]))
            problem = (
                f"{cache.path}: its {trained.name} features differ from those that {self.checkpoint} was trained on: "
                f"{comparison.text('{field} is {found}, there {expected}')}"
            )
            if strict and trained.is_incompatible(comparison):
                options = comparison.options() or "the same options"
                raise ProvenanceMismatchError(
                    f"{problem}; extract another cache with {options}, or evaluate from images, without --cache"
                )
            self._warn(comparison, trained, problem)
        require_same_orientation(cache, cache.feature_sets[self.tokens.name], cache.feature_sets[self.maps.name])

    def require_backbones(
        self, provenances: Mapping[str, Mapping[str, Any]], overridden: Collection[str] = (), strict: bool = True
    ) -> None:
        """Check that the features of loaded backbones are compatible with those that the head was trained on.

        provenances   of the backbones, by name
        overridden    fields that the user has set: their differences are only logged
        strict        False: all differences are only logged

        Raises WeightsError.
        """
        for trained in (self.tokens, self.maps):
            # The backbones do not decide the orientation of images.
            fields = {name: value for name, value in trained.fields.items() if name != "exif"}
            comparison = compare(fields, provenances[trained.name])
            if strict and trained.is_incompatible(comparison, overridden):
                raise WeightsError(
                    f"{self.checkpoint}: was trained on {trained.name} with "
                    f"{comparison.text('{field} {expected}, but {found}')} are loaded; give the weights and options "
                    "that its cache was extracted with, or skip this check with --no-check-weights"
                )
            differences = comparison.text("{field} {found}, trained with {expected}")
            self._warn(comparison, trained, f"{self.checkpoint}: runs on {trained.name} with {differences}")

    def _warn(self, comparison: Comparison, trained: HeadFeatureSet, problem: str) -> None:
        if comparison.differences:
            log.warning("%s; scores may be worse than with the features of the training", problem)
        if comparison.missing and not trained.implied:
            log.warning(
                "%s: these fields of its %s features are unknown, so they are not compared: %s",
                self.checkpoint,
                trained.name,
                ", ".join(comparison.missing),
            )


def head_features(checkpoint: Path, info: HeadInfo) -> HeadFeatures:
    """The features that a head needs. Raises WeightsError if it names neither its backbones nor a preset."""
    preset = PRESETS.get(info.preset) if info.preset else None
    if not info.localizer and preset:
        return HeadFeatures(checkpoint, *_released(preset))
    localizer, encoder = info.localizer, info.encoder or (preset and preset.encoder)
    if not localizer or not encoder:
        raise WeightsError(f"{checkpoint}: names neither its backbones nor a preset; train it again with --preset")
    maps = _stated(checkpoint, info, "map", encoder, OLDER_PREPROCESS)
    # Imported tokens state no preprocessing: assume that of the maps.
    tokens = _stated(checkpoint, info, "token", localizer, maps.preprocess)
    return HeadFeatures(checkpoint, tokens, maps)


def _released(preset: Preset) -> tuple[HeadFeatureSet, HeadFeatureSet]:
    """The features of a released file: the authors' preprocessing, the official weights of the preset."""

    def implied(name: str, **fields: Any) -> HeadFeatureSet:
        if name in OFFICIAL:
            fields["weights_sha256"] = OFFICIAL[name].sha256
        fields |= {"model": name, "preprocess": RELEASED_PREPROCESS}
        return HeadFeatureSet(name, fields, RELEASED_PREPROCESS, implied=("weights_sha256",))

    return implied(preset.localizer), implied(preset.encoder, input_pixels=preset.clip_pixels)


def _stated(checkpoint: Path, info: HeadInfo, kind: str, name: str, preprocess: str) -> HeadFeatureSet:
    """A feature set as the checkpoint's records of its caches state it; `preprocess` is the default."""
    records = [_fields(cache[kind]) for cache in info.caches if kind in cache]
    fields = dict(records[0]) if records else {}
    for other in records[1:]:  # older versions trained on caches with different features
        if differences := compare(fields, other).text("{field} {expected} and {found}"):
            log.warning("%s: was trained on different %s features: %s", checkpoint, name, differences)
    if name in info.weights_sha256:
        fields["weights_sha256"] = info.weights_sha256[name]
    return HeadFeatureSet(name, fields, str(fields.get("preprocess", preprocess)))


def _fields(record: Mapping[str, Any]) -> dict[str, Any]:
    """The description of a feature set in the checkpoint's record of a cache."""
    fields = {key: value for key, value in record.items() if key not in ("name", "encoding")}
    if "encoding" not in record and "input_pixels" not in record:
        fields.pop("dtype", None)  # older versions recorded the encoding as dtype if the backbone stated none
    return fields
