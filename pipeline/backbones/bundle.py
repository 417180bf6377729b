"""The frozen models of one extraction: how to load them, and the feature sets that they produce."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial

import torch
from torch import Tensor

from regionspot.cache.errors import InputError
from regionspot.cache.format.feature_dtypes import Encoding
from regionspot.cache.format.schema import FLIP, FeatureSet
from regionspot.cache.machine import compute_device
from regionspot.pipeline.backbones.batch_size import batch_size_of
from regionspot.pipeline.backbones.builders import get_preset
from regionspot.pipeline.backbones.clip import load_encoder
from regionspot.pipeline.backbones.dense import dense_provenance, dense_set, require_dense
from regionspot.pipeline.backbones.dtypes import AUTO, half_is_faster, stored_dtype
from regionspot.pipeline.backbones.mirrored import MirroredEncoder, MirroredLocalizer
from regionspot.pipeline.backbones.protocols import FIRST, Backbone, Localizer, SemanticEncoder
from regionspot.pipeline.backbones.registry import stored_name
from regionspot.pipeline.backbones.sam import load_localizer
from regionspot.pipeline.images.decode import Exif

FLOAT16 = Encoding("float16")
NONE = "none"  # instead of a model's name: no model


@dataclass(frozen=True)
class Backbones:
    """A localizer, semantic encoders, or both, which all use the same decoded image.

    dense    dense maps as well, from the same pass as the feature maps
    reload   `load` with the same arguments, if its dtype was "auto"

    Raises InputError for an encoder that is named twice or has no dense map, and for dense maps without an encoder.
    """

    localizer: Localizer | None = None
    encoders: tuple[SemanticEncoder, ...] = ()
    dense: bool = False
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
        dense: bool = False,
        flip: bool = False,
        stored: Mapping[str, FeatureSet] | None = None,
    ) -> Backbones:
        """Load the models of a preset, or others in their place, by default on a GPU if there is one.

        weights, sam_weights, clip_weights   sources for `load_weights`: for all models, or only for one
        dtype       of the image encoders; "auto": that of the model's `stored` feature set, else `resolve_dtype`'s
        localizer   replaces the preset's; "none": no localizer
        encoders    replace the preset's; "none": no encoder
        preprocess  "direct" or "reference"
        tokens      "first", or "all": the three other mask tokens and the predicted IoUs as well
        dense       also the dense maps of the encoders
        flip        the models of mirrored images, whose feature sets have names of their own
        stored      feature sets of an existing cache, by name

        Raises InputError for unknown names and dtypes, WeightsError for missing weights.
        """
        names = get_preset(preset)
        encoder_names = [name for name in (list(encoders) or [names.encoder]) if name != NONE]
        if clip_weights and len(encoder_names) > 1:
            raise InputError(f"clip weights {clip_weights}: are for one encoder, not for {', '.join(encoder_names)}")
        place = str(compute_device(device))

        def dtype_for(name: str) -> str:
            # Both views of a cache have one dtype: training reads either.
            views = ((stored or {}).get(stored_name(name) + suffix) for suffix in ("", FLIP))
            feature_set = next(filter(None, views), None) if dtype == AUTO else None
            return dtype if feature_set is None else stored_dtype(feature_set.provenance)

        localizer_name = localizer or names.localizer
        sam: Localizer | None = None
        if localizer_name != NONE:
            source, localizer_dtype = sam_weights or weights, dtype_for(localizer_name)
            sam = load_localizer(localizer_name, source, place, localizer_dtype, preprocess=preprocess, tokens=tokens)
        clips: list[SemanticEncoder] = [
            load_encoder(name, clip_weights or weights, place, dtype_for(name), preprocess=preprocess)
            for name in encoder_names
        ]
        if flip:
            sam, clips = sam and MirroredLocalizer(sam), [MirroredEncoder(encoder) for encoder in clips]
        return cls(
            sam,
            tuple(clips),
            dense,
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
                dense=dense,
                flip=flip,
            ),
        )

    def with_stored_dtypes(self, stored: Mapping[str, FeatureSet]) -> Backbones:
        """These models, loaded again if their dtype was "auto" and differs from that of their stored feature sets.

        With a named dtype they stay as they are; the check of the provenance then refuses them.
        """
        models = [model for model in self.models if model.name in stored]
        differ = any(stored_dtype(stored[model.name].provenance) != stored_dtype(model.provenance) for model in models)
        return self.reload(stored=stored) if self.reload is not None and differ else self

    def __post_init__(self) -> None:
        names = [encoder.name for encoder in self.encoders]
        if len(set(names)) < len(names):
            raise InputError(f"encoders {', '.join(names)}: one is named twice")
        if self.dense:
            if not self.encoders:
                raise InputError("--map dense: needs an encoder, and there is none; leave out --encoder none")
            for encoder in self.encoders:
                require_dense(encoder)

    @property
    def models(self) -> list[Backbone]:
        """The localizer, if there is one, and the encoders."""
        return [*self.encoders] if self.localizer is None else [self.localizer, *self.encoders]

    @property
    def device(self) -> torch.device:
        """The device of the models; the CPU if there are none."""
        return self.models[0].device if self.models else torch.device("cpu")

    @property
    def half_is_faster(self) -> bool:
        """Whether an image encoder uses float32 on a device that is faster in bfloat16."""
        return half_is_faster([stored_dtype(model.provenance) for model in self.models], self.device)

    @cached_property
    def batch_size(self) -> int:
        """The default batch size; measured once on a GPU."""
        return batch_size_of(self.models)

    def map_sets(self, encoder: SemanticEncoder) -> dict[str, tuple[int, int]]:
        """The shapes of an encoder's feature sets by their names; the first is its feature map."""
        sets = {encoder.name: encoder.map_shape}
        if self.dense and (shape := require_dense(encoder).dense_shape) is not None:
            sets[dense_set(encoder.name)] = shape
        return sets

    def encode_maps(self, encoder: SemanticEncoder, batch: Tensor) -> dict[str, Tensor]:
        """float32 (B, *shape) of each of `map_sets`, for stacked preprocessed images."""
        maps = require_dense(encoder).encode_with_dense(batch) if self.dense else (encoder.encode(batch),)
        return dict(zip(self.map_sets(encoder), (values.float() for values in maps), strict=True))

    def feature_sets(
        self, exif: Exif = "auto", encoding: Encoding = FLOAT16, token_encoding: Encoding = FLOAT16
    ) -> list[FeatureSet]:
        """The feature sets of these models, with the provenance that later runs must match.

        encoding, token_encoding   of maps and of tokens; int8 is still without its channel statistics
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
            for name, shape in self.map_sets(encoder).items():
                of_set = provenance if name == encoder.name else {**provenance, **dense_provenance(encoder)}
                sets.append(FeatureSet(name, "map", shape, encoding.dtype, of_set, encoding.compression))
        return sets
