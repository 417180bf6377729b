"""Two ways to name regions with the same frozen CLIP and no training, which the head has to beat.

    crop    cut every box out, run CLIP on it: accurate, and one pass of the image tower for every box
    pooled  average CLIP's map of the whole image over each box, project: nearly free, once the map is there

They use CLIP alone; neither makes masks. Both get the softmax that suits them best: the encoder's own logit scale,
which on the toy world gives crops 3 to 4 points of AP more than the head's 100. OpenAI's models have 100 themselves.
"""

# n boxes, T map tokens (class token first), g patches a side, D width, p pixels of CLIP's square

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from regionspot.cache.errors import InputError
from regionspot.cache.format.manifest import Manifest
from regionspot.evaluation.inference.methods import ImageReader
from regionspot.evaluation.inference.resumable import Unreadable
from regionspot.evaluation.inference.scoring import RegionScores, Timed, class_probabilities
from regionspot.fusion.vocabulary import Vocabulary
from regionspot.pipeline.backbones.batch_size import Halving
from regionspot.pipeline.backbones.protocols import ProjectingEncoder, TextEncoder
from regionspot.pipeline.images.decode import Exif

CROPS_AT_ONCE = 64
# Of a box's width and height, added on every side. On 514 boxes of the toy world, AP at 0, 0.05, 0.1: 41.0, 39.7,
# 39.4 with the encoder's scale; from 0.2 on it falls steeply.
CROP_MARGIN = 0.0
BATCH = 8  # images the encoder takes at a time


@dataclass(frozen=True)
class _CroppedImage:
    """An image and its boxes float32 (n, 4); `clip` is CLIP's input where the whole image is wanted."""

    image: Image.Image
    boxes_xyxy: NDArray[np.float32]
    clip: Tensor | None = None


class CropBaseline:
    """CLIP on every box, cut out with a margin and squeezed into its square as a whole image would be."""

    name = "CLIP on each crop"

    def __init__(
        self,
        encoder: TextEncoder,
        manifest: Manifest,
        images: Path,
        vocabulary: Vocabulary,
        *,
        margin: float = CROP_MARGIN,
        exif: Exif = "auto",
    ) -> None:
        self.manifest, self.device = manifest, torch.device(encoder.device)
        self._encoder, self._margin = encoder, margin
        self._text = vocabulary.embeddings.to(self.device)
        self._pieces = Halving()
        self._reader = ImageReader(manifest, images, self._prepare, exif)
        self.identity = {**_identity(encoder, vocabulary, exif), "margin": margin}
        self.features = {encoder.name: {**encoder.provenance, "exif": exif}}

    def score(self, rows: Sequence[int], timed: Timed) -> Iterator[RegionScores | Unreadable]:
        """One answer a row; stages "photo", "cut crops", "clip on crops"."""
        for batch in self._reader.batches(rows, 1, timed):
            for image in batch:
                yield image if isinstance(image, Unreadable) else self._score(image, timed)

    def _prepare(self, image: Image.Image, row: int) -> _CroppedImage:
        return _CroppedImage(image, self.manifest.boxes_xyxy[self.manifest.regions(row)])

    def _score(self, image: _CroppedImage, timed: Timed) -> RegionScores:
        found = [np.zeros((0, len(self._text)), np.float32)]
        for start in range(0, len(image.boxes_xyxy), CROPS_AT_ONCE):
            boxes = image.boxes_xyxy[start : start + CROPS_AT_ONCE]
            with timed("cut crops"):
                crops = [self._encoder.preprocess(crop(image.image, box, self._margin)) for box in boxes]
            with timed("clip on crops"):
                embedded = self._pieces(lambda piece: self._encoder.embed_images(torch.stack(list(piece))), crops)
                found.append(class_probabilities(embedded, self._text, self._encoder.logit_scale))
        return RegionScores(np.concatenate(found))


