"""Regions named by a frozen CLIP alone, without a trained head.

    crop    encode the crop of every box with CLIP: one pass of the image tower per box
    dense   the mean of CLIP's dense map in the box (pipeline/backbones/dense.py): one pass per image

Both use the encoder's own logit scale: on the toy dataset it gives crops 3 to 4 points of AP more than the head's 100.
The scale of OpenAI's models is 100.
"""

# n boxes of an image, P patches, S patches on a side, E text embedding, h, w pixels

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from regionspot.evaluation.metrics.detections import Masks
from regionspot.fusion.heads.pooling import box_weights
from regionspot.pipeline.backbones.batch_size import Halving
from regionspot.pipeline.backbones.protocols import TextEncoder

ZeroShotMethod = Literal["crop", "dense"]

CROP_BATCH = 64
# Fraction of the box's width and height, added on every side. AP at 0, 0.05 and 0.1 on 514 boxes of the toy dataset:
# 41.0, 39.7, 39.4; from 0.2 on it falls steeply.
CROP_MARGIN = 0.0


def embed_crops(
    encoder: TextEncoder, image: Image.Image, boxes_xyxy: NDArray[np.float32], *, batches: Halving
) -> Tensor:
    """Embeddings of unit length (n, E) of the crops of an image. `batches` splits one that does not fit into memory."""
    embedded = [torch.zeros(0, encoder.text_dim, device=encoder.device)]
    for start in range(0, len(boxes_xyxy), CROP_BATCH):
        boxes = boxes_xyxy[start : start + CROP_BATCH]
        crops = [encoder.preprocess(crop(image, box, CROP_MARGIN)) for box in boxes]
        embedded.append(batches(lambda batch: encoder.embed_images(torch.stack(list(batch))), crops))
    return F.normalize(torch.cat(embedded), dim=-1)


def crop(image: Image.Image, box_xyxy: NDArray[np.float32], margin: float) -> Image.Image:
    """The crop of a box with its margin: whole pixels, at least one, clipped to the image."""
    x1, y1, x2, y2 = (float(value) for value in box_xyxy)
    margin_x, margin_y = margin * (x2 - x1), margin * (y2 - y1)
    left, top = max(0, math.floor(x1 - margin_x)), max(0, math.floor(y1 - margin_y))
    right, bottom = min(image.width, math.ceil(x2 + margin_x)), min(image.height, math.ceil(y2 + margin_y))
    return image.crop((left, top, max(right, left + 1), max(bottom, top + 1)))


def dense_embeddings(dense_map: Tensor, boxes: NDArray[np.float32], masks: Masks | None = None) -> Tensor:
    """Embeddings of unit length (n, E): the mean of a dense map (P, E) in each box (n, 4), or in its mask."""
    weights = region_weights(boxes, math.isqrt(len(dense_map)), masks)
    return F.normalize(weights.to(dense_map) @ dense_map, dim=-1)


def region_weights(boxes: NDArray[np.float32], side: int, masks: Masks | None = None) -> Tensor:
    """float32 (n, P), rows adding up to 1: the share of each box, or of its mask, in each patch.

    Boxes are relative to the image. A mask without a pixel is replaced by its box.
    """
    weights = box_weights(torch.from_numpy(boxes), side)[:, 0]
    if masks is None or not len(masks):
        return weights
    pixels = np.stack([_patch_pixels(masks.decode(index), side) for index in range(len(masks))])
    shares = torch.from_numpy(pixels / np.maximum(pixels.sum(axis=1, keepdims=True), 1e-9))
    return torch.where(shares.any(dim=1, keepdim=True), shares, weights)


def _patch_pixels(mask: NDArray[np.bool_], side: int) -> NDArray[np.float32]:
    """float32 (P,): the pixels of a mask (h, w) in each patch; one on an edge counts by its parts."""
    height, width = mask.shape
    pixels: NDArray[np.float32] = _overlap(height, side) @ mask.astype(np.float32) @ _overlap(width, side).T
    return pixels.reshape(-1)


def _overlap(pixels: int, side: int) -> NDArray[np.float32]:
    """float32 (S, pixels): the part of each pixel of an axis that lies in each patch."""
    edges, starts = np.arange(side + 1)[:, None] * (pixels / side), np.arange(pixels)
    overlap = np.minimum(edges[1:], starts + 1) - np.maximum(edges[:-1], starts)
    clipped: NDArray[np.float32] = overlap.clip(min=0).astype(np.float32)
    return clipped
