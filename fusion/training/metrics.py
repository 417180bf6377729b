"""The metrics of a training run: one JSON line per interval in `metrics.jsonl`, a progress line, and a plot of them.

An incomplete line, left by a killed run, is ignored. A run that resumes from a checkpoint first removes the lines that
were written after it, so the file always reads as one run.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from regionspot.cache.progress import duration
from regionspot.cache.storage.atomic_files import rename_key, write_file
from regionspot.fusion.training.trackers import Tracker

log = logging.getLogger(__name__)

PROGRESS_SECONDS = 5.0

Metrics = dict[str, Any]


def read_metrics(path: Path) -> list[Metrics]:
    """The lines of a metrics file, in order; an empty list if there is no file."""
    if not path.exists():
        return []
    lines = []
    for text in path.read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue  # incomplete: the run was killed while it wrote this line
    return lines


def _to_line(metrics: Metrics) -> str:
    return json.dumps(metrics, allow_nan=False) + "\n"


class Meter:
    """Averages over intervals and writes them. The fields of a line:

    step               steps done since the start of the run, including the steps before a resume
    loss, grad_norm    means over the interval; the norm is the one before clipping
    lr                 of the interval's last step
    pictures_per_second, mb_per_second   over the interval: images, and megabytes (10^6 bytes) read from the caches
    data_wait          share of the interval spent waiting for batches
    seconds            of training so far, including the time before a resume
    validation         {score: value}, only in the line of a step after which the head was validated

    The meter itself never reads a tensor: the sums of loss and norm may stay on the device until a line is written.
    """

    def __init__(
        self,
        path: Path,
        first_step: int,
        iterations: int,
        interval: Metrics | None = None,
        trackers: Sequence[Tracker] = (),
    ) -> None:
        """`interval` is the result of `open_interval` when the checkpoint of `first_step` was saved.

        The trackers get each line, too. A run that was killed after its last checkpoint computes some steps again:
        their lines are written again, but the trackers have them already.
        """
        lines = read_metrics(path)
        kept = [line for line in lines if line["step"] <= first_step]
        write_file(path, "".join(_to_line(line) for line in kept).encode())
        self._path, self._first_step, self._iterations = path, first_step, iterations
        self._trackers, self._tracked_step = list(trackers), lines[-1]["step"] if lines else 0
        self._earlier_seconds = kept[-1]["seconds"] if kept else 0.0
        self._start = self._last_progress = time.perf_counter()
        self.last: Metrics | None = kept[-1] if kept else None
        self.resumed_sums = 0.0, 0.0  # loss and norm of the open interval's steps before a resume
        self._start_interval()
        if interval:
            self.resumed_sums = interval["loss"], interval["grad_norm"]
            self._steps, self._images, self._bytes = interval["steps"], interval["pictures"], interval.get("bytes", 0)
            self._wait_seconds = interval["waited"]
            self._interval_start -= interval["span"]
            self._earlier_seconds = interval["seconds"]

    def _start_interval(self) -> None:
        self._interval_start = time.perf_counter()
        self._steps = self._images = self._bytes = 0
        self._wait_seconds = 0.0

    def open_interval(self, loss_sum: float, grad_norm_sum: float) -> Metrics:
        """The open interval, which goes on. A checkpoint between two lines saves it for a resumed run.

        loss_sum, grad_norm_sum   over all steps since the last line, as for `write`
        """
        return {
            "steps": self._steps,
            "pictures": self._images,
            "bytes": self._bytes,
            "loss": loss_sum,
            "grad_norm": grad_norm_sum,
            "waited": self._wait_seconds,
            "span": time.perf_counter() - self._interval_start,
            "seconds": self.seconds,
        }

    @property
    def seconds(self) -> float:
        """Seconds of training, including the time before a resume."""
        return self._earlier_seconds + time.perf_counter() - self._start

    def add(self, images: int, bytes: int, wait_seconds: float) -> None:
        """Count one step: the images of its batch, their bytes in the cache, and the time that it waited for them."""
        self._steps += 1
        self._images += images
        self._bytes += bytes
        self._wait_seconds += wait_seconds

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time inside does not count for the rates of the interval: for validation."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._interval_start += time.perf_counter() - begin

    def write(
        self,
        step: int,
        lr: float,
        loss_sum: float,
        grad_norm_sum: float,
        validation: Mapping[str, float] | None = None,
    ) -> None:
        """End the interval and write its line; `step` steps are done.

        loss_sum, grad_norm_sum   over all steps since the last line; a resumed run starts them at `resumed_sums`
        validation                scores of the head after this step, if it was validated
        """
        seconds = max(time.perf_counter() - self._interval_start, 1e-9)
        self.last = {
            "step": step,
            "loss": loss_sum / self._steps,
            "lr": lr,
            "grad_norm": grad_norm_sum / self._steps,
            "pictures_per_second": round(self._images / seconds, 2),
            "mb_per_second": round(self._bytes / 1e6 / seconds, 2),
            "seconds": round(self.seconds, 3),
            "data_wait": round(self._wait_seconds / seconds, 4),
            **({"validation": dict(validation)} if validation else {}),
        }
        with self._path.open("a") as file:
            file.write(_to_line(self.last))
        if step > self._tracked_step:
            self._track(step, self.last)
        self._start_interval()
        now = time.perf_counter()
        if now - self._last_progress >= PROGRESS_SECONDS or step == self._iterations or validation:
            self._last_progress = now
            log.info("%s", self._progress_line(step, self.last))

    def _track(self, step: int, line: Metrics) -> None:
        values = {name: value for name, value in line.items() if name not in ("step", "validation")}
        values |= {f"validation/{name}": score for name, score in line.get("validation", {}).items()}
        for tracker in list(self._trackers):
            try:
                tracker.log(rename_key(values, "pictures_per_second", "images_per_second"), step=step)
            except Exception as error:  # a training must not end because a tracker has lost its server
                log.warning("%s: gets no more metrics (%s)", type(tracker).__name__, error)
                self._trackers.remove(tracker)

    def close(self) -> None:
        """Close the trackers."""
        for tracker in self._trackers:
            with redirect_stdout(sys.stderr), suppress(Exception):  # trackio prints; stdout is for results
                tracker.finish()

    def _progress_line(self, step: int, last: Metrics) -> str:
        steps_per_second = (step - self._first_step) / max(time.perf_counter() - self._start, 1e-9)
        left = duration((self._iterations - step) / steps_per_second) if steps_per_second else "?"
        scores = "".join(f"  {name} {value:.4g}" for name, value in last.get("validation", {}).items())
        return (
            f"{step:,}/{self._iterations:,} steps  loss {last['loss']:.4g}  lr {last['lr']:.3g}{scores}  "
            f"{last['pictures_per_second']:,.3g} images/s  {last['mb_per_second']:,.3g} MB/s  {left} left  "
            f"(waiting for data {last['data_wait']:.0%})"
        )


def smoothed(values: NDArray[np.float64], share: float = 0.05) -> NDArray[np.float64]:
    """Centred moving average over `share` of the run; the window shrinks at both ends."""
    half = max(1, round(len(values) * share / 2))
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    low, high = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
    averages: NDArray[np.float64] = (sums[high] - sums[low]) / (high - low)
    return averages


def draw_curves(metrics: Sequence[Metrics], path: Path) -> None:
    """Plot loss, learning rate and, of a validated run, its scores into a PNG. Without any metrics, no file."""
    if not metrics:
        return
    # Figure instead of pyplot, which would select a window system and keep every figure in memory.
    from matplotlib.figure import Figure

    steps = np.array([line["step"] for line in metrics])
    # On a logarithmic axis, because a loss falls by a factor of a thousand; smoothed as it is seen there.
    loss = np.array([line["loss"] for line in metrics], dtype=np.float64).clip(min=1e-9)
    validated = [line for line in metrics if "validation" in line]
    names = ["focal loss", *(["validation"] if validated else []), "learning rate"]
    figure = Figure(figsize=(8, 5 + 2 * bool(validated)), layout="constrained")
    rows = figure.subplots(len(names), 1, sharex=True, height_ratios=(3, 2, 1) if validated else (3, 1))
    axes = dict(zip(names, rows, strict=True))
    axes["focal loss"].plot(steps, loss, color="0.75", linewidth=0.8, label="mean of an interval")
    smooth = np.exp(smoothed(np.log(loss)))
    axes["focal loss"].plot(steps, smooth, color="tab:blue", label="smoothed over 5 % of the run")
    axes["learning rate"].plot(steps, [line["lr"] for line in metrics], color="tab:orange")
    for name in dict.fromkeys(name for line in validated for name in line["validation"]):
        points = [(line["step"], line["validation"][name]) for line in validated if name in line["validation"]]
        axes["validation"].plot(*zip(*points, strict=True), marker=".", label=name)
    for name, panel in axes.items():
        panel.set_ylabel(name)
        if name == "focal loss":
            panel.set_yscale("log")
        else:
            panel.set_ylim(bottom=0)
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
        if name != "learning rate":
            panel.legend(frameon=False)
    rows[-1].set_xlabel("step")
    figure.savefig(path, dpi=120)
