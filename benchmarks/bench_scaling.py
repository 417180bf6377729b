"""`make bench-scaling`: how the rate of an extraction grows with its workers, and what a part costs to give out.

The GPU is simulated by sleeping, so that a machine with few cores can show 64 workers: what is left is what scaling can
fail by. Workers are processes without torch.
"""

from __future__ import annotations

import os
import resource
import shutil
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.goals import Report, options, say, versions
from benchmarks.simulated import SimulatedJob, make_cache
from regionspot.cache.tools.verify import verify
from regionspot.pipeline.distributed.cluster import Connection, connected
from regionspot.pipeline.distributed.run import WrittenFeatures, run_parts
from regionspot.pipeline.reporting.run_monitor import RunMonitor

IMAGES = 16  # of a part: few, for what a part costs beside its GPU time does not grow with them
PART_SECONDS = 512 / 310  # of GPU for a part of 512 images, at 310 images a second: the ceiling of an H200
PARTS_EACH = 24
MANY_PARTS = 6000  # of three million images

PROTOCOL = f"""
Workers are dask worker processes on this machine (`--scheduler local:N`) that run the real loop of a part: claim,
features of {IMAGES} small images, files flushed and named, record, report. Only the encoders are replaced, by
sleeping under a lock, as one GPU a worker is used by its two task threads: {PART_SECONDS:.2f} s a part, which is what
512 images take at 310 a second, the ceiling of SAM ViT-B with CLIP L/14 on an H200. Shorter parts would measure this
machine's cores, which all workers share, instead of the scheduler.

* Rate: parts a second over a whole run of {PARTS_EACH} parts a worker, the last ones included, when the workers have
  started and have opened the cache. Speedup is the rate of N workers over N times the rate of one.
* Every cache is verified afterwards.
* Cost of a part: {MANY_PARTS:,} parts of one image on two workers; the CPU time of the process that holds client and
  scheduler, over the parts. Wall time is given beside it.
"""


def main() -> int:
    arguments = options(__doc__ or "")
    packages = ("distributed", "dask", "tornado", "msgpack", "zarr")
    report = Report("scaling", "How extraction scales to many workers", PROTOCOL, versions(packages))
    parts_each = 3 if arguments.quick else PARTS_EACH
    rates: dict[int, float] = {}
    for count in (1, 2, 8) if arguments.quick else (1, 2, 8, 32, 64):
        say(f"{count} workers")
        rates[count] = _scale(report, count, parts_each, rates)
        if count > 1:
            goal = f"speedup of {count} workers, over {count} times one worker"
            report.add_goal(goal, rates[count] / rates[1] / count, at_least=0.9)
    say("parts of one image")
    _cost(report, 600 if arguments.quick else MANY_PARTS)
    report.finish(arguments.results)
    return 0


def _scale(report: Report, count: int, parts_each: int, rates: dict[int, float]) -> float:
    """Parts a second of so many workers."""
    folder = Path(tempfile.mkdtemp(prefix="scaling-"))
    try:
        cache, parts = make_cache(folder / "c.zarr", IMAGES * parts_each * count, IMAGES), parts_each * count
        job = SimulatedJob(str(cache.path), PART_SECONDS / IMAGES)
        started = time.perf_counter()
        with connected(f"local:{count}") as connection:
            connection.client.wait_for_workers(count)
            connection.client.run(_open, job)
            ready, busy = time.perf_counter(), time.process_time()
            monitor = RunMonitor(IMAGES * parts, parts)
            written = WrittenFeatures(cache, list(cache.feature_sets), job.run, monitor)
            run_parts(connection, job, written, range(parts))
            seconds, busy = time.perf_counter() - ready, time.process_time() - busy
            memory = sum(connection.client.run(_memory_mb).values())
        found = verify(cache.path)
        if not found.sound or found.pending or monitor.stats.parts != parts:
            raise RuntimeError(f"{count} workers: {monitor.stats.parts} of {parts} parts, {found.text()}")
    finally:
        shutil.rmtree(folder)
    report.add_row(
        "Workers",
        workers=count,
        parts=parts,
        seconds=seconds,
        **{
            "parts/s": parts / seconds,
            "of ideal": parts / seconds / count / rates.get(1, parts / seconds),
            "of N GPUs' time": parts * PART_SECONDS / count / seconds,
            "scheduler's CPU": busy / seconds,
            "start s": ready - started,
            "memory MB": memory,
        },
    )
    return parts / seconds


def _cost(report: Report, parts: int) -> None:
    folder = Path(tempfile.mkdtemp(prefix="scaling-"))
    try:
        with connected("local:2") as connection:
            connection.client.wait_for_workers(2)
            _run_tiny_parts(connection, folder / "first.zarr", 50)
            wall, busy = time.perf_counter(), time.process_time()
            _run_tiny_parts(connection, folder / "c.zarr", parts)
            wall, busy = time.perf_counter() - wall, time.process_time() - busy
    finally:
        shutil.rmtree(folder)
    report.add_row("Cost of a part", parts=parts, cpu_ms=busy / parts * 1e3, wall_ms=wall / parts * 1e3)
    report.add_goal(f"scheduler's and client's CPU ms a part, {parts:,} parts", busy / parts * 1e3, at_most=5)


def _run_tiny_parts(connection: Connection, path: Path, parts: int) -> None:
    cache = make_cache(path, parts, 1)
    job = SimulatedJob(str(path))
    written = WrittenFeatures(cache, list(cache.feature_sets), job.run, RunMonitor(parts, parts))
    run_parts(connection, job, written, range(parts))


def _open(job: SimulatedJob) -> None:
    """In a worker: open the cache, as the first part would."""
    from regionspot.pipeline.distributed.worker import open_job

    open_job(job)


def _memory_mb() -> float:
    """In a worker: the most memory it has used."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
