"""Scores of an image's regions, computed in batches that never cross the parts of an inference.

Images go through the engine of extraction (`BatchEncoder`), so a method has the features that a float32 cache holds.
"""

# B images, R regions (padded), n regions of one image, C location token, T map tokens, D width, E text embedding,
# V classes

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from regionspot.cache.format.schema import ImageFeatures
from regionspot.evaluation.metrics.detections import Masks, concatenate_masks
from regionspot.fusion.head import LOGIT_SCALE, similarity_logits
from regionspot.pipeline.backbones.batch_size import Halving
from regionspot.pipeline.backbones.protocols import MaskingLocalizer, MaskThreshold
from regionspot.pipeline.extraction.batch_encoder import BatchEncoder
from regionspot.pipeline.extraction.decode_ahead import DecodedImage, Decoder, decode_ahead, default_threads
from regionspot.pipeline.reporting.run_stats import RunStats

MASK_PIXELS = 50_000_000  # maximum of all bool masks in memory

Parts = Sequence[Sequence[int]]  # the rows of each part


@dataclass(frozen=True)
class RegionScores:
    """The regions of one image.

    probabilities  float32 (n, V) over the classes
    masks          computes the masks of some regions, int64 (k,) indices; None if the method makes none. They are
                   computed after the selection of detections: of a detector's 900 boxes many have none
    """

    probabilities: NDArray[np.float32]
    masks: Callable[[NDArray[np.int64]], Masks] | None = None

    def not_finite(self) -> str | None:
        """An error message if a score is NaN or infinite, else None."""
        count = int((~np.isfinite(self.probabilities)).sum())
        if not count:
            return None
        return (
            f"{count:,} of {self.probabilities.size:,} scores are not finite; the features of a backbone overflow "
            "(use another dtype), or are NaN themselves"
        )


@dataclass(frozen=True)
class FailedImage:
    """Takes the place of RegionScores for an image without features; `reason` is one line."""

    reason: str


def split(parts: Parts, size: int) -> list[Sequence[int]]:
    """The rows of each batch of `size` images; batches never cross parts, so a resumed run has the same batches."""
    return [rows[start : start + size] for rows in parts for start in range(0, len(rows), size)]


def decoded_images(decoder: Decoder, parts: Parts, stats: RunStats) -> Iterator[DecodedImage]:
    """The images of `parts`, decoded ahead in threads: for methods that take images, not features."""
    for (image,) in _decoded_batches(decoder, (), parts, 1, stats):
        yield image


def encoded_batches(
    decoder: Decoder,
    parts: Parts,
    size: int,
    stats: RunStats,
    device_lock: AbstractContextManager[object] | None = None,
    keep_embeddings: bool = False,
) -> Iterator[list[ImageFeatures]]:
    """The features of the images of `parts` by the decoder's backbones, `size` images at a time.

    device_lock and keep_embeddings are those of `BatchEncoder`. Its batches are as large as in an extraction.
    """
    backbones = decoder.backbones
    names = [name for encoder in backbones.encoders for name in backbones.map_sets(encoder)]
    if backbones.localizer is not None:
        names += backbones.localizer.outputs
    encode = BatchEncoder(decoder.manifest, backbones, stats, device_lock, keep_embeddings)
    with closing(_decoded_batches(decoder, names, parts, backbones.batch_size, stats)) as batches:
        features = encode(batches)
        for rows in split(parts, size):
            yield list(islice(features, len(rows)))


def _decoded_batches(
    decoder: Decoder, feature_sets: Sequence[str], parts: Parts, size: int, stats: RunStats
) -> Generator[list[DecodedImage]]:
    requests = ((row, feature_sets) for rows in parts for row in rows)
    with closing(decode_ahead(decoder, requests, default_threads())) as images:
        for rows in split(parts, size):
            with stats.timed("decode"):
                batch = list(islice(images, len(rows)))
            yield batch


def head_probabilities(
    head: nn.Module,
    tokens: Sequence[Tensor],
    boxes: Sequence[NDArray[np.float32]],
    feature_maps: Tensor,
    text: Tensor,
    batches: Halving,
) -> list[NDArray[np.float32]]:
    """`batch_probabilities` of B images: tokens (n, C) and relative boxes float32 (n, 4) of each, maps (B, T, D)."""
    # Image by image: the logits of V3Det's 13,204 classes take more memory than everything before.
    return [class_probabilities(vectors, text) for vectors in head_vectors(head, tokens, boxes, feature_maps, batches)]


