"""The trained head as a scoring method: end to end from images, or from a feature cache.

Both give the same scores if the cache is float32, else up to its rounding. Only images give masks. From a cache no
backbone runs; of CLIP only the text tower is loaded, if the vocabulary is not stored yet.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from regionspot.cache.errors import InputError
from regionspot.cache.format.manifest import Manifest
from regionspot.cache.format.schema import ImageFeatures
from regionspot.cache.reading.batch import Batch
from regionspot.cache.reading.prefetch import read_ahead
from regionspot.cache.store import FeatureCache
from regionspot.evaluation.inference.region_spot import RegionSpot
from regionspot.evaluation.inference.scoring import (
    FailedImage,
    Parts,
    RegionScores,
    batch_probabilities,
    encode_masks,
    encoded_batches,
    head_probabilities,
    split,
)
from regionspot.evaluation.metrics.detections import Masks
from regionspot.fusion.checkpoint import weights_digest
from regionspot.fusion.heads.pooling import relative_boxes
from regionspot.fusion.training.batches import DeviceDecoder
from regionspot.fusion.vocabulary import Vocabulary
from regionspot.pipeline.backbones.batch_size import Halving
from regionspot.pipeline.backbones.bundle import Backbones
from regionspot.pipeline.backbones.protocols import MaskingLocalizer, MaskThreshold
from regionspot.pipeline.extraction.batch_encoder import EMBEDDING
from regionspot.pipeline.extraction.decode_ahead import Decoder
from regionspot.pipeline.images.decode import Exif
from regionspot.pipeline.reporting.run_stats import RunStats

HEAD_BATCH = 16  # images


class HeadOnImages:
    """The head end to end: image decoder, both encoders, tokens, head, and the masks of what is detected.

    Thread-safe: several threads may score different parts.
    """

    name = "head"

    def __init__(
        self,
        spot: RegionSpot,
        manifest: Manifest,
        image_folder: Path,
        vocabulary: Vocabulary,
        *,
        masks: bool = True,
        mask_threshold: MaskThreshold = "sam",
        exif: Exif = "auto",
    ) -> None:
        """Raises InputError for masks of a localizer that makes none."""
        localizer, encoder = spot.localizer, spot.encoder
        if masks and not isinstance(localizer, MaskingLocalizer):
            raise InputError(f"localizer {localizer.name}: cannot make masks; use --no-masks")
        self.manifest, self.device = manifest, spot.device
        self._head, self._text = spot.head, vocabulary.embeddings.to(spot.device)
        self._localizer, self._with_masks, self._mask_threshold = localizer, masks, mask_threshold
        self._tokens, self._maps = localizer.name, encoder.name
        self._decoder = Decoder(manifest, image_folder, Backbones(localizer, (encoder,)), exif)
        self._batches, self._device_lock = Halving(), threading.Lock()
        self.identity = {
            **spot.identity(),
            "vocabulary": vocabulary.digest,
            "masks": masks,
            "mask_threshold": mask_threshold if masks else None,
            "exif": exif,
        }
        self.features = {model.name: {**model.provenance, "exif": exif} for model in (localizer, encoder)}

    def score(self, parts: Parts, stats: RunStats) -> Iterator[RegionScores | FailedImage]:
        """One result per row; stages "decode", "encode", "tokens", "head"."""
        batches = encoded_batches(self._decoder, parts, HEAD_BATCH, stats, self._device_lock, self._with_masks)
        for images in batches:
            readable = [image for image in images if image.failure is None]
            with stats.timed("head"), self._device_lock:
                probabilities = iter(self._probabilities(readable) if readable else ())
            for image in images:
                if image.failure is not None:
                    yield FailedImage(image.failure)
                else:
                    masks = partial(self._masks, image) if self._with_masks else None
                    yield RegionScores(next(probabilities), masks)

    def _probabilities(self, images: Sequence[ImageFeatures]) -> list[NDArray[np.float32]]:
        tokens = [torch.from_numpy(image.features[self._tokens]) for image in images]
        maps = torch.stack([torch.from_numpy(image.features[self._maps]) for image in images])
        boxes = [relative_boxes(self._boxes(image.row), *self._size(image.row)) for image in images]
        return head_probabilities(self._head, tokens, boxes, maps.to(self.device), self._text, self._batches)

    def _masks(self, image: ImageFeatures, regions: NDArray[np.int64]) -> Masks:
        assert isinstance(self._localizer, MaskingLocalizer)
        embedding, boxes = torch.from_numpy(image.features[EMBEDDING]), self._boxes(image.row)
        with self._device_lock:
            return encode_masks(self._localizer, embedding, boxes, self._size(image.row), regions, self._mask_threshold)

    def _boxes(self, row: int) -> NDArray[np.float32]:
        return self.manifest.boxes_xyxy[self.manifest.regions(row)]

    def _size(self, row: int) -> tuple[int, int]:
        return int(self.manifest.heights[row]), int(self.manifest.widths[row])


class HeadOnCache:
    """The head on stored features. The rows of the manifest are the rows of the cache."""

    name = "head, from the cache"

    def __init__(
        self,
        head: nn.Module,
        cache: FeatureCache,
        vocabulary: Vocabulary,
        token_set: str,
        map_set: str,
        *,
        limit: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        """`token_set` and `map_set` are the feature sets that the head was trained on."""
        self.device = torch.device(device)
        self.manifest = cache.manifest.head(limit)
        self._cache, self._tokens, self._maps = cache, cache.feature_sets[token_set], cache.feature_sets[map_set]
        self._decode_tokens, self._decode_maps = (DeviceDecoder(s, self.device) for s in (self._tokens, self._maps))
        self._head = head.to(self.device).eval()
        self._batches = Halving()
        self._text = vocabulary.embeddings.to(self.device)
        self._failures = {failure.row: failure.reason for failure in cache.failures()}
        self.features = {feature_set.name: feature_set.provenance for feature_set in (self._tokens, self._maps)}
        self.identity = {
            "head_sha256": weights_digest(head.state_dict()),
            "vocabulary": vocabulary.digest,
            "features": self.features,
        }

    def score(self, parts: Parts, stats: RunStats) -> Iterator[RegionScores | FailedImage]:
        """One result per row; stages "read", "head". Raises NotExtractedError for a part that is not extracted yet."""
        batches = split(parts, HEAD_BATCH)
        readable = [np.array([row for row in rows if row not in self._failures], np.int64) for rows in batches]
        reader = self._cache.batch_reader(self._maps.name, self._tokens.name)
        reads = ((reader, rows) for rows in readable if len(rows))
        with closing(read_ahead(reads, reader.threads, pinned=self.device.type == "cuda")) as ahead:
            for rows, of_batch in zip(batches, readable, strict=True):
                probabilities: Iterator[NDArray[np.float32]] = iter(())
                if len(of_batch):
                    with stats.timed("read"):
                        batch = next(ahead)
                    with stats.timed("head"):
                        probabilities = iter(self._probabilities(batch))
                for row in rows:
                    failure = self._failures.get(row)
                    yield RegionScores(next(probabilities)) if failure is None else FailedImage(failure)

    def _probabilities(self, batch: Batch) -> list[NDArray[np.float32]]:
        boxes = relative_boxes(batch.boxes_xyxy, self.manifest.heights[batch.rows], self.manifest.widths[batch.rows])
        return batch_probabilities(
            self._head,
            self._decode_tokens(batch.tokens, batch.token_scale).float(),
            torch.from_numpy(batch.region_mask).to(self.device),
            self._decode_maps(batch.feature_map, batch.map_scale).float(),
            torch.from_numpy(boxes).to(self.device),
            self._text,
            self._batches,
        )
