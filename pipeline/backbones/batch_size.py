"""How many images go through a model at a time: as many as the GPU's memory holds, found by trying one and two.

What a batch needs is about a fixed part and the same again for each image, so the peaks of one and of two images
say what any number will take. Somebody else may take memory later, though: a batch that does not fit any more is
run in halves, and so are all that follow it, instead of losing the run.
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

# Past this a GPU computes no faster, and a batch of preprocessed images takes 100 MB of pinned memory and its time.
LARGEST = 32
SHARE = 0.8  # of the memory that is free: fragments, the token decoder and whoever else is on the GPU want some too


def batch_size_of(models: Sequence[Backbone]) -> int:
    """Images to send through these models at a time.

    On a GPU found by trying, a power of two at most LARGEST: so runs on cards of about the same size, or with a little
    less of it free, cut their images alike, and how a product rounds may depend on its batch. Elsewhere the least
    that one of them asks for, since a large model gains nothing there.

    Raises torch.OutOfMemoryError when not even one image fits.
    """
    if any(model.device.type != "cuda" for model in models):
        return min(model.batch_size for model in models)
    return min((_fitting_on_gpu(model) for model in models), default=LARGEST)


def _fitting_on_gpu(model: Backbone) -> int:
    # As large as SAM takes it: blank images need the same memory as any.
    blank = model.preprocess(Image.new("RGB", (1024, 1024)))
    model.encode(blank[None])  # loads kernels and makes their workspaces, which stay and are no part of a batch
    batches = (blank.expand(count, *blank.shape) for count in (1, 2))
    one, two = (peak_bytes(partial(model.encode, batch), model.device) for batch in batches)
    return fitting(one, two, int(SHARE * free_bytes(model.device)))


def free_bytes(device: torch.device) -> int:
    """Memory of a GPU that can still be taken: what nobody has, and what PyTorch keeps of what was freed."""
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept


def fitting(one: int, two: int, free: int) -> int:
    """The largest power of two, at most LARGEST, of images in `free` bytes, by the peaks of one and two images."""
    each = max(two - one, 1)
    most = max(1, (free - (one - each)) // each)
    return min(1 << (most.bit_length() - 1), LARGEST)


def peak_bytes(work: Callable[[], object], device: torch.device) -> int:
    """What it takes on top of what is there already, at most at once."""
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    work()
    return torch.cuda.max_memory_allocated(device) - before


class Halving:
    """Runs batches through a model in pieces that fit, `most` images at a time; None while all have fitted."""

    def __init__(self) -> None:
        self.most: int | None = None

    def __call__(self, encode: Callable[[Sequence[Tensor]], Tensor], batch: Sequence[Tensor]) -> Tensor:
        """`encode(batch)`, whose results lie along the first dimension, one an image.

        Raises torch.OutOfMemoryError when not even one image fits.
        """
        found = self.results(encode, batch) or [encode(batch)]
        return found[0] if len(found) == 1 else torch.cat(found)

    def results(self, compute: Callable[[Sequence[T]], R], batch: Sequence[T]) -> list[R]:
        """What `compute` makes of each piece of the batch, in order: of all of it at once, where that fits.

        Raises torch.OutOfMemoryError when not even one image fits.
        """
        found: list[R] = []
        done = 0
        while done < len(batch):
            piece = batch[done : done + (self.most or len(batch))]
            result = self._tried(compute, piece)
            if result is None:
                self._halve(len(piece))
            else:
                found.append(result)
                done += len(piece)
        return found

    def sizes(self, count: int) -> list[int]:
        """For each image of a batch of `count`, how many would be computed together with it, itself included."""
        most = self.most or count
        return [min(most, count - at // most * most) for at in range(count)]

    def _tried(self, compute: Callable[[Sequence[T]], R], piece: Sequence[T]) -> R | None:
        """None when memory did not do; by then the traceback, which holds on to what was computed, is gone."""
        try:
            return compute(piece)
        except torch.OutOfMemoryError:
            if len(piece) <= 1:
                raise
        return None

    def _halve(self, failed: int) -> None:
        self.most = failed // 2
        log.warning("the GPU's memory does not hold %d images at a time; from here on %d", failed, self.most)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # what is cached in pieces of the larger batch does not serve the smaller one
