"""`regionspot extract --scheduler`: one run by many workers, distributed by dask.

A task is a part. Dask gives it to a worker with a free thread, and to another one when that worker dies or, after
`worker-ttl`, is not heard of any more. What is done is known from the parts' records in the cache alone, which also
hold what a run's totals are made of. So whatever else goes wrong needs no mending: a connection that breaks, a part
that another run has claimed, a worker that is cut off while it has one. When the tasks have ended, the parts without a
record that nobody alive has claimed are given out again, until there is none.
"""

from __future__ import annotations

import logging
import math
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, cast

from regionspot.cache.claims import Claims
from regionspot.cache.errors import CacheError, InputError, NotACacheError, NotExtractedError, RegionSpotError
from regionspot.cache.machine import processors
from regionspot.cache.process import this_process
from regionspot.cache.progress import Progress
from regionspot.cache.records import PartRecord
from regionspot.cache.store import FeatureCache
from regionspot.pipeline.bottleneck import find_bottleneck
from regionspot.pipeline.clusters import SAY_SECONDS, Connection, connected, local_workers
from regionspot.pipeline.extract_config import ExtractConfig
from regionspot.pipeline.failure_kinds import FailureCount
from regionspot.pipeline.job import ExtractJob, Prepared
from regionspot.pipeline.part_worker import Job, WorkerFailedError, do_part, when_idle
from regionspot.pipeline.summary import COMPLETE, ExtractSummary, RunRecord
from regionspot.pipeline.summary_page import publish

if TYPE_CHECKING:
    from distributed import Future

log = logging.getLogger(__name__)

HELD_SECONDS = 3.0  # between two looks whether a part that another run has is free


@dataclass
class Totals:
    """What the workers did together, as far as they are.

    parts           that they wrote; `others` were written by other runs meanwhile
    seconds         since the begin
    stages          seconds in each stage, of all parts together
    most_workers    that were there at once
    failures        images that could not be read, by kind
    """

    pictures: int = 0
    ignored: int = 0
    regions: int = 0
    bytes: int = 0
    parts: int = 0
    others: int = 0
    most_workers: int = 0
    seconds: float = 0.0
    stages: Counter[str] = field(default_factory=Counter)
    failures: FailureCount = field(default_factory=FailureCount)

    def add(self, records: Sequence[PartRecord], run: str) -> None:
        """Count a part by its records, one a feature set; those that `run` has not written are of another run."""
        ours = [record for record in records if record.account.get("run") == run]
        if not ours:
            self.others += 1
            return
        self.parts += 1
        self.pictures += ours[0].pictures
        self.regions += ours[0].regions
        self.bytes += sum(size for record in ours for size in record.files.values())
        self.ignored += ours[0].account["ignored_orientations"]
        self.stages.update(ours[0].account["stage_seconds"])
        for failure in {each.row: each for record in ours for each in record.failures}.values():
            self.failures.add(failure.path, failure.reason)

    def shares(self) -> dict[str, float]:
        """Each stage's share of the workers' time."""
        busy = max(self.stages.total(), 1e-9)
        return {stage: seconds / busy for stage, seconds in self.stages.items()}


def run_parts(
    connection: Connection,
    job: Job,
    cache: FeatureCache,
    names: Sequence[str],
    parts: Iterable[int],
    totals: Totals,
    check: Callable[[], None] = lambda: None,
    take_over: bool = False,
) -> None:
    """Have the workers write the feature sets `names` of these parts, and say how far they are.

    totals     counts what was done
    check      called after each part; what it raises ends the run
    take_over  no other run is alive: what dead ones have claimed is free at once

    At an interrupt the workers end the parts under way, then KeyboardInterrupt is raised; at a second one at once.
    Raises CacheError, in one line, when a part cannot be made or the scheduler is gone; what is written by then stays.
    """
    with Claims(cache.storage, take_over=take_over) as claims:
        run = _Run(connection, job, cache, names, parts, totals, check)
        try:
            while run.missing:
                run.give_out(claims)
        except KeyboardInterrupt:
            run.end_what_is_under_way()
            raise
        finally:
            run.drop()


