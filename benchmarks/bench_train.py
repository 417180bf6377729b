"""Training from the cache, against batches in memory and against the authors' input: `make bench-train`.

Every section runs in a process of its own. On a machine with a GPU, bench_train_gpu.py runs first.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

from benchmarks import bench_train_gpu
from benchmarks.bench_extract_data import SIZES
from benchmarks.bench_train_data import MOST_REGIONS, REGIONS, TrainingData, write_sparse_cache
from benchmarks.bench_train_start import measure_start
from benchmarks.bench_train_steps import (
    AUTHORS,
    AUTHORS_ALONE,
    COLD,
    COLD_ALONE,
    IN_MEMORY,
    WARM,
    WARM_ALONE,
    measure_authors,
    measure_steps,
)
from benchmarks.goals import SCRATCH, Report, alone, options, ratio, versions

PACKAGES = ["torch", "numpy", "zarr", "google-crc32c", "open_clip_torch", "pillow"]
START_PRESET, START_REGIONS = "bl", 10.0


@dataclass(frozen=True)
class Scale:
    """How much is measured: a full run takes about ten minutes on two cores, and 4 GB of disk.

    steps    of a case in a round
    images   of a cache that steps are read from
    authors  preset that is compared with the authors' input, and the number of rounds
    start    images of the two caches whose start is measured
    """

    presets: tuple[str, ...]
    batch: int
    steps: int
    rounds: int
    images: int
    authors: tuple[str, int]
    start: tuple[int, int]


# Whole parts of 512 images.
FULL = Scale(("bb", "bl", "bl336"), 16, steps=2, rounds=6, images=512, authors=("bl", 3), start=(30_208, 3_000_320))
SMALL = Scale(("bb",), 4, steps=1, rounds=3, images=64, authors=("bb", 1), start=(5_120, 51_200))


def main() -> None:
    arguments = options(__doc__.splitlines()[0])
    scale = SMALL if arguments.quick else FULL
    if torch.cuda.is_available():
        bench_train_gpu.main(["--results", str(arguments.results)])
    report = Report("train", "Training from the cache", _protocol(scale), versions(PACKAGES))
    scratch = SCRATCH / "train"
    shutil.rmtree(scratch, ignore_errors=True)  # of a run that was stopped
    scratch.mkdir(parents=True)
    for preset in scale.presets:
        _steps(report, scale, preset, scratch)
    _authors(report, scale, scratch)
    _start(report, scale, scratch)
    shutil.rmtree(scratch)
    report.finish(arguments.results)


def _steps(report: Report, scale: Scale, preset: str, scratch: Path) -> None:
    data = TrainingData(preset, scale.images)
    measured = alone(measure_steps, data, scratch / preset, scale.batch, scale.steps, scale.rounds)
    samples = measured.samples
    for case in (IN_MEMORY, WARM, COLD, WARM_ALONE, COLD_ALONE):
        images = median(samples[case])
        report.add_row(
            f"{preset}: images a second, batches of {scale.batch}",
            case=case,
            **_rates(samples[case]),
            **{
                "GB/s": images * data.record_bytes / 1e9 if case != IN_MEMORY else None,
                f"/ {IN_MEMORY}": ratio(samples, case, IN_MEMORY),
                "waiting for data": measured.waiting.get(case),
                "bytes from disk / bytes of maps": measured.from_disk.get(case),
            },
        )
    for case in (WARM, COLD):
        report.add_goal(f"{preset}: {case} / {IN_MEMORY}", ratio(samples, case, IN_MEMORY), at_least=0.95)


def _authors(report: Report, scale: Scale, scratch: Path) -> None:
    preset, rounds = scale.authors
    data = TrainingData(preset, scale.images)
    samples, operations = alone(measure_authors, data, scratch / "authors", scale.batch, scale.steps, rounds)
    for theirs, cases in ((AUTHORS, (WARM, AUTHORS)), (AUTHORS_ALONE, (WARM_ALONE, AUTHORS_ALONE))):
        for case in cases:
            over = {"/ the authors'": ratio(samples, case, theirs)}
            report.add_row(
                f"{preset}: images a second, against the authors", case=case, **_rates(samples[case]), **over
            )
    for of, count in operations.items():
        report.add_row(f"{preset}: operations of an image", of=of, GFLOP=count / 1e9)
    report.add_goal(f"{preset}: {WARM} / {AUTHORS}", ratio(samples, WARM, AUTHORS), at_least=20)


def _rates(rates: list[float]) -> dict[str, float]:
    return {"images/s": median(rates), "lowest": min(rates), "highest": max(rates)}


def _start(report: Report, scale: Scale, scratch: Path) -> None:
    starts = {}
    for images in scale.start:
        path = scratch / f"{images}.zarr"
        alone(write_sparse_cache, path, TrainingData(START_PRESET, images, regions=START_REGIONS))
        starts[images] = start = measure_start(path, START_PRESET, scratch / f"run_{images}")
        shutil.rmtree(path)
        report.add_row(
            f"Start of a run, {START_PRESET}, new process",
            images=f"{images:,}",
            **{
                "modules imported, s": start.imported,
                "cache opened, s": start.opened,
                "first step begins, s": start.first_step,
                "peak of resident memory, MB": start.peak,
                "of it mapped files, MB": start.mapped,
                "peak of memory in use, MB": start.in_use,
            },
        )
    few, many = scale.start
    growth = starts[many].in_use - starts[few].in_use
    report.add_row("Memory in use that grows with the dataset", **{"bytes an image": growth * 2**20 / (many - few)})
    report.add_goal(f"seconds from start to first step, {many:,} images", starts[many].first_step, at_most=10)
    goal = f"peak of memory in use, {many:,} images / {few:,} images"
    report.add_goal(goal, starts[many].in_use / starts[few].in_use, at_most=1.05)


def _protocol(scale: Scale) -> str:
    few, many = scale.start
    sizes = " and ".join(f"{width} x {height}" for width, height in SIZES)
    return f"""
