"""Any model of open_clip, built without weights, and what its authors publish with it.

Most are a vision transformer with a class token beside a causal text tower, which `encoder.ClipEncoder` computes in its
own, faster way. Where either tower is something else (SigLIP, PE, EVA, ConvNeXt, CoCa, ...), `is_plain` says so and
`open_clip_encoder.OpenClipEncoder` takes the model as it is. A text tower out of Hugging Face's library cannot be built
without its network; of such a model the image tower alone is built.
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

# What a tower must not have for ClipEncoder: its map needs a class token in front of the patches, and cutting prompts
# at their end needs a causal text tower and open_clip's own tokenizer.
OTHER_VISION = ("timm_model_name", "attentional_pool", "pool_type", "final_ln_after_pool")
OTHER_TEXT = ("hf_model_name", "hf_tokenizer_name", "no_causal_mask", "embed_cls", "pool_type", "proj_type")
# In place of a text tower that cannot be built: as small as one may be, and thrown away.
NO_TEXT = {"context_length": 1, "vocab_size": 1, "width": 8, "heads": 1, "layers": 1}


class Tokenizer(Protocol):
    """Words to ids, as open_clip's SimpleTokenizer does; `encode` gives those of the words alone."""

    sot_token_id: int
    eot_token_id: int

    def encode(self, text: str) -> list[int]: ...


@dataclass(frozen=True)
class BuiltClip:
    """An open_clip CLIP without weights, and what goes with it: `mean` and `std` normalise an image in [0, 1].

    tokenizer    a Tokenizer; None where it has to be fetched from a hub when text is asked for
    squash       the filter by which the authors squeeze an image into the square, "bicubic" or "bilinear"; None where
                 they keep its aspect and crop, which would lose regions
    text_config  of the text tower as open_clip states it; None where there is no tower
    """

    model: Any  # open_clip carries no types
    tokenizer: Any
    mean: Sequence[float]
    std: Sequence[float]
    official: OfficialFile | None = None
    unpack: Callable[[StateDict], StateDict] = dict  # from what a file holds to the model's own state dict
    squash: str | None = None
    text_config: dict[str, Any] | None = None


def model_and_tag(name: str) -> tuple[str, str | None]:
    """Of open_clip:MODEL:TAG, open_clip:MODEL/TAG or, as it is stored, open_clip.MODEL.TAG; the tag may be left out."""
    rest = name.removeprefix("open_clip")[1:].replace("/", ":").replace(".", ":")
    model, _, tag = rest.partition(":")
    return model, tag or None


def config_of(model: str) -> dict[str, Any]:
    """open_clip's configuration of a model. Raises InputError where it has none of this name."""
    import open_clip

    config: dict[str, Any] | None = open_clip.get_model_config(model)
    if config is None:
        raise InputError(f"encoder open_clip:{model}: open_clip has no model of this name (open_clip.list_models())")
    return config


def is_plain(config: dict[str, Any]) -> bool:
    """Whether ClipEncoder can compute it: a class token, a causal text tower, open_clip's own tokenizer."""
    vision, text = config["vision_cfg"], config["text_cfg"]
    odd = [vision.get(key) for key in OTHER_VISION] + [text.get(key) for key in OTHER_TEXT]
    other_class = config.get("custom_text") or "multimodal_cfg" in config or isinstance(vision.get("layers"), list)
    return not any(odd) and not other_class


