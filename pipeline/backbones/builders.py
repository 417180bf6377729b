"""Build the frozen models by name, without weights, and the presets that combine two of them.

Models are built without initialising their weights, which takes longer than loading them. The model libraries are
imported when a model is built, not when a name is looked up.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch

from regionspot.cache.errors import InputError, unknown_name
from regionspot.pipeline.backbones.open_clip_models import BuiltClip, build_open_clip, model_and_tag
from regionspot.pipeline.backbones.protocols import BackboneConfig
from regionspot.pipeline.backbones.registry import stored_name
from regionspot.pipeline.backbones.state_dicts import StateDict, skip_init
from regionspot.pipeline.backbones.weights import OFFICIAL, LoadedWeights


@dataclass(frozen=True)
class Preset:
    """A localizer, a semantic encoder and its input size in pixels, as in the paper."""

    localizer: str
    encoder: str
    clip_pixels: int


PRESETS = {
    "bb": Preset(localizer="sam_vit_b", encoder="clip_vit_b_16", clip_pixels=224),
    "bl": Preset(localizer="sam_vit_b", encoder="clip_vit_l_14", clip_pixels=224),
    # 24 x 24 patches where bl has 16 x 16: a 32-pixel object in a 640-pixel image spans 1.2 patches, not 0.8.
    "bl336": Preset(localizer="sam_vit_b", encoder="clip_vit_l_14_336", clip_pixels=336),
    # Trained by this project on its toy dataset; its weights are part of the package.
    "toy": Preset(localizer="toy_sam", encoder="toy_clip", clip_pixels=192),
}


def get_preset(name: str) -> Preset:
    """The preset of that name. Raises InputError for an unknown one."""
    if name not in PRESETS:
        raise unknown_name("preset", name, PRESETS)
    return PRESETS[name]


# Names in segment_anything.sam_model_registry.
SAM_MODELS = {"sam_vit_b": "vit_b", "sam_vit_l": "vit_l", "sam_vit_h": "vit_h"}
MOBILE_SAM = "mobile_sam"
# Names of open_clip's configurations. OpenAI trained with QuickGELU; the plain names load the same weights with
# another activation, which changes features by 8 % without a warning.
CLIP_MODELS = {
    "clip_vit_b_16": "ViT-B-16-quickgelu",
    "clip_vit_l_14": "ViT-L-14-quickgelu",
    "clip_vit_l_14_336": "ViT-L-14-336-quickgelu",
}


def base_provenance(config: BackboneConfig, loaded: LoadedWeights, pixels: int, *packages: str) -> dict[str, Any]:
    """The provenance fields of every model; `packages` are those whose versions are recorded."""
    return {
        "model": stored_name(config.name),
        "weights_sha256": loaded.sha256,
        "weights_origin": loaded.origin,
        "input_pixels": pixels,
        "dtype": config.dtype,
        "versions": {package: version(package) for package in ("torch", *packages, "regionspot")},
    }


def build_sam(name: str) -> Any:
    """segment_anything's Sam of that name, without weights. Raises InputError for an unknown name."""
    if name == "toy_sam":
        from regionspot.pipeline.toy.models import build_toy_sam

        with skip_init():
            return build_toy_sam()
    if name not in (*SAM_MODELS, MOBILE_SAM):
        raise InputError(f"{name!r}: is not a SAM; expected one of {', '.join((*SAM_MODELS, MOBILE_SAM, 'toy_sam'))}")
    from segment_anything import sam_model_registry

    with skip_init():
        sam = sam_model_registry[SAM_MODELS.get(name, "vit_b")]()
        if name == MOBILE_SAM:
            from regionspot.pipeline.backbones.mobile_sam import TinyVitEncoder

            sam.image_encoder = TinyVitEncoder()
    return sam


def sam_converter(name: str) -> Callable[[StateDict], StateDict]:
    """The conversion of that model's weights file to the state dict of `build_sam`'s model."""
    if name != MOBILE_SAM:
        return dict
    from regionspot.pipeline.backbones.mobile_sam import convert_mobile_sam

    return convert_mobile_sam


def build_clip(name: str) -> BuiltClip:
    """The CLIP of that name, without weights. Raises InputError for an unknown name."""
    if name == "toy_clip":
        return _build_toy_clip()
    if name in CLIP_MODELS:
        return build_open_clip(CLIP_MODELS[name], None, OFFICIAL[name])
    return build_open_clip(*model_and_tag(name))


def _build_toy_clip() -> BuiltClip:
    import open_clip

    from regionspot.pipeline.toy.models import TOKEN_IDS, build_toy_clip, toy_tokenizer

    def expand_word_table(state_dict: StateDict) -> StateDict:
        """The file has the rows of known words and their indices; all other rows become zero."""
        weights = dict(state_dict)
        ids, rows = weights.pop(TOKEN_IDS, None), weights.get("token_embedding.weight")
        if ids is None or rows is None or len(ids) != len(rows) or ids.max() >= model.vocab_size:
            return weights  # check_fit reports the error
        table = torch.zeros(model.vocab_size, rows.shape[1])
        table[ids.long()] = rows.float()
        return {**weights, "token_embedding.weight": table}

    with skip_init():
        model = build_toy_clip()
    mean, std = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
    return BuiltClip(model, toy_tokenizer(), mean, std, convert=expand_word_table, text_config={})
