"""What a dask worker does: claim a part, compute it, write it: the features of images, or another job's parts.

A task returns nothing: what is written states which run wrote the part, and what is in it. So no result
is lost with a worker or a connection, and a task may be repeated on any worker: it skips parts that are written or
claimed. cache/writing/claims.py explains why two processes never write the same part.

A job is a small picklable object: the config of the run. The first worker prepares: it reads the annotations, loads the
models and creates the cache, so the command needs no GPU and sends no manifest. The other workers open that cache. Each
process opens a job once and keeps cache, models and one run of `Claims`. Two threads per worker extract one part each,
so one part is decoded or flushed while another keeps the GPU busy. This module does not import torch.
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
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from regionspot.cache.errors import CacheError, InputError, RegionSpotError
from regionspot.cache.format.compatibility import require_same_features
from regionspot.cache.format.schema import ImageFeatures
from regionspot.cache.storage.base import Storage
from regionspot.cache.store import FeatureCache
from regionspot.cache.writing.claims import Claims
from regionspot.pipeline.extraction.config import ExtractConfig
from regionspot.pipeline.extraction.failure_check import FIRST_IMAGES
from regionspot.pipeline.extraction.plan import stored_feature_sets
from regionspot.pipeline.reporting.environment import Environment
from regionspot.pipeline.reporting.run_stats import RunStats

if TYPE_CHECKING:
    from distributed import Worker

    from regionspot.pipeline.backbones.bundle import Backbones

log = logging.getLogger(__name__)

PARTS_AT_ONCE = 2  # per worker; further threads wait

# dask's default of distributed.nanny.pre-spawn-environ. `keep_memory` would take it for the user's choice.
_DASK_TRIM_THRESHOLD = "65536"

# Yields the features of these rows in order, for the feature sets of these names; thread-safe.
EncodePart = Callable[[range, Sequence[str], RunStats], Iterator[ImageFeatures]]


class PartJob(Protocol):
    """A picklable and hashable description of a run; `run` is its random id."""

    @property
    def run(self) -> str: ...

    def open(self) -> PartMaker:
        """Open what a worker needs. Raises RegionSpotError when something is missing."""


class PartsToWrite(Protocol):
    """Writes the parts of a run, whose claims are in `storage`. Thread-safe."""

    @property
    def storage(self) -> Storage: ...

    def is_written(self, part: int) -> bool: ...

    def write(self, part: int, claims: Claims) -> None:
        """Compute a part, then call `claims.require_owned`, then publish it."""


class PartMaker:
    """Writes parts that no other run and no other thread writes."""

    def __init__(self, parts: PartsToWrite) -> None:
        self._parts = parts
        self._claims = Claims(parts.storage)
        self._claims.__enter__()  # exited by close()
        self._slots = threading.Semaphore(PARTS_AT_ONCE)
        self._in_progress: set[int] = set()

    @property
    def busy(self) -> bool:
        """Whether a part is being written."""
        return bool(self._in_progress)

    def close(self) -> None:
        """Release all claims."""
        self._claims.__exit__(None, None, None)

    def make(self, part: int) -> None:
        """Write the part, unless it is written or claimed, also by another thread of this worker.

        Raises RegionSpotError when that fails.
        """
        with self._slots:
            if self._parts.is_written(part) or not self._claims.claim(part):
                return
            self._in_progress.add(part)
            try:
                # Check again: another run may have written the part between the check and the claim.
                if not self._parts.is_written(part):
                    self._parts.write(part, self._claims)
            except CacheError as error:
                if self._claims.is_owned(part):
                    raise
                log.warning("%s", error)  # another run took the part over while this process was suspended
            finally:
                self._claims.release(part)
                self._in_progress.discard(part)


class FeatureParts:
    """The parts of an open cache: the feature sets `names`, with features from `encode_part`. A PartsToWrite."""

    def __init__(self, cache: FeatureCache, names: Sequence[str], encode_part: EncodePart, run: str) -> None:
        self.storage = cache.storage
        self._cache, self._names, self._encode_part, self._run = cache, list(names), encode_part, run

    def is_written(self, part: int) -> bool:
        return not self._cache.missing_sets(part, self._names)

    def write(self, part: int, claims: Claims) -> None:
        """Write what the part lacks of these sets."""
        stats, begin, account = RunStats(), time.perf_counter(), dict[str, Any]()
        names = self._cache.missing_sets(part, self._names)

        def before_publish() -> None:
            claims.require_owned(part)
            stats.seconds = time.perf_counter() - begin
            account.update(stats.account(self._run))

        images = self._encode_part(self._cache.part_rows(part), names, stats)
        self._cache.write_part(part, images, names, str(claims.process), before_publish, account)


@dataclass(frozen=True)
class Preparation:
    """What the first worker returns.

    names         of the feature sets to fill
    environment   of that worker
    """

    image_folder: Path
    names: tuple[str, ...]
    environment: Environment


@dataclass(frozen=True)
class ExtractJob:
    """The job of a real extraction."""

    config: ExtractConfig
    run: str = field(default_factory=lambda: uuid.uuid4().hex)

    def prepare(self) -> Preparation:
        """Create the cache, or check that it can be resumed. Run it on one worker before the others start."""
        from regionspot.pipeline.extraction.decode_ahead import default_threads  # imports torch
        from regionspot.pipeline.extraction.extract import Extraction

        extraction = Extraction.load(self.config, _load_backbones(self))
        cache, backbones = extraction.prepare()
        names = tuple(feature_set.name for feature_set in self.config.feature_sets(backbones))
        environment = Environment.of_process(cache, backbones, self.config.decode_threads or default_threads())
        return Preparation(extraction.image_folder, names, environment)

    def open(self) -> PartMaker:
        """Open cache and models. Raises RegionSpotError when cache, images or weights are not on this worker."""
        cache = FeatureCache.open(self.config.cache, "a")
        image_folder = self.config.image_folder(cache.manifest)
        if not image_folder.is_dir():
            raise InputError(f"{image_folder}: no such image folder on this worker; mount it at the same path")
        backbones = _load_backbones(self).with_stored_dtypes(cache.feature_sets)
        feature_sets = self.config.feature_sets(backbones)
        for expected in feature_sets:
            stored = cache.feature_sets[expected.name]
            require_same_features(
                self.config.cache, stored, replace(expected, dtype=stored.dtype, compression=stored.compression)
            )
        names = [feature_set.name for feature_set in feature_sets]
        encode_part = _PartEncoder(cache, names, image_folder, backbones, self.config)
        return PartMaker(FeatureParts(cache, names, encode_part, self.run))


class _PartEncoder:
    """Extracts the features of a part from image files; its threads share the models, one call at a time."""

    def __init__(
        self, cache: FeatureCache, names: Sequence[str], image_folder: Path, backbones: Backbones, config: ExtractConfig
    ) -> None:
        from regionspot.pipeline.extraction.batch_encoder import choose_batch_size  # imports torch
        from regionspot.pipeline.extraction.decode_ahead import Decoder, default_threads

        self._cache, self._backbones = cache, backbones
        self._batch_size = choose_batch_size(config.batch_size, cache, names, backbones)
        self._threads = config.decode_threads or default_threads()
        self._decoder = Decoder(cache.manifest, image_folder, backbones, config.exif)
        self._device_lock = threading.Lock()
        self._any_read = False

    def __call__(self, rows: range, names: Sequence[str], stats: RunStats) -> Iterator[ImageFeatures]:
        """Yield the features of the rows of one part.

        Raises InputError when this worker has not read any image yet and none of the part's first images can be read:
        the worker may lack the mount that the others have, and a part of failures only would count as done.
        """
        from regionspot.pipeline.extraction.batch_encoder import BatchEncoder, encode_images  # imports torch

        encode = BatchEncoder(self._cache.manifest, self._backbones, stats, self._device_lock)
        requests = ((row, names) for row in rows)
        part_size = self._cache.part_size
        for image in encode_images(requests, self._decoder, encode, self._batch_size, part_size, self._threads):
            self._any_read |= image.failure is None
            if not self._any_read and image.row + 1 - rows.start >= min(FIRST_IMAGES, len(rows)):
                raise InputError(
                    f"{self._decoder.image_folder}: none of a part's first images could be read (the last: "
                    f"{image.failure}); check --data, and that this worker can read it"
                )
            yield image


_loaded: dict[ExtractJob, Backbones] = {}  # of one job: its `prepare` and `open` share the models


def _load_backbones(job: ExtractJob) -> Backbones:
    if job not in _loaded:
        _loaded.clear()  # free the models of an earlier run first
        keep_worker_memory()
        _loaded[job] = job.config.load_backbones(stored_feature_sets(job.config.cache))
    return _loaded[job]


def keep_worker_memory() -> None:
    """`keep_memory` of a worker, where a default of dask would count as the user's choice."""
    from regionspot.pipeline.extraction.malloc import keep_memory

    if os.environ.get("MALLOC_TRIM_THRESHOLD_") == _DASK_TRIM_THRESHOLD:
        del os.environ["MALLOC_TRIM_THRESHOLD_"]
    keep_memory()


