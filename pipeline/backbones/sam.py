"""The SAM localizer: its image encoder (sam_image_encoder.py) and location tokens (sam_token_decoder.py).

Masks are computed only on request, and points only serve to find boxes. MobileSAM is a SAM with another image encoder
(mobile_sam.py); SAM 2 has its own class (sam2.py). `load_localizer` loads all of them by name.
"""

# B images, n boxes, k points of a prompt, C token width (256), g side of the embedding (64), h, w pixels

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
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
from regionspot.pipeline.backbones.protocols import (
    ALL,
    FIRST,
    BackboneConfig,
    Localizer,
    MaskThreshold,
    missing_members,
)
from regionspot.pipeline.backbones.registry import LOCALIZERS
from regionspot.pipeline.backbones.sam_image_encoder import SamEncoder
from regionspot.pipeline.backbones.sam_token_decoder import (
    ALL_OUTPUT_QUERIES,
    FIRST_MASK_TOKEN,
    IOU_TOKEN,
    MASK_TOKENS,
    TOKEN_SLOT,
    RegionTokens,
)
from regionspot.pipeline.backbones.weights import load_weights
from regionspot.pipeline.images.preprocess import get_preprocess

# ImageNet's, for values in 0..255 (segment_anything/build_sam.py).
SAM_PIXEL_MEAN = (123.675, 116.28, 103.53)
SAM_PIXEL_STD = (58.395, 57.12, 57.375)
MASK_CHUNK = 8  # masks are interpolated in float32 at the original size: 48 MB per mask of a 12-megapixel image

# Defaults of SamAutomaticMaskGenerator (segment_anything/automatic_mask_generator.py), which uses no crops by default.
POINTS_PER_SIDE = 32
MIN_PREDICTED_IOU = 0.88
MIN_STABILITY, STABILITY_OFFSET = 0.95, 1.0
NMS_IOU = 0.7


