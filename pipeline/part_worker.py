"""What a worker process does with the number of a part: claims it, makes it, writes it, and says so in a few words.

    do_part(job, 42, again=False) -> PartReport

A job is a small object that can be pickled; what it opens (the cache, models) is opened once a process and kept, and so
is one run of `Claims` with its heartbeat. Threads of a worker make several parts at once.

Where a part is done *again*, because the first worker at it is slow, frozen or cut off, the first to be done wins. The
second works without a claim, takes the claim over when its files are complete, and looks once more whether the part is
there; the first, if it ever comes so far, finds its claim gone and drops what it wrote. So never do two of them give
files their names, but for one that falls asleep between its last question and the last of its renames (claims.py says
what becomes of that).

Torch is not imported here: a job that needs it does that when it is opened.
"""

from __future__ import annotations

import atexit
import logging
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Literal, Protocol

from regionspot.cache.claims import Claims
from regionspot.cache.errors import CacheError, RegionSpotError
from regionspot.cache.process import this_process
from regionspot.cache.progress import Progress
from regionspot.cache.schema import PictureFeatures
from regionspot.cache.store import FeatureCache

log = logging.getLogger(__name__)

LOOK_SECONDS = 2.0  # between two looks whether another worker has finished the part meanwhile
# Between taking a claim over and the last look: time for the other one to finish its renames, if it is at them.
GRACE_SECONDS = 1.0

Outcome = Literal["done", "there", "held", "left", "failed"]


@dataclass(frozen=True)
class PartReport:
    """What became of a part, in some hundred bytes.

    outcome   "done" here; "there": somebody else did it; "held" by another run, which `message` names; "left" to who
              took it over; "failed": `message` says why
    failed    pictures that could not be read, of `pictures`
    ignored   pictures whose EXIF orientation was ignored
    bytes     written
    stages    seconds of each stage, of the `seconds` that the part took
    """

    part: int
    outcome: Outcome
    pictures: int = 0
    failed: int = 0
    ignored: int = 0
    regions: int = 0
    bytes: int = 0
    seconds: float = 0.0
    stages: dict[str, float] = field(default_factory=dict)
    message: str = ""


class Job(Protocol):
    """What is done with every part; hashable, and equal to its copy that was sent."""

    def open(self) -> PartMaker:
        """Open what a worker needs for it. Raises RegionSpotError where that is not to be had."""


class PartMaker(Protocol):
    """Makes parts, several at once in threads."""

    def make(self, part: int, again: bool) -> PartReport:
        """Make one. Raises RegionSpotError where that cannot be done."""

    def close(self) -> None:
        """Let go of everything."""


class Features(Protocol):
    """Where the features of a part's pictures come from."""

    def of_rows(self, rows: range, names: Sequence[str], progress: Progress) -> Iterator[PictureFeatures]:
        """Features of the sets `names` of each picture, in order; the stages' seconds go into `progress`.

        What is not in any stage counts as writing.
        """

    def ignored_orientations(self, rows: range) -> int:
        """How many of these pictures had an EXIF orientation that was ignored; asked once, when they are done."""


class CacheParts:
    """Makes parts of a cache that is open for writing: the feature sets `names`, from `features`."""

    def __init__(self, cache: FeatureCache, names: Sequence[str], features: Features) -> None:
        self._cache, self._names, self._features = cache, list(names), features
        self._worker = str(this_process())
        self._claims = Claims(cache.storage)
        self._claims.__enter__()  # left by close()

    def close(self) -> None:
        self._claims.__exit__(None, None, None)

    def make(self, part: int, again: bool) -> PartReport:
        """`again`: do it though another run has the part, and take it over when all of it is ready."""
        if not self._lacking(part):
            return PartReport(part, "there")
        claimed = self._claims.claim(part)
        if not claimed and not again:
            holder = self._claims.holder(part)
            return PartReport(part, "held", message=str(holder or "another run"))
        try:
            return self._write(part, claimed)
        except _DoneElsewhereError:
            return PartReport(part, "there")
        except _TakenOverError:
            return PartReport(part, "left")
        finally:
            self._claims.release(part)

    def _write(self, part: int, claimed: bool) -> PartReport:
        missing = self._lacking(part)  # again: who had the claim a moment ago may have finished it
        if not missing:
            raise _DoneElsewhereError
        rows = self._cache.part_rows(part)
        progress = Progress(len(rows) + 1, "pictures")  # one more than there are, so that no line says it is done
        record = self._cache.write_part(
            part,
            self._until_done_elsewhere(part, self._features.of_rows(rows, missing, progress)),
            missing,
            worker=self._worker,
            before_publish=lambda: self._require_still_ours(part) if claimed else self._take_over(part),
        )
        seconds, stages = progress.seconds, dict(progress.stage_seconds)
        return PartReport(
            part,
            "done",
            pictures=len(rows),
            failed=len(record.failures),
            ignored=self._features.ignored_orientations(rows),
            regions=record.regions,
            bytes=sum(record.files.values()),
            seconds=seconds,
            stages={**stages, "write": seconds - sum(stages.values())},
        )

    def _until_done_elsewhere(self, part: int, pictures: Iterator[PictureFeatures]) -> Iterator[PictureFeatures]:
        looked = time.monotonic()
        for picture in pictures:
            if (now := time.monotonic()) - looked >= LOOK_SECONDS:
                looked = now
                self._require_lacking(part)
            yield picture

    def _require_still_ours(self, part: int) -> None:
        if not self._claims.still_ours(part):
            raise _TakenOverError

    def _take_over(self, part: int) -> None:
        """Claim a part that another run may hold. Raises _TakenOverError, _DoneElsewhereError."""
        if not self._claims.take_over(part):
            raise _TakenOverError
        time.sleep(GRACE_SECONDS)
        self._require_still_ours(part)
        self._require_lacking(part)

    def _require_lacking(self, part: int) -> None:
        if not self._lacking(part):
            raise _DoneElsewhereError

    def _lacking(self, part: int) -> list[str]:
        return self._cache.missing_sets(part, self._names)


class _DoneElsewhereError(Exception):
    """Another run has finished the part; what this one has of it is dropped."""


class _TakenOverError(Exception):
    """Another run has taken the part over."""


_opened: dict[Job, PartMaker] = {}
_opening = threading.Lock()


def do_part(job: Job, part: int, again: bool) -> PartReport:
    """The task that a worker is given. What the user can mend comes back as words, so that no traceback travels."""
    try:
        return opened(job).make(part, again)
    except (RegionSpotError, OSError) as error:
        return PartReport(part, "failed", message=str(error))


def do_task(job: Job, part: int, again: bool, topic: str, number: int) -> None:
    """`do_part` as a task of dask; the report is told to who listens to `topic`, with the offer's number."""
    from distributed import get_worker  # half a second to import, and there already in a worker

    report = do_part(job, part, again)
    get_worker().log_event(topic, {"number": number, "report": asdict(report)})


def opened(job: Job) -> PartMaker:
    """What the job opens, opened by the first thread that asks; that of an earlier job is closed."""
    with _opening:
        if job not in _opened:
            close_all()
            _opened[job] = job.open()
        return _opened[job]


def dask_setup(_: object) -> None:
    """Called by dask in a worker of this machine: a terminal's Ctrl-C is for the command, which tells the workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def close_all() -> None:
    """Close what this process has opened for jobs."""
    while _opened:
        _, maker = _opened.popitem()
        try:
            maker.close()
        except CacheError as error:
            log.warning("%s", error)


# A worker that is told to end lets go of its claims, so that nobody waits until they look dead.
atexit.register(close_all)
