"""What training says about itself: one JSON line an interval in `metrics.jsonl`, and a progress line now and then.

A line is complete or ignored, so a run killed inside one loses nothing; a run that goes on from a checkpoint first
drops what was written after it, so that the file always reads as one run.
"""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any

from regionspot.cache.progress import duration
from regionspot.cache.storage.atomic_files import write_file

log = logging.getLogger(__name__)

PROGRESS_SECONDS = 5.0

Metrics = dict[str, Any]


def read_metrics(path: Path) -> list[Metrics]:
    """The lines of a metrics file, in order; none where there is no file."""
    if not path.exists():
        return []
    lines = []
    for text in path.read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue  # the run was killed inside this line
    return lines


def _line_of(metrics: Metrics) -> str:
    return json.dumps(metrics, allow_nan=False) + "\n"


class Meter:
    """Averages over intervals and writes them.

    step               steps done, counted over all runs that made up this one
    loss, grad_norm    means over the interval; the norm is that before clipping
    lr                 of the interval's last step
    images_per_second, data_wait   over the interval; data_wait is the share of time spent waiting for batches
    seconds            of training so far, over all runs
    """

    def __init__(self, path: Path, first_step: int, iterations: int, interval: Metrics | None = None) -> None:
        """`interval` is what `open_interval` gave when the checkpoint of `first_step` was saved."""
        kept = [line for line in read_metrics(path) if line["step"] <= first_step]
        write_file(path, "".join(_line_of(line) for line in kept).encode())
        self._path, self._first, self._iterations = path, first_step, iterations
        self._earlier = kept[-1]["seconds"] if kept else 0.0
        self._begin = self._shown = time.perf_counter()
        self.last: Metrics | None = kept[-1] if kept else None
        self._reset()
        if interval:
            self._steps, self._images = interval["steps"], interval["pictures"]
            self._loss, self._grad_norm, self._waited = interval["loss"], interval["grad_norm"], interval["waited"]
            self._since -= interval["span"]
            self._earlier = interval["seconds"]

    def _reset(self) -> None:
        self._since = time.perf_counter()
        self._steps = self._images = 0
        self._loss = self._grad_norm = self._waited = 0.0

    def open_interval(self) -> Metrics:
        """Sums over the steps since the last line, for a checkpoint between two lines: a resumed run adds to them."""
        return {
            "steps": self._steps,
            "pictures": self._images,
            "loss": self._loss,
            "grad_norm": self._grad_norm,
            "waited": self._waited,
            "span": time.perf_counter() - self._since,
            "seconds": self.seconds,
        }

    @property
    def seconds(self) -> float:
        """Seconds of training, over all runs."""
        return self._earlier + time.perf_counter() - self._begin

    def add(self, loss: float, grad_norm: float, images: int, waited: float) -> None:
        """Count one step; `waited` is the seconds it waited for its batch."""
        self._steps += 1
        self._images += images
        self._loss += loss
        self._grad_norm += grad_norm
        self._waited += waited

    def write(self, step: int, lr: float) -> None:
        """Close the interval with the line of `step` steps done."""
        span = max(time.perf_counter() - self._since, 1e-9)
        self.last = {
            "step": step,
            "loss": self._loss / self._steps,
            "lr": lr,
            "grad_norm": self._grad_norm / self._steps,
            "pictures_per_second": round(self._images / span, 2),
            "seconds": round(self.seconds, 3),
            "data_wait": round(self._waited / span, 4),
        }
        with self._path.open("a") as file:
            file.write(_line_of(self.last))
        self._reset()
        now = time.perf_counter()
        if now - self._shown >= PROGRESS_SECONDS or step == self._iterations:
            self._shown = now
            log.info("%s", self._line(step))

    def _line(self, step: int) -> str:
        rate = (step - self._first) / max(time.perf_counter() - self._begin, 1e-9)
        left = duration((self._iterations - step) / rate) if rate else "?"
        last = self.last or {}
        return (
            f"{step:,}/{self._iterations:,} steps  loss {last['loss']:.4g}  lr {last['lr']:.3g}  "
            f"{last['pictures_per_second']:.3g} images/s  {left} left  (waiting for data {last['data_wait']:.0%})"
        )
