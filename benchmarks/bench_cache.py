"""The cache against its peers, and against what the machine can do at most: `make bench-cache`.

Every section runs in a process of its own, so that no library's threads, memory or settings reach into another's
figures, and leaves nothing behind.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from benchmarks.bench_cache_chart import draw
from benchmarks.bench_cache_cold import measure_cold
from benchmarks.bench_cache_data import BATCH, PART, REGIONS, Features
from benchmarks.bench_cache_reading import measure_reading
from benchmarks.bench_cache_small import measure_memory, measure_opening, measure_tokens
from benchmarks.bench_cache_writing import measure_writing
from benchmarks.goals import SCRATCH, Report, Samples, alone, options, ratio, versions

PACKAGES = ["numpy", "torch", "zarr", "zarrs", "tensorstore", "h5py", "litdata", "mosaicml-streaming", "google-crc32c"]
CHART = Path(__file__).resolve().parents[1] / "docs" / "bench_cache.png"

WRITE_RAW = "raw file, fsync"
RAW, NEVER, ALWAYS = "raw memmap", "cache.loader, check never", "cache.loader, check always"
READ_GOALS = [  # of which reader, over which, at least
    (NEVER, RAW, 0.9),
    (ALWAYS, RAW, 0.55),
    (NEVER, "tensorstore", 2.5),
    (NEVER, "zarrs codec pipeline", 8),
    (NEVER, "zarr-python, sharded", 20),
    (NEVER, ".pth an image", 6),
    (NEVER, "LitData", 8),
    (NEVER, "MosaicML Streaming", 8),
]


@dataclass(frozen=True)
class Scale:
    """How much is measured: a full run takes about ten minutes on two cores and 9 GB of disk."""

    reading: tuple[Features, ...]
    cold: Features
    part: Features
    rounds: int
    memory: Features


FULL = Scale(
    reading=(
        Features(257, 1024, "float16", 4 * PART),
        Features(197, 768, "float16", 7 * PART),
        Features(577, 1024, "float16", 2 * PART),
        Features(257, 1024, "int8", 8 * PART),
    ),
    cold=Features(257, 1024, "float16", 4 * PART),
    part=Features(257, 1024, "float16", PART),
    rounds=3,
    memory=Features(257, 1024, "float16", PART),
)
SMALL = Scale(
    reading=(Features(257, 1024, "float16", PART), Features(257, 1024, "int8", PART)),
    cold=Features(257, 1024, "float16", PART),
    part=Features(257, 1024, "float16", PART // 4),
    rounds=2,
    memory=Features(64, 256, "float16", PART),
)


def main() -> None:
    arguments = options(__doc__.splitlines()[0])
    scale = SMALL if arguments.quick else FULL
    report = Report("cache", "The cache against its peers", _protocol(scale), versions(PACKAGES))
    scratch = SCRATCH / "cache"
    shutil.rmtree(scratch, ignore_errors=True)  # of a run that was stopped
    warm = _read_all(report, scale, scratch)
    cold = _read_cold(report, scale, scratch)
    written = _write(report, scale, scratch)
    _small_things(report, scale, scratch)
    report.finish(arguments.results)
    panels = {
        f"Shuffled batches of {scale.reading[0].name}, GB/s": warm,
        "An epoch from a cold disk, GB/s": cold,
        "Writing with fsync, GB/s": written,
    }
    draw(arguments.results / "bench_cache.png" if arguments.quick else CHART, panels)


def _read_all(report: Report, scale: Scale, scratch: Path) -> Samples:
    """Shuffled epochs of every shape; the samples of the first."""
    found = [(features, *alone(measure_reading, features, scratch, scale.rounds)) for features in scale.reading]
    for features, how, samples in found:
        _add_rates(report, f"Shuffled batches of {BATCH}, {features.name}, page cache warm", samples, RAW, how)
        for reader, over, least in READ_GOALS:
            report.add_goal(f"{features.name}: {reader} / {over}", ratio(samples, reader, over), at_least=least)
    return found[0][-1]


def _read_cold(report: Report, scale: Scale, scratch: Path) -> Samples:
    samples, from_disk = alone(measure_cold, scale.cold, scratch, scale.rounds)
    table = f"A whole epoch from a cold disk, {scale.cold.name}"
    for name in _fastest_first(samples):
        rates = {"GB/s": median(samples[name]), "lowest": min(samples[name]), "highest": max(samples[name])}
        report.add_row(table, reader=name, **rates, **{"bytes from disk / bytes of features": from_disk[name]})
    for peer in ("DataLoader over cache.read, 2 workers", "DataLoader over a raw memmap, 2 workers"):
        goal = f"cold: cache.loader, shuffle full / {peer}"
        report.add_goal(goal, ratio(samples, "cache.loader, shuffle full", peer), at_least=2.5)
    return samples


def _write(report: Report, scale: Scale, scratch: Path) -> Samples:
    samples = alone(measure_writing, scale.part, scratch, 2 * scale.rounds)
    _add_rates(report, f"Writing a part of {scale.part.records} records, {scale.part.name}, fsync", samples, WRITE_RAW)
    for over, least in ((WRITE_RAW, 0.8), ("zarr-python, sharded, fsync", 4)):
        report.add_goal(f"cache.write_part / {over}", ratio(samples, "cache.write_part", over), at_least=least)
    return samples


def _small_things(report: Report, scale: Scale, scratch: Path) -> None:
    tokens = alone(measure_tokens, scratch, scale.rounds)
    for name in tokens:
        report.add_row("Tokens of one image, 16 x 256 float16", reader=name, microseconds=median(tokens[name]))
    opening = median(alone(measure_opening, scratch, scale.rounds))
    report.add_goal(f"milliseconds to open a part of {PART} images", opening, at_most=0.2)
    memory = alone(measure_memory, scale.memory, scratch)
    for gigabytes, megabytes in memory.items():
        row = {"cache, GB": gigabytes, "loader, MB": megabytes}
        report.add_row(f"Memory of a loader at the end of an epoch, batches of {BATCH}, {scale.memory.name}", **row)
    small, large = memory.values()
    report.add_goal("memory of a loader, a cache ten times as large / a small one", large / small, at_most=1.05)


def _add_rates(report: Report, table: str, samples: Samples, limit: str, how: dict[str, str] | None = None) -> None:
    for name in _fastest_first(samples):
        rates = {"GB/s": median(samples[name]), "lowest": min(samples[name]), "highest": max(samples[name])}
        of_limit = {f"/ {limit}": ratio(samples, name, limit)}
        report.add_row(table, reader=name, **rates, **of_limit, **({"how": how[name]} if how else {}))


def _fastest_first(samples: Samples) -> list[str]:
    return sorted(samples, key=lambda name: -median(samples[name]))


def _protocol(scale: Scale) -> str:
    sets = ", ".join(f"{each.records:,} of {each.name} ({each.gigabytes:.2f} GB)" for each in scale.reading)
    return f"""
