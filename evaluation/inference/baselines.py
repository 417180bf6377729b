"""Baselines that classify regions with the same frozen CLIP, without training, on a dataset.

    crop        encode the crop of every box with CLIP: accurate, but one pass of the image tower per box
    pooled      the mean of CLIP's feature map in the box, then layer norm and projection
    dense       the mean of CLIP's dense map in the box (pipeline/backbones/dense.py)
    dense-mask  the mean of the dense map in SAM's mask of the box

All but `crop` are nearly free once the map is computed. Only `dense-mask` makes masks. They use the encoder's own logit
scale (zero_shot.py).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from regionspot.cache.errors import InputError
from regionspot.cache.format.manifest import Manifest
from regionspot.cache.format.schema import ImageFeatures
from regionspot.cache.reading.dask_arrays import read_decoded
from regionspot.cache.store import FeatureCache
from regionspot.evaluation.inference.scoring import (
    FailedImage,
    Parts,
    RegionScores,
    class_probabilities,
    decoded_images,
    encode_masks,
    encoded_batches,
)
from regionspot.evaluation.inference.zero_shot import (
    CROP_MARGIN,
    dense_embeddings,
    embed_crops,
    region_weights,
)
from regionspot.evaluation.metrics.detections import Masks
from regionspot.fusion.heads.pooling import map_side, relative_boxes
from regionspot.fusion.vocabulary import Vocabulary
from regionspot.pipeline.backbones.batch_size import Halving
from regionspot.pipeline.backbones.bundle import Backbones
from regionspot.pipeline.backbones.dense import dense_set
from regionspot.pipeline.backbones.protocols import (
    Localizer,
    MaskingLocalizer,
    MaskThreshold,
    ProjectingEncoder,
    TextEncoder,
)
from regionspot.pipeline.extraction.batch_encoder import EMBEDDING
from regionspot.pipeline.extraction.decode_ahead import Decoder
from regionspot.pipeline.images.decode import Exif
from regionspot.pipeline.reporting.run_stats import RunStats

Baseline = Literal["crop", "pooled", "dense", "dense-mask"]

NAMES: dict[Baseline, str] = {
    "crop": "CLIP on each crop",
    "pooled": "CLIP map pooled in the box",
    "dense": "CLIP dense map in the box",
    "dense-mask": "CLIP dense map in SAM's mask",
}


PIXELS = "pixels"


class _PixelDecoder(Decoder):
    """Decodes images without resizing them for a model: PIXELS is uint8 (h, w, 3)."""

    def model_inputs(self, image: Image.Image, names: Sequence[str]) -> dict[str, Tensor]:
        return {PIXELS: torch.from_numpy(np.array(image))}


class CropBaseline:
    """CLIP on every box: the crop, resized to CLIP's square like a whole image."""

    name = NAMES["crop"]

    def __init__(
        self,
        encoder: TextEncoder,
        manifest: Manifest,
        image_folder: Path,
        vocabulary: Vocabulary,
        *,
        exif: Exif = "auto",
    ) -> None:
        self.manifest, self.device = manifest, torch.device(encoder.device)
        self._encoder, self._text = encoder, vocabulary.embeddings.to(self.device)
        self._batches = Halving()
        self._decoder = _PixelDecoder(manifest, image_folder, Backbones(), exif)
        self.identity = {**_identity(encoder, vocabulary, exif), "margin": CROP_MARGIN}
        self.features = {encoder.name: {**encoder.provenance, "exif": exif}}

    def score(self, parts: Parts, stats: RunStats) -> Iterator[RegionScores | FailedImage]:
        """One result per row; stages "decode", "clip on crops"."""
        for image in decoded_images(self._decoder, parts, stats):
            if image.failure is not None:
                yield FailedImage(image.failure)
                continue
            with stats.timed("clip on crops"):
                pixels, boxes = Image.fromarray(image.inputs[PIXELS].numpy()), _boxes(self.manifest, image.row)
                embedded = embed_crops(self._encoder, pixels, boxes, batches=self._batches)
                probabilities = class_probabilities(embedded, self._text, self._encoder.logit_scale)
            yield RegionScores(probabilities)


