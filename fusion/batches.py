"""The batch of every training step, read ahead, and decoded on the training device.

A batch follows from the seed and the step alone, so a resumed run gets the same batches as a run that was never
stopped. The batches of one cache are those of its loader, epoch after epoch; several caches alternate.
"""

# B images, R regions (padded), T map tokens, D channels

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from regionspot.cache.errors import InputError
from regionspot.cache.format.encodings import require_statistics
from regionspot.cache.format.schema import FeatureSet
from regionspot.cache.reading.batch import Batch
from regionspot.cache.reading.loader import Loader
from regionspot.fusion.training_sets import TrainingSet

# Fractional part of the golden ratio: its multiples modulo 1 fill every interval of [0, 1) more evenly than random
# numbers do, so the ratios of the caches also hold over short intervals of a run.
GOLDEN = 0.6180339887498949


@dataclass(frozen=True, eq=False)
class TrainingBatch:
    """The batch of one step, from training set number `set_index`. The next step reuses its buffers."""

    step: int
    set_index: int
    batch: Batch


def batch_shares(training_sets: Sequence[TrainingSet], ratios: Sequence[float] | None = None) -> NDArray[np.float64]:
    """Share of the batches that each training set gives; they add up to 1.

    `ratios` are in any unit; default: the number of usable images. Raises InputError unless there is one positive ratio
    for each training set.
    """
    sizes = [len(training_set.rows) for training_set in training_sets]
    weights = np.asarray(sizes if ratios is None else ratios, dtype=np.float64)
    if weights.shape != (len(sizes),) or not (np.isfinite(weights).all() and (weights > 0).all()):
        raise InputError(f"ratios {weights.tolist()}: expected {len(sizes)} numbers above 0, one for each cache")
    shares: NDArray[np.float64] = weights / weights.sum()
    return shares


def set_of_steps(shares: NDArray[np.float64], steps: int) -> NDArray[np.int64]:
    """int64 (steps,): index of the training set that each step reads from."""
    edges = np.cumsum(shares)[:-1]
    return np.searchsorted(edges, np.arange(steps) * GOLDEN % 1.0, side="right").astype(np.int64)


def read_batches(
    training_sets: Sequence[TrainingSet],
    shares: NDArray[np.float64],
    batch_size: int,
    seed: int,
    first_step: int,
    end_step: int,
    pin_memory: bool = False,
) -> Generator[TrainingBatch]:
    """The batches of steps `first_step` to `end_step` - 1, read ahead by threads.

    pin_memory   page-locked buffers, for copies to a GPU

    Raises the error of a failed read at the step whose batch it concerns.
    """
    set_indices = set_of_steps(shares, end_step)
    steps_done = np.bincount(set_indices[:first_step], minlength=len(shares))
    with ExitStack() as stack:
        streams = []
        for index, (training_set, done) in enumerate(zip(training_sets, steps_done.tolist(), strict=True)):
            loader = training_set.cache.loader(
                batch_size,
                seed=seed + index,
                rows=training_set.rows,
                map_set=training_set.maps.name,
                token_set=training_set.tokens.name,
                pin_memory=pin_memory,
            )
            epoch, batches = divmod(done, len(loader))
            loader.load_state_dict({**loader.state_dict(), "epoch": epoch, "batches": batches})
            streams.append(stack.enter_context(closing(_all_epochs(loader))))
        for step, index in enumerate(set_indices[first_step:].tolist(), start=first_step):
            yield TrainingBatch(step, index, next(streams[index]))


def _all_epochs(loader: Loader) -> Generator[Batch]:
    while True:
        yield from loader


def decode_on_device(
    stored: NDArray[Any], scales: NDArray[np.float16], feature_set: FeatureSet, device: torch.device
) -> Tensor:
    """Features (..., D) on `device`, from `stored` (..., D) of a batch and, for int8, its `scales` (...).

    The stored form, which is the smallest, is copied to the device and decoded there. float16 and float32 stay as they
    are; int8 becomes float32: code * scale of the row * deviation of the channel + mean of the channel. A copy from
    page-locked memory may still be running when this returns. Raises InputError for an int8 set without statistics.
    """
    values = torch.from_numpy(stored).to(device, non_blocking=True)
    if feature_set.dtype == "bfloat16":
        return values.view(torch.bfloat16)
    if feature_set.dtype != "int8":
        return values
    statistics = require_statistics(feature_set)
    deviation, mean = (torch.tensor(array, device=device) for array in (statistics.deviation, statistics.mean))
    factors = torch.from_numpy(scales).to(device, non_blocking=True).float().unsqueeze(-1)
    return values.float().mul_(factors).mul_(deviation).add_(mean)
