"""The chart of the ablations: AP of every variant as a dot with its standard deviation, one panel a table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

_GUIDED, _REFERENCE, _INK = "#1f6fb2", "#8a9199", "#24292f"
_ROW_INCHES = 0.26


def draw(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """`rows` as benchmarks/ablate.py reports them; the first row of a panel is what the others are compared with."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    tables = list(dict.fromkeys(row["table"] for row in rows))
    counts = [sum(row["table"] == table for row in rows) for table in tables]
    figure, panels = pyplot.subplots(
        len(tables),
        figsize=(8, _ROW_INCHES * (len(rows) + 2.2 * len(tables))),
        height_ratios=[count + 1 for count in counts],
        sharex=True,
        layout="constrained",
    )
    for axes, table in zip(panels, tables, strict=True):
        _panel(axes, table, [row for row in rows if row["table"] == table])
    panels[-1].set_xlabel("AP in %, mean and standard deviation of the seeds")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _panel(axes: Any, title: str, rows: Sequence[dict[str, Any]]) -> None:
    for position, row in enumerate(rows):
        colour = _GUIDED if row["head"].startswith("guided") else _REFERENCE
        axes.errorbar(row["AP"], position, xerr=row["± AP"], fmt="o", color=colour, capsize=3, markersize=5)
        axes.annotate(f"{row['AP']:.1f}", (row["AP"], position), (8, 5), textcoords="offset points", fontsize=7)
    axes.set_yticks(range(len(rows)), [row["head"] for row in rows], fontsize=8)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_title(title, fontsize=9, loc="left", color=_INK, fontweight="bold")
    axes.grid(axis="x", linewidth=0.4)
    axes.spines[["top", "right"]].set_visible(False)
