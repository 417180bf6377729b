"""One way to say how far a long job is: rate, time left, and where its time goes.

Here because every stage may import `cache`, and all of them speak alike:
`12,400/19,809 pictures  41.2/s  3m left  (decode 11%, encode 83%, write 6%)`
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

log = logging.getLogger(__name__)


class Progress:
    """Counts work done and logs a line at most every `interval` seconds; `total` is in `unit`s.

    Time spent in `with progress.timed("encode"):` blocks shows as that stage's share of all time since the start.
    Not for several threads at once: the thread that sees all work keeps it.
    """

    def __init__(self, total: int, unit: str, interval: float = 5.0) -> None:
        self.total, self.unit, self.interval = total, unit, interval
        self.done = 0
        self.stage_seconds: dict[str, float] = {}
        self._start = self._last = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self._start

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Adds the block's seconds to `stage`."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.stage_seconds[stage] = self.stage_seconds.get(stage, 0.0) + time.perf_counter() - begin

    def step(self, count: int = 1) -> None:
        """Counts `count` more units as done and logs a line when one is due."""
        self.done += count
        now = time.perf_counter()
        if now - self._last >= self.interval or self.done >= self.total:
            self._last = now
            log.info("%s", self.line())

    def line(self) -> str:
        """The progress line as it stands now."""
        rate = self.done / max(self.seconds, 1e-9)
        left = "?" if not self.done else duration((self.total - self.done) / rate)
        shares = self.shares()
        detail = f"  ({', '.join(f'{stage} {share:.0%}' for stage, share in shares.items())})" if shares else ""
        return f"{self.done:,}/{self.total:,} {self.unit}  {rate:.3g}/s  {left} left{detail}"

    def shares(self) -> dict[str, float]:
        """Share of the time since the start that each stage took, 0 to 1."""
        return {stage: seconds / max(self.seconds, 1e-9) for stage, seconds in self.stage_seconds.items()}


def duration(seconds: float) -> str:
    """A length of time in its two largest units: 42s, 3m 10s, 2h 5m, 3d 4h."""
    whole = round(seconds)
    for size, name, below, below_name in ((86400, "d", 3600, "h"), (3600, "h", 60, "m"), (60, "m", 1, "s")):
        if whole >= size:
            rest = whole % size // below
            return f"{whole // size}{name}" + (f" {rest}{below_name}" if rest else "")
    return f"{whole}s"
