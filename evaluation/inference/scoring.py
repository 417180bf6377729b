"""Scores of an image's regions: class probabilities from region vectors, in batches of images decoded ahead."""

# B images, n regions of one image, C location token, T feature map tokens, D width, E text embedding, V classes

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from regionspot.evaluation.metrics.detections import Masks
from regionspot.fusion.head import LOGIT_SCALE, similarity_logits
from regionspot.pipeline.backbones.batch_size import Halving
from regionspot.pipeline.extraction.decode_ahead import DecodedImage, Decoder, decode_ahead, default_threads

StageTimer = Callable[[str], AbstractContextManager[None]]  # `with timer("head"):` measures the time of that stage


@dataclass(frozen=True)
class RegionScores:
    """The regions of one image: probabilities float32 (n, V) over the classes, and their masks if requested."""

    probabilities: NDArray[np.float32]
    masks: Masks | None = None

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


def score_in_batches(
    decoder: Decoder,
    feature_sets: Sequence[str],
    rows: Sequence[int],
    batch_size: int,
    score: Callable[[list[DecodedImage]], Iterable[RegionScores]],
    timer: StageTimer,
) -> Iterator[RegionScores | FailedImage]:
    """Decode the images at `rows` ahead in threads and `score` them in batches; one result per row, in order.

    Waiting for images is the stage "photo". Images that cannot be read are left out of the batches.
    """
    jobs = ((row, feature_sets) for row in rows)
    with closing(decode_ahead(decoder, jobs, default_threads())) as images:
        while True:
            with timer("photo"):
                batch = list(islice(images, batch_size))
            if not batch:
                return
            readable = [image for image in batch if image.failure is None]
            scores = iter(score(readable) if readable else ())
            for image in batch:
                yield next(scores) if image.failure is None else FailedImage(image.failure)


@torch.inference_mode()
def head_probabilities(
    head: nn.Module,
    tokens: Sequence[Tensor],
    boxes: Sequence[NDArray[np.float32]],
    feature_maps: Tensor,
    text: Tensor,
    batches: Halving,
) -> list[NDArray[np.float32]]:
    """Softmax over the classes, float32 (n, V) for each image, from its tokens (n, C) and the maps (B, T, D).

    `boxes` float32 (n, 4) are relative to the size of the image, as heads take them. `batches` splits a batch that does
    not fit into the memory of the device.
    """
    counts = [len(image_tokens) for image_tokens in tokens]
    if not any(counts):
        return [np.zeros((0, len(text)), np.float32) for _ in counts]
    padded = pad_sequence(list(tokens), batch_first=True)
    padded_boxes = pad_sequence([torch.from_numpy(of_image) for of_image in boxes], batch_first=True).to(padded.device)
    mask = (torch.arange(padded.shape[1]) < torch.tensor(counts)[:, None]).to(padded.device)

    def region_vectors(images: Sequence[Tensor]) -> Tensor:
        index = torch.stack(list(images))
        vectors: Tensor = head(padded[index], mask[index], feature_maps[index], padded_boxes[index])
        return vectors

    vectors = batches(region_vectors, list(torch.arange(len(counts), device=padded.device)))
    # Image by image: the logits of V3Det's 13,204 classes take more memory than everything before.
    return [
        class_probabilities(image_vectors[:count], text) for image_vectors, count in zip(vectors, counts, strict=True)
    ]


def class_probabilities(embedded: Tensor, text: Tensor, scale: float = LOGIT_SCALE) -> NDArray[np.float32]:
    """Softmax (..., V) over the classes of scaled cosines between region vectors (..., E) and text (V, E)."""
    probabilities: NDArray[np.float32] = similarity_logits(embedded, text, scale).softmax(dim=-1).cpu().numpy()
    return probabilities
