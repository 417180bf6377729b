"""Inference by the workers of a dask scheduler: a task is a part, and the part files are the only state.

The command has loaded the method, too, so it knows what the scores of the workers must depend on. Claims beside the
part files keep two workers from computing the same part.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from regionspot.cache.errors import CacheError, InputError
from regionspot.cache.storage.local import LocalStorage
from regionspot.cache.writing.claims import Claims
from regionspot.evaluation.inference.resumable import Inference, InferenceResult, PartFiles, ScoringMethod, infer_part
from regionspot.evaluation.metrics.selection import BEST, Selection
from regionspot.pipeline.datasets.failure_limit import EVALUATION_LIMIT, FailureLimit
from regionspot.pipeline.distributed.cluster import connected
from regionspot.pipeline.distributed.run import run_parts
from regionspot.pipeline.distributed.worker import PartMaker, keep_worker_memory
from regionspot.pipeline.reporting.run_stats import RunStats


def infer_on_workers(
    scheduler: str,
    load: Callable[[Any], ScoringMethod],
    options: Any,
    method: ScoringMethod,
    folder: Path,
    *,
    selection: Selection = BEST,
    max_failures: FailureLimit = EVALUATION_LIMIT,
) -> InferenceResult:
    """`infer` on the workers of `scheduler` (see pipeline/distributed/cluster.py), which load the same method.

    load     a function of a module, which makes the method from `options`: picklable, hashable, with absolute paths
    folder   on a disk that the workers share

    On an interrupt, the workers finish the parts in progress. Raises what `infer` and `run_parts` raise.
    """
    inference = Inference(method, folder.absolute(), selection, max_failures)
    if inference.pending:
        job = InferenceJob(load, options, inference.files.folder, selection)
        with connected(scheduler) as connection:
            run_parts(connection, job, _WrittenResults(inference, job.run), inference.pending)
        with suppress(CacheError), Claims(LocalStorage(job.folder)):  # removes the claims of killed workers
            pass
    return inference.merged()


@dataclass(frozen=True)
class InferenceJob:
    """What a worker needs; `folder` is that of the command's part files."""

    load: Callable[[Any], ScoringMethod]
    options: Any
    folder: Path
    selection: Selection
    run: str = field(default_factory=lambda: uuid.uuid4().hex)

    def open(self) -> PartMaker:
        """Load the method. Raises InputError if its scores would differ from those of the command's method."""
        keep_worker_memory()
        method = self.load(self.options)
        files = PartFiles(self.folder.parent, method, self.selection)
        if files.folder != self.folder:
            raise InputError(
                f"{files.folder}/identity.json: this worker would compute other scores than the command, as "
                f"{self.folder.name}/identity.json beside it shows; give --dtype, and the same weights and files to all"
            )
        return PartMaker(_InferredParts(method, files, self.selection, self.run))


@dataclass
class _InferredParts:
    """The parts that a worker computes, a PartsToWrite."""

    method: ScoringMethod
    files: PartFiles
    selection: Selection
    run: str

    @property
    def storage(self) -> LocalStorage:
        return LocalStorage(self.files.folder)

    def is_written(self, part: int) -> bool:
        return self.files.load(part, self.run) is not None

    def write(self, part: int, claims: Claims) -> None:
        stats, rows = RunStats(), self.files.rows(part)
        result = infer_part(self.method, rows, self.method.score([rows], stats), stats, self.selection)
        claims.require_owned(part)
        self.files.save(part, result, self.run)


@dataclass
class _WrittenResults:
    """The parts as the command sees them, a WrittenParts."""

    inference: Inference
    run: str

    @property
    def storage(self) -> LocalStorage:
        return LocalStorage(self.inference.files.folder)

    def pending(self) -> Collection[int]:
        return set(self.inference.pending) - self.inference.files.existing()

    def count(self, parts: Collection[int]) -> Collection[int]:
        results = {part: self.inference.files.load(part, self.run) for part in parts}
        written = {part: result for part, result in results.items() if result is not None}
        for part, result in written.items():
            self.inference.stats.merge(RunStats(seconds=sum(result.seconds.values()), stage_seconds=result.seconds))
            self.inference.progress.step(result.images)
            self.inference.add(part, result)
        return written
