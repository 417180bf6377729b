"""The frozen models by name: what each is called, how it is built, and which two make a preset.

A model is built without drawing its initial weights, which would take longer than loading the real ones; the
loaders fill every tensor. The model libraries are imported when a model is built, not when a name is looked up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from regionspot.cache.errors import InputError
from regionspot.pipeline.weight_files import StateDict
from regionspot.pipeline.weights import OFFICIAL, OfficialFile


@dataclass(frozen=True)
class Preset:
    """One configuration of the paper: a localizer, a semantic encoder and its input size in pixels."""

    localizer: str
    encoder: str
    clip_pixels: int


PRESETS = {
    "bb": Preset(localizer="sam_vit_b", encoder="clip_vit_b_16", clip_pixels=224),
    "bl": Preset(localizer="sam_vit_b", encoder="clip_vit_l_14", clip_pixels=224),
    # 24 x 24 patches where bl has 16 x 16: a 32-pixel object in a 640-pixel photo spans 1.2 patches, not 0.8.
    "bl336": Preset(localizer="sam_vit_b", encoder="clip_vit_l_14_336", clip_pixels=336),
    # Trained by this project on its own small world; ships with the package.
    "toy": Preset(localizer="toy_sam", encoder="toy_clip", clip_pixels=192),
}


def preset_named(name: str) -> Preset:
    """Raises InputError for a name that is none of PRESETS."""
    if name not in PRESETS:
        raise InputError(f"preset {name!r}: expected one of {', '.join(PRESETS)}")
    return PRESETS[name]


# Names in segment_anything.sam_model_registry.
SAM_MODELS = {"sam_vit_b": "vit_b", "sam_vit_l": "vit_l", "sam_vit_h": "vit_h"}
# Names of open_clip's configurations. OpenAI trained with QuickGELU; the plain names would load the same weights
# and compute with another activation, off by 8 % and with no warning.
CLIP_MODELS = {
    "clip_vit_b_16": "ViT-B-16-quickgelu",
    "clip_vit_l_14": "ViT-L-14-quickgelu",
    "clip_vit_l_14_336": "ViT-L-14-336-quickgelu",
}
LOCALIZERS = (*SAM_MODELS, "toy_sam")
ENCODERS = (*CLIP_MODELS, "toy_clip")
OPEN_CLIP = "open_clip:"  # open_clip:MODEL or open_clip:MODEL:TAG, any other of its models

# What a text or image tower may not have: the map needs a class token in front of the patches, and cutting prompts
# at their end needs a causal text tower and open_clip's own tokenizer.
UNSUPPORTED_VISION = ("timm_model_name", "attentional_pool", "pool_type", "final_ln_after_pool")
UNSUPPORTED_TEXT = ("hf_model_name", "hf_tokenizer_name", "no_causal_mask", "embed_cls", "pool_type", "proj_type")


class Tokenizer(Protocol):
    """Words to ids, as open_clip's SimpleTokenizer does; `encode` gives those of the words alone."""

    sot_token_id: int
    eot_token_id: int

    def encode(self, text: str) -> list[int]: ...


@dataclass(frozen=True)
class BuiltClip:
    """An open_clip CLIP without weights, and what goes with it: `mean` and `std` normalise a picture in [0, 1]."""

    model: Any  # open_clip and segment_anything carry no types
    tokenizer: Tokenizer
    mean: Sequence[float]
    std: Sequence[float]
    official: OfficialFile | None = None
    unpack: Callable[[StateDict], StateDict] = dict  # from what a file holds to the model's own state dict


