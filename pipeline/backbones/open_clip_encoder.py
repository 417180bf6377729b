"""Encoders for open_clip models that are not a plain CLIP: SigLIP, PE, EVA, ConvNeXt, CoCa, ResNets and others.

The feature map is the image tower's output at each position before the last norm and pooling, after the class token if
there is one; register tokens are left out. Each model pools its map in its own way (often by attention), so single
tokens cannot be projected into the joint space. Models that do not pool by attention have a dense map, which is in that
space (dense.py). Whole images and prompts are embedded by open_clip.
"""

# B images, T map tokens, D map width, P prompts, E width of the joint space, p pixels

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from regionspot.cache.errors import InputError
from regionspot.pipeline.backbones.builders import base_provenance, build_clip
from regionspot.pipeline.backbones.clip import PROMPT_BATCH, ClipEncoder
from regionspot.pipeline.backbones.dense import dense_path
from regionspot.pipeline.backbones.dtypes import autocast
from regionspot.pipeline.backbones.open_clip_models import config_of, contiguous_attention, is_plain, model_and_tag
from regionspot.pipeline.backbones.protocols import BackboneConfig
from regionspot.pipeline.backbones.registry import stored_name
from regionspot.pipeline.backbones.weights import load_weights

SQUASH = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
SQUASH_RESIZE = "PIL {filter} to {pixels} x {pixels}, aspect not kept"


def build(config: BackboneConfig) -> ClipEncoder | OpenClipEncoder:
    """Build the encoder of open_clip:MODEL[:TAG]. Raises InputError for an unknown model or tag."""
    model, _ = model_and_tag(config.name)
    return ClipEncoder(config) if is_plain(config_of(model)) else OpenClipEncoder(config)


