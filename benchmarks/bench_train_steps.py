"""Training steps fed from a cache, against the same steps on the same batches held in memory, and against the authors'.

The step and the batches are those of `regionspot train`; this module only calls and times them.
"""

from __future__ import annotations

import shutil
import time
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import median

from benchmarks.bench_cache_data import bytes_from_disk, drop, warm
from benchmarks.bench_extract_gpu import operations_of as operations_of_backbones
from benchmarks.bench_train_authors import AuthorsInput
from benchmarks.bench_train_data import TrainingData, TrainingRun, write_cache
from benchmarks.bench_train_gpu_steps import operations_of as operations_of_steps
from benchmarks.goals import Samples, interleaved, say, seconds
from regionspot.cache.reading.prefetch import AHEAD
from regionspot.fusion.training.config import TrainConfig

IN_MEMORY, WARM, COLD = "steps, batches in memory", "steps, page cache", "steps, disk"
WARM_ALONE, COLD_ALONE = "feeding alone, page cache", "feeding alone, disk"
AUTHORS, AUTHORS_ALONE = "steps, authors' input", "authors' input alone"


class Fed:
    """Steps on batches from the cache. A call gives images a second over `steps` steps, batches read ahead as in a run.

    waiting     share of the time spent waiting for a batch, of each call
    from_disk   bytes read from disk over the bytes of the feature maps that were read, of each call
    """

    def __init__(self, run: TrainingRun, steps: int, cold: bool) -> None:
        self._run, self._steps, self._cold = run, steps, cold
        self.waiting: list[float] = []
        self.from_disk: list[float] = []

    def __call__(self) -> float:
        run, steps = self._run, self._steps
        (drop if self._cold else warm)(run.path)
        before, waited = bytes_from_disk(), 0.0
        with closing(run.batches("pread" if self._cold else "auto")) as batches:
            batch = next(batches)
            started = time.perf_counter()
            for _ in range(steps):
                run.step(batch)
                asked = time.perf_counter()
                batch = next(batches)
                waited += time.perf_counter() - asked
            taken = time.perf_counter() - started
        images = run.config.batch_size * (steps + 1 + AHEAD)  # the last ones are not used
        self.waiting.append(waited / taken)
        self.from_disk.append((bytes_from_disk() - before) / (images * run.data.record_bytes))
        return run.config.batch_size * steps / taken


class FromMemory:
    """The same steps on copies of the same batches."""

    def __init__(self, run: TrainingRun, steps: int) -> None:
        self._run, self._batches = run, run.copies(steps)

    def __call__(self) -> float:
        taken = seconds(lambda: [self._run.step(batch) for batch in self._batches])
        return sum(len(batch) for batch in self._batches) / taken


class Feeding:
    """An epoch of batches without any step; a call gives images a second."""

    def __init__(self, run: TrainingRun, cold: bool) -> None:
        self._run, self._cold = run, cold

    def __call__(self) -> float:
        run = self._run
        (drop if self._cold else warm)(run.path)
        count = run.data.images // run.config.batch_size
        with closing(run.batches("pread" if self._cold else "auto")) as batches:
            taken = seconds(lambda: [None for _ in islice(batches, count)])
        return count * run.config.batch_size / taken


class FromImages:
    """Steps on batches whose input is computed as the authors do; a call gives images a second of one step.

    inputs   images a second of the input alone, of each call
    """

    def __init__(self, run: TrainingRun, folder: Path) -> None:
        self._run, (self._batch,) = run, run.copies(1)
        self._input = AuthorsInput(run.data.preset, folder, run.config.batch_size)
        self._input.write_tokens(self._batch)
        self.inputs: list[float] = []

    def __call__(self) -> float:
        started = time.perf_counter()
        batch = self._input(self._batch)
        ready = time.perf_counter()
        self._run.step(batch)
        images = self._run.config.batch_size
        self.inputs.append(images / (ready - started))
        return images / (time.perf_counter() - started)


@dataclass(frozen=True)
class StepsMeasured:
    """Images a second of each case and round, and what the cases fed from the cache noted, by case."""

    samples: Samples
    waiting: dict[str, float]
    from_disk: dict[str, float]


def measure_steps(data: TrainingData, folder: Path, batch_size: int, steps: int, rounds: int) -> StepsMeasured:
    """Steps fed from memory, from the page cache and from disk; and both ways of feeding without any step."""
    say(f"{data.preset}: steps of {batch_size} images, {rounds} rounds")
    run = _new_run(data, folder, batch_size)
    fed = {WARM: Fed(run, steps, cold=False), COLD: Fed(run, steps, cold=True)}
    in_memory = FromMemory(run, steps)
    in_memory()  # warms up
    samples = interleaved({IN_MEMORY: in_memory, **fed}, rounds)
    samples |= interleaved({WARM_ALONE: Feeding(run, cold=False), COLD_ALONE: Feeding(run, cold=True)}, rounds)
    shutil.rmtree(folder)
    return StepsMeasured(
        samples,
        {name: median(case.waiting) for name, case in fed.items()},
        {name: median(case.from_disk) for name, case in fed.items()},
    )


def measure_authors(
    data: TrainingData, folder: Path, batch_size: int, steps: int, rounds: int
) -> tuple[Samples, dict[str, float]]:
    """Steps fed from the cache and by the authors' input, and the two inputs alone; and the operations of an image.

    Operations are those of CLIP's forward pass and of a step of the head, padding included.
    """
    say(f"{data.preset}: the authors' input, {rounds} rounds")
    run = _new_run(data, folder, batch_size)
    theirs = FromImages(run, folder / "photos")
    theirs()  # warms up
    theirs.inputs.clear()
    ours = {WARM: Fed(run, steps, cold=False), WARM_ALONE: Feeding(run, cold=False)}
    samples = interleaved({**ours, AUTHORS: theirs}, rounds)
    operations = {
        "CLIP": float(operations_of_backbones(data.preset)["CLIP"]),
        "step of the head": operations_of_steps(run.step, run.copies(1)),
    }
    shutil.rmtree(folder)
    return {**samples, AUTHORS_ALONE: theirs.inputs}, operations


def _new_run(data: TrainingData, folder: Path, batch_size: int) -> TrainingRun:
    write_cache(folder / "cache.zarr", data)
    return TrainingRun(data, folder / "cache.zarr", TrainConfig(batch_size=batch_size))
