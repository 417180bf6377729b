"""One way to say how far a long job is: rate, time left, and where its time goes.

Here because every stage may import `cache`, and all of them speak alike:
`12,400/19,809 images  41.2/s  3m left  (decode 11%, encode 83%, write 6%)`

On a terminal the line is drawn over itself; elsewhere, in a log, one follows another every few seconds.
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

_DRAWN_SECONDS = 0.2  # between two lines on a terminal: the eye sees no more
_LOGGED_SECONDS = 5.0
# The time left is told from the last five minutes: what is slow at first (libraries, caches of the system) is forgotten
# by then, and a CPU that needs two minutes a batch still has done two or three of them.
_WINDOW_SECONDS = 300.0
_SAMPLES = 100  # of the window
CLEAR_LINE = "\r\x1b[K"  # to the line's begin, and all behind it gone (ECMA-48, EL)


class TerminalHandler(logging.StreamHandler[TextIO]):
    """Draws progress lines over one another; what else is said stands above them."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self._drawn = False

    def emit(self, record: logging.LogRecord) -> None:
        text, draw = self.format(record), getattr(record, "drawn", False)
        clear = CLEAR_LINE if self._drawn else ""
        # A line that wraps could not be drawn over.
        self.stream.write(clear + (text[: shutil.get_terminal_size().columns - 1] if draw else text + "\n"))
        self.stream.flush()
        self._drawn = draw

    def close(self) -> None:
        """Ends the line that is drawn: what is printed next begins a new one."""
        if self._drawn:
            self.stream.write("\n")
            self._drawn = False
        super().close()


def log_to(stream: TextIO) -> None:
    """Have this process's log go to `stream`: our own progress and warnings, of the libraries only warnings."""
    handler = TerminalHandler(stream) if stream.isatty() else logging.StreamHandler(stream)
    logging.basicConfig(handlers=[handler], level=logging.WARNING, format="%(message)s")
    logging.getLogger("regionspot").setLevel(logging.INFO)


class Progress:
    """Counts work done and logs a line when one is due; `total` is in `unit`s and may be changed on the way.

    interval   seconds between two lines; default: what suits a terminal or a log
    detail     gives further words for the line
    shares     gives each stage's share of the time, where another one times the stages
    clock      seconds that only rise

    Time spent in `with progress.timed("encode"):` blocks shows as that stage's share of all time since the start; any
    thread may time. `step` is for one thread at a time.
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
        drawn = any(isinstance(handler, TerminalHandler) for handler in logging.getLogger().handlers)
        self.interval = interval if interval is not None else _DRAWN_SECONDS if drawn else _LOGGED_SECONDS
        self.done = 0
        self.stage_seconds: dict[str, float] = {}
        self._lock = threading.Lock()
        self._start = self._last = clock()
        self._window, self._newest_since = deque([(self._start, 0)]), -math.inf

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return self._clock() - self._start

    @property
    def rate(self) -> float:
        """Units a second, of the last five minutes; 0 before anything is done."""
        (begin, before), (end, done) = self._window[0], self._window[-1]
        return (done - before) / max(end - begin, 1e-9)

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Adds the block's seconds to `stage`."""
        begin = self._clock()
        try:
            yield
        finally:
            with self._lock:
                self.stage_seconds[stage] = self.stage_seconds.get(stage, 0.0) + self._clock() - begin

    def step(self, count: int = 1) -> None:
        """Counts `count` more units as done and logs a line when one is due."""
        self.done += count
        now = self._clock()
        self._remember(now)
        if now - self._last >= self.interval or self.done >= self.total:
            self._last = now
            log.info("%s", self.line(), extra={"drawn": self.done < self.total})

    def finish(self) -> None:
        """Logs the last line, where the total was not reached: the job stopped, or others did the rest."""
        if 0 < self.done < self.total:
            log.info("%s", self.line())

    def line(self) -> str:
        """The progress line as it stands now."""
        left = duration((self.total - self.done) / self.rate) if self.rate else "?"
        shares = ", ".join(f"{stage} {share:.0%}" for stage, share in self.shares().items())
        words = [f"{self.done:,}/{self.total:,} {self.unit}", f"{self.rate:.3g}/s", self._detail(), f"{left} left"]
        return "  ".join(filter(None, [*words, f"({shares})" if shares else ""]))

    def shares(self) -> dict[str, float]:
        """Share of the time since the start that each stage took, 0 to 1."""
        if self._shares is not None:
            return self._shares()
        with self._lock:
            return {stage: seconds / max(self.seconds, 1e-9) for stage, seconds in self.stage_seconds.items()}

    def _remember(self, now: float) -> None:
        """Keeps the newest moment, and one every few seconds; a burst of steps is one moment, with all of them done."""
        if now - self._newest_since < _WINDOW_SECONDS / _SAMPLES:
            self._window.pop()
        else:
            self._newest_since = now
        self._window.append((now, self.done))
        while len(self._window) > 2 and now - self._window[1][0] >= _WINDOW_SECONDS:
            self._window.popleft()


def duration(seconds: float) -> str:
    """A length of time in its two largest units: 42s, 3m 10s, 2h 5m, 3d 4h."""
    whole = round(seconds)
    for size, name, below, below_name in ((86400, "d", 3600, "h"), (3600, "h", 60, "m"), (60, "m", 1, "s")):
        if whole >= size:
            rest = whole % size // below
            return f"{whole // size}{name}" + (f" {rest}{below_name}" if rest else "")
    return f"{whole}s"
