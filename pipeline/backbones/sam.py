"""The SAM localizer: its image encoder (sam_image_encoder.py) and location tokens (sam_token_decoder.py).

Masks are computed only on request. MobileSAM is a SAM with another image encoder (mobile_sam.py); SAM 2 has its own
class (sam2.py). `load_localizer` loads all of them by name.
"""

# B images, n boxes, C token width (256), g side of the embedding (64), h, w pixels

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from regionspot.cache.errors import InputError
from regionspot.cache.machine import compute_device
from regionspot.pipeline.backbones.builders import base_provenance, build_sam, sam_converter
from regionspot.pipeline.backbones.dtypes import autocast, resolve_dtype
from regionspot.pipeline.backbones.protocols import ALL, FIRST, BackboneConfig, Localizer, missing_members
from regionspot.pipeline.backbones.registry import LOCALIZERS
from regionspot.pipeline.backbones.sam_image_encoder import SamEncoder
from regionspot.pipeline.backbones.sam_token_decoder import FIRST_MASK_TOKEN, TOKEN_SLOT, RegionTokens
from regionspot.pipeline.backbones.weights import load_weights
from regionspot.pipeline.images.preprocess import get_preprocess

# ImageNet's, for values in 0..255 (segment_anything/build_sam.py).
SAM_PIXEL_MEAN = (123.675, 116.28, 103.53)
SAM_PIXEL_STD = (58.395, 57.12, 57.375)
MASK_CHUNK = 8  # masks are interpolated in float32 at the original size: 48 MB per mask of a 12-megapixel image