class MapBaseline:
    """The mean of a map of CLIP over each region: the baselines "pooled", "dense" and "dense-mask".

    Thread-safe: several threads may score different parts.
    """

    def __init__(
        self,
        kind: Baseline,
        encoder: TextEncoder,
        manifest: Manifest,
        image_folder: Path,
        vocabulary: Vocabulary,
        *,
        localizer: Localizer | None = None,
        masks: bool = False,
        mask_threshold: MaskThreshold = "sam",
        exif: Exif = "auto",
    ) -> None:
        """`localizer` makes the masks of "dense-mask"; with `masks` they are also returned with the scores.

        Raises InputError if the encoder or the localizer cannot do what the baseline needs.
        """
        if kind == "pooled" and not isinstance(encoder, ProjectingEncoder):
            raise InputError(
                f"encoder {encoder.name}: has no projection of its map into the text space, which pooling needs; "
                "use --baseline crop"
            )
        if kind == "dense-mask" and not isinstance(localizer, MaskingLocalizer):
            lack = "there is no localizer" if localizer is None else f"localizer {localizer.name} cannot make masks"
            raise InputError(f"baseline dense-mask: {lack}; use --baseline dense")
        self.name, self.manifest, self.device = NAMES[kind], manifest, torch.device(encoder.device)
        self._encoder, self._localizer = encoder, localizer
        self._with_masks, self._mask_threshold = masks, mask_threshold
        self._map = encoder.name if kind == "pooled" else dense_set(encoder.name)
        self._text, self._device_lock = vocabulary.embeddings.to(self.device), threading.Lock()
        backbones = Backbones(localizer, (encoder,), dense=kind != "pooled")
        self._decoder = Decoder(manifest, image_folder, backbones, exif)
        self.features = {model.name: {**model.provenance, "exif": exif} for model in backbones.models}
        self.identity = {
            **_identity(encoder, vocabulary, exif),
            "localizer": None if localizer is None else localizer.provenance,
            "masks": masks,
            "mask_threshold": None if localizer is None else mask_threshold,
        }

    def score(self, parts: Parts, stats: RunStats) -> Iterator[RegionScores | FailedImage]:
        """One result per row; stages "decode", "encode", "tokens" and "masks" of "dense-mask", "pool"."""
        with_masks = self._localizer is not None
        for (image,) in encoded_batches(self._decoder, parts, 1, stats, self._device_lock, with_masks):
            if image.failure is not None:
                yield FailedImage(image.failure)
                continue
            masks = None
            if with_masks:
                with stats.timed("masks"):
                    masks = self._masks(image)
            with stats.timed("pool"), self._device_lock:
                embedded = self._embed(image, masks)
                probabilities = class_probabilities(embedded, self._text, self._encoder.logit_scale)
            yield RegionScores(probabilities, masks.take if masks is not None and self._with_masks else None)

    def _embed(self, image: ImageFeatures, masks: Masks | None) -> Tensor:
        feature_map = torch.from_numpy(image.features[self._map]).to(self.device)
        boxes = relative_boxes(_boxes(self.manifest, image.row), *_size(self.manifest, image.row))
        if not isinstance(self._encoder, ProjectingEncoder) or self._map != self._encoder.name:
            return dense_embeddings(feature_map, boxes, masks)
        weights = region_weights(boxes, map_side(feature_map[None])).to(feature_map)
        return F.normalize(self._encoder.project(weights @ feature_map[1:]), dim=-1)

    def _masks(self, image: ImageFeatures) -> Masks:
        assert isinstance(self._localizer, MaskingLocalizer)
        embedding, boxes = torch.from_numpy(image.features[EMBEDDING]), _boxes(self.manifest, image.row)
        size, every = _size(self.manifest, image.row), np.arange(len(boxes))
        with self._device_lock:
            return encode_masks(self._localizer, embedding, boxes, size, every, self._mask_threshold)


class DenseOnCache:
    """The baseline "dense" on stored dense maps. The rows of the manifest are the rows of the cache."""

    name = f"{NAMES['dense']}, from the cache"

    def __init__(
        self,
        cache: FeatureCache,
        dense_maps: str,
        vocabulary: Vocabulary,
        *,
        limit: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        """`dense_maps` is the name of their feature set, as `extract --map dense` adds it."""
        self.device, self.manifest = torch.device(device), cache.manifest.head(limit)
        self._reader, self._text = cache.reader(dense_maps), vocabulary.embeddings.to(self.device)
        self._failures = {failure.row: failure.reason for failure in cache.failures()}
        provenance = cache.feature_sets[dense_maps].provenance
        self._logit_scale = float(provenance["logit_scale"])
        self.features = {dense_maps: provenance}
        self.identity = {"features": self.features, "vocabulary": vocabulary.digest}

    def score(self, parts: Parts, stats: RunStats) -> Iterator[RegionScores | FailedImage]:
        """One result per row; stages "read", "pool". Raises NotExtractedError for a part that is not extracted yet."""
        for row in (row for rows in parts for row in rows):
            if (failure := self._failures.get(row)) is not None:
                yield FailedImage(failure)
                continue
            with stats.timed("read"):
                dense_map = torch.from_numpy(read_decoded(self._reader, [row])[0]).to(self.device).float()
            with stats.timed("pool"):
                boxes = relative_boxes(_boxes(self.manifest, row), *_size(self.manifest, row))
                embedded = dense_embeddings(dense_map, boxes)
                probabilities = class_probabilities(embedded, self._text, self._logit_scale)
            yield RegionScores(probabilities)


def _boxes(manifest: Manifest, row: int) -> NDArray[np.float32]:
    return manifest.boxes_xyxy[manifest.regions(row)]


def _size(manifest: Manifest, row: int) -> tuple[int, int]:
    return int(manifest.heights[row]), int(manifest.widths[row])


def _identity(encoder: TextEncoder, vocabulary: Vocabulary, exif: Exif) -> dict[str, Any]:
    scale = encoder.logit_scale
    return {"encoder": encoder.provenance, "vocabulary": vocabulary.digest, "exif": exif, "logit_scale": scale}