class PooledBaseline:
    """The mean of CLIP's map inside each box, by layer norm and projection taken into the text's space."""

    name = "CLIP map pooled in the box"

    def __init__(
        self,
        encoder: TextEncoder,
        manifest: Manifest,
        images: Path,
        vocabulary: Vocabulary,
        *,
        exif: Exif = "auto",
    ) -> None:
        if not isinstance(encoder, ProjectingEncoder):
            raise InputError(
                f"encoder {encoder.name}: its map has no projection into the text's space, which pooling needs; "
                "take the baseline of crops"
            )
        self.manifest, self.device = manifest, torch.device(encoder.device)
        self._encoder = encoder
        self._text = vocabulary.embeddings.to(self.device)
        self._pieces = Halving()
        self._reader = ImageReader(manifest, images, self._prepare, exif)
        self.identity = _identity(encoder, vocabulary, exif)
        self.features = {encoder.name: {**encoder.provenance, "exif": exif}}

    def score(self, rows: Sequence[int], timed: Timed) -> Iterator[RegionScores | Unreadable]:
        """One answer a row; stages "photo", "clip", "pool"."""
        for batch in self._reader.batches(rows, BATCH, timed):
            readable = [image for image in batch if not isinstance(image, Unreadable)]
            scored = iter(self._score(readable, timed) if readable else ())
            for image in batch:
                yield image if isinstance(image, Unreadable) else next(scored)

    def _prepare(self, image: Image.Image, row: int) -> _CroppedImage:
        boxes = self.manifest.boxes_xyxy[self.manifest.regions(row)]
        return _CroppedImage(image, boxes, self._encoder.preprocess(image))

    def _score(self, images: Sequence[_CroppedImage], timed: Timed) -> list[RegionScores]:
        with timed("clip"):
            inputs = [image.clip for image in images if image.clip is not None]
            maps = self._pieces(lambda piece: self._encoder.encode(torch.stack(list(piece))), inputs)
        with timed("pool"):
            return [self._pool(image, each) for image, each in zip(images, maps, strict=True)]

    def _pool(self, image: _CroppedImage, feature_map: Tensor) -> RegionScores:
        weights = pooling_weights(image.boxes_xyxy, image.image.size, math.isqrt(len(feature_map) - 1))
        pooled = torch.from_numpy(weights).to(feature_map.device) @ feature_map[1:]
        return RegionScores(class_probabilities(self._encoder.project(pooled), self._text, self._encoder.logit_scale))


def crop(image: Image.Image, box_xyxy: NDArray[np.float32], margin: float) -> Image.Image:
    """The box with its margin cut out of the image, whole pixels, at least one, never past the image's edge."""
    x1, y1, x2, y2 = (float(value) for value in box_xyxy)
    aside, above = margin * (x2 - x1), margin * (y2 - y1)
    left, top = max(0, math.floor(x1 - aside)), max(0, math.floor(y1 - above))
    right, bottom = min(image.width, math.ceil(x2 + aside)), min(image.height, math.ceil(y2 + above))
    return image.crop((left, top, max(right, left + 1), max(bottom, top + 1)))


def pooling_weights(boxes_xyxy: NDArray[np.float32], size: tuple[int, int], grid: int) -> NDArray[np.float32]:
    """float32 (n, g * g), rows adding up to 1: how much of each box lies in each patch.

    `size` is (width, height) of the image, which CLIP squeezes into a square of `grid` x `grid` patches. A box
    smaller than a patch takes the patches that it lies in.
    """
    edges = np.arange(grid + 1) / grid
    shares = []
    for axis in (0, 1):
        low, high = boxes_xyxy[:, axis, None] / size[axis], boxes_xyxy[:, axis + 2, None] / size[axis]
        shares.append((np.minimum(high, edges[1:]) - np.maximum(low, edges[:-1])).clip(min=0))
    overlap = (shares[1][:, :, None] * shares[0][:, None, :]).reshape(len(boxes_xyxy), grid * grid)
    weights: NDArray[np.float32] = (overlap / overlap.sum(axis=1, keepdims=True)).astype(np.float32)
    return weights


def _identity(encoder: TextEncoder, vocabulary: Vocabulary, exif: Exif) -> dict[str, Any]:
    scale = encoder.logit_scale
    return {"encoder": encoder.provenance, "vocabulary": vocabulary.digest, "exif": exif, "logit_scale": scale}
