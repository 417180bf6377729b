"""From region vectors to class probabilities: the few lines that every way to score regions shares."""

# B images, n regions of one image, C location token, T feature map tokens, D width, E text embedding, V classes

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from regionspot.evaluation.metrics.detections import Masks
from regionspot.fusion.head import LOGIT_SCALE, FusionHead, similarity_logits
from regionspot.pipeline.backbones.batch_size import Halving

Timed = Callable[[str], AbstractContextManager[None]]  # entered with the name of a stage, around its work


@dataclass(frozen=True)
class RegionScores:
    """One image's regions: probabilities float32 (n, V) over the classes, and their masks if made."""

    probabilities: NDArray[np.float32]
    masks: Masks | None = None

    def not_finite(self) -> str | None:
        """Why these are no scores, where one is NaN or infinite: a number that no JSON holds and no AP should count."""
        broken = int((~np.isfinite(self.probabilities)).sum())
        if not broken:
            return None
        return (
            f"{broken:,} of {self.probabilities.size:,} scores are not finite; a backbone's features overflow "
            "(take another dtype), or hold NaN themselves"
        )


@torch.inference_mode()
def head_probabilities(
    head: FusionHead, tokens: Sequence[Tensor], feature_maps: Tensor, text: Tensor, pieces: Halving
) -> list[NDArray[np.float32]]:
    """Softmax over the classes, float32 (n, V) an image, from the tokens (n, C) of each and maps (B, T, D).

    `pieces` cuts a batch that the device's memory does not hold.
    """
    counts = [len(some) for some in tokens]
    if not any(counts):
        return [np.zeros((0, len(text)), np.float32) for _ in counts]
    padded = torch.nn.utils.rnn.pad_sequence(list(tokens), batch_first=True)
    mask = (torch.arange(padded.shape[1]) < torch.tensor(counts)[:, None]).to(padded.device)

    def semantic(images: Sequence[Tensor]) -> Tensor:
        at = torch.stack(list(images))
        vectors: Tensor = head(padded[at], mask[at], feature_maps[at])
        return vectors

    vectors = pieces(semantic, list(torch.arange(len(counts), device=padded.device)))
    # Image by image: the logits of V3Det's 13,204 classes take more memory than all that came before.
    return [class_probabilities(of_image[:count], text) for of_image, count in zip(vectors, counts, strict=True)]


def class_probabilities(embedded: Tensor, text: Tensor, scale: float = LOGIT_SCALE) -> NDArray[np.float32]:
    """Softmax (..., V) over the classes of scaled cosines between region vectors (..., E) and text (V, E)."""
    probabilities: NDArray[np.float32] = similarity_logits(embedded, text, scale).softmax(dim=-1).cpu().numpy()
    return probabilities


def head_digest(head: FusionHead) -> str:
    """SHA-256 over the names and values of a head's weights, as hex."""
    digest = hashlib.sha256()
    for name, value in head.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
