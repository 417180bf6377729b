"""Build any open_clip model without weights, with its published preprocessing and weights file.

Most are a plain CLIP: a vision transformer with a class token and a causal text tower, for which `ClipEncoder` is
faster. If `is_plain` is False (SigLIP, PE, EVA, ConvNeXt, CoCa, ...), `OpenClipEncoder` is used. Text towers of Hugging
Face cannot be built without a download; of such a model only the image tower is built.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from regionspot.cache.errors import InputError
from regionspot.pipeline.backbones.state_dicts import StateDict, skip_init
from regionspot.pipeline.backbones.weights import OfficialFile

# Options that a plain CLIP does not have: ClipEncoder needs a class token before the patches, a causal text tower and
# open_clip's own tokenizer.
OTHER_VISION = ("timm_model_name", "attentional_pool", "pool_type", "final_ln_after_pool")
OTHER_TEXT = ("hf_model_name", "hf_tokenizer_name", "no_causal_mask", "embed_cls", "pool_type", "proj_type")
# The smallest possible text tower, in place of one that cannot be built; it is not kept.
NO_TEXT = {"context_length": 1, "vocab_size": 1, "width": 8, "heads": 1, "layers": 1}


class Tokenizer(Protocol):
    """open_clip's SimpleTokenizer; `encode` returns ids without start and end."""

    sot_token_id: int
    eot_token_id: int

    def encode(self, text: str) -> list[int]: ...


@dataclass(frozen=True)
class BuiltClip:
    """An open_clip CLIP without weights.

    tokenizer    a Tokenizer; None if it is loaded from a hub on first use
    mean, std    normalise an image in [0, 1]
    convert      from the content of a weights file to the model's state dict
    squash       the authors' filter ("bicubic" or "bilinear") if they resize images to a square; None if they crop,
                 which would lose regions
    text_config  open_clip's configuration of the text tower; None if it was not built
    """

    model: Any  # open_clip carries no types
    tokenizer: Any
    mean: Sequence[float]
    std: Sequence[float]
    official: OfficialFile | None = None
    convert: Callable[[StateDict], StateDict] = dict
    squash: str | None = None
    text_config: dict[str, Any] | None = None


def model_and_tag(name: str) -> tuple[str, str | None]:
    """Split open_clip:MODEL:TAG, open_clip:MODEL/TAG or the stored name open_clip.MODEL.TAG; the tag is optional."""
    rest = name.removeprefix("open_clip")[1:].replace("/", ":").replace(".", ":")
    model, _, tag = rest.partition(":")
    return model, tag or None


def config_of(model: str) -> dict[str, Any]:
    """open_clip's configuration of a model. Raises InputError for an unknown model."""
    import open_clip

    config: dict[str, Any] | None = open_clip.get_model_config(model)
    if config is None:
        raise InputError(f"encoder open_clip:{model}: open_clip has no model of this name (open_clip.list_models())")
    return config


def is_plain(config: dict[str, Any]) -> bool:
    """Whether ClipEncoder supports the model: a class token, a causal text tower, open_clip's own tokenizer."""
    vision, text = config["vision_cfg"], config["text_cfg"]
    other = [vision.get(key) for key in OTHER_VISION] + [text.get(key) for key in OTHER_TEXT]
    other_class = config.get("custom_text") or "multimodal_cfg" in config or isinstance(vision.get("layers"), list)
    return not any(other) and not other_class


def build_open_clip(model: str, tag: str | None, official: OfficialFile | None = None) -> BuiltClip:
    """Build a model; its `official` is the weights file of the tag.

    Raises InputError for an unknown model or tag, and for a tag that was trained with another activation.
    """
    import open_clip

    config = config_of(model)
    tags = open_clip.list_pretrained_tags_by_model(model)
    if tag and tag not in tags:
        known = ", ".join(tags) or "none"
        raise InputError(f"encoder open_clip:{model}: has no pretrained tag {tag!r}; expected one of: {known}")
    if tag:
        _check_activation(model, tag, config)
    # Without a tag the first one's: all tags of a model have the same preprocessing.
    published = open_clip.get_pretrained_cfg(model, tag or tags[0]) if tags else {}
    text = None if config["text_cfg"].get("hf_model_name") else config["text_cfg"]
    built = _build(config, text is not None)
    return BuiltClip(
        model=built,
        tokenizer=open_clip.get_tokenizer(model) if is_plain(config) else None,
        mean=published.get("mean", open_clip.OPENAI_DATASET_MEAN),
        std=published.get("std", open_clip.OPENAI_DATASET_STD),
        official=official or (_published_file(model, tag, published) if tag else None),
        convert=dict if is_plain(config) else _converter(built) if text is not None else _image_tower_weights,
        squash=published.get("interpolation") if published.get("resize_mode") == "squash" else None,
        text_config=text,
    )


