"""RunStats: the one accounting of an extraction, mergeable.

A run in one process counts image by image. A distributed run merges the stats of its parts, which the part records
keep: so a lost worker or connection loses no counts.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from regionspot.cache.format.part_record import PartRecord
from regionspot.pipeline.reporting.failure_kinds import FailureCount


@dataclass
class RunStats:
    """What a run, or one of its parts, has done.

    images, regions       processed, including unreadable images
    ignored_orientations  images whose EXIF orientation was ignored because the annotations use the stored orientation
    parts, bytes          written by this run
    parts_of_others       written by other runs meanwhile
    seconds               duration; of a distributed run, summed over its workers
    stage_seconds         duration of each stage
    failures              unreadable images, by kind
    """

    images: int = 0
    regions: int = 0
    ignored_orientations: int = 0
    parts: int = 0
    parts_of_others: int = 0
    bytes: int = 0
    seconds: float = 0.0
    stage_seconds: dict[str, float] = field(default_factory=dict)
    failures: FailureCount = field(default_factory=FailureCount)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    @classmethod
    def of_part(cls, records: Sequence[PartRecord], run: str) -> RunStats:
        """Stats of a written part from its records, one per feature set; only those that `run` wrote are counted."""
        own = [record for record in records if record.account.get("run") == run]
        if not own:
            return cls(parts_of_others=1)
        first = own[0]
        failures = {failure.row: failure for record in own for failure in record.failures}
        return cls(
            images=first.images,
            regions=first.regions,
            ignored_orientations=first.account["ignored_orientations"],
            parts=1,
            bytes=sum(size for record in own for size in record.files.values()),
            seconds=first.account["seconds"],
            stage_seconds=dict(first.account["stage_seconds"]),
            failures=FailureCount((failure.path, failure.reason) for failure in failures.values()),
        )

    def account(self, run: str) -> dict[str, Any]:
        """The `account` field of a part record; time in no stage counts as writing."""
        stages = {**self.stage_seconds, "write": self.seconds - sum(self.stage_seconds.values())}
        return {
            "run": run,
            "seconds": self.seconds,
            "stage_seconds": stages,
            "ignored_orientations": self.ignored_orientations,
        }

    def merge(self, other: RunStats) -> None:
        """Add the counts of `other`."""
        self.images += other.images
        self.regions += other.regions
        self.ignored_orientations += other.ignored_orientations
        self.parts += other.parts
        self.parts_of_others += other.parts_of_others
        self.bytes += other.bytes
        self.seconds += other.seconds
        for stage, seconds in other.stage_seconds.items():
            self._add(stage, seconds)
        self.failures.merge(other.failures)

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the duration of the block to `stage`; thread-safe."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._add(stage, time.perf_counter() - begin)

    def _add(self, stage: str, seconds: float) -> None:
        with self._lock:
            self.stage_seconds[stage] = self.stage_seconds.get(stage, 0.0) + seconds

    def shares(self) -> dict[str, float]:
        """Each stage's share of the duration, 0 to 1."""
        with self._lock:
            return {stage: seconds / max(self.seconds, 1e-9) for stage, seconds in self.stage_seconds.items()}