class OpenClipEncoder:
    """A frozen open_clip model, a `TextEncoder` with the attributes of ClipEncoder. Use `load_encoder`."""

    def __init__(self, config: BackboneConfig) -> None:
        built = build_clip(config.name)
        self.name = stored_name(config.name)
        loaded = load_weights(self.name, config.weights, built.model.state_dict(), built.official, built.convert)
        built.model.load_state_dict(loaded.state_dict)
        self.weights_sha256 = loaded.sha256
        self.device = torch.device(config.device)
        self._model = built.model.to(self.device).eval().requires_grad_(False)
        self._visual = self._model.visual
        contiguous_attention(self._visual, self.device, config.dtype)
        self._open_clip_name, self._text_config = model_and_tag(config.name)[0], built.text_config
        self._tokenize: Any = None
        self._dtype, self._preprocess = config.dtype, config.preprocess
        self._normalisation = (tuple(built.mean), tuple(built.std))
        size = self._visual.image_size
        self.pixels: int = size if isinstance(size, int) else size[0]
        # The authors' own filter, if they resize to a square too and the image was not resized before.
        self._squash = built.squash if config.preprocess.name == "direct" else None
        self._has_class_token = _has_class_token(self._visual)
        self.provenance: dict[str, Any] = {
            **base_provenance(config, loaded, self.pixels, "open_clip_torch", "timm"),
            **config.preprocess.clip_provenance(self.pixels),
            **({"resize": SQUASH_RESIZE.format(filter=self._squash, pixels=self.pixels)} if self._squash else {}),
            "mean": list(built.mean),
            "std": list(built.std),
            "class_token": self._has_class_token,
        }
        scale = getattr(self._model, "logit_scale", None)
        self.logit_scale = 1.0 if scale is None else float(scale.exp())
        # Measured, because the towers store their grid size in many ways.
        blank = torch.zeros(1, 3, self.pixels, self.pixels)
        _, tokens, width = self.encode(blank).shape
        self.map_shape = (tokens, width)
        self.text_dim: int = self.embed_images(blank).shape[1]
        self._dense = dense_path(self._visual)
        self.dense_shape = None if self._dense is None else (tokens - self._has_class_token, self.text_dim)

    @property
    def batch_size(self) -> int:
        """Images to encode at a time."""
        return 8

    def preprocess(self, image: Image.Image) -> Tensor:
        """float32 (3, p, p), normalised."""
        if self._squash is None:
            return self._preprocess.clip_input(image, self.pixels, *self._normalisation)
        square = image.convert("RGB").resize((self.pixels, self.pixels), SQUASH[self._squash])
        pixels = torch.from_numpy(np.array(square)).permute(2, 0, 1).float().div_(255)
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in self._normalisation)
        return pixels.sub_(mean).div_(std)

    @torch.no_grad()
    def encode(self, batch: Tensor) -> Tensor:
        """float32 (B, T, D): the feature maps of preprocessed images (B, 3, p, p)."""
        return self._outputs_of_blocks(batch, 1)[0]

    @torch.no_grad()
    def encode_with_dense(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        """float32 (B, T, D) and (B, P, E): feature maps as `encode` gives them, and dense maps."""
        assert self._dense is not None
        before, feature_map = self._outputs_of_blocks(batch, 2)
        return feature_map, self._dense(before[:, 1:] if self._has_class_token else before)

    def _outputs_of_blocks(self, batch: Tensor, count: int) -> list[Tensor]:
        """float32 (B, T, D) for each of the last `count` blocks."""
        # Convolutional towers such as ConvNeXt do not have these two options.
        token_options = {"output_fmt": "NLC", "output_extra_tokens": True} if _has_tokens(self._visual) else {}
        with autocast(self.device, self._dtype):
            outputs = self._visual.forward_intermediates(
                batch.to(self.device), indices=count, intermediates_only=True, **token_options
            )
        blocks: list[Tensor] = outputs["image_intermediates"]
        if not token_options:
            blocks = [patches.flatten(2).transpose(1, 2) for patches in blocks]
        if self._has_class_token:
            prefixes = outputs["image_intermediates_prefix"]
            blocks = [
                torch.cat([prefix[:, :1], patches], dim=1) for prefix, patches in zip(prefixes, blocks, strict=True)
            ]
        return [tokens.float() for tokens in blocks]

    @torch.no_grad()
    def embed_images(self, batch: Tensor) -> Tensor:
        """float32 (B, E): the model's embedding of whole preprocessed images, not normalised."""
        with autocast(self.device, self._dtype):
            output = self._visual(batch.to(self.device))
        # CoCa's tower returns its caption tokens as well.
        embeddings: Tensor = output[0] if isinstance(output, tuple) else output
        return embeddings.float()

    @torch.no_grad()
    def embed_prompts(self, prompts: Sequence[str]) -> Tensor:
        """float32 (P, E): the embeddings of the prompts, not normalised.

        Raises InputError if the model has no text tower or its tokenizer cannot be loaded.
        """
        tokenize = self._tokenizer()
        embeddings = [torch.zeros(0, self.text_dim, device=self.device)]
        for start in range(0, len(prompts), PROMPT_BATCH):
            ids = tokenize(list(prompts[start : start + PROMPT_BATCH])).to(self.device)
            embeddings.append(self._model.encode_text(ids).float())
        return torch.cat(embeddings)

    def _tokenizer(self) -> Any:
        if self._text_config is None:
            raise InputError(
                f"encoder {self.name}: text towers of Hugging Face are not supported; it gives maps, but class names "
                "need another encoder"
            )
        if self._tokenize is None:
            self._tokenize = _load_tokenizer(self.name, self._open_clip_name, self._text_config)
        return self._tokenize


def _load_tokenizer(name: str, model: str, config: dict[str, Any]) -> Any:
    import open_clip

    hub_name = config.get("hf_tokenizer_name")
    try:
        return open_clip.get_tokenizer(model)
    except ImportError:
        remedy = "pip install 'regionspot[text]'"
    except (OSError, ValueError):  # transformers raises these if the hub cannot be reached
        remedy = "connect to the internet once to download it, or set HF_HOME to a folder that contains it"
    raise InputError(f"encoder {name}: needs the tokenizer {hub_name}, which cannot be loaded; {remedy}")


def _has_tokens(visual: Any) -> bool:
    """Whether the tower is a transformer over tokens."""
    trunk = getattr(visual, "trunk", None)
    return hasattr(visual, "class_embedding") if trunk is None else hasattr(trunk, "num_prefix_tokens")


def _has_class_token(visual: Any) -> bool:
    trunk = getattr(visual, "trunk", None)
    return hasattr(visual, "class_embedding") if trunk is None else getattr(trunk, "cls_token", None) is not None
