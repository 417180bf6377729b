"""Two baselines that classify regions with the same frozen CLIP, without training.

    crop    encode the crop of every box with CLIP: accurate, but one pass of the image tower per box
    pooled  average CLIP's map of the whole image over each box and project it: nearly free once the map is computed

They use CLIP alone and make no masks. Both use the encoder's own logit scale: on the toy dataset it gives crops 3 to 4
points of AP more than the head's 100. The scale of OpenAI's models is 100.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from regionspot.cache.errors import InputError
from regionspot.cache.format.manifest import Manifest
from regionspot.evaluation.inference.scoring import (
    FailedImage,
    Parts,
    RegionScores,
    class_probabilities,
    encoded_batches,
    score_in_batches,
)
from regionspot.fusion.heads.pooling import pool_boxes, relative_boxes
from regionspot.fusion.vocabulary import Vocabulary
from regionspot.pipeline.backbones.batch_size import Halving
from regionspot.pipeline.backbones.bundle import Backbones
from regionspot.pipeline.backbones.protocols import ProjectingEncoder, TextEncoder
from regionspot.pipeline.extraction.decode_ahead import DecodedImage, Decoder
from regionspot.pipeline.images.decode import Exif
from regionspot.pipeline.reporting.run_stats import RunStats

CROP_BATCH = 64
# Fraction of the box's width and height, added on every side. AP at 0, 0.05 and 0.1 on 514 boxes of the toy dataset:
# 41.0, 39.7, 39.4; from 0.2 on it falls steeply.
CROP_MARGIN = 0.0


class _PixelDecoder(Decoder):
    """Decodes images without resizing them for a model: "pixels" is uint8 (h, w, 3)."""

    def model_inputs(self, image: Image.Image, names: Sequence[str]) -> dict[str, Tensor]:
        return {"pixels": torch.from_numpy(np.array(image))}


class CropBaseline:
    """CLIP on every box: the crop with a margin, resized to CLIP's square like a whole image."""

    name = "CLIP on each crop"

    def __init__(
        self,
        encoder: TextEncoder,
        manifest: Manifest,
        image_folder: Path,
        vocabulary: Vocabulary,
        *,
        margin: float = CROP_MARGIN,
        exif: Exif = "auto",
    ) -> None:
        self.manifest, self.device = manifest, torch.device(encoder.device)
        self._encoder, self._margin = encoder, margin
        self._text = vocabulary.embeddings.to(self.device)
        self._batches = Halving()
        self._decoder = _PixelDecoder(manifest, image_folder, Backbones(), exif)
        self.identity = {**_identity(encoder, vocabulary, exif), "margin": margin}
        self.features = {encoder.name: {**encoder.provenance, "exif": exif}}

    def score(self, parts: Parts, stats: RunStats) -> Iterator[RegionScores | FailedImage]:
        """One result per row; stages "decode", "cut crops", "clip on crops"."""

        def score_image(images: list[DecodedImage]) -> list[RegionScores]:
            (image,) = images
            pixels = Image.fromarray(image.inputs["pixels"].numpy())
            return [self._score(pixels, self.manifest.boxes_xyxy[self.manifest.regions(image.row)], stats)]

        return score_in_batches(self._decoder, (), parts, 1, score_image, stats)

    def _score(self, image: Image.Image, boxes_xyxy: NDArray[np.float32], stats: RunStats) -> RegionScores:
        probabilities = [np.zeros((0, len(self._text)), np.float32)]
        for start in range(0, len(boxes_xyxy), CROP_BATCH):
            with stats.timed("cut crops"):
                boxes = boxes_xyxy[start : start + CROP_BATCH]
                crops = [self._encoder.preprocess(crop(image, box, self._margin)) for box in boxes]
            with stats.timed("clip on crops"):
                embedded = self._batches(lambda batch: self._encoder.embed_images(torch.stack(list(batch))), crops)
                probabilities.append(class_probabilities(embedded, self._text, self._encoder.logit_scale))
        return RegionScores(np.concatenate(probabilities))


class PooledBaseline:
    """The mean of CLIP's map inside each box, taken into the text space by layer norm and projection."""

    name = "CLIP map pooled in the box"

    def __init__(
        self,
        encoder: TextEncoder,
        manifest: Manifest,
        image_folder: Path,
        vocabulary: Vocabulary,
        *,
        exif: Exif = "auto",
    ) -> None:
        if not isinstance(encoder, ProjectingEncoder):
            raise InputError(
                f"encoder {encoder.name}: has no projection of its map into the text space, which pooling needs; "
                "use --baseline crop"
            )
        self.manifest, self.device = manifest, torch.device(encoder.device)
        self._encoder = encoder
        self._text = vocabulary.embeddings.to(self.device)
        self._decoder = Decoder(manifest, image_folder, Backbones(None, (encoder,)), exif)
        self.identity = _identity(encoder, vocabulary, exif)
        self.features = {encoder.name: {**encoder.provenance, "exif": exif}}

    def score(self, parts: Parts, stats: RunStats) -> Iterator[RegionScores | FailedImage]:
        """One result per row; stages "decode", "encode", "pool"."""
        for (image,) in encoded_batches(self._decoder, parts, 1, stats):
            if image.failure is not None:
                yield FailedImage(image.failure)
                continue
            with stats.timed("pool"):
                feature_map = torch.from_numpy(image.features[self._encoder.name]).to(self.device)
                scores = self._pool(image.row, feature_map)
            yield scores

    def _pool(self, row: int, feature_map: Tensor) -> RegionScores:
        manifest = self.manifest
        boxes = relative_boxes(manifest.boxes_xyxy[manifest.regions(row)], manifest.heights[row], manifest.widths[row])
        pooled = pool_boxes(feature_map[None], torch.from_numpy(boxes[None]).to(feature_map.device))[0, :, 0]
        return RegionScores(class_probabilities(self._encoder.project(pooled), self._text, self._encoder.logit_scale))


def crop(image: Image.Image, box_xyxy: NDArray[np.float32], margin: float) -> Image.Image:
    """The crop of a box with its margin: whole pixels, at least one, clipped to the image."""
    x1, y1, x2, y2 = (float(value) for value in box_xyxy)
    margin_x, margin_y = margin * (x2 - x1), margin * (y2 - y1)
    left, top = max(0, math.floor(x1 - margin_x)), max(0, math.floor(y1 - margin_y))
    right, bottom = min(image.width, math.ceil(x2 + margin_x)), min(image.height, math.ceil(y2 + margin_y))
    return image.crop((left, top, max(right, left + 1), max(bottom, top + 1)))


def _identity(encoder: TextEncoder, vocabulary: Vocabulary, exif: Exif) -> dict[str, Any]:
    scale = encoder.logit_scale
    return {"encoder": encoder.provenance, "vocabulary": vocabulary.digest, "exif": exif, "logit_scale": scale}
