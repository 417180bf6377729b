"""Training on a GPU: images a second from caches of full-size records, beside what the card can do.

    python -m benchmarks.bench_train_gpu                        # all of it, in under ten minutes
    python -m benchmarks.bench_train_gpu --device cpu --tiny    # only to see that it runs

It needs a GPU, 16 GB of free disk and this package; no weights and no images. For each batch size it first chooses the
attention kernels and the way of compiling, then it trains with them from the cache.
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median

import torch

from benchmarks.bench_train_data import TrainingData, TrainingRun, write_cache
from benchmarks.bench_train_gpu_steps import (
    ATTENTION,
    COMPILED,
    READ_EVERY,
    WARM_UP_STEPS,
    Fed,
    Variant,
    operations_of,
    rate_of_steps,
)
from benchmarks.device_rates import matrix_rate
from benchmarks.goals import RESULTS, SCRATCH, Report, Samples, interleaved, ratio, say, versions
from regionspot.fusion.training.batches import TrainingBatch
from regionspot.fusion.training.config import TRAIN_PRESETS, TrainConfig

PACKAGES = ["torch", "numpy", "zarr", "google-crc32c"]
FLOAT16, INT8 = "float16", "int8"
PAGE_CACHE, DISK, ON_DEVICE = "page cache", "disk", "batches on the device"


@dataclass(frozen=True)
class Scale:
    """How much is measured.

    schedules   by the name in TRAIN_PRESETS; their batch sizes are 16 and 512
    held        batches that are kept on the device, by batch size
    seconds     of each measurement at most
    choosing    seconds, for each schedule, after which no further variant is tried
    end         seconds since the start, after which no further round begins
    """

    preset: str
    images: int
    part_size: int
    schedules: dict[str, TrainConfig]
    held: dict[int, int]
    seconds: float
    rounds: int
    choosing: float
    end: float
    matrix: int


FULL = Scale(
    "bl",
    images=16_384,
    part_size=512,
    schedules={name: TRAIN_PRESETS[name] for name in ("paper", "fast")},
    held={16: 32, 512: 6},
    seconds=4,
    rounds=2,
    choosing=90,
    end=400,
    matrix=8192,
)
TINY = Scale(
    "tiny",
    images=64,
    part_size=16,
    schedules={
        name: replace(TRAIN_PRESETS[name], batch_size=size, layers=1, heads=2, ffn=8)
        for name, size in (("paper", 4), ("fast", 8))
    },
    held={4: 2, 8: 2},
    seconds=0.02,
    rounds=1,
    choosing=60,
    end=60,
    matrix=64,
)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny features, to see that all of it runs")
    parser.add_argument("--results", type=Path, help="folder for the results (default: benchmarks/results)")
    parser.add_argument("--scratch", type=Path, default=SCRATCH / "train_gpu", help="folder for the caches, on a disk")
    options = parser.parse_args(arguments)
    scale, device = TINY if options.tiny else FULL, torch.device(options.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "none: run on the CPU"
    report = Report("train_gpu", f"Training on a GPU ({name})", _protocol(scale), versions(PACKAGES))
    shutil.rmtree(options.scratch, ignore_errors=True)  # of a run that was stopped
    # On a CPU, compiling would take longer than everything else.
    with torch.compiler.set_stance("force_eager") if device.type == "cpu" else nullcontext():
        measure(report, scale, device, options.scratch)
    report.finish(options.results or (SCRATCH if options.tiny else RESULTS))


def measure(report: Report, scale: Scale, device: torch.device, scratch: Path) -> None:
    """Fill the report."""
    end = time.monotonic() + scale.end
    datasets = [TrainingData(scale.preset, scale.images, each, part_size=scale.part_size) for each in (FLOAT16, INT8)]
    for data in datasets:
        say(f"a cache of {data.images:,} records, {data.dtype}")
        write_cache(scratch / data.dtype, data)
    matrix = matrix_rate(scale.matrix, device, scale.seconds)
    report.add_row("Card", product=f"bfloat16, {scale.matrix} x {scale.matrix}", **{"TFLOP/s": matrix / 1e12})
    for schedule, config in scale.schedules.items():
        runs = {data.dtype: TrainingRun(data, scratch / data.dtype, config, str(device)) for data in datasets}
        images = _measure_schedule(report, scale, runs, matrix, end)
        _extrapolate(report, schedule, config, images)
    shutil.rmtree(scratch)


def _measure_schedule(
    report: Report, scale: Scale, runs: dict[str, TrainingRun], matrix: float, end: float
) -> dict[str, float]:
    """Images a second of each case."""
    run, size = runs[FLOAT16], runs[FLOAT16].config.batch_size
    held = run.copies(scale.held[size])
    operations = operations_of(run.new_step(), held)
    best = _choose(report, scale, run, held, operations / matrix)
    fed = {
        f"{dtype}, {source}": Fed(each, each.new_step(COMPILED[best.compiled]), scale.seconds, cold=source == DISK)
        for dtype, each in runs.items()
        for source in (PAGE_CACHE, DISK)
    }
    on_device = partial(rate_of_steps, run.new_step(COMPILED[best.compiled]), held, scale.seconds)
    samples: Samples = {}
    with best.kernels():
        for number in range(scale.rounds):
            if number and time.monotonic() > end:
                break
            say(f"batches of {size}: round {number + 1}")
            for case, rates in interleaved({ON_DEVICE: on_device, **fed}, 1, seed=number).items():
                samples.setdefault(case, []).extend(rates)
    for case, rates in samples.items():
        rate, from_cache = median(rates), fed.get(case)
        report.add_row(
            f"Batches of {size}; {best.name}",
            case=case,
            **{
                "images/s": rate,
                "lowest": min(rates),
                "highest": max(rates),
                f"/ {ON_DEVICE}": ratio(samples, case, ON_DEVICE),
                "/ matrix rate": rate * operations / matrix,
                "device busy": median(from_cache.busy) if from_cache else None,
                "GB/s from the cache": rate * from_cache.run.data.record_bytes / 1e9 if from_cache else None,
                "bytes from disk / bytes of maps": median(from_cache.from_disk) if from_cache else None,
            },
        )
    return {case: median(rates) for case, rates in samples.items()}


def _choose(report: Report, scale: Scale, run: TrainingRun, held: list[TrainingBatch], share: float) -> Variant:
    """The fastest variant on batches that are on the device: the best attention first, then the best compilation.

    share   of the matrix rate that one image a second is
    """
    size, end = run.config.batch_size, time.monotonic() + scale.choosing
    best, best_rate = Variant(next(iter(ATTENTION)), next(iter(COMPILED))), 0.0
    tried = set()
    for field, values in (("attention", ATTENTION), ("compiled", COMPILED)):
        for variant in [replace(best, **{field: value}) for value in values]:
            if variant in tried or (best_rate and time.monotonic() > end):
                continue
            tried.add(variant)
            say(f"batches of {size}: {variant.name}")
            try:
                with variant.kernels():
                    rate = rate_of_steps(run.new_step(COMPILED[variant.compiled]), held, scale.seconds)
            except Exception as error:  # what this card or torch cannot do is left out
                say(f"left out: {' '.join(str(error).split())[:300]}")
                continue
            row = {"variant": variant.name, "images/s": rate, "/ matrix rate": rate * share}
            report.add_row(f"Variants of the step, {ON_DEVICE}", batch=size, **row)
            if rate > best_rate:
                best, best_rate = variant, rate
    if not best_rate:
        raise RuntimeError("no variant of the step could be computed; the reasons are above")
    return best


def _extrapolate(report: Report, schedule: str, config: TrainConfig, images: dict[str, float]) -> None:
    total = config.iterations * config.batch_size
    for case, rate in images.items():
        row = {"schedule": f"{schedule}: {config.iterations:,} x {config.batch_size}", "case": case}
        report.add_row("Hours of a stage", **row, hours=total / rate / 3600)
    case = f"{FLOAT16}, {PAGE_CACHE}"
    report.add_goal(f"images a second, batches of {config.batch_size}, {case}", images[case], at_least=5000)
    hours = total / images[case] / 3600
    report.add_goal(f"hours of a stage, schedule {schedule}, {case}", hours, at_most=1)


def _protocol(scale: Scale) -> str:
    data = TrainingData(scale.preset, scale.images)
    tokens, width = data.shapes.map
    held = " and ".join(f"{count} batches of {size}" for size, count in scale.held.items())
    return f"""
Preset `{scale.preset}`: {scale.images:,} synthetic records of {tokens} x {width}, {data.record_bytes:,} bytes in
float16, with numbers of regions as in Objects365; a float16 and an int8 cache. Batches and steps are those of
`regionspot train` with the schedules `paper` and `fast`, the loss read every {READ_EVERY} steps as there.

- **Variants**: steps on {held} that are on the device already. First the attention kernels,
  then the ways to compile with the fastest of these. Every batch is computed twice before the clock starts. All that
  follows uses the fastest variant.
- **From the cache**: cases take turns within a round, in an order drawn anew for each of at most {scale.rounds} rounds;
  an epoch or {scale.seconds:g} s each, after {WARM_UP_STEPS} steps. Rates are medians; "/ {ON_DEVICE}" is the
  median of the ratio within a round. *Page cache*: the files are read through before. *Disk*: they are dropped from the
  page cache before, and read by `pread`.
- **Device busy**: the time from the first to the last kernel of each step by CUDA events, over the wall time.
- **/ matrix rate**: operations in the products of the forward and backward pass, padding included, over those of one
  large bfloat16 product in the same time.
"""


if __name__ == "__main__":
    main()
