"""The chart of the cache's benchmark: bars in GB/s from zero, ours in one hue, everybody else grey, limits hollow."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.goals import Samples

_OURS, _OTHERS, _INK, _PAPER = "#1f6fb2", "#b9bec4", "#24292f", "white"
_BAR_INCHES = 0.27


def draw(path: Path, panels: Mapping[str, Samples]) -> None:
    """One panel a title: the first fills the left half, the others share the right one."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    first, *others = panels
    figure = pyplot.figure(figsize=(11, _BAR_INCHES * (len(panels[first]) + 4)), layout="constrained")
    axes = figure.subplot_mosaic(
        [[first, other] for other in others], height_ratios=[len(panels[other]) + 2 for other in others]
    )
    for title, samples in panels.items():
        _bars(axes[title], title, samples)
    figure.savefig(path, dpi=150, facecolor=_PAPER)


def _bars(axes: Any, title: str, samples: Samples) -> None:
    rates = sorted(((median(values), name) for name, values in samples.items()), reverse=True)
    names = [name for _, name in rates]
    values = [value for value, _ in rates]
    inner, outer = zip(*map(_colours, names), strict=True)
    bars = axes.barh(names, values, color=inner, edgecolor=outer, linewidth=1.2, height=0.75)
    axes.bar_label(bars, [f"{value:.1f}" if value >= 1 else f"{value:.2f}" for value in values], padding=3, fontsize=9)
    axes.invert_yaxis()
    axes.margins(x=0.12, y=0.01)
    axes.set_title(title, fontsize=10, loc="left", color=_INK, fontweight="bold")
    axes.xaxis.set_visible(False)  # each bar says its value
    axes.tick_params(left=False, labelsize=9, labelcolor=_INK)
    for label in axes.get_yticklabels():
        label.set_fontweight("bold" if label.get_text().startswith("cache.") else "normal")
    axes.spines[["top", "right", "bottom"]].set_visible(False)


def _colours(name: str) -> tuple[str, str]:
    """Of a bar and of its edge."""
    if "raw" in name and "DataLoader" not in name:
        return _PAPER, _OTHERS  # what the machine can do: nobody's product
    return (_OURS, _OURS) if name.startswith("cache.") else (_OTHERS, _OTHERS)