Made-up features in parts of {PART} images: {sets}. Everything compared runs in turn
within a round, in an order drawn anew for each of {scale.rounds} rounds. Rates are medians over the rounds; goals, and
the columns headed "/", are medians of the ratio within a round. Before the first round a whole epoch of every reader
is checked against the crc32c of every record.

- **Warm**: each reader's files are read through right before its turn. An epoch reads all records once, in a new
  random order, in batches of {BATCH}. Readers that take rows fill one batch whose memory is used again; loaders with
  workers have 2, which live through all epochs. Counted are the bytes of the feature maps alone; the cache's own
  readers lay out {REGIONS} boxes an image as well, and the scales of int8. `check first` is timed after the epoch
  in which it checked everything.
- **Cold**: {scale.cold.records:,} records of {scale.cold.name}; their files are flushed, and dropped from the page
  cache (`POSIX_FADV_DONTNEED`), before each epoch. The last column is what came from disk during the epoch by the
  kernel's count, over the size of the features: 1 where dropping worked and nothing was read twice. A file that
  somebody maps cannot be dropped: workers are started anew for each epoch, and the cache is read by positioned reads,
  as it is by itself where it does not fit into memory.
- **Writing**: one part of {scale.part.records} records ({scale.part.gigabytes:.2f} GB) that are in memory already;
  the time includes the fsync of everything, {2 * scale.rounds} rounds.
- **Opening a part**: its first read less a later one. **Memory**: what Python and numpy hold (tracemalloc) for a
  loader when its epoch ends, the batches included; the manifest's columns are there before and not counted.
"""


if __name__ == "__main__":
    main()