Synthetic caches of full-size float16 records with random values; an image has {REGIONS} regions on average, as in
Objects365, in a geometric distribution, {MOST_REGIONS} at most. The step is that of `regionspot train`: head and loss
forward and backward, clipping, AdamW, float32, on all cores. Cases take turns within a round, in an order drawn anew
for each round. Rates are medians over the rounds; goals, and the columns headed "/", are medians of the ratio within a
round.

- **Steps**: {scale.steps} steps of {scale.batch} images in each of {scale.rounds} rounds, the same batches in every
  case. *In memory*: copies made before. *Page cache*: the files are read through before. *Disk*: as where the cache is
  larger than the memory. Instead of a limit on memory, the files are
  flushed and dropped from the page cache (`POSIX_FADV_DONTNEED`) before, and read by `pread`, as they are by default
  where they do not fit into memory; the last column shows that everything came from disk. The cache is opened anew each
  time, so that every record is compared with its checksum. The clock starts when the first batch is there, and batches
  are read ahead until it stops, so that as many batches are read as are used.
- **Feeding alone**: the same batches without a step, all {scale.images} images.
- **Authors**: {scale.batch} JPEG files of {sizes} (in turn) decoded and resized by Pillow and torchvision, open_clip's
  image tower of the preset with random weights at its real size on the whole batch, one token file an image; then the
  same step; {scale.authors[1]} rounds. The step itself takes the same time on both sides: where both compute equally
  well, the ratio of whole steps is at most 1 + operations of CLIP / operations of a step. So the ratio of the input
  alone is given as well.
- **Start**: caches of {few:,} and {many:,} images with {START_REGIONS:g} regions an image. Manifest, part records,
  indices and checksums are complete; the features are holes in sparse files. A new process opens the cache and calls
  `train` for one step with a vocabulary that is in memory. Times count from the start of the process. Memory is the
  kernel's VmHWM at the end, after the step and its checkpoint, and RssFile for mapped files, among them the columns of
  the manifest. Memory in use is the difference of the two in another process, whose malloc returns what is freed
  (MALLOC_TRIM_THRESHOLD_): by default it keeps some 100 MB of the buffers that the columns were decoded in. The page
  cache is warm.
"""


if __name__ == "__main__":
    main()
