"""What a dask worker does with the number of a part: claim it, compute its features, write it.

A task returns nothing: the part's record in the cache says that it is done, by which run, and what is in it. So no
result is lost with a worker or a connection, and a task may be given any number of times, to any workers: with a part
that is written, or that somebody has claimed, nothing is done. claims.py says why two never write one part, whatever
dies, freezes or is cut off.

A job is a small object that can be pickled. What it opens (the cache, models) is opened once in each process and kept,
with one run of `Claims` and its heartbeat. Threads of a worker make several parts at the same time, so that one is
decoded or flushed while another one keeps the GPU busy. Torch is not imported here.
"""

from __future__ import annotations

import asyncio
import atexit
import logging
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from regionspot.cache.errors import CacheError, RegionSpotError
from regionspot.cache.format.schema import ImageFeatures
from regionspot.cache.store import FeatureCache
from regionspot.cache.writing.claims import Claims
from regionspot.pipeline.reporting.run_stats import RunStats

if TYPE_CHECKING:
    from distributed import Worker

log = logging.getLogger(__name__)

PARTS_AT_ONCE = 2  # of a worker: threads beyond these wait


class Job(Protocol):
    """What is done with every part; hashable, and equal to its copy that was sent.

    run   a word of this run's own
    """

    @property
    def run(self) -> str: ...

    def open(self) -> PartMaker:
        """Open what a worker needs for it. Raises RegionSpotError where that is not to be had."""


class Features(Protocol):
    """Where the features of a part's images come from. Called by several threads at once."""

    def of_rows(self, rows: range, names: Sequence[str], stats: RunStats) -> Iterator[ImageFeatures]:
        """Features of the sets `names` of each image, in order; `stats` get the time of each stage."""


class PartMaker:
    """Makes parts of a cache that is open for writing: the feature sets `names`, from `features`."""

    def __init__(self, cache: FeatureCache, names: Sequence[str], features: Features, run: str) -> None:
        self._cache, self._names, self._features, self._run = cache, list(names), features, run
        self._claims = Claims(cache.storage)
        self._claims.__enter__()  # left by close()
        self._room = threading.Semaphore(PARTS_AT_ONCE)
        self._under_way: set[int] = set()

    @property
    def busy(self) -> bool:
        """Whether a part is being made."""
        return bool(self._under_way)

    def close(self) -> None:
        """Let go of all claims."""
        self._claims.__exit__(None, None, None)

    def make(self, part: int) -> None:
        """Write the part, unless it is there already or somebody, also another thread of this worker, is at it.

        Raises RegionSpotError where that cannot be done.
        """
        with self._room:
            if self._missing(part) and self._claims.claim(part):
                self._write_claimed(part)

    def _write_claimed(self, part: int) -> None:
        self._under_way.add(part)
        try:
            if missing := self._missing(part):  # again: who had the claim a moment ago may have written it
                self._write(part, missing)
        except CacheError as error:
            if self._claims.is_owned(part):
                raise
            log.warning("%s", error)  # taken over by another run while this one stood still
        finally:
            self._claims.release(part)
            self._under_way.discard(part)

    def _write(self, part: int, missing: list[str]) -> None:
        rows = self._cache.part_rows(part)
        stats, begin, account = RunStats(), time.perf_counter(), dict[str, Any]()

        def before_publish() -> None:
            self._claims.require_owned(part)
            stats.seconds = time.perf_counter() - begin
            account.update(stats.account(self._run))

        images = self._features.of_rows(rows, missing, stats)
        self._cache.write_part(part, images, missing, str(self._claims.process), before_publish, account)

    def _missing(self, part: int) -> list[str]:
        return self._cache.missing_sets(part, self._names)


class WorkerFailedError(Exception):
    """A part could not be made: by the worker at the address `worker`, for the reason in `message`, one line."""

    def __init__(self, worker: str, message: str) -> None:
        super().__init__(worker, message)
        self.worker, self.message = worker, message


def do_part(job: Job, part: int) -> None:
    """The task that a worker is given. Raises WorkerFailedError."""
    from distributed import get_worker  # half a second to import, and there already in a worker

    try:
        opened(job).make(part)
    except (RegionSpotError, OSError) as error:
        raise WorkerFailedError(get_worker().address, str(error)) from None
    except Exception as error:
        log.exception("part %d", part)
        last = (str(error).strip().splitlines() or [""])[-1]
        raise WorkerFailedError(get_worker().address, f"{type(error).__name__}: {last}") from None


async def when_idle() -> None:
    """Run by dask in a worker that is given no more parts: returns when those under way are written."""
    while any(maker.busy for maker in _opened.values()):
        await asyncio.sleep(0.05)


_opened: dict[Job, PartMaker] = {}
_opening = threading.Lock()


def opened(job: Job) -> PartMaker:
    """What the job opens, opened by the first thread that asks; what is left of earlier jobs is closed."""
    with _opening:
        if job not in _opened:
            close_all(but_busy=True)
            _opened[job] = job.open()
        return _opened[job]


def close_all(but_busy: bool = False) -> None:
    """Close what this process has opened for jobs; `but_busy`: not those that are making a part."""
    for job in [job for job, maker in _opened.items() if not (but_busy and maker.busy)]:
        try:
            _opened.pop(job).close()
        except CacheError as error:
            log.warning("%s", error)


# A worker that is told to end lets go of its claims, so that nobody waits until they look dead.
atexit.register(close_all)


def dask_setup(worker: Worker) -> None:
    """Called by dask in each worker of this machine when it starts; they are named 0, 1, 2, ..."""
    if found := gpus():
        os.environ["CUDA_VISIBLE_DEVICES"] = found[int(worker.name) % len(found)]
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is for the command, which tells the workers


def gpus() -> list[str]:
    """Values of CUDA_VISIBLE_DEVICES for one GPU each; from the driver, because importing torch takes seconds."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name.strip() for name in visible.split(",") if name.strip() not in ("", "-1")]
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    result = subprocess.run([tool, "--query-gpu=index", "--format=csv,noheader"], capture_output=True, text=True)
    return result.stdout.split() if result.returncode == 0 else []
