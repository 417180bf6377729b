"""Choose the batch size that fits into the GPU's memory, and halve batches that run out of memory.

A batch takes a fixed amount of memory plus the same amount per image, so the peaks for one and two images predict the
peak of any batch. Other processes may allocate memory later: a batch that no longer fits is split in halves, and so are
all later ones, instead of failing the run.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import torch
from PIL import Image
from torch import Tensor

from regionspot.pipeline.backbones.protocols import Backbone

log = logging.getLogger(__name__)

T = TypeVar("T")
R = TypeVar("R")

# Larger batches are no faster on a GPU; 32 preprocessed images take 100 MB of pinned memory.
MAX_BATCH = 32
FREE_SHARE = 0.8  # of the free memory; the rest is for fragmentation, the token decoder and other processes


def batch_size_of(models: Sequence[Backbone]) -> int:
    """The batch size for these models.

    On a GPU it is measured, and a power of two up to MAX_BATCH: rounding depends on the batch size, so GPUs of similar
    size or with a little less free memory should get the same one. On other devices it is the models' smallest own
    `batch_size`.

    Raises torch.OutOfMemoryError if not even one image fits.
    """
    if any(model.device.type != "cuda" for model in models):
        return min(model.batch_size for model in models)
    return min((_measure_on_gpu(model) for model in models), default=MAX_BATCH)


def _measure_on_gpu(model: Backbone) -> int:
    # SAM's largest input. Blank images take the same memory as any.
    blank = model.preprocess(Image.new("RGB", (1024, 1024)))
    model.encode(blank[None])  # loads kernels and allocates their workspaces, which stay allocated
    batches = (blank.expand(count, *blank.shape) for count in (1, 2))
    one, two = (peak_bytes(partial(model.encode, batch), model.device) for batch in batches)
    return largest_batch(one, two, int(FREE_SHARE * free_bytes(model.device)))


def free_bytes(device: torch.device) -> int:
    """Memory of a GPU that can be allocated: free on the device, or cached and unused by PyTorch."""
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + cached


def largest_batch(one: int, two: int, free: int) -> int:
    """The largest power of two, up to MAX_BATCH, that fits in `free` bytes, from the peaks of one and two images."""
    per_image = max(two - one, 1)
    largest = max(1, (free - (one - per_image)) // per_image)
    return min(1 << (largest.bit_length() - 1), MAX_BATCH)


def peak_bytes(work: Callable[[], object], device: torch.device) -> int:
    """Peak memory that `work` allocates in addition to what is already allocated."""
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    work()
    return torch.cuda.max_memory_allocated(device) - before


class Halving:
    """Runs batches in parts that fit into memory. `max_size`: images per part; None until a batch did not fit."""

    def __init__(self) -> None:
        self.max_size: int | None = None

    def __call__(self, encode: Callable[[Sequence[Tensor]], Tensor], batch: Sequence[Tensor]) -> Tensor:
        """`encode(batch)`, whose first dimension is the images.

        Raises torch.OutOfMemoryError if not even one image fits.
        """
        results = self.results(encode, batch) or [encode(batch)]
        return results[0] if len(results) == 1 else torch.cat(results)

    def results(self, compute: Callable[[Sequence[T]], R], batch: Sequence[T]) -> list[R]:
        """`compute` of each part of the batch, in order; of the whole batch if it fits.

        Raises torch.OutOfMemoryError if not even one image fits.
        """
        results: list[R] = []
        done = 0
        while done < len(batch):
            part = batch[done : done + (self.max_size or len(batch))]
            result = self._try(compute, part)
            if result is None:
                self._halve(len(part))
            else:
                results.append(result)
                done += len(part)
        return results

    def sizes(self, count: int) -> list[int]:
        """For each image of a batch of `count`, the size of the part in which it is computed."""
        size = self.max_size or count
        return [min(size, count - index // size * size) for index in range(count)]

    def _try(self, compute: Callable[[Sequence[T]], R], part: Sequence[T]) -> R | None:
        """None if out of memory. Returning releases the traceback, which keeps intermediate results alive."""
        try:
            return compute(part)
        except torch.OutOfMemoryError:
            if len(part) <= 1:
                raise
        return None

    def _halve(self, failed: int) -> None:
        self.max_size = failed // 2
        log.warning("the GPU's memory does not hold %d images at a time; continuing with %d", failed, self.max_size)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # blocks cached for the larger batch do not fit the smaller one
