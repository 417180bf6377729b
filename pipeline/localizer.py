"""The localizer: SAM's image encoder (sam_encoder.py) and mask decoder, as far as a token needs it (token_decoder.py).

A location token is what the mask decoder's transformer makes of its first mask query. The published method takes
nothing else, so masks are upscaled only where somebody asks for them.
"""

# B pictures, n boxes, C token width (256), g side of the embedding (64), h, w pixels

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from regionspot.pipeline.backbones import build_sam
from regionspot.pipeline.dtypes import check_dtype
from regionspot.pipeline.preprocess import Preprocess, preprocess_named
from regionspot.pipeline.sam_encoder import SamEncoder
from regionspot.pipeline.token_decoder import FIRST_MASK_TOKEN, TokenDecoder
from regionspot.pipeline.weights import load_weights

# Of ImageNet, in 0..255 (segment_anything/build_sam.py).
SAM_PIXEL_MEAN = (123.675, 116.28, 103.53)
SAM_PIXEL_STD = (58.395, 57.12, 57.375)
TOKEN_SLOT = 0  # the single-mask output of the mask decoder's four; the paper's choice
# Boxes decoded at a time. Each carries some 15 MB of cells and scores through the decoder: few stay in a CPU's
# caches (16 boxes of SAM ViT-B on one core: 0.30 s by 2 to 4, 0.37 s by 16), many keep a GPU's cores busy.
TOKEN_CHUNK = {"cpu": 4, "cuda": 128}
MASK_CHUNK = 8  # masks are interpolated in float32 at the original size: 48 MB each for a 12-megapixel photo