def head_vectors(
    head: nn.Module,
    tokens: Sequence[Tensor],
    boxes: Sequence[NDArray[np.float32]],
    feature_maps: Tensor,
    batches: Halving,
) -> list[Tensor]:
    """The head's vectors (n, E), not normalised, of B images whose features are those of `head_probabilities`."""
    counts = torch.tensor([len(of_image) for of_image in tokens])
    slots = max(1, int(counts.max()))  # as in a Batch of the cache, for equal rounding
    padded = _pad(tokens, slots), _pad([torch.from_numpy(of_image) for of_image in boxes], slots)
    padded_tokens, padded_boxes = (values.to(feature_maps.device) for values in padded)
    region_mask = (torch.arange(slots) < counts[:, None]).to(feature_maps.device)
    return batch_vectors(head, padded_tokens, region_mask, feature_maps, padded_boxes, batches)


def _pad(images: Sequence[Tensor], slots: int) -> Tensor:
    """(B, slots, W) of B tensors (n, W): zeros after the regions of each image."""
    return torch.stack([F.pad(values, (0, 0, 0, slots - len(values))) for values in images])


def batch_probabilities(
    head: nn.Module,
    tokens: Tensor,
    region_mask: Tensor,
    feature_maps: Tensor,
    boxes: Tensor,
    text: Tensor,
    batches: Halving,
) -> list[NDArray[np.float32]]:
    """Softmax over the classes, float32 (n, V) for each image.

    tokens       (B, R, C)
    region_mask  bool (B, R), False for padding; an image's regions come first
    feature_maps (B, T, D)
    boxes        float32 (B, R, 4), relative to the size of the image
    text         (V, E)
    batches      splits a batch that does not fit into the memory of the device
    """
    vectors = batch_vectors(head, tokens, region_mask, feature_maps, boxes, batches)
    return [class_probabilities(of_image, text) for of_image in vectors]


@torch.inference_mode()
def batch_vectors(
    head: nn.Module, tokens: Tensor, region_mask: Tensor, feature_maps: Tensor, boxes: Tensor, batches: Halving
) -> list[Tensor]:
    """The head's vectors (n, E), not normalised, of each image; the arguments are those of `batch_probabilities`."""

    def region_vectors(images: Sequence[int]) -> Tensor:
        piece = slice(images[0], images[-1] + 1)
        vectors: Tensor = head(tokens[piece], region_mask[piece], feature_maps[piece], boxes[piece])
        return vectors

    vectors = torch.cat(batches.results(region_vectors, range(len(tokens))))
    return [of_image[:count] for of_image, count in zip(vectors, region_mask.sum(dim=1).tolist(), strict=True)]


def class_probabilities(embedded: Tensor, text: Tensor, scale: float = LOGIT_SCALE) -> NDArray[np.float32]:
    """Softmax (..., V) over the classes of scaled cosines between region vectors (..., E) and text (V, E)."""
    probabilities: NDArray[np.float32] = similarity_logits(embedded, text, scale).softmax(dim=-1).cpu().numpy()
    return probabilities


def encode_masks(
    localizer: MaskingLocalizer,
    embedding: Tensor,
    boxes_xyxy: NDArray[np.float32],
    size: tuple[int, int],
    regions: NDArray[np.int64],
    mask_threshold: MaskThreshold = "sam",
) -> Masks:
    """The masks of some `regions`, int64 (k,), of the boxes float32 (n, 4) of an image.

    embedding   (C, g, g) of the image by the localizer
    size        height and width of the image

    A few at a time, because bool masks are large.
    """
    boxes, step = boxes_xyxy[regions], max(1, MASK_PIXELS // (size[0] * size[1]))
    starts = range(0, max(1, len(boxes)), step)
    parts = (boxes[start : start + step] for start in starts)
    masks = (localizer.tokens_and_masks(embedding, part, size, mask_threshold)[1] for part in parts)
    return concatenate_masks([Masks.encode(bits) for bits in masks])
