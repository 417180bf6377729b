"""`regionspot extract --scheduler`: the run of many workers, from the words of one command to one summary."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime

from regionspot.cache.claims import Claims
from regionspot.cache.errors import CacheError, InputError, NotACacheError
from regionspot.cache.machine import processors
from regionspot.cache.process import this_process
from regionspot.cache.store import FeatureCache
from regionspot.pipeline.bottleneck import find_bottleneck
from regionspot.pipeline.clusters import connected, local_workers
from regionspot.pipeline.failure_kinds import FailureCount
from regionspot.pipeline.failure_limit import FailureLimit
from regionspot.pipeline.job import ExtractJob, Prepared
from regionspot.pipeline.one_worker import on_one_worker
from regionspot.pipeline.schedule import Totals, run_parts
from regionspot.pipeline.summary import COMPLETE, ExtractSummary, RunRecord
from regionspot.pipeline.summary_page import publish

log = logging.getLogger(__name__)


def extract_on(scheduler: str, job: ExtractJob, take_over: bool = False) -> ExtractSummary:
    """Have the workers of `scheduler` (clusters.py says which there are) extract what the cache lacks.

    take_over   no other run is alive: what dead ones have claimed is free at once

    At an interrupt the workers end the parts that they hold. Raises InputError and CacheError in one line when the
    cache cannot be made, too many pictures are broken, a part cannot be done or the scheduler is gone; what is written
    by then stays.
    """
    job = job.from_anywhere()
    if (count := local_workers(scheduler)) and job.decode_threads is None:
        job = replace(job, decode_threads=min(max(processors() // count, 1), 16))  # they share this machine's cores
    with connected(scheduler) as client:
        prepared: Prepared = on_one_worker(client, "prepares the cache", ExtractJob.prepare, job)
        if prepared.trouble:
            raise InputError(prepared.trouble)
        cache = _opened(job.cache)
        run = _WorkersRun(cache, prepared)
        if take_over:
            with Claims(cache.storage, take_over=True):
                pass  # entering it frees what dead runs had claimed
        with run.recorded():
            sent = replace(job, photos=prepared.photos)
            run_parts(client, sent, run.sizes(), run.totals, lambda: run.check(job.max_failures))
    _tidy_up(job.cache)  # behind the workers of this machine, which have ended
    return run.summary()


class _WorkersRun:
    """What is told of a run: while it is at work, in the cache's summary.md, and at its end."""

    def __init__(self, cache: FeatureCache, prepared: Prepared) -> None:
        self._cache, self._prepared = cache, prepared
        asked = set(range(cache.n_parts) if prepared.parts is None else prepared.parts)
        self._pending = [part for part in cache.pending_parts(prepared.names) if part in asked]
        self._before = len(asked) - len(self._pending)
        self.totals = Totals()

    def sizes(self) -> dict[int, int]:
        """Pictures of each part that is to be done."""
        return {part: len(self._cache.part_rows(part)) for part in self._pending}

    def check(self, limit: FailureLimit) -> None:
        """Raises InputError when more pictures are broken than `limit` allows."""
        failed, total = self.totals.failed, sum(self.sizes().values())
        if not limit.allows(failed, total):
            raise InputError(
                f"{self._prepared.photos}: {failed:,} of {total:,} images could not be read, more than --max-failures "
                f"{limit} allows; check --data, or allow more"
            )

    def summary(self) -> ExtractSummary:
        """The run as it stands now."""
        totals, shares = self.totals, self.totals.shares()
        machine = self._prepared.machine
        bottleneck = find_bottleneck(
            shares,
            device="cpu" if machine.get("gpu") == "none" else "cuda",
            regions_per_picture=totals.regions / max(totals.pictures, 1),
            decode_threads=self._prepared.decode_threads,
            cores=int(machine.get("cores", 1)),
        )
        return ExtractSummary(
            pictures=totals.pictures,
            failed=totals.failed,
            parts=totals.parts,
            parts_before=self._before,
            parts_of_others=totals.others,
            ignored_orientations=totals.ignored,
            seconds=max(totals.seconds, 1e-9),
            shares=shares,
            regions=totals.regions,
            bytes=totals.bytes,
            bottleneck=bottleneck,
            failures=FailureCount(self._failures()).kinds(),
        )

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Write the run into the cache at its end, however it ends, if it has done anything."""
        started, outcome = datetime.now(UTC).isoformat(), COMPLETE
        try:
            yield
        except BaseException as error:
            outcome = f"stopped: {error or type(error).__name__}"
            raise
        finally:
            if self.totals.parts:
                said, cache = self._prepared, self._cache
                machine = {**said.machine, "workers": self.totals.most_workers}
                by = str(this_process())
                publish(cache, RunRecord(started, by, outcome, machine, said.versions, said.models, self.summary()))

    def _failures(self) -> Iterator[tuple[str, str]]:
        for part in self.totals.with_failures:
            for failure in self._cache.record(part, self._prepared.names[0]).failures:
                yield failure.path, failure.reason


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
