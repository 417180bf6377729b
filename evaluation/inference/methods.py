"""The trained head as a scoring method: end to end from images, or from a feature cache.

Both give the same probabilities up to the rounding of the cache. Only images give masks. From a cache no backbone runs;
of CLIP only the text tower is loaded, if the vocabulary is not stored yet.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from regionspot.cache.format.manifest import Manifest
from regionspot.cache.store import FeatureCache
from regionspot.evaluation.inference.region_spot import RegionSpot
from regionspot.evaluation.inference.scoring import (
    FailedImage,
    RegionScores,
    StageTimer,
    head_probabilities,
    score_in_batches,
)
from regionspot.fusion.checkpoint import weights_digest
from regionspot.fusion.heads.pooling import relative_boxes
from regionspot.fusion.training.batches import DeviceDecoder
from regionspot.fusion.vocabulary import Vocabulary
from regionspot.pipeline.backbones.batch_size import Halving
from regionspot.pipeline.backbones.bundle import Backbones
from regionspot.pipeline.extraction.decode_ahead import DecodedImage, Decoder
from regionspot.pipeline.images.decode import Exif

CACHE_BATCH = 16


class HeadOnImages:
    """The head end to end: image decoder, both encoders, tokens and masks, head."""

    name = "head"

    def __init__(
        self,
        spot: RegionSpot,
        manifest: Manifest,
        image_folder: Path,
        vocabulary: Vocabulary,
        *,
        masks: bool = True,
        exif: Exif = "auto",
    ) -> None:
        self.manifest, self.device = manifest, spot.device
        self._spot, self._text, self._masks = spot, vocabulary.embeddings.to(spot.device), masks
        self._decoder = Decoder(manifest, image_folder, Backbones(spot.localizer, (spot.encoder,)), exif)
        self.identity = {**spot.identity(), "vocabulary": vocabulary.digest, "masks": masks, "exif": exif}
        self.features = {model.name: {**model.provenance, "exif": exif} for model in (spot.localizer, spot.encoder)}

    def score(self, rows: Sequence[int], timer: StageTimer) -> Iterator[RegionScores | FailedImage]:
        """One result per row; stages "photo", "sam", "clip", "tokens" (and masks), "head"."""

        def score_batch(images: list[DecodedImage]) -> list[RegionScores]:
            boxes = [self.manifest.boxes_xyxy[self.manifest.regions(image.row)] for image in images]
            return self._spot.score(images, boxes, self._text, self._masks, timer)

        feature_sets = [*self._spot.localizer.outputs, self._spot.encoder.name]
        return score_in_batches(self._decoder, feature_sets, rows, self._spot.localizer.batch_size, score_batch, timer)


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

    def score(self, rows: Sequence[int], timer: StageTimer) -> Iterator[RegionScores | FailedImage]:
        """One result per row; stages "read", "head". Raises NotExtractedError for a part that is not extracted yet."""
        for start in range(0, len(rows), CACHE_BATCH):
            batch = rows[start : start + CACHE_BATCH]
            readable = [row for row in batch if row not in self._failures]
            probabilities = iter(self._probabilities(readable, timer) if readable else ())
            for row in batch:
                failure = self._failures.get(row)
                yield RegionScores(next(probabilities)) if failure is None else FailedImage(failure)

    def _probabilities(self, rows: Sequence[int], timer: StageTimer) -> list[NDArray[np.float32]]:
        with timer("read"):
            batch = self._cache.read(rows, token_set=self._tokens.name, map_set=self._maps.name)
        with timer("head"):
            padded = self._decode_tokens(batch.tokens, batch.token_scale).float()
            feature_maps = self._decode_maps(batch.feature_map, batch.map_scale).float()
            counts = batch.region_mask.sum(axis=1).tolist()
            tokens = [image_tokens[:count] for image_tokens, count in zip(padded, counts, strict=True)]
            sizes = self.manifest.heights[batch.rows], self.manifest.widths[batch.rows]
            relative = relative_boxes(batch.boxes_xyxy, *sizes)
            boxes = [image_boxes[:count] for image_boxes, count in zip(relative, counts, strict=True)]
            return head_probabilities(self._head, tokens, boxes, feature_maps, self._text, self._batches)
