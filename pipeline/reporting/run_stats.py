"""RunStats: the one accounting of an extraction. A part has one, and a run's is theirs together.

A run in one process counts image by image. One by workers counts part by part, from the parts' records: these hold what
their workers counted, so nothing is lost with a worker or a connection.
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
    """What was done so far.

    images                of the parts, also those that could not be read; `regions` are theirs
    ignored_orientations  images whose EXIF would have turned them, but whose annotations want them as stored
    parts, bytes          written by this run
    parts_of_others       written by other runs meanwhile
    seconds               that it took; of several workers, all of theirs together
    stage_seconds         of these, by stage
    failures              images that could not be read, by kind
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
        """Those of a written part, by its records, one a feature set; what `run` has not written is of another run."""
        ours = [record for record in records if record.account.get("run") == run]
        if not ours:
            return cls(parts_of_others=1)
        first = ours[0]
        failures = {each.row: each for record in ours for each in record.failures}
        return cls(
            images=first.images,
            regions=first.regions,
            ignored_orientations=first.account["ignored_orientations"],
            parts=1,
            bytes=sum(size for record in ours for size in record.files.values()),
            seconds=first.account["seconds"],
            stage_seconds=dict(first.account["stage_seconds"]),
            failures=FailureCount((each.path, each.reason) for each in failures.values()),
        )

    def account(self, run: str) -> dict[str, Any]:
        """What the record of a part keeps of its own; what is in no stage counts as writing."""
        stages = {**self.stage_seconds, "write": self.seconds - sum(self.stage_seconds.values())}
        return {
            "run": run,
            "seconds": self.seconds,
            "stage_seconds": stages,
            "ignored_orientations": self.ignored_orientations,
        }

    def merge(self, other: RunStats) -> None:
        """Count what another one has counted as well."""
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
        """Adds the block's seconds to `stage`; in any thread."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._add(stage, time.perf_counter() - begin)

    def _add(self, stage: str, seconds: float) -> None:
        with self._lock:
            self.stage_seconds[stage] = self.stage_seconds.get(stage, 0.0) + seconds

    def shares(self) -> dict[str, float]:
        """Each stage's share of the seconds, 0 to 1."""
        with self._lock:
            return {stage: seconds / max(self.seconds, 1e-9) for stage, seconds in self.stage_seconds.items()}