class _NoDraws(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Leaves tensors as they are where an initialiser would draw them."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.uniform_.default, torch.ops.aten.normal_.default):
            return args[0]
        return func(*args, **(kwargs or {}))


@contextmanager
def undrawn() -> Iterator[None]:
    """Build modules without initial weights: 1.6 s -> 0.1 s for SAM ViT-B, 7.4 s -> 0.1 s for CLIP ViT-L/14.

    Every parameter must be loaded afterwards. The global random generator is left as it was.
    """
    with torch.random.fork_rng(devices=[]), _NoDraws():  # type: ignore[no-untyped-call]
        yield


def build_sam(name: str) -> Any:
    """segment_anything's Sam of that name, without weights. Raises InputError for a name that is none."""
    if name == "toy_sam":
        from regionspot.pipeline.toy_backbones import build_toy_sam

        with undrawn():
            return build_toy_sam()
    if name not in SAM_MODELS:
        raise InputError(f"localizer {name!r}: unknown; expected one of {', '.join(LOCALIZERS)}")
    from segment_anything import sam_model_registry

    with undrawn():
        return sam_model_registry[SAM_MODELS[name]]()


def encoder_name(name: str) -> str:
    """The name under which an encoder's features are stored: one path component, so tags follow a colon."""
    return name.replace("/", ":") if name.startswith(OPEN_CLIP) else name


def build_clip(name: str) -> BuiltClip:
    """The semantic encoder of that name, without weights. Raises InputError for a name that is none."""
    if name == "toy_clip":
        return _build_toy_clip()
    if name in CLIP_MODELS:
        return _build_open_clip(CLIP_MODELS[name], None, OFFICIAL[name])
    if not name.startswith(OPEN_CLIP):
        raise InputError(
            f"encoder {name!r}: unknown; expected one of {', '.join(ENCODERS)}, or {OPEN_CLIP}MODEL:TAG with a model "
            "and a pretrained tag of open_clip"
        )
    model, _, tag = encoder_name(name).removeprefix(OPEN_CLIP).partition(":")
    return _build_open_clip(model, tag or None, None)


def _build_toy_clip() -> BuiltClip:
    import open_clip

    from regionspot.pipeline.toy_backbones import TOKEN_IDS, build_toy_clip, toy_tokenizer

    def spread(state_dict: StateDict) -> StateDict:
        """The file holds the rows of words that were learnt and which rows they are; all others become zero."""
        weights = dict(state_dict)
        ids, rows = weights.pop(TOKEN_IDS, None), weights.get("token_embedding.weight")
        if ids is None or rows is None or len(ids) != len(rows) or ids.max() >= model.vocab_size:
            return weights  # the check against the model says what is wrong with it
        table = torch.zeros(model.vocab_size, rows.shape[1])
        table[ids.long()] = rows.float()
        return {**weights, "token_embedding.weight": table}

    with undrawn():
        model = build_toy_clip()
    mean, std = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
    return BuiltClip(model, toy_tokenizer(), mean, std, unpack=spread)


def _build_open_clip(model: str, tag: str | None, official: OfficialFile | None) -> BuiltClip:
    import open_clip

    config = open_clip.get_model_config(model)
    _check_supported(model, config)
    published: dict[str, Any] = open_clip.get_pretrained_cfg(model, tag) if tag else {}
    if tag and not published:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(model)) or "none"
        raise InputError(f"encoder {OPEN_CLIP}{model}: has no pretrained tag {tag!r}; expected one of: {tags}")
    if tag and published.get("quick_gelu", False) != config.get("quick_gelu", False):
        other = model.removesuffix("-quickgelu") if config.get("quick_gelu") else f"{model}-quickgelu"
        raise InputError(f"encoder {OPEN_CLIP}{model}: {tag!r} was trained with the other activation; use {other}")
    with undrawn():
        clip = open_clip.model.CLIP(**config)
    mean, std = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
    return BuiltClip(
        clip,
        open_clip.get_tokenizer(model),
        published.get("mean", mean),
        published.get("std", std),
        official or _published_file(model, tag, published),
    )


def _check_supported(model: str, config: dict[str, Any] | None) -> None:
    if config is None:
        raise InputError(f"encoder {OPEN_CLIP}{model}: open_clip has no model of this name (open_clip.list_models())")
    vision, text = config["vision_cfg"], config["text_cfg"]
    odd = [key for key in UNSUPPORTED_VISION if vision.get(key)] + [key for key in UNSUPPORTED_TEXT if text.get(key)]
    if isinstance(vision.get("layers"), list):
        odd.append("layers of a ResNet")
    if "multimodal_cfg" in config:
        odd.append("multimodal_cfg")
    if odd:
        raise InputError(
            f"encoder {OPEN_CLIP}{model}: its configuration has {', '.join(odd)}; expected a vision transformer with "
            "a class token and open_clip's own causal text tower and tokenizer"
        )


def _published_file(model: str, tag: str | None, published: dict[str, Any]) -> OfficialFile | None:
    """Where open_clip says that the weights of a tag are, stored under the model's and the tag's names."""
    if not published:
        return None
    repository, _, file = published.get("hf_hub", "").rpartition("/")
    if repository:
        file = file or "open_clip_model.safetensors"  # open_clip.constants.HF_SAFE_WEIGHTS_NAME
        url = f"https://huggingface.co/{repository}/resolve/main/{file}"
    else:
        url = published["url"]
    suffix = url.rpartition(".")[2]
    return OfficialFile(f"{model}.{tag}.{suffix}", url, None)