def _build(config: dict[str, Any], with_text: bool) -> Any:
    from open_clip.coca_model import CoCa
    from open_clip.model import CLIP, CustomTextCLIP

    parts = copy.deepcopy(config)
    custom = parts.pop("custom_text", False)
    with skip_init():
        if not with_text:
            return _ImageTower(CLIP(**{**parts, "text_cfg": NO_TEXT}).visual)
        if "multimodal_cfg" in parts:
            return CoCa(**parts)
        return CustomTextCLIP(**parts) if custom else CLIP(**parts)


class _ImageTower(nn.Module):
    """Gives an image tower the name that it has in a whole model."""

    def __init__(self, visual: Any) -> None:
        super().__init__()
        self.visual = visual


def _image_tower_weights(weights: StateDict) -> StateDict:
    return {name: tensor for name, tensor in weights.items() if name.startswith("visual.")}


def _converter(model: Any) -> Callable[[StateDict], StateDict]:
    """Converts the names and shapes of other programs and older open_clip versions to the model's."""
    from open_clip.convert import convert_state_dict
    from open_clip.model import convert_to_custom_text_state_dict

    def convert(weights: StateDict) -> StateDict:
        converted: StateDict = convert_state_dict(model, dict(weights))
        if not hasattr(model, "positional_embedding"):
            converted = convert_to_custom_text_state_dict(converted)
        for name in ("logit_scale", "logit_bias"):
            own = getattr(model, name, None)
            if own is not None and name in converted and converted[name].numel() == own.numel():
                converted[name] = converted[name].reshape(own.shape)
        return converted

    return convert


def _check_activation(model: str, tag: str, config: dict[str, Any]) -> None:
    import open_clip

    trained = open_clip.get_pretrained_cfg(model, tag).get("quick_gelu", False)
    other = model.removesuffix("-quickgelu") if config.get("quick_gelu") else f"{model}-quickgelu"
    if trained != config.get("quick_gelu", False) and other != model:
        raise InputError(f"encoder open_clip:{model}: {tag!r} was trained with the other activation; use {other}")


def _published_file(model: str, tag: str, published: dict[str, Any]) -> OfficialFile:
    """open_clip's weights file of a tag, to be stored as MODEL.TAG.SUFFIX."""
    repository, _, file = published.get("hf_hub", "").rpartition("/")
    if repository:
        file = file or "open_clip_model.safetensors"  # open_clip.constants.HF_SAFE_WEIGHTS_NAME
        url = f"https://huggingface.co/{repository}/resolve/main/{file}"
    else:
        url = published["url"]
    suffix = url.rpartition(".")[2]
    return OfficialFile(f"{model}.{tag}.{suffix}", url, None)


def contiguous_attention(tower: nn.Module, device: torch.device, dtype: str) -> None:
    """Make a tower's attention copy its inputs to contiguous memory, in half precision on a CPU.

    nn.MultiheadAttention transposes images and positions without a copy. Except in float32, torch.matmul then computes
    the projection as one product per position and copies the weights each time: 8 images take four times as long as in
    float32, and with this nearly half as long (https://github.com/pytorch/pytorch/issues/126973).
    """
    if device.type != "cpu" or dtype == "float32":
        return
    for module in tower.modules():
        if isinstance(module, nn.MultiheadAttention) and module.batch_first:
            module.batch_first = False
            module.register_forward_pre_hook(_positions_first)
            module.register_forward_hook(_images_first)


def _positions_first(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    # Equal inputs stay the same tensor, because attention then projects them together.
    transposed = {id(tensor): tensor.transpose(0, 1).contiguous() for tensor in inputs}
    return tuple(transposed[id(tensor)] for tensor in inputs)


def _images_first(_: nn.Module, __: object, output: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor | None]:
    return output[0].transpose(0, 1), output[1]
