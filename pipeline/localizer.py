"""The localizer: SAM's image encoder and the half of its mask decoder that a location token needs.

A location token is what the mask decoder's transformer makes of its first mask query. The published method takes
nothing else, so masks are upscaled only where somebody asks for them.
"""

# B pictures, n boxes, C token width (256), g side of the embedding (64), h, w pixels

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from regionspot.pipeline.backbones import build_sam
from regionspot.pipeline.dtypes import autocast, check_dtype
from regionspot.pipeline.preprocess import SAM_RESIZE, sam_input, sam_size, scale_boxes
from regionspot.pipeline.weights import load_weights

# Of ImageNet, in 0..255 (segment_anything/build_sam.py).
SAM_PIXEL_MEAN = (123.675, 116.28, 103.53)
SAM_PIXEL_STD = (58.395, 57.12, 57.375)
TOKEN_SLOT = 0  # the single-mask output of the mask decoder's four; the paper's choice
# Each box carries its own copy of the picture's embedding through the decoder: 4 MB, and more inside attention.
TOKEN_CHUNK = 64
MASK_CHUNK = 8  # masks are interpolated in float32 at the original size: 48 MB each for a 12-megapixel photo


class Localizer:
    """A frozen SAM. Made by `load_localizer`.

    name        registry name, which is also that of the feature set in a cache
    pixels      the longer side of a picture on entry
    token_dim   width of a location token
    provenance  what decides the tokens' values, JSON-able
    """

    def __init__(self, name: str, sam: Any, provenance: dict[str, Any], device: str, dtype: str) -> None:
        self.name = name
        self.provenance = provenance
        self.device = torch.device(device)
        self._sam = sam.to(self.device).eval().requires_grad_(False)
        self._dtype = dtype
        self.pixels: int = self._sam.image_encoder.img_size
        self.token_dim: int = self._sam.mask_decoder.transformer_dim
        self._mean = torch.tensor(SAM_PIXEL_MEAN, device=self.device).view(3, 1, 1)
        self._std = torch.tensor(SAM_PIXEL_STD, device=self.device).view(3, 1, 1)
        # The same for every picture and box: the positions of the embedding's cells, and "no mask was given".
        self._positions: Tensor = self._sam.prompt_encoder.get_dense_pe()

    @property
    def batch_size(self) -> int:
        """Pictures to encode at a time. On a CPU more than one large one only costs memory: 0.8 GB of scores each."""
        return 8 if self.device.type == "cuda" or self.pixels <= 512 else 1

    def preprocess(self, photo: Image.Image) -> Tensor:
        """uint8 (3, h, w), the longer side `pixels` long; normalising and padding are left to the device."""
        return sam_input(photo, self.pixels)

    @torch.no_grad()
    def encode(self, pictures: Sequence[Tensor]) -> Tensor:
        """float32 (B, C, g, g): the image embeddings of pictures as `preprocess` gives them."""
        batch = torch.stack([self._normalised(picture) for picture in pictures])
        with autocast(self.device, self._dtype):
            embedding: Tensor = self._sam.image_encoder(batch)
        return embedding.float()

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
        decoded = self._decode(embedding, boxes_xyxy, original_size, TOKEN_CHUNK)
        none = torch.zeros(0, self.token_dim, device=self.device)
        return torch.cat([none, *(queries[:, 1 + TOKEN_SLOT] for queries, _ in decoded)])

    @torch.no_grad()
    def tokens_and_masks(
        self, embedding: Tensor, boxes_xyxy: NDArray[np.float32], original_size: tuple[int, int]
    ) -> tuple[Tensor, NDArray[np.bool_]]:
        """The location tokens as `tokens` gives them, and bool (n, h, w): each box's mask at the original size."""
        tokens, masks = [torch.zeros(0, self.token_dim, device=self.device)], [np.zeros((0, *original_size), np.bool_)]
        for queries, cells in self._decode(embedding, boxes_xyxy, original_size, MASK_CHUNK):
            tokens.append(queries[:, 1 + TOKEN_SLOT])
            logits = self._mask_logits(tokens[-1], cells)
            full = self._sam.postprocess_masks(logits, sam_size(original_size, self.pixels), original_size)
            masks.append((full[:, 0] > self._sam.mask_threshold).cpu().numpy())
        return torch.cat(tokens), np.concatenate(masks)

    def _decode(
        self,
        embedding: Tensor,
        boxes_xyxy: NDArray[np.float32],
        original_size: tuple[int, int],
        chunk: int,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The mask decoder's transformer, `chunk` boxes at a time.

        Yields its queries (k, 7, C), in the order IoU, four masks, two box corners, and its picture cells (k, g*g, C).
        Stays in float32 whatever the encoder runs in: the Fourier features of a box lose a pixel in bfloat16.
        """
        decoder, prompts = self._sam.mask_decoder, self._sam.prompt_encoder
        outputs = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])
        boxes = torch.from_numpy(scale_boxes(boxes_xyxy, original_size, self.pixels)).to(self.device)
        for start in range(0, len(boxes), chunk):
            some = boxes[start : start + chunk]
            corners, no_mask = prompts(points=None, boxes=some, masks=None)
            queries = torch.cat([outputs.expand(len(some), -1, -1), corners], dim=1)
            picture = embedding.to(self.device).float() + no_mask
            yield decoder.transformer(picture, self._positions.expand(len(some), -1, -1, -1), queries)

    def _mask_logits(self, tokens: Tensor, cells: Tensor) -> Tensor:
        """float32 (k, 1, 4g, 4g): what MaskDecoder.predict_masks computes, for the one slot."""
        decoder = self._sam.mask_decoder
        grid = cells.transpose(1, 2).reshape(len(cells), -1, *self._positions.shape[-2:])
        upscaled = decoder.output_upscaling(grid)
        weights = decoder.output_hypernetworks_mlps[TOKEN_SLOT](tokens)
        return torch.einsum("kc,kchw->khw", weights, upscaled).unsqueeze(1)


def load_localizer(name: str, weights: str | None = None, device: str = "cpu", dtype: str = "float32") -> Localizer:
    """A localizer of `backbones.LOCALIZERS` with its weights.

    `weights` is a source that `load_weights` knows. `dtype` is what the image encoder computes in (float32,
    bfloat16, float16); the token decoder always computes in float32.

    Raises InputError for an unknown name or dtype, WeightsError for weights that cannot be had or do not fit.
    """
    check_dtype(dtype)
    sam = build_sam(name)
    loaded = load_weights(name, weights, sam.state_dict())
    sam.load_state_dict(loaded.state_dict)
    pixels = sam.image_encoder.img_size
    provenance = {
        "model": name,
        "weights_sha256": loaded.sha256,
        "weights_origin": loaded.origin,
        "input_pixels": pixels,
        "resize": SAM_RESIZE.format(pixels=pixels),
        "dtype": dtype,
        "token_slot": TOKEN_SLOT,
        "versions": {package: version(package) for package in ("torch", "segment_anything", "regionspot")},
    }
    return Localizer(name, sam, provenance, device, dtype)
