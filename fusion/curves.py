"""The image of a training run: its loss, as it was and smoothed, and its learning rate."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from regionspot.fusion.metrics import Metrics


def smoothed(values: NDArray[np.float64], share: float = 0.05) -> NDArray[np.float64]:
    """Centred mean over `share` of the run; the window shrinks at both ends, so no value is invented there."""
    half = max(1, round(len(values) * share / 2))
    sums = np.concatenate([[0.0], np.cumsum(values)])
    places = np.arange(len(values))
    low, high = np.maximum(places - half, 0), np.minimum(places + half + 1, len(values))
    smooth: NDArray[np.float64] = (sums[high] - sums[low]) / (high - low)
    return smooth


def draw_curves(metrics: Sequence[Metrics], path: Path) -> None:
    """Draw the lines of a `metrics.jsonl` into a PNG. Without any line there is nothing to draw, and no file."""
    if not metrics:
        return
    # Figure and not pyplot, which would pick a window system and keep every figure alive.
    from matplotlib.figure import Figure

    steps = np.array([line["step"] for line in metrics])
    loss = np.array([line["loss"] for line in metrics], dtype=np.float64)
    figure = Figure(figsize=(8, 5), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    upper.plot(steps, loss, color="0.75", linewidth=0.8, label="mean of an interval")
    upper.plot(steps, smoothed(loss), color="tab:blue", label="smoothed over 5 % of the run")
    _label(upper, "focal loss")
    upper.legend(frameon=False)
    lower.plot(steps, [line["lr"] for line in metrics], color="tab:orange")
    _label(lower, "learning rate")
    lower.set_xlabel("step")
    figure.savefig(path, dpi=120)


def _label(axes: Any, name: str) -> None:
    axes.set_ylabel(name)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