class SamLocalizer:
    """A frozen SAM or MobileSAM, a `PointLocalizer`. Use `load_localizer`.

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
        self,
        embedding: Tensor,
        boxes_xyxy: NDArray[np.float32],
        original_size: tuple[int, int],
        mask_threshold: MaskThreshold = "sam",
    ) -> tuple[Tensor, NDArray[np.bool_]]:
        """float32 (n, C) and bool (n, h, w): tokens of one image's boxes, and masks at the original size."""
        by_authors = mask_threshold == "reference"
        threshold_size = get_preprocess("reference").first_size(original_size) if by_authors else original_size
        tokens, masks = [torch.zeros(0, self.token_dim, device=self.device)], [np.zeros((0, *original_size), np.bool_)]
        boxes, size = self._scale(boxes_xyxy, original_size), self._preprocess.sam_size(original_size, self.pixels)
        embeddings, queries = embedding[None].to(self.device).float(), [FIRST_MASK_TOKEN + TOKEN_SLOT]
        for part in self._tokens.decoder.decode(embeddings, boxes, [0] * len(boxes), queries, MASK_CHUNK):
            tokens.append(part.queries[:, 0])
            logits = self._mask_logits(part.queries, part.cells, [TOKEN_SLOT])
            inside = self._sam.postprocess_masks(logits, size, threshold_size) > self._sam.mask_threshold
            if by_authors:
                inside = F.interpolate(inside.byte(), original_size, mode="nearest").bool()
            masks.append(inside[:, 0].cpu().numpy())
        return torch.cat(tokens), np.concatenate(masks)

    @torch.no_grad()
    def masks_of_points(
        self,
        embedding: Tensor,
        points_xy: NDArray[np.float32],
        labels: NDArray[np.int64],
        original_size: tuple[int, int],
    ) -> NDArray[np.bool_]:
        """bool (n, h, w): the mask of each prompt of k points (n, k, 2) with labels (n, k), as a PointLocalizer's.

        One point is ambiguous (a shirt, or its wearer), so of its three masks the one with the highest predicted IoU is
        taken; several points have the single mask (segment_anything/predictor.py, `multimask_output`).
        """
        size, masks = self._preprocess.sam_size(original_size, self.pixels), [np.zeros((0, *original_size), np.bool_)]
        for logits, iou in self._decode_points(embedding, points_xy, labels, original_size):
            several = points_xy.shape[1] > 1
            best = torch.full_like(iou[:, 0], TOKEN_SLOT, dtype=torch.int64) if several else iou[:, 1:].argmax(1) + 1
            chosen = logits[torch.arange(len(logits), device=logits.device), best, None]
            for part in torch.split(chosen, MASK_CHUNK):
                full = self._sam.postprocess_masks(part, size, original_size)[:, 0]
                masks.append((full > self._sam.mask_threshold).cpu().numpy())
        return np.concatenate(masks)

    @torch.no_grad()
    def propose_boxes(self, embedding: Tensor, original_size: tuple[int, int]) -> NDArray[np.float32]:
        """float32 (n, 4): boxes around whatever SAM segments in one image, best first, as a PointLocalizer's.

        The boxes of SamAutomaticMaskGenerator by its defaults: the masks of a grid of points, without those of low
        predicted IoU or low stability and without repeated ones.
        """
        from segment_anything.utils.amg import batched_mask_to_box, build_point_grid, calculate_stability_score
        from torchvision.ops import nms

        threshold, size = self._sam.mask_threshold, self._preprocess.sam_size(original_size, self.pixels)
        grid = (build_point_grid(POINTS_PER_SIDE) * original_size[::-1]).astype(np.float32)[:, None]
        boxes, scores = [torch.zeros(0, 4, device=self.device)], [torch.zeros(0, device=self.device)]
        labels = np.ones((len(grid), 1), np.int64)
        for logits, iou in self._decode_points(embedding, grid, labels, original_size):
            candidates, predicted = logits[:, 1:].flatten(0, 1), iou[:, 1:].flatten()
            for part in torch.split((predicted > MIN_PREDICTED_IOU).nonzero()[:, 0], MASK_CHUNK):
                full = self._sam.postprocess_masks(candidates[part, None], size, original_size)[:, 0]
                stable = calculate_stability_score(full, threshold, STABILITY_OFFSET) >= MIN_STABILITY
                boxes.append(batched_mask_to_box(full[stable] > threshold).float())
                scores.append(predicted[part[stable]])
        proposed = torch.cat(boxes)
        kept: NDArray[np.float32] = proposed[nms(proposed, torch.cat(scores), NMS_IOU)].cpu().numpy()
        kept[:, 2:] += 1  # from the last pixel of the mask to its edge
        return kept

    def _decode_points(
        self,
        embedding: Tensor,
        points_xy: NDArray[np.float32],
        labels: NDArray[np.int64],
        original_size: tuple[int, int],
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields the logits (c, 4, 4g, 4g) and predicted IoUs (c, 4) of the masks of some prompts at a time."""
        # As boxes from a point to itself.
        scaled = self._scale(np.tile(points_xy.reshape(-1, 2), 2), original_size)[:, :2].reshape(points_xy.shape)
        embeddings, on_device = embedding[None].to(self.device).float(), self._on_device(torch.from_numpy(labels))
        image = [0] * len(scaled)
        for part in self._tokens.decoder.decode(embeddings, scaled, image, ALL_OUTPUT_QUERIES, labels=on_device):
            logits = self._mask_logits(part.queries[:, FIRST_MASK_TOKEN:], part.cells, range(MASK_TOKENS))
            yield logits, self._sam.mask_decoder.iou_prediction_head(part.queries[:, IOU_TOKEN])

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

    def _mask_logits(self, tokens: Tensor, cells: Tensor, slots: Sequence[int]) -> Tensor:
        """float32 (n, S, 4g, 4g): MaskDecoder.predict_masks for the tokens (n, S, C) of these S slots."""
        decoder = self._sam.mask_decoder
        side = math.isqrt(cells.shape[1])
        grid = cells.transpose(1, 2).reshape(len(cells), -1, side, side)
        upscaled = decoder.output_upscaling(grid)
        weights = [decoder.output_hypernetworks_mlps[slot](tokens[:, at]) for at, slot in enumerate(slots)]
        return torch.einsum("nsc,nchw->nshw", torch.stack(weights, dim=1), upscaled)


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
