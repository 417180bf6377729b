"""Training steps on a GPU: in which variant, on batches that are on the device, and fed from a cache."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.bench_cache_data import bytes_from_disk, drop, warm
from benchmarks.bench_train_data import TrainingRun
from benchmarks.device_rates import wait
from regionspot.fusion.training.batches import TrainingBatch
from regionspot.fusion.training.step import TrainStep

READ_EVERY = 20  # steps, as `train` reads the loss
WARM_UP_STEPS = 3

# Backends that may be chosen, the preferred one first. Flash takes no mask, and self-attention over regions has one.
ATTENTION: dict[str, list[SDPBackend]] = {
    "PyTorch's choice": [],
    "flash, else efficient": [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION],
    "cuDNN, else efficient": [SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION],
    "efficient": [SDPBackend.EFFICIENT_ATTENTION],
    "math": [SDPBackend.MATH],
}
# The number of regions differs from batch to batch, so all are compiled for variable shapes.
COMPILED: dict[str, Callable[[nn.Module], nn.Module]] = {
    "eager": lambda head: head,
    "compiled": lambda head: torch.compile(head, dynamic=True),
    "compiled, CUDA graphs": lambda head: torch.compile(head, dynamic=True, mode="reduce-overhead"),
}


@dataclass(frozen=True)
class Variant:
    """A way to compute the step."""

    attention: str
    compiled: str

    @property
    def name(self) -> str:
        return f"{self.compiled}; attention: {self.attention}"

    def kernels(self) -> AbstractContextManager[None]:
        backends = ATTENTION[self.attention]
        return sdpa_kernel(backends, set_priority=True) if backends else nullcontext()


def rate_of_steps(step: TrainStep, held: list[TrainingBatch], seconds: float) -> float:
    """Images a second on batches that are on the device. Every batch is computed twice before."""
    for batch in [*held, *held]:
        step(batch)
    step.read()
    images, started, batches = 0, time.perf_counter(), itertools.cycle(held)
    while time.perf_counter() - started < seconds:
        for batch in itertools.islice(batches, READ_EVERY):
            step(batch)
            images += len(batch)
        step.read()
    rate = images / (time.perf_counter() - started)
    sums = step.read()
    if sums.bad_step is not None:
        raise RuntimeError(f"the loss is not finite: {sums}")
    return rate


def operations_of(step: TrainStep, held: list[TrainingBatch]) -> float:
    """Multiplications and additions of a step's products, per image, padding included."""
    with FlopCounterMode(display=False) as counter:
        for batch in held:
            step(batch)
    return counter.get_total_flops() / sum(len(batch) for batch in held)


class Fed:
    """Steps on batches from the cache, for an epoch or so many seconds; a call gives images a second.

    busy        share of the time in which the device computes a step, of each call
    from_disk   bytes read from disk over the bytes of the feature maps that were used, of each call
    """

    def __init__(self, run: TrainingRun, step: TrainStep, seconds: float, cold: bool) -> None:
        self.run, self._step, self._seconds, self._cold = run, step, seconds, cold
        self.busy: list[float] = []
        self.from_disk: list[float] = []

    def __call__(self) -> float:
        run, step = self.run, self._step
        (drop if self._cold else warm)(run.path)
        spans: list[tuple[Any, Any]] = []
        steps = run.data.images // run.config.batch_size
        before = bytes_from_disk()
        with closing(run.batches("pread" if self._cold else "auto")) as batches:
            for batch in itertools.islice(batches, WARM_UP_STEPS):
                step(batch)
            wait(run.device)
            images, started = 0, time.perf_counter()
            for number in range(1, steps - WARM_UP_STEPS):
                batch = next(batches)
                begin = self._event()
                step(batch)
                spans.append((begin, self._event()))
                images += len(batch)
                if number % READ_EVERY == 0:
                    step.read()
                    if time.perf_counter() - started > self._seconds:
                        break
            wait(run.device)
            taken = time.perf_counter() - started
        used = images + WARM_UP_STEPS * run.config.batch_size
        self.from_disk.append((bytes_from_disk() - before) / (used * run.data.record_bytes))
        self.busy.append(sum(_elapsed(*span) for span in spans) / taken)
        return images / taken

    def _event(self) -> Any:
        if self.run.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _elapsed(begin: Any, end: Any) -> float:
    """Seconds between two events."""
    return end - begin if isinstance(begin, float) else begin.elapsed_time(end) / 1e3
