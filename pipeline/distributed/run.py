"""`regionspot extract --scheduler`: one run by many workers, distributed by dask.

A task is a part. Dask assigns it to a worker with a free thread, and to another one when that worker dies or, after
`worker-ttl`, sends no heartbeat. The part records in the cache are the only state: they say which parts are written,
and hold the counts of the run. So most faults need no handling: after a broken connection, a part claimed by another
run, or a worker that is cut off, the parts without a record that no live run has claimed are assigned again.

Three means of dask are not enough, so there is code for them here and in cluster.py: its `retries` choose the failed
worker again, its client loses tasks or hangs when it reconnects, and its cancel does not wait for running tasks.
"""

from __future__ import annotations

import logging
import math
import time
import uuid
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol, cast

from regionspot.cache.errors import CacheError, NotACacheError, NotExtractedError, RegionSpotError
from regionspot.cache.format.part_record import PartRecord
from regionspot.cache.machine import processors
from regionspot.cache.process import Process
from regionspot.cache.storage.base import Storage
from regionspot.cache.store import FeatureCache
from regionspot.cache.writing.claims import Claims
from regionspot.pipeline.distributed.cluster import LOG_SECONDS, Connection, connected, local_workers
from regionspot.pipeline.distributed.worker import (
    ExtractJob,
    PartJob,
    Preparation,
    WorkerFailedError,
    last_line,
    make_part,
    wait_until_idle,
)
from regionspot.pipeline.extraction.config import ExtractConfig
from regionspot.pipeline.extraction.failure_check import FailureCheck
from regionspot.pipeline.reporting.run_monitor import RunMonitor
from regionspot.pipeline.reporting.run_stats import RunStats
from regionspot.pipeline.reporting.run_summary import ExtractSummary

if TYPE_CHECKING:
    from distributed import Future

log = logging.getLogger(__name__)

CLAIMED_SECONDS = 3.0  # between two checks whether a part that another run has claimed is free


