"""The frozen models of one extraction together: how they are loaded, and what they write into a cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial

import torch

from regionspot.cache.errors import InputError
from regionspot.cache.format.feature_dtypes import Encoding
from regionspot.cache.format.schema import FeatureSet
from regionspot.cache.machine import compute_device
from regionspot.pipeline.backbones.batch_size import batch_size_of
from regionspot.pipeline.backbones.builders import get_preset
from regionspot.pipeline.backbones.clip import load_encoder
from regionspot.pipeline.backbones.dtypes import AUTO, dtype_of, half_is_faster
from regionspot.pipeline.backbones.protocols import FIRST, Localizer, SemanticEncoder
from regionspot.pipeline.backbones.registry import stored_name
from regionspot.pipeline.backbones.sam import load_localizer
from regionspot.pipeline.images.decode import Exif

FLOAT16 = Encoding("float16")
NONE = "none"  # in place of a model's name: leave it out


@dataclass(frozen=True)
class Backbones:
    """A localizer, semantic encoders, or both: all that one reading of an image is used for.

    reload   `load` with the same arguments, where it was left to it to choose the dtype
    """

    localizer: Localizer | None = None
    encoders: tuple[SemanticEncoder, ...] = ()
    reload: Callable[..., Backbones] | None = field(default=None, repr=False, compare=False)

    @classmethod
    def load(
        cls,
        preset: str = "bl",
        weights: str | None = None,
        sam_weights: str | None = None,
        clip_weights: str | None = None,
        device: str | None = None,
        dtype: str = "auto",
        *,
        localizer: str | None = None,
        encoders: Sequence[str] = (),
        preprocess: str = "direct",
        tokens: str = FIRST,
        held: Mapping[str, FeatureSet] | None = None,
    ) -> Backbones:
        """The models of a preset, or others in their place, on a GPU where there is one.

        weights, sam_weights, clip_weights   sources that `load_weights` knows: for all, and instead of that for one
        dtype       of the image encoders; "auto": what `held` was made in, else what `resolve_dtype` says of the device
        localizer   instead of the preset's; "none": leave it out
        encoders    likewise
        preprocess  "direct" or "reference"
        tokens      "first", or "all": the three other mask tokens and the predicted IoU as well
        held        feature sets of the cache to go on with

        Raises InputError for names and dtypes that there are not, WeightsError for weights that cannot be had.
        """
        names = get_preset(preset)
        chosen = [name for name in (list(encoders) or [names.encoder]) if name != NONE]
        if clip_weights and len(chosen) > 1:
            raise InputError(f"clip weights {clip_weights}: are of one encoder, asked for are {', '.join(chosen)}")
        place = str(compute_device(device))

        def dtype_for(name: str) -> str:
            stored = (held or {}).get(stored_name(name)) if dtype == AUTO else None
            return dtype if stored is None else dtype_of(stored.provenance)

        first = localizer or names.localizer
        return cls(
            load_localizer(first, sam_weights or weights, place, dtype_for(first), preprocess=preprocess, tokens=tokens)
            if first != NONE
            else None,
            tuple(
                load_encoder(name, clip_weights or weights, place, dtype_for(name), preprocess=preprocess)
                for name in chosen
            ),
            reload=None
            if dtype != AUTO
            else partial(
                cls.load,
                preset,
                weights,
                sam_weights,
                clip_weights,
                device,
                localizer=localizer,
                encoders=encoders,
                preprocess=preprocess,
                tokens=tokens,
            ),
        )

    def following(self, held: Mapping[str, FeatureSet]) -> Backbones:
        """These models, loaded again where the feature sets that are held were made in another dtype than they have.

        Where the dtype was asked for by name they stay as they are, and whoever compares them with the feature sets
        refuses them.
        """
        models = [model for model in (self.localizer, *self.encoders) if model is not None and model.name in held]
        differ = any(dtype_of(held[model.name].provenance) != dtype_of(model.provenance) for model in models)
        return self.reload(held=held) if self.reload is not None and differ else self

    def __post_init__(self) -> None:
        names = [each.name for each in self.encoders]
        if len(set(names)) < len(names):
            raise InputError(f"encoders {', '.join(names)}: one is named twice")

    @property
    def device(self) -> torch.device:
        """Where the models are; the CPU where there are none."""
        models = [model for model in (self.localizer, *self.encoders) if model is not None]
        return models[0].device if models else torch.device("cpu")

    @property
    def half_is_faster(self) -> bool:
        """Whether an image encoder computes in float32 on a device that is faster in bfloat16."""
        models = (self.localizer, *self.encoders)
        return half_is_faster([dtype_of(model.provenance) for model in models if model is not None], self.device)

    @cached_property
    def batch_size(self) -> int:
        """Images to encode at a time, where nobody says otherwise; on a GPU found by trying, once."""
        return batch_size_of([model for model in (self.localizer, *self.encoders) if model is not None])

    def feature_sets(
        self, exif: Exif = "auto", encoding: Encoding = FLOAT16, token_encoding: Encoding = FLOAT16
    ) -> list[FeatureSet]:
        """What these models write into a cache, with the provenance that a later run must match.

        encoding, token_encoding   of maps and of tokens; int8 is still without the statistics of a sample
        """
        sets = []
        if self.localizer is not None:
            provenance = {**self.localizer.provenance, "exif": exif}
            sets = [
                FeatureSet(name, "token", shape, token_encoding.dtype, provenance, token_encoding.compression)
                for name, shape in self.localizer.outputs.items()
            ]
        for encoder in self.encoders:
            provenance = {**encoder.provenance, "exif": exif}
            sets.append(
                FeatureSet(encoder.name, "map", encoder.map_shape, encoding.dtype, provenance, encoding.compression)
            )
        return sets
