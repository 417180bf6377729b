"""Progress lines of long jobs: throughput, time left, and the share of each stage.

In this package because every stage may import it: `12,400/19,809 images  41.2/s  3m left  (decode 11%, encode 83%)`

A terminal shows one line that is overwritten; a log gets a new line every few seconds.
"""

from __future__ import annotations

import logging
import math
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

log = logging.getLogger(__name__)

_TERMINAL_SECONDS = 0.2  # between two updates
_LOG_SECONDS = 5.0
# Throughput is measured over the last five minutes: a slow start (imports, cold page cache) is forgotten by then, and a
# CPU that takes two minutes per batch has still finished two or three.
_WINDOW_SECONDS = 300.0
_SAMPLES = 100  # of the window
CLEAR_LINE = "\r\x1b[K"  # go to the start of the line and erase it (ECMA-48, EL)


class TerminalHandler(logging.StreamHandler[TextIO]):
    """Overwrites a progress line with the next one; other messages are printed above it."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self._line_shown = False

    def emit(self, record: logging.LogRecord) -> None:
        text, transient = self.format(record), getattr(record, "transient", False)
        clear = CLEAR_LINE if self._line_shown else ""
        # A line that wraps could not be overwritten.
        self.stream.write(clear + (text[: shutil.get_terminal_size().columns - 1] if transient else text + "\n"))
        self.stream.flush()
        self._line_shown = transient

    def close(self) -> None:
        """Ends the current progress line, so that later output starts on a new one."""
        if self._line_shown:
            self.stream.write("\n")
            self._line_shown = False
        super().close()


def log_to(stream: TextIO) -> None:
    """Send this process's log to `stream`: progress and warnings of regionspot, only warnings of libraries."""
    handler = TerminalHandler(stream) if stream.isatty() else logging.StreamHandler(stream)
    logging.basicConfig(handlers=[handler], level=logging.WARNING, format="%(message)s")
    logging.getLogger("regionspot").setLevel(logging.INFO)


class Progress:
    """Counts finished units and logs a line when one is due; `total` may be changed on the way.

    interval   seconds between two lines; the default depends on terminal or log
    detail     returns additional text for the line
    shares     returns each stage's share of the time, if the stages are timed elsewhere
    clock      monotonic seconds

    Time spent in `with progress.timed("encode"):` blocks is shown as that stage's share of all time since the start.
    Any thread may time; `step` is for one thread at a time.
    """

    def __init__(
        self,
        total: int,
        unit: str,
        interval: float | None = None,
        detail: Callable[[], str] = str,
        shares: Callable[[], dict[str, float]] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.total, self.unit, self._detail, self._shares, self._clock = total, unit, detail, shares, clock
        terminal = any(isinstance(handler, TerminalHandler) for handler in logging.getLogger().handlers)
        self.interval = interval if interval is not None else _TERMINAL_SECONDS if terminal else _LOG_SECONDS
        self.done = 0
        self.stage_seconds: dict[str, float] = {}
        self._lock = threading.Lock()
        self._start = self._last_line = clock()
        self._window, self._last_sample = deque([(self._start, 0)]), -math.inf  # (time, units done)

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return self._clock() - self._start

    @property
    def rate(self) -> float:
        """Units per second over the last five minutes; 0 before the first one."""
        (start, before), (end, done) = self._window[0], self._window[-1]
        return (done - before) / max(end - start, 1e-9)

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Adds the block's seconds to `stage`."""
        start = self._clock()
        try:
            yield
        finally:
            with self._lock:
                self.stage_seconds[stage] = self.stage_seconds.get(stage, 0.0) + self._clock() - start

    def step(self, count: int = 1) -> None:
        """Counts `count` more units as done and logs a line when one is due."""
        self.done += count
        now = self._clock()
        self._sample(now)
        if now - self._last_line >= self.interval or self.done >= self.total:
            self._last_line = now
            log.info("%s", self.line(), extra={"transient": self.done < self.total})

    def finish(self) -> None:
        """Logs a last line if the job ended before the total: it stopped, or other processes did the rest."""
        if 0 < self.done < self.total:
            log.info("%s", self.line())

    def line(self) -> str:
        """The current progress line."""
        left = duration((self.total - self.done) / self.rate) if self.rate else "?"
        shares = ", ".join(f"{stage} {share:.0%}" for stage, share in self.shares().items())
        fields = [f"{self.done:,}/{self.total:,} {self.unit}", f"{self.rate:.3g}/s", self._detail(), f"{left} left"]
        return "  ".join(filter(None, [*fields, f"({shares})" if shares else ""]))

    def shares(self) -> dict[str, float]:
        """Each stage's share of the time since the start, 0 to 1."""
        if self._shares is not None:
            return self._shares()
        with self._lock:
            return {stage: seconds / max(self.seconds, 1e-9) for stage, seconds in self.stage_seconds.items()}

    def _sample(self, now: float) -> None:
        """Keeps the newest moment and one every few seconds; a burst of steps counts as one moment."""
        if now - self._last_sample < _WINDOW_SECONDS / _SAMPLES:
            self._window.pop()
        else:
            self._last_sample = now
        self._window.append((now, self.done))
        while len(self._window) > 2 and now - self._window[1][0] >= _WINDOW_SECONDS:
            self._window.popleft()


def duration(seconds: float) -> str:
    """A length of time in its two largest units: 42s, 3m 10s, 2h 5m, 3d 4h."""
    whole = round(seconds)
    for size, name, smaller, smaller_name in ((86400, "d", 3600, "h"), (3600, "h", 60, "m"), (60, "m", 1, "s")):
        if whole >= size:
            rest = whole % size // smaller
            return f"{whole // size}{name}" + (f" {rest}{smaller_name}" if rest else "")
    return f"{whole}s"
