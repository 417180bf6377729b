"""The SAM 2 and 2.1 localizers, from Meta's package `sam2` (the extra of the same name).

Only the parts for single images are used: the image encoder, the prompt encoder and the mask decoder. The decoder's
transformer is SAM's, so `TokenDecoder` computes it. It has two more queries, which are not read: an object score and an
empty point after the box's corners. The order of queries does not matter, so both are appended here.
"""

# B images, n boxes, C token width (256), g side of the embedding (64)

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from regionspot.pipeline.backbones.builders import base_provenance
from regionspot.pipeline.backbones.dtypes import autocast
from regionspot.pipeline.backbones.protocols import BackboneConfig
from regionspot.pipeline.backbones.sam_token_decoder import TOKEN_SLOT, RegionTokens
from regionspot.pipeline.backbones.state_dicts import skip_init
from regionspot.pipeline.backbones.weights import load_weights

# ImageNet's, for values in 0..1 (sam2/utils/transforms.py, which resizes images to a square).
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIZES = {"tiny": "t", "small": "s", "base_plus": "b+", "large": "l"}


def build_sam2(name: str, overrides: Sequence[str] = ()) -> Any:
    """sam2's SAM2Base without weights. `overrides` are hydra's, such as "model.image_size=256"."""
    # Slow to import and optional. Importing `sam2` registers its configurations with hydra.
    import sam2  # noqa: F401
    from hydra import compose
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    version, size = name.split("_hiera_")
    config = compose(f"configs/{version}/{version}_hiera_{SIZES[size]}.yaml", overrides=list(overrides))
    OmegaConf.resolve(config)
    with skip_init():
        return instantiate(config.model, _recursive_=True)


class Sam2Localizer:
    """The frozen image part of a SAM 2, a `Localizer` without masks. Use `load_localizer`.

    pixels   side of the square input
    """

    def __init__(self, config: BackboneConfig) -> None:
        model = build_sam2(config.name)
        loaded = load_weights(config.name, config.weights, model.state_dict())
        model.load_state_dict(loaded.state_dict)
        self.name = config.name
        self.device = torch.device(config.device)
        self._model = model.to(self.device).eval().requires_grad_(False)
        self._dtype, self._preprocess = config.dtype, config.preprocess
        self.pixels: int = self._model.image_size
        self.provenance: dict[str, Any] = {
            **base_provenance(config, loaded, self.pixels, "sam2"),
            **config.preprocess.clip_provenance(self.pixels),  # the same square input
            "token_slot": TOKEN_SLOT,
        }
        self._tokens = RegionTokens(self.name, _as_sam(self._model), config.tokens)
        self.token_dim, self.outputs = self._tokens.width, self._tokens.outputs

    @property
    def batch_size(self) -> int:
        """Images to encode at a time. A CPU gains nothing from batches."""
        return 8 if self.device.type == "cuda" else 1

    def preprocess(self, image: Image.Image) -> Tensor:
        """float32 (3, pixels, pixels), normalised."""
        return self._preprocess.clip_input(image, self.pixels, MEAN, STD)

    @torch.no_grad()
    def encode(self, images: Sequence[Tensor]) -> Tensor:
        """float32 (B, C, g, g): the embeddings of preprocessed images."""
        with autocast(self.device, self._dtype):
            outputs = self._model.image_encoder(torch.stack(list(images)).to(self.device))
        embeddings: Tensor = outputs["vision_features"].float()
        if self._model.directly_add_no_mem_embed:
            # Added to a video's first frame, which has no memories (SAM2ImagePredictor.set_image).
            embeddings = embeddings + self._model.no_mem_embed.view(1, -1, 1, 1)
        return embeddings

    def tokens_of_images(
        self, embeddings: Tensor, boxes_xyxy: Sequence[NDArray[np.float32]], original_sizes: Sequence[tuple[int, int]]
    ) -> list[Tensor]:
        """B tensors float32 (n, C): the location tokens of each image's boxes, decoded together."""
        return self._tokens.first(embeddings, self._scale_all(boxes_xyxy, original_sizes))

    def outputs_of_images(
        self, embeddings: Tensor, boxes_xyxy: Sequence[NDArray[np.float32]], original_sizes: Sequence[tuple[int, int]]
    ) -> list[dict[str, Tensor]]:
        """All `outputs` of each image's boxes: float32 (n, *shape) by feature set."""
        return self._tokens.all_outputs(embeddings, self._scale_all(boxes_xyxy, original_sizes))

    def _scale_all(
        self, boxes_xyxy: Sequence[NDArray[np.float32]], original_sizes: Sequence[tuple[int, int]]
    ) -> list[Tensor]:
        """Boxes in pixels of the square."""
        scaled = []
        for boxes, (height, width) in zip(boxes_xyxy, original_sizes, strict=True):
            ratio = np.tile([self.pixels / width, self.pixels / height], 2)
            pixels = (np.asarray(boxes, np.float64).reshape(-1, 4) * ratio).astype(np.float32)
            scaled.append(torch.from_numpy(pixels).to(self.device))
        return scaled


def _as_sam(model: Any) -> SimpleNamespace:
    """The parts of a Sam that `RegionTokens` uses."""
    decoder, prompts = model.sam_mask_decoder, model.sam_prompt_encoder
    additional = [prompts.not_a_point_embed.weight]  # the two corners are points, which end with an empty one
    if decoder.pred_obj_scores:
        additional.append(decoder.obj_score_token.weight)
    return SimpleNamespace(mask_decoder=decoder, prompt_encoder=_PromptEncoder(prompts, torch.cat(additional).detach()))


class _PromptEncoder:
    """A prompt encoder that appends queries to a box's corners."""

    def __init__(self, prompts: Any, additional: Tensor) -> None:
        self._prompts, self._additional = prompts, additional
        self.get_dense_pe, self.no_mask_embed = prompts.get_dense_pe, prompts.no_mask_embed

    def __call__(self, points: None, boxes: Tensor, masks: None) -> tuple[Tensor, Tensor]:
        corners, no_mask = self._prompts(points=points, boxes=boxes, masks=masks)
        return torch.cat([corners, self._additional.expand(len(boxes), -1, -1)], dim=1), no_mask