class Localizer:
    """A frozen SAM. Made by `load_localizer`.

    name        registry name, which is also that of the feature set in a cache
    pixels      the longer side of a picture on entry
    token_dim   width of a location token
    provenance  what decides the tokens' values, JSON-able
    """

    def __init__(
        self, name: str, sam: Any, provenance: dict[str, Any], device: str, dtype: str, preprocess: Preprocess
    ) -> None:
        self.name = name
        self.provenance = provenance
        self.device = torch.device(device)
        self._preprocess = preprocess
        self._sam = sam.to(self.device).eval().requires_grad_(False)
        self.pixels: int = self._sam.image_encoder.img_size
        self.token_dim: int = self._sam.mask_decoder.transformer_dim
        self._mean = torch.tensor(SAM_PIXEL_MEAN, device=self.device).view(3, 1, 1)
        self._std = torch.tensor(SAM_PIXEL_STD, device=self.device).view(3, 1, 1)
        self._encoder = SamEncoder(self._sam.image_encoder, dtype)
        self._decoder = TokenDecoder(self._sam)

    @property
    def batch_size(self) -> int:
        """Pictures to encode at a time. On a CPU more than one large one gains nothing."""
        return 8 if self.device.type == "cuda" or self.pixels <= 512 else 1

    def preprocess(self, photo: Image.Image) -> Tensor:
        """uint8 (3, h, w), the longer side `pixels` long; normalising and padding are left to the device."""
        return self._preprocess.sam_input(photo, self.pixels)

    @torch.no_grad()
    def encode(self, pictures: Sequence[Tensor]) -> Tensor:
        """float32 (B, C, g, g): the image embeddings of pictures as `preprocess` gives them."""
        return self._encoder(torch.stack([self._normalised(picture) for picture in pictures]))

    def _normalised(self, picture: Tensor) -> Tensor:
        values = (picture.to(self.device).float() - self._mean) / self._std
        # After normalising: the padding is 0, the mean colour, as in SAM's own preprocess.
        return F.pad(values, (0, self.pixels - values.shape[2], 0, self.pixels - values.shape[1]))

    @torch.no_grad()
    def tokens(self, embedding: Tensor, boxes_xyxy: NDArray[np.float32], original_size: tuple[int, int]) -> Tensor:
        """float32 (n, C): the location token of each box, in order.

        embedding      (C, g, g)       of one picture
        boxes_xyxy     float32 (n, 4)  in pixels of the original; n may be 0
        original_size  (height, width)
        """
        return self.tokens_of_pictures(embedding[None], [boxes_xyxy], [original_size])[0]

    @torch.no_grad()
    def tokens_of_pictures(
        self, embeddings: Tensor, boxes_xyxy: Sequence[NDArray[np.float32]], original_sizes: Sequence[tuple[int, int]]
    ) -> list[Tensor]:
        """The location tokens of several pictures' boxes, which go through the decoder together.

        embeddings (B, C, g, g), boxes and sizes as for `tokens`, one entry a picture; returns B tensors (n, C).
        """
        counts = [len(boxes) for boxes in boxes_xyxy]
        scaled = [self._scaled(boxes, size) for boxes, size in zip(boxes_xyxy, original_sizes, strict=True)]
        picture = np.repeat(np.arange(len(counts)), counts).tolist()
        chunk = TOKEN_CHUNK["cuda" if self.device.type == "cuda" else "cpu"]
        wanted = [FIRST_MASK_TOKEN + TOKEN_SLOT]
        decoded = self._decoder.decode(embeddings.to(self.device).float(), torch.cat(scaled), picture, wanted, chunk)
        none = torch.zeros(0, self.token_dim, device=self.device)
        return list(torch.split(torch.cat([none, *(part.queries[:, 0] for part in decoded)]), counts))

    @torch.no_grad()
    def tokens_and_masks(
        self, embedding: Tensor, boxes_xyxy: NDArray[np.float32], original_size: tuple[int, int]
    ) -> tuple[Tensor, NDArray[np.bool_]]:
        """The location tokens as `tokens` gives them, and bool (n, h, w): each box's mask at the original size."""
        tokens, masks = [torch.zeros(0, self.token_dim, device=self.device)], [np.zeros((0, *original_size), np.bool_)]
        boxes, entered = self._scaled(boxes_xyxy, original_size), self._preprocess.sam_size(original_size, self.pixels)
        embeddings, wanted = embedding[None].to(self.device).float(), [FIRST_MASK_TOKEN + TOKEN_SLOT]
        for part in self._decoder.decode(embeddings, boxes, [0] * len(boxes), wanted, MASK_CHUNK):
            tokens.append(part.queries[:, 0])
            logits = self._mask_logits(tokens[-1], part.cells)
            full = self._sam.postprocess_masks(logits, entered, original_size)
            masks.append((full[:, 0] > self._sam.mask_threshold).cpu().numpy())
        return torch.cat(tokens), np.concatenate(masks)

    def _scaled(self, boxes_xyxy: NDArray[np.float32], original_size: tuple[int, int]) -> Tensor:
        """Boxes in pixels of the encoder's input. float32 always: in bfloat16 their Fourier features lose a pixel."""
        scaled = self._preprocess.scale_boxes(boxes_xyxy, original_size, self.pixels)
        return torch.from_numpy(scaled).to(self.device)

    def _mask_logits(self, tokens: Tensor, cells: Tensor) -> Tensor:
        """float32 (k, 1, 4g, 4g): what MaskDecoder.predict_masks computes, for the one slot."""
        decoder = self._sam.mask_decoder
        side = math.isqrt(cells.shape[1])
        grid = cells.transpose(1, 2).reshape(len(cells), -1, side, side)
        upscaled = decoder.output_upscaling(grid)
        weights = decoder.output_hypernetworks_mlps[TOKEN_SLOT](tokens)
        return torch.einsum("kc,kchw->khw", weights, upscaled).unsqueeze(1)


def load_localizer(
    name: str, weights: str | None = None, device: str = "cpu", dtype: str = "float32", *, preprocess: str = "direct"
) -> Localizer:
    """A localizer of `backbones.LOCALIZERS` with its weights.

    `weights` is a source that `load_weights` knows. `dtype` is what the image encoder computes in (float32,
    bfloat16, float16); the token decoder always computes in float32. `preprocess` is a preset of preprocess.py.

    Raises InputError for an unknown name, dtype or preset, WeightsError for weights that cannot be had or do not fit.
    """
    check_dtype(dtype)
    rule = preprocess_named(preprocess)
    sam = build_sam(name)
    loaded = load_weights(name, weights, sam.state_dict())
    sam.load_state_dict(loaded.state_dict)
    pixels = sam.image_encoder.img_size
    provenance = {
        "model": name,
        "weights_sha256": loaded.sha256,
        "weights_origin": loaded.origin,
        "input_pixels": pixels,
        **rule.sam_provenance(pixels),
        "dtype": dtype,
        "token_slot": TOKEN_SLOT,
        "versions": {package: version(package) for package in ("torch", "segment_anything", "regionspot")},
    }
    return Localizer(name, sam, provenance, device, dtype, rule)