class SamLocalizer:
    """A frozen SAM or MobileSAM, a `MaskingLocalizer`. Use `load_localizer`.

    name        of the registry entry and of the feature set
    pixels      the longer side of an input image
    token_dim   width of a location token
    provenance  JSON-serialisable, everything that determines the values of the tokens
    """

    def __init__(self, config: BackboneConfig) -> None:
        sam = build_sam(config.name)
        loaded = load_weights(config.name, config.weights, sam.state_dict(), convert=sam_converter(config.name))
        sam.load_state_dict(loaded.state_dict)
        self.name = config.name
        self.device = torch.device(config.device)
        self._sam = sam.to(self.device).eval().requires_grad_(False)
        self.pixels: int = self._sam.image_encoder.img_size
        self._preprocess = config.preprocess
        self.provenance: dict[str, Any] = {
            **base_provenance(config, loaded, self.pixels, "segment_anything"),
            **config.preprocess.sam_provenance(self.pixels),
            "token_slot": TOKEN_SLOT,
        }
        self._mean = torch.tensor(SAM_PIXEL_MEAN, device=self.device).view(3, 1, 1)
        self._std = torch.tensor(SAM_PIXEL_STD, device=self.device).view(3, 1, 1)
        self._encoder = self._image_encoder(config.dtype)
        self._tokens = RegionTokens(self.name, self._sam, config.tokens)
        self.token_dim, self.outputs = self._tokens.width, self._tokens.outputs

    def _image_encoder(self, dtype: str) -> Callable[[Tensor], Tensor]:
        from segment_anything.modeling import ImageEncoderViT

        encoder = self._sam.image_encoder
        if isinstance(encoder, ImageEncoderViT):
            return SamEncoder(encoder, dtype)

        def plain(images: Tensor) -> Tensor:
            with autocast(self.device, dtype):
                embedding: Tensor = encoder(images)
            return embedding.float()

        return plain

    @property
    def batch_size(self) -> int:
        """Images to encode at a time. A CPU gains nothing from batches of large images."""
        return 8 if self.device.type == "cuda" or self.pixels <= 512 else 1

    def preprocess(self, image: Image.Image) -> Tensor:
        """uint8 (3, h, w), the longer side `pixels` long; `encode` normalises and pads it on the device."""
        return self._preprocess.sam_input(image, self.pixels)

    @torch.no_grad()
    def encode(self, images: Sequence[Tensor]) -> Tensor:
        """float32 (B, C, g, g): the embeddings of preprocessed images."""
        return self._encoder(torch.stack([self._normalised(image) for image in images]))

    def _normalised(self, image: Tensor) -> Tensor:
        values = (self._on_device(image).float() - self._mean) / self._std
        # Padded with 0 after normalisation, as in SAM's own preprocess.
        return F.pad(values, (0, self.pixels - values.shape[2], 0, self.pixels - values.shape[1]))

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

    @torch.no_grad()
    def tokens_and_masks(
        self, embedding: Tensor, boxes_xyxy: NDArray[np.float32], original_size: tuple[int, int]
    ) -> tuple[Tensor, NDArray[np.bool_]]:
        """float32 (n, C) and bool (n, h, w): tokens of one image's boxes, and masks at the original size."""
        tokens, masks = [torch.zeros(0, self.token_dim, device=self.device)], [np.zeros((0, *original_size), np.bool_)]
        boxes, size = self._scale(boxes_xyxy, original_size), self._preprocess.sam_size(original_size, self.pixels)
        embeddings, queries = embedding[None].to(self.device).float(), [FIRST_MASK_TOKEN + TOKEN_SLOT]
        for part in self._tokens.decoder.decode(embeddings, boxes, [0] * len(boxes), queries, MASK_CHUNK):
            tokens.append(part.queries[:, 0])
            logits = self._mask_logits(tokens[-1], part.cells)
            full = self._sam.postprocess_masks(logits, size, original_size)
            masks.append((full[:, 0] > self._sam.mask_threshold).cpu().numpy())
        return torch.cat(tokens), np.concatenate(masks)

    def _scale_all(
        self, boxes_xyxy: Sequence[NDArray[np.float32]], original_sizes: Sequence[tuple[int, int]]
    ) -> list[Tensor]:
        return [self._scale(boxes, size) for boxes, size in zip(boxes_xyxy, original_sizes, strict=True)]

    def _scale(self, boxes_xyxy: NDArray[np.float32], original_size: tuple[int, int]) -> Tensor:
        """Boxes in pixels of the encoder's input, always float32: bfloat16 Fourier features are a pixel off."""
        scaled = self._preprocess.scale_boxes(boxes_xyxy, original_size, self.pixels)
        return self._on_device(torch.from_numpy(scaled))

    def _on_device(self, values: Tensor) -> Tensor:
        # For CUDA the driver copies pageable memory before it returns, so this is safe and the host need not wait.
        return values.to(self.device, non_blocking=self.device.type == "cuda")

    def _mask_logits(self, tokens: Tensor, cells: Tensor) -> Tensor:
        """float32 (k, 1, 4g, 4g): MaskDecoder.predict_masks, for one slot."""
        decoder = self._sam.mask_decoder
        side = math.isqrt(cells.shape[1])
        grid = cells.transpose(1, 2).reshape(len(cells), -1, side, side)
        upscaled = decoder.output_upscaling(grid)
        weights = decoder.output_hypernetworks_mlps[TOKEN_SLOT](tokens)
        return torch.einsum("kc,kchw->khw", weights, upscaled).unsqueeze(1)


def load_localizer(
    name: str,
    weights: str | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    *,
    preprocess: str = "direct",
    tokens: str = FIRST,
) -> Localizer:
    """Load a localizer of `registry.LOCALIZERS`, or "package.module:Class".

    weights     a source for `load_weights`
    dtype       of the image encoder: float32, bfloat16, float16 or "auto"; the token decoder uses float32
    preprocess  a preset in preprocess.py
    tokens      "first", or "all": the other mask tokens and the predicted IoUs as well

    Raises InputError for an unknown name, dtype, preset or `tokens`, or a class that is not a Localizer; WeightsError
    for missing or unfitting weights.
    """
    place, rule = str(compute_device(device)), get_preprocess(preprocess)
    model = LOCALIZERS.build(
        BackboneConfig(name, weights, place, resolve_dtype(dtype, place, "localizer"), rule, tokens)
    )
    if not isinstance(model, Localizer):
        raise InputError(
            f"localizer {name!r}: lacks {missing_members(model, Localizer)}, which protocols.Localizer requires"
        )
    if tokens == ALL and len(model.outputs) == 1:
        raise InputError(f"localizer {name!r}: has only location tokens; leave out --tokens {tokens}")
    return model
