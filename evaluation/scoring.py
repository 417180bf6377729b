"""From region vectors to class probabilities: the few lines that every way to score regions shares."""

# B pictures, n regions of one picture, C location token, T feature map tokens, D width, E text embedding, V classes

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from regionspot.evaluation.detections import Masks
from regionspot.fusion.head import LOGIT_SCALE, FusionHead, similarity_logits

Timed = Callable[[str], AbstractContextManager[None]]  # entered with the name of a stage, around its work


@dataclass(frozen=True)
class RegionScores:
    """What is said of one picture's regions: probabilities float32 (n, V) over the classes, and their masks if made."""

    probabilities: NDArray[np.float32]
    masks: Masks | None = None


@torch.inference_mode()
def head_probabilities(
    head: FusionHead, tokens: Sequence[Tensor], feature_maps: Tensor, text: Tensor
) -> list[NDArray[np.float32]]:
    """Softmax over the classes, float32 (n, V) a picture, from the tokens (n, C) of each and maps (B, T, D)."""
    counts = [len(some) for some in tokens]
    if not any(counts):
        return [np.zeros((0, len(text)), np.float32) for _ in counts]
    padded = torch.nn.utils.rnn.pad_sequence(list(tokens), batch_first=True)
    mask = torch.arange(padded.shape[1]) < torch.tensor(counts)[:, None]
    semantic = head(padded, mask.to(padded.device), feature_maps)
    probabilities = class_probabilities(semantic, text)
    return [of_picture[:count] for of_picture, count in zip(probabilities, counts, strict=True)]


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
