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
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from regionspot.cache.errors import CacheError, NotACacheError, NotExtractedError, RegionSpotError
from regionspot.cache.format.part_record import PartRecord
from regionspot.cache.machine import processors
from regionspot.cache.store import FeatureCache
from regionspot.cache.writing.claims import Claims
from regionspot.pipeline.distributed.cluster import SAY_SECONDS, Connection, connected, local_workers
from regionspot.pipeline.distributed.job import ExtractJob, Prepared
from regionspot.pipeline.distributed.worker import Job, WorkerFailedError, do_part, when_idle
from regionspot.pipeline.extraction.config import ExtractConfig
from regionspot.pipeline.reporting.failures import FailureCheck
from regionspot.pipeline.reporting.run_monitor import RunMonitor
from regionspot.pipeline.reporting.run_stats import RunStats
from regionspot.pipeline.reporting.run_summary import ExtractSummary

if TYPE_CHECKING:
    from distributed import Future

log = logging.getLogger(__name__)

HELD_SECONDS = 3.0  # between two looks whether a part that another run has is free


def run_parts(
    connection: Connection,
    job: Job,
    cache: FeatureCache,
    names: Sequence[str],
    parts: Iterable[int],
    watch: RunMonitor,
    check: Callable[[int, str | None], None] = lambda row, failure: None,
    take_over: bool = False,
) -> None:
    """Have the workers write the feature sets `names` of these parts, and say how far they are.

    watch      counts what was done
    check      called with the row of each image, and why it could not be read; what it raises ends the run
    take_over  no other run is alive: what dead ones have claimed is free at once

    At an interrupt the workers end the parts under way, then KeyboardInterrupt is raised; at a second one at once.
    Raises CacheError, in one line, when a part cannot be made or the scheduler is gone; what is written by then stays.
    """
    with Claims(cache.storage, take_over=take_over) as claims:
        run = _Run(connection, job, cache, names, parts, watch, check)
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
        watch: RunMonitor,
        check: Callable[[int, str | None], None],
    ) -> None:
        self._connection, self._job, self._cache, self._names = connection, job, cache, list(names)
        self._watch, self._check = watch, check
        self._tasks: set[Future[None]] = set()
        self._failed_on: dict[int, str] = {}
        self._said = -math.inf
        self.missing = set(parts)

    def give_out(self, claims: Claims) -> None:
        """Give the parts out that nobody alive has claimed, and wait until these tasks have ended."""
        others = claims.claims_of_others()
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
        this one is retired: its disk is full, it lacks the images, its GPU is broken.
        """
        if not isinstance(error, WorkerFailedError):
            # Dask counts a worker's death for all of its parts: others may reach the limit together with this one.
            time.sleep(0.2)
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
        """Count those of the parts that are written."""
        with ThreadPoolExecutor(self._cache.storage.readers) as pool:  # each takes an object store 20 ms
            for part, records in pool.map(lambda part: (part, self._records(part)), self.missing.intersection(parts)):
                if records:
                    self.missing.discard(part)
                    self._watch.part(RunStats.of_part(records, self._job.run), records[0].images)
                    self._check_images(records)

    def _check_images(self, records: Sequence[PartRecord]) -> None:
        failures = {each.row: each.reason for record in records for each in record.failures}
        for row in self._cache.part_rows(records[0].part):
            self._check(row, failures.get(row))

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
    job, watch = ExtractJob(config), RunMonitor()
    with connected(scheduler) as connection:
        prepared: Prepared = run_once(connection, ExtractJob.prepare, job)
        cache = _opened(config.cache)
        asked = config.chosen_parts(cache.geometry)
        missing = set(asked).intersection(cache.pending_parts(prepared.names))
        check = FailureCheck(cache, asked, config.max_failures, prepared.images)
        with watch.over(cache, prepared.environment):
            watch.begin_by_workers(sum(len(cache.part_rows(part)) for part in missing), len(asked) - len(missing))
            try:
                run_parts(connection, job, cache, prepared.names, missing, watch, check, config.take_over)
            finally:
                prepared.environment.machine["workers"] = connection.most_workers
    _tidy_up(config.cache)  # behind the workers of this machine, which have ended
    return watch.summary()


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