def extract_on(scheduler: str, config: ExtractConfig) -> ExtractSummary:
    """Extract what the cache lacks on the workers of `scheduler` (see cluster.py).

    On an interrupt, the workers finish the parts in progress. Raises InputError and CacheError, in one line, when the
    cache cannot be created, too many images fail, a part cannot be written or the scheduler is gone; written parts
    stay.
    """
    config = config.with_absolute_paths()
    if (count := local_workers(scheduler)) and config.decode_threads is None:
        config = replace(config, decode_threads=min(max(processors() // count, 1), 16))  # they share the cores
    job = ExtractJob(config)
    with connected(scheduler) as connection:
        prepared: Preparation = run_once(connection, ExtractJob.prepare, job)
        cache, environment = _open_prepared(config.cache), prepared.environment
        parts = config.selected_parts(cache.geometry)
        missing = set(parts).intersection(cache.pending_parts(prepared.names))
        check = FailureCheck(cache, parts, config.max_failures, prepared.image_folder)
        images = sum(len(cache.part_rows(part)) for part in missing)
        monitor = RunMonitor(images, len(parts), len(parts) - len(missing))
        with monitor.recording(cache, environment):
            try:
                written = WrittenFeatures(cache, prepared.names, job.run, monitor, check)
                run_parts(connection, job, written, missing, config.take_over)
            finally:
                environment.machine["workers"] = connection.most_workers
    # The local workers have exited. Remove the claims and partial files of killed ones, as opening for writing does.
    with suppress(CacheError), Claims(FeatureCache.open(config.cache, "a").storage):
        pass
    return monitor.summary(environment)


def _open_prepared(address: str) -> FeatureCache:
    try:
        return FeatureCache.open(address)
    except NotACacheError as error:
        raise CacheError(
            f"{address}: a worker has prepared the cache there, but this machine does not see it ({error}); mount the "
            "disk at the same path on the workers and this machine, or use an object store"
        ) from error


class WrittenParts(Protocol):
    """The parts of a run as its command sees them: what is written decides, not what a worker reports.

    storage   of the workers' claims
    """

    @property
    def storage(self) -> Storage: ...

    def pending(self) -> Collection[int]:
        """The parts that are not written, by their names alone."""

    def count(self, parts: Collection[int]) -> Collection[int]:
        """Count those of the parts that are written, and return them. What it raises ends the run."""


@dataclass
class WrittenFeatures:
    """The parts of a cache: the feature sets `names`, written by the run of id `run` and counted by `monitor`.

    check      called with the row of each image and why it could not be read
    """

    cache: FeatureCache
    names: Sequence[str]
    run: str
    monitor: RunMonitor
    check: Callable[[int, str | None], None] = lambda row, failure: None

    @property
    def storage(self) -> Storage:
        return self.cache.storage

    def pending(self) -> Collection[int]:
        return self.cache.pending_parts(self.names)

    def count(self, parts: Collection[int]) -> Collection[int]:
        written = []
        with ThreadPoolExecutor(self.storage.readers) as pool:  # a request to an object store takes 20 ms
            for records in pool.map(self._records, parts):
                if not records:
                    continue
                written.append(records[0].part)
                self.monitor.add_part(RunStats.of_part(records, self.run), records[0].images)
                failures = {failure.row: failure.reason for record in records for failure in record.failures}
                for row in self.cache.part_rows(records[0].part):
                    self.check(row, failures.get(row))
        return written

    def _records(self, part: int) -> list[PartRecord]:
        try:
            return [self.cache.record(part, name) for name in self.names]
        except NotExtractedError:
            return []


def run_parts(
    connection: Connection, job: PartJob, written: WrittenParts, parts: Iterable[int], take_over: bool = False
) -> None:
    """Have the workers write these parts, which are counted by `written`.

    take_over  no other run is alive: claims of dead runs are free at once

    On an interrupt, the workers finish the parts in progress, then KeyboardInterrupt is raised; on a second one,
    immediately. Raises CacheError, in one line, when a part cannot be written or the scheduler is gone.
    """
    with Claims(written.storage, take_over=take_over) as claims:
        run = _Run(connection, job, written, set(parts))
        try:
            while run.missing:
                run.assign_free_parts(claims)
        except KeyboardInterrupt:
            run.finish_parts_in_progress()
            raise
        finally:
            run.cancel()


@dataclass
class _Run:
    """The state of `run_parts`; `missing` are the parts that are not known to be written."""

    connection: Connection
    job: PartJob
    written: WrittenParts
    missing: set[int]
    tasks: set[Future[None]] = field(default_factory=set)
    failed_on: dict[int, str] = field(default_factory=dict)  # part to the worker that could not write it
    logged: float = -math.inf

    def assign_free_parts(self, claims: Claims) -> None:
        """Assign the parts that no live run has claimed, and wait until these tasks have ended."""
        others = claims.claims_of_others()
        if free := [part for part in sorted(self.missing) if part not in others or _is_free(claims, part)]:
            self._wait_for(self._submit(free))
        else:
            self._log_holders(others.values())
            time.sleep(CLAIMED_SECONDS)
        self._count(self.missing.difference(self.written.pending()))

    def _submit(self, parts: Sequence[int]) -> list[Future[None]]:
        # Unique keys: a worker may still run a cancelled task of an earlier call, and would take an equal key for it.
        name = f"part-{uuid.uuid4().hex}"
        tasks = self.connection.client.map(
            make_part, [self.job] * len(parts), parts, key=[(name, part) for part in parts], pure=False
        )
        self.tasks.update(tasks)
        return tasks

    def _wait_for(self, tasks: list[Future[None]]) -> None:
        """Count parts as their tasks end; returns early when the connection breaks, which loses the tasks."""
        from distributed import as_completed

        completed = as_completed(tasks, loop=self.connection.client.loop)
        while not completed.is_empty():
            if self.connection.is_broken:
                return self.connection.renew()
            self.connection.poll_workers()
            batch = completed.next_batch(block=False)
            for task in batch:
                if task.status == "error":
                    completed.update(self._retry_elsewhere(_part_of(task), task.exception()))
            self.tasks.difference_update(batch)
            self._count([_part_of(task) for task in batch])
            if not batch:
                time.sleep(0.05)

    def _retry_elsewhere(self, part: int, error: Exception) -> list[Future[None]]:
        """Retire the worker that failed and submit the part again. Raises CacheError when that is useless.

        Dask's `retries` would choose the same worker again, which has the most free threads because it fails fast: its
        disk is full, it lacks the images, or its GPU is broken.
        """
        if not isinstance(error, WorkerFailedError):
            # Dask counts a worker's death against all of its parts, so others may reach the limit at the same time.
            time.sleep(0.2)
            parts = sorted(_part_of(task) for task in self.tasks if task.status == "error")
            raise CacheError(f"part {' or '.join(map(str, parts))}: {explain(error)}") from error
        message = f"worker {error.worker}: {error.message}"
        if part in self.failed_on:
            raise CacheError(f"{message} (and worker {self.failed_on[part]} failed, too)")
        self.failed_on[part] = error.worker
        if not self.connection.retire(error.worker):
            raise CacheError(message)
        log.warning("worker %s is retired: %s", error.worker, error.message)
        return self._submit([part])

    def _count(self, parts: Iterable[int]) -> None:
        self.missing.difference_update(self.written.count(self.missing.intersection(parts)))

    def finish_parts_in_progress(self) -> None:
        """Wait until the workers have written the parts that they have started."""
        log.info("stopping: the workers finish the parts in progress; interrupt again to stop immediately")
        self.cancel()
        with suppress(OSError, TimeoutError):
            self.connection.client.run(wait_until_idle, on_error="ignore")
        self._count(self.missing.difference(self.written.pending()))

    def cancel(self) -> None:
        """Cancel the tasks that no worker has started."""
        with suppress(OSError, TimeoutError):
            if not self.connection.is_broken:
                self.connection.client.cancel(list(self.tasks))
        self.tasks.clear()

    def _log_holders(self, holders: Iterable[Process]) -> None:
        if (now := time.monotonic()) - self.logged >= LOG_SECONDS:
            self.logged = now
            names = ", ".join(sorted(set(map(str, holders))))
            log.info("waiting for %d parts claimed by other runs: %s", len(self.missing), names)


def _part_of(task: Future[None]) -> int:
    _, part = cast("tuple[str, int]", task.key)
    return part


def _is_free(claims: Claims, part: int) -> bool:
    """Whether the run that has claimed the part is dead by now."""
    free = claims.claim(part)
    claims.release(part)
    return free


def run_once(connection: Connection, function: Callable[..., Any], *args: Any) -> Any:
    """Call a function on one worker, and on another one when that one dies, and return its result.

    Raises the function's own RegionSpotError, or CacheError when workers die of it, cannot start it, or the scheduler
    is gone.
    """
    while True:
        task = connection.client.submit(function, *args, key=f"{function.__name__}-{uuid.uuid4().hex}", pure=False)
        while not (task.done() or connection.is_broken):
            connection.poll_workers()
            time.sleep(0.05)
        if connection.is_broken:
            connection.renew()
        elif task.status == "error":
            error = task.exception()
            raise error if isinstance(error, RegionSpotError) else CacheError(explain(error))
        else:
            return task.result()


def explain(error: Exception) -> str:
    """Why dask could not run a task, in one line."""
    from distributed import KilledWorker

    if isinstance(error, KilledWorker):
        return (
            f"{error.allowed_failures + 1} workers died while running it, the last {error.last_worker.address}; read "
            "their logs (out of memory?), then run the same command again"
        )
    return (
        f"a worker could not start: {type(error).__name__}: {last_line(error)}; the scheduler and its workers need "
        "the same versions of regionspot, dask and Python as this machine"
    )