class WorkerFailedError(Exception):
    """The worker at the address `worker` cannot write a part, for the reason in `message`, one line."""

    def __init__(self, worker: str, message: str) -> None:
        super().__init__(worker, message)
        self.worker, self.message = worker, message


def make_part(job: PartJob, part: int) -> None:
    """The task of a worker. Raises WorkerFailedError."""
    from distributed import get_worker  # takes half a second to import, but a worker has imported it

    try:
        open_job(job).make(part)
    except (RegionSpotError, OSError) as error:
        raise WorkerFailedError(get_worker().address, str(error)) from None
    except Exception as error:
        log.exception("part %d", part)
        raise WorkerFailedError(get_worker().address, f"{type(error).__name__}: {last_line(error)}") from None


def last_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[-1]


async def wait_until_idle() -> None:
    """Run by dask on each worker when no more parts are assigned: returns when the parts in progress are written."""
    while any(maker.busy for maker in _makers.values()):
        await asyncio.sleep(0.05)


_makers: dict[PartJob, PartMaker] = {}
_opening = threading.Lock()


def open_job(job: PartJob) -> PartMaker:
    """The job's PartMaker, opened by the first thread that asks; closes those of earlier jobs that are idle."""
    with _opening:
        if job not in _makers:
            _close([earlier for earlier, maker in _makers.items() if not maker.busy])
            _makers[job] = job.open()
        return _makers[job]


def _close(jobs: Sequence[PartJob]) -> None:
    for job in jobs:
        try:
            _makers.pop(job).close()
        except CacheError as error:
            log.warning("%s", error)


# A worker that exits releases its claims, so that no other run has to wait until it counts as dead.
atexit.register(lambda: _close(list(_makers)))


def dask_setup(worker: Worker) -> None:
    """Called by dask in each local worker at start; their names are 0, 1, 2, ..."""
    if devices := visible_gpus():
        os.environ["CUDA_VISIBLE_DEVICES"] = devices[int(worker.name) % len(devices)]
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is for the command, which stops the workers


def visible_gpus() -> list[str]:
    """Values of CUDA_VISIBLE_DEVICES, one per GPU; from the driver, because importing torch takes seconds."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name.strip() for name in visible.split(",") if name.strip() not in ("", "-1")]
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    result = subprocess.run([tool, "--query-gpu=index", "--format=csv,noheader"], capture_output=True, text=True)
    return result.stdout.split() if result.returncode == 0 else []