def build_open_clip(model: str, tag: str | None, official: OfficialFile | None = None) -> BuiltClip:
    """The model, and of its tag where the weights are.

    Raises InputError for a model or tag that open_clip does not have, and for a tag trained with another activation.
    """
    import open_clip

    config = config_of(model)
    tags = open_clip.list_pretrained_tags_by_model(model)
    if tag and tag not in tags:
        known = ", ".join(tags) or "none"
        raise InputError(f"encoder open_clip:{model}: has no pretrained tag {tag!r}; expected one of: {known}")
    if tag:
        _check_activation(model, tag, config)
    # Without a tag as with the first one: what an image has to look like is the same for all of a model's.
    published = open_clip.get_pretrained_cfg(model, tag or tags[0]) if tags else {}
    text = None if config["text_cfg"].get("hf_model_name") else config["text_cfg"]
    built = _built(config, text is not None)
    return BuiltClip(
        model=built,
        tokenizer=open_clip.get_tokenizer(model) if is_plain(config) else None,
        mean=published.get("mean", open_clip.OPENAI_DATASET_MEAN),
        std=published.get("std", open_clip.OPENAI_DATASET_STD),
        official=official or (_published_file(model, tag, published) if tag else None),
        unpack=dict if is_plain(config) else _older_names(built) if text is not None else _image_tower,
        squash=published.get("interpolation") if published.get("resize_mode") == "squash" else None,
        text_config=text,
    )


def _built(config: dict[str, Any], with_text: bool) -> Any:
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
    """An image tower under the name that it has in a whole model."""

    def __init__(self, visual: Any) -> None:
        super().__init__()
        self.visual = visual


def _image_tower(weights: StateDict) -> StateDict:
    return {name: tensor for name, tensor in weights.items() if name.startswith("visual.")}


def _older_names(model: Any) -> Callable[[StateDict], StateDict]:
    """From the names and shapes that other programs, and open_clip before, wrote, to those of the model."""
    from open_clip.convert import convert_state_dict
    from open_clip.model import convert_to_custom_text_state_dict

    def unpack(weights: StateDict) -> StateDict:
        found: StateDict = convert_state_dict(model, dict(weights))
        if not hasattr(model, "positional_embedding"):
            found = convert_to_custom_text_state_dict(found)
        for name in ("logit_scale", "logit_bias"):
            own = getattr(model, name, None)
            if own is not None and name in found and found[name].numel() == own.numel():
                found[name] = found[name].reshape(own.shape)
        return found

    return unpack


def _check_activation(model: str, tag: str, config: dict[str, Any]) -> None:
    import open_clip

    trained = open_clip.get_pretrained_cfg(model, tag).get("quick_gelu", False)
    other = model.removesuffix("-quickgelu") if config.get("quick_gelu") else f"{model}-quickgelu"
    if trained != config.get("quick_gelu", False) and other != model:
        raise InputError(f"encoder open_clip:{model}: {tag!r} was trained with the other activation; use {other}")


def _published_file(model: str, tag: str, published: dict[str, Any]) -> OfficialFile:
    """Where open_clip says that the weights of a tag are, stored under the model's and the tag's names."""
    repository, _, file = published.get("hf_hub", "").rpartition("/")
    if repository:
        file = file or "open_clip_model.safetensors"  # open_clip.constants.HF_SAFE_WEIGHTS_NAME
        url = f"https://huggingface.co/{repository}/resolve/main/{file}"
    else:
        url = published["url"]
    suffix = url.rpartition(".")[2]
    return OfficialFile(f"{model}.{tag}.{suffix}", url, None)


def contiguous_attention(tower: nn.Module, device: torch.device, dtype: str) -> None:
    """Have a tower's attention copy its inputs into contiguous memory, where it computes in half precision on a CPU.

    nn.MultiheadAttention turns images and places around without copying them. In other than float32, torch.matmul then
    takes the projection for a product of one matrix a place, and copies the weights as often: 8 images are then four
    times slower than in float32, and with this nearly twice as fast (https://github.com/pytorch/pytorch/issues/126973).
    """
    if device.type != "cpu" or dtype == "float32":
        return
    for module in tower.modules():
        if isinstance(module, nn.MultiheadAttention) and module.batch_first:
            module.batch_first = False
            module.register_forward_pre_hook(_places_first)
            module.register_forward_hook(_images_first)


def _places_first(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    # What is one tensor stays one: attention projects such inputs together.
    turned = {id(each): each.transpose(0, 1).contiguous() for each in inputs}
    return tuple(turned[id(each)] for each in inputs)


def _images_first(_: nn.Module, __: object, output: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor | None]:
    return output[0].transpose(0, 1), output[1]
