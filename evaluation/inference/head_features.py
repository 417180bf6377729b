"""The features that a head takes: what its checkpoint states of those that it was trained on, or implies.

A head makes sense only of features made as those, so both ways to evaluate one compare first: with the features of a
cache, and with the backbones that are loaded to run on images.
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
from regionspot.fusion.training_sets import require_same_orientation
from regionspot.pipeline.backbones.builders import PRESETS, Preset
from regionspot.pipeline.backbones.dtypes import stored_dtype
from regionspot.pipeline.backbones.weights import OFFICIAL

log = logging.getLogger(__name__)

# By which preprocessing a head's features were made where its checkpoint does not state it: a released one was trained
# by the authors' own code; one of ours without that record is older than the choice.
RELEASED_PREPROCESS, OLDER_PREPROCESS = "reference", "direct"


@dataclass(frozen=True)
class TrainedOn:
    """One of the two feature sets of a head.

    name        of the set, which is that of its backbone
    fields      what is known of how it was made, as `compatibility.description` gives it
    preprocess  preset of pipeline/images/preprocess.py, stated or implied
    implied     fields of which another value is said but not refused: the checkpoint implies and does not state them
    """

    name: str
    fields: Mapping[str, Any]
    preprocess: str
    implied: tuple[str, ...] = ()

    @property
    def dtype(self) -> str:
        """What its backbone computed in; "auto" where that is not known."""
        return str(stored_dtype(self.fields))

    def refused(self, compared: Comparison, allowed: Collection[str] = ()) -> bool:
        return any(each.field not in (*self.implied, *allowed) for each in compared.differences)


@dataclass(frozen=True)
class HeadFeatures:
    """Both feature sets of a head; `checkpoint` is where the head is, for messages."""

    checkpoint: Path
    tokens: TrainedOn
    maps: TrainedOn

    @property
    def exif(self) -> str | None:
        """The rule by which images were turned; None where that is not known."""
        rule = self.maps.fields.get("exif", self.tokens.fields.get("exif"))
        return None if rule is None else str(rule)

    def require_cache(self, cache: FeatureCache, strict: bool = True) -> None:
        """See that the features of `cache` were made as those that the head was trained on.

        strict   refuse what was made otherwise; else it is only said. A feature set that is missing is always refused

        Raises ProvenanceMismatchError, naming both sides, the fields and what to do; InputError where tokens and maps
        of the cache saw the images turned differently.
        """
        for trained in (self.tokens, self.maps):
            if trained.name not in cache.feature_sets:
                held = ", ".join(cache.feature_sets) or "none"
                raise ProvenanceMismatchError(
                    f"{cache.path}: holds the feature sets {held}; {self.checkpoint} was trained on {trained.name}: "
                    "extract it into this cache first, or take a head of this cache's preset"
                )
            compared = compare(trained.fields, description(cache.feature_sets[trained.name]))
            problem = (
                f"{cache.path}: its {trained.name} features were made otherwise than those that {self.checkpoint} was "
                f"trained on: {compared.text('{field} is {found}, there {expected}')}"
            )
            if strict and trained.refused(compared):
                options = compared.options() or "the same options"
                raise ProvenanceMismatchError(
                    f"{problem}; extract another cache with {options}, or evaluate from images, without --cache"
                )
            self._warn(compared, trained, problem)
        require_same_orientation(cache, *(cache.feature_sets[each.name] for each in (self.tokens, self.maps)))

    def require_backbones(
        self, provenances: Mapping[str, Mapping[str, Any]], asked: Collection[str] = (), strict: bool = True
    ) -> None:
        """See that loaded backbones make features such as the head was trained on.

        provenances   of the backbones, by name
        asked         fields that were set by the user: another value of these is said, and not refused
        strict        refuse what differs otherwise; else it is only said

        Raises WeightsError, naming both sides, the fields and what to do.
        """
        for trained in (self.tokens, self.maps):
            # How an image is turned is no matter of the backbones.
            fields = {name: value for name, value in trained.fields.items() if name != "exif"}
            compared = compare(fields, provenances[trained.name])
            if strict and trained.refused(compared, asked):
                raise WeightsError(
                    f"{self.checkpoint}: was trained on {trained.name} with "
                    f"{compared.text('{field} {expected}, but {found}')} are loaded; give the weights and options that "
                    "its cache was extracted with, or ask for no such check (--no-check-weights)"
                )
            form = "{field} {found}, trained with {expected}"
            self._warn(compared, trained, f"{self.checkpoint}: runs on {trained.name} with {compared.text(form)}")

    def _warn(self, compared: Comparison, trained: TrainedOn, problem: str) -> None:
        if compared.differences:
            log.warning("%s; scores may be worse than those of the head's own features", problem)
        if compared.missing and not trained.implied:
            log.warning(
                "%s: of the %s features that it was trained on, or of those given, these are not stated and so not "
                "compared: %s",
                self.checkpoint,
                trained.name,
                ", ".join(compared.missing),
            )


def features_of(checkpoint: Path, info: HeadInfo) -> HeadFeatures:
    """What a head takes. Raises WeightsError for one that names neither its backbones nor a preset."""
    preset = PRESETS.get(info.preset) if info.preset else None
    if not info.localizer and preset:
        return HeadFeatures(checkpoint, *_released(preset))
    localizer, encoder = info.localizer, info.encoder or (preset and preset.encoder)
    if not localizer or not encoder:
        raise WeightsError(f"{checkpoint}: names neither its backbones nor a preset; train it again with --preset")
    maps = _stated(checkpoint, info, "map", encoder, OLDER_PREPROCESS)
    # Imported tokens state no preprocessing: they count as made from the images as the maps were.
    tokens = _stated(checkpoint, info, "token", localizer, maps.preprocess)
    return HeadFeatures(checkpoint, tokens, maps)


def _released(preset: Preset) -> tuple[TrainedOn, TrainedOn]:
    """What a file that the authors released was trained on: their preprocessing, their preset's official weights."""

    def implied(name: str, **fields: Any) -> TrainedOn:
        if name in OFFICIAL:
            fields["weights_sha256"] = OFFICIAL[name].sha256
        fields |= {"model": name, "preprocess": RELEASED_PREPROCESS}
        return TrainedOn(name, fields, RELEASED_PREPROCESS, implied=("weights_sha256",))

    return implied(preset.localizer), implied(preset.encoder, input_pixels=preset.clip_pixels)


def _stated(checkpoint: Path, info: HeadInfo, kind: str, name: str, preprocess: str) -> TrainedOn:
    """What the head's own records of its caches say; `preprocess` where they do not."""
    records = [_fields(cache[kind]) for cache in info.caches if kind in cache]
    fields = dict(records[0]) if records else {}
    for other in records[1:]:  # heads of before training compared its caches
        if differing := compare(fields, other).text("{field} {expected} and {found}"):
            log.warning("%s: was trained on %s features made in different ways: %s", checkpoint, name, differing)
    if name in info.weights_sha256:
        fields["weights_sha256"] = info.weights_sha256[name]
    return TrainedOn(name, fields, str(fields.get("preprocess", preprocess)))


def _fields(record: Mapping[str, Any]) -> dict[str, Any]:
    """The description of a feature set in a head's record of a cache."""
    fields = {key: value for key, value in record.items() if key not in ("name", "encoding")}
    if "encoding" not in record and "input_pixels" not in record:
        fields.pop("dtype", None)  # so older versions recorded the encoding, where a backbone stated no dtype
    return fields
