"""Tables of AP, one row per method, with the seconds per image: as plain text and as markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from regionspot.evaluation.metrics.average_precision import AP_METRICS
from regionspot.evaluation.report.protocol import protocol_text

COSTS = ("s/image", "s on maps")
LEGEND = (
    "AP in %: AP50 and AP75 at that IoU; s, m, l by size; r, c, f by the frequency of the class. "
    "s/image: from the file on disk; s on maps: without the time to compute the image maps."
)


@dataclass(frozen=True)
class ApRow:
    """One method: AP from 0 to 1 by metric, None or missing without ground truth; seconds per image in all, on maps."""

    method: str
    ap: dict[str, float | None]
    seconds_in_all: float | None = None
    seconds_on_maps: float | None = None


def row_of(results: dict[str, Any], figure: str = "bbox", method: str | None = None) -> ApRow:
    """The row of an evaluation's results: "bbox", "segm", "fixed_bbox" or "fixed_segm"; empty if not evaluated."""
    seconds = results["seconds_per_image"]
    return ApRow(
        method or results["method"],
        results[figure] or {},
        seconds["in_all"],
        seconds["on_shared_maps"],
    )


def ap_table(rows: Sequence[ApRow], title: str = "", mark_best: bool = True) -> str:
    """A plain text table, AP in %; the best of every column is marked with *."""
    cells = _cells(rows, "*" if mark_best else "")
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    lines = ["  ".join(_padded(line, widths)).rstrip() for line in cells]
    rule = "-" * max(map(len, lines))
    return "\n".join([*([title] if title else []), lines[0], rule, *lines[1:]])


def ap_markdown(rows: Sequence[ApRow]) -> str:
    """The table in markdown, with the best of every column in bold."""
    header, *cells = _cells(rows, "**")
    lines = [header, ("---", *("---:" for _ in header[1:])), *cells]
    return "\n".join(f"| {' | '.join(cell.strip() for cell in line)} |" for line in lines)


def results_text(results: dict[str, Any]) -> str:
    """The results of one evaluation as plain text: all figures, and the protocol."""
    names = {"bbox": "boxes", "segm": "masks", "fixed_bbox": "boxes, fixed AP", "fixed_segm": "masks, fixed AP"}
    rows = [
        row_of(results, figure, f"{results['method']}, {name}") for figure, name in names.items() if results[figure]
    ]
    lines = [line for line in (_accuracy_line(results), _split_line(results)) if line]
    parts = [ap_table(rows, mark_best=False), "\n".join(lines), LEGEND, protocol_text(results["protocol"])]
    return "\n\n".join(part for part in parts if part)


def _accuracy_line(results: dict[str, Any]) -> str:
    if not (accuracy := results["accuracy"]):
        return ""
    shares = {name: f"{100 * accuracy[name]:.1f} %" for name in ("top1", "top5", "class_accuracy")}
    return (
        f"right names of the {accuracy['regions']:,} boxes: top-1 {shares['top1']}, top-5 {shares['top5']}, "
        f"mean of the classes' top-1 {shares['class_accuracy']}"
    )


def _split_line(results: dict[str, Any]) -> str:
    if not (split := results["zero_shot_split"]):
        return ""
    shown = [
        f"{_percent(group['bbox'])} of the {group['classes']:,} classes {name} in training"
        for name, group in split.items()
    ]
    return f"box AP by class: {', '.join(shown)}"


def _cells(rows: Sequence[ApRow], mark: str) -> list[tuple[str, ...]]:
    """Header and rows. Metrics that no row has are left out: COCO has no frequencies of classes."""
    metrics = [metric for metric in AP_METRICS if any(row.ap.get(metric) is not None for row in rows)]
    best = {metric: max(row.ap.get(metric) or 0.0 for row in rows) for metric in metrics}
    cells = [
        (
            row.method,
            *(
                _marked(row.ap.get(metric), best[metric] if len(rows) > 1 and mark else None, mark)
                for metric in metrics
            ),
            _seconds(row.seconds_in_all),
            _seconds(row.seconds_on_maps),
        )
        for row in rows
    ]
    return [("method", *metrics, *COSTS), *cells]


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def _marked(value: float | None, best: float | None, mark: str) -> str:
    shown = _percent(value)
    if value != best or not value:
        return shown + " "
    return f"{shown}*" if mark == "*" else f"**{shown}**"


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}" if value < 0.1 else f"{value:.2f}"


def _padded(line: Sequence[str], widths: Sequence[int]) -> list[str]:
    return [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))]