class _Run:
    """`missing`: parts that are not known to be written."""

    def __init__(
        self,
        connection: Connection,
        job: Job,
        cache: FeatureCache,
        names: Sequence[str],
        parts: Iterable[int],
        totals: Totals,
        check: Callable[[], None],
    ) -> None:
        self._connection, self._job, self._cache, self._names = connection, job, cache, list(names)
        self._totals, self._check = totals, check
        self._tasks: set[Future[None]] = set()
        self._failed_on: dict[int, str] = {}
        self._said = -math.inf
        self.missing = set(parts)
        self._progress = Progress(sum(len(cache.part_rows(part)) for part in self.missing), "pictures")

    def give_out(self, claims: Claims) -> None:
        """Give the parts out that nobody alive has claimed, and wait until these tasks have ended."""
        others = claims.others()
        if free := [part for part in sorted(self.missing) if part not in others or _is_free(claims, part)]:
            self._follow(free)
        else:
            self._say_who_is_waited_for(Counter(map(str, others.values())))
            time.sleep(HELD_SECONDS)
        self._count(self.missing.difference(self._cache.pending_parts(self._names)))

    def _follow(self, parts: Sequence[int]) -> None:
        from distributed import as_completed

        ended = as_completed(self._submit(parts), loop=self._connection.client.loop)
        while not ended.is_empty():
            if self._connection.is_broken:
                self._connection.renew()
                return
            self._connection.watch_workers()
            self._totals.most_workers = max(self._totals.most_workers, self._connection.workers)
            batch = ended.next_batch(block=False)
            for task in batch:
                if task.status == "error":
                    ended.update(self._try_elsewhere(_part_of(task), task.exception()))
            self._tasks.difference_update(batch)
            self._count([_part_of(task) for task in batch])
            if not batch:
                time.sleep(0.05)

    def _submit(self, parts: Sequence[int]) -> list[Future[None]]:
        # A name of its own: a worker may still be at a task of an earlier call or run that was cancelled, and would
        # take one of the same name for it.
        name = f"part-{uuid.uuid4().hex}"
        tasks = self._connection.client.map(
            do_part, [self._job] * len(parts), parts, key=[(name, part) for part in parts], pure=False
        )
        self._tasks.update(tasks)
        return tasks

    def _try_elsewhere(self, part: int, error: Exception) -> list[Future[None]]:
        """The task of a part that a worker could not make, for another worker. Raises CacheError when it is no use.

        Dask's own `retries` would give it to the same worker again, which has most room because it fails quickly. So
        this one is retired: its disk is full, it lacks the photos, its GPU is broken.
        """
        if not isinstance(error, WorkerFailedError):
            time.sleep(
                0.2
            )  # dask counts a worker's death for all of its parts: others may reach the limit with this one
            parts = sorted(_part_of(task) for task in self._tasks if task.status == "error")
            raise CacheError(f"part {' or '.join(map(str, parts))}: {trouble_of(error)}") from error
        message = f"worker {error.worker}: {error.message}"
        if part in self._failed_on:
            raise CacheError(f"{message} (likewise on worker {self._failed_on[part]})")
        self._failed_on[part] = error.worker
        if not self._connection.retire(error.worker):
            raise CacheError(message)
        log.warning("%s gets no more parts: %s", error.worker, error.message)
        return self._submit([part])

    def _count(self, parts: Iterable[int]) -> None:
        """Take those of the parts that are written into the totals."""
        with ThreadPoolExecutor(self._cache.storage.readers) as pool:  # each takes an object store 20 ms
            for part, records in pool.map(lambda part: (part, self._records(part)), self.missing.intersection(parts)):
                if records:
                    self.missing.discard(part)
                    self._totals.add(records, self._job.run)
                    self._totals.seconds = self._progress.seconds
                    self._progress.stage_seconds = {
                        stage: share * self._progress.seconds for stage, share in self._totals.shares().items()
                    }
                    self._progress.step(len(self._cache.part_rows(part)))
                    self._check()

    def _records(self, part: int) -> list[PartRecord]:
        try:
            return [self._cache.record(part, name) for name in self._names]
        except NotExtractedError:
            return []

    def end_what_is_under_way(self) -> None:
        """Wait until the workers have written the parts that they are making."""
        log.info("stopping: the workers end the parts under way; interrupt again to leave them")
        self.drop()
        with suppress(OSError, TimeoutError):
            self._connection.client.run(when_idle, on_error="ignore")
        self._count(self.missing.difference(self._cache.pending_parts(self._names)))

    def drop(self) -> None:
        """Take the tasks back that no worker has begun."""
        with suppress(OSError, TimeoutError):
            if not self._connection.is_broken:
                self._connection.client.cancel(list(self._tasks))
        self._tasks.clear()

    def _say_who_is_waited_for(self, holders: Counter[str]) -> None:
        if (now := time.monotonic()) - self._said >= SAY_SECONDS:
            self._said = now
            names = ", ".join(holders)
            log.info("waiting for %d parts that others are at work on: %s", len(self.missing), names)


def _part_of(task: Future[None]) -> int:
    _, part = cast("tuple[str, int]", task.key)
    return part


def _is_free(claims: Claims, part: int) -> bool:
    """Whether whoever has claimed the part is dead by now."""
    free = claims.claim(part)
    claims.release(part)
    return free


def run_once(connection: Connection, function: Callable[..., Any], *args: Any) -> Any:
    """What a function returns on the first worker that is there, or on another one when that one dies.

    Raises what it raises of ours, CacheError when workers die of it, cannot begin it, or the scheduler is gone.
    """
    while True:
        task = connection.client.submit(function, *args, key=f"{function.__name__}-{uuid.uuid4().hex}", pure=False)
        while not (task.done() or connection.is_broken):
            connection.watch_workers()
            time.sleep(0.05)
        if connection.is_broken:
            connection.renew()
        elif task.status == "error":
            error = task.exception()
            raise error if isinstance(error, RegionSpotError) else CacheError(trouble_of(error))
        else:
            return task.result()


def trouble_of(error: Exception) -> str:
    """Why dask could not have a task done, in one line."""
    from distributed import KilledWorker

    if isinstance(error, KilledWorker):
        return (
            f"{error.allowed_failures + 1} workers died in turn while at work on it, the last "
            f"{error.last_worker.address}; look at their logs (memory?), then run the same command again"
        )
    last = (str(error).strip().splitlines() or [""])[-1]
    return (
        f"a worker could not begin: {type(error).__name__}: {last}; the scheduler and its workers need the same "
        "regionspot, dask and Python as this machine"
    )


def extract_on(scheduler: str, config: ExtractConfig) -> ExtractSummary:
    """Have the workers of `scheduler` (clusters.py says which there are) extract what the cache lacks.

    At an interrupt the workers end the parts under way. Raises InputError and CacheError in one line when the cache
    cannot be made, too many images are broken, a part cannot be made or the scheduler is gone; what is written by then
    stays.
    """
    config = config.with_absolute_paths()
    if (count := local_workers(scheduler)) and config.decode_threads is None:
        config = replace(config, decode_threads=min(max(processors() // count, 1), 16))  # they share the cores
    job = ExtractJob(config)
    with connected(scheduler) as connection:
        prepared: Prepared = run_once(connection, ExtractJob.prepare, job)
        cache = _opened(config.cache)
        run = _WorkersRun(cache, prepared, config)
        with run.recorded():
            run_parts(connection, job, cache, prepared.names, run.pending, run.totals, run.check, config.take_over)
    _tidy_up(config.cache)  # behind the workers of this machine, which have ended
    return run.summary()


class _WorkersRun:
    """What is told of a run: while it is at work, in the cache's summary.md, and at its end."""

    def __init__(self, cache: FeatureCache, prepared: Prepared, config: ExtractConfig) -> None:
        self._cache, self._prepared, self._limit = cache, prepared, config.max_failures
        asked = set(config.chosen_parts(cache.n_parts))
        self.pending = [part for part in cache.pending_parts(prepared.names) if part in asked]
        self._images = sum(len(cache.part_rows(part)) for part in self.pending)
        self._before = len(asked) - len(self.pending)
        self.totals = Totals()

    def check(self) -> None:
        """Raises InputError when more images are broken than the limit allows."""
        failed, total = self.totals.failures.total, self._images
        if not self._limit.allows(failed, total):
            raise InputError(
                f"{self._prepared.images}: {failed:,} of {total:,} images could not be read, more than --max-failures "
                f"{self._limit} allows; check --data, or allow more"
            )

    def summary(self) -> ExtractSummary:
        """The run as it stands now."""
        totals, shares = self.totals, self.totals.shares()
        machine = self._prepared.machine
        bottleneck = find_bottleneck(
            shares,
            device=self._prepared.device,
            regions_per_picture=totals.regions / max(totals.pictures, 1),
            decode_threads=self._prepared.decode_threads,
            cores=int(machine.get("cores", 1)),
            half_is_faster=self._prepared.half_is_faster,
        )
        return ExtractSummary(
            pictures=totals.pictures,
            failed=totals.failures.total,
            parts=totals.parts,
            parts_before=self._before,
            parts_of_others=totals.others,
            ignored_orientations=totals.ignored,
            seconds=max(totals.seconds, 1e-9),
            shares=shares,
            regions=totals.regions,
            bytes=totals.bytes,
            bottleneck=bottleneck,
            failures=totals.failures.kinds(),
        )

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Write the run into the cache at its end, however it ends, if it has done anything."""
        started, outcome = datetime.now(UTC).isoformat(), COMPLETE
        try:
            yield
        except BaseException as error:
            outcome = f"stopped: {str(error) or type(error).__name__}"
            raise
        finally:
            if self.totals.parts:
                said, cache = self._prepared, self._cache
                machine = {**said.machine, "workers": self.totals.most_workers}
                by = str(this_process())
                publish(cache, RunRecord(started, by, outcome, machine, said.versions, said.models, self.summary()))


def _opened(address: str) -> FeatureCache:
    try:
        return FeatureCache.open(address)
    except NotACacheError as error:
        raise CacheError(
            f"{address}: a worker has prepared the cache there, but it is not to be seen from this machine ({error}); "
            "workers and this machine have to share that disk under one path, or use an object store"
        ) from error


def _tidy_up(address: str) -> None:
    """Remove what workers that were killed have left: claims and partial files of processes that are gone."""
    with suppress(CacheError), Claims(FeatureCache.open(address, "a").storage):
        pass  # opening a cache for writing removes such files, and entering removes such claims
