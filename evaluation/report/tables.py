"""Tables of AP, one row per method, with the seconds per image: as plain text and as markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from regionspot.evaluation.metrics.average_precision import AP_METRICS, IouType

COSTS = ("s/image", "s on maps")
LEGEND = (
    "AP in %: AP50 and AP75 at that IoU; s, m, l by size; r, c, f by the frequency of the class. "
    "s/image: from the file on disk; s on maps: without the time to compute the image maps."
)


@dataclass(frozen=True)
class ApRow:
    """One method: AP from 0 to 1 by metric, None without ground truth; seconds per image in all and on maps."""

    method: str
    ap: dict[str, float | None]
    seconds_in_all: float | None = None
    seconds_on_maps: float | None = None


def row_of(results: dict[str, Any], iou_type: IouType = "bbox", method: str | None = None) -> ApRow:
    """The row of an evaluation's results; AP is empty if `iou_type` was not evaluated."""
    seconds = results["seconds_per_picture"]
    return ApRow(
        method or results["method"],
        results[iou_type] or dict.fromkeys(AP_METRICS),
        seconds["in_all"],
        seconds["on_shared_maps"],
    )


def ap_table(rows: Sequence[ApRow], title: str = "", mark_best: bool = True) -> str:
    """A plain text table, AP in %; the best of every column is marked with *."""
    cells = [("method", *AP_METRICS, *COSTS), *_cells(rows, "*" if mark_best else "")]
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    lines = ["  ".join(_padded(line, widths)).rstrip() for line in cells]
    rule = "-" * max(map(len, lines))
    return "\n".join([*([title] if title else []), lines[0], rule, *lines[1:]])


def ap_markdown(rows: Sequence[ApRow]) -> str:
    """The table in markdown, with the best of every column in bold."""
    header = ("method", *AP_METRICS, *COSTS)
    lines = [header, ("---", *("---:" for _ in header[1:])), *_cells(rows, "**")]
    return "\n".join(f"| {' | '.join(cell.strip() for cell in line)} |" for line in lines)


def results_text(results: dict[str, Any]) -> str:
    """The results of one evaluation as plain text: box and mask AP, and the protocol."""
    rows = [row_of(results, "bbox", f"{results['method']}, boxes")]
    if results["segm"] is not None:
        rows.append(row_of(results, "segm", f"{results['method']}, masks"))
    return "\n\n".join([ap_table(rows, mark_best=False), LEGEND, protocol_text(results)])


def protocol_text(results: dict[str, Any]) -> str:
    """The protocol of the evaluation, one line per field."""
    protocol = results["protocol"]
    width = max(map(len, protocol))
    return "\n".join(f"{name.replace('_', ' '):<{width}}  {value}" for name, value in protocol.items())


def _cells(rows: Sequence[ApRow], mark: str) -> list[tuple[str, ...]]:
    best = {metric: max((row.ap[metric] or 0.0 for row in rows), default=0.0) for metric in AP_METRICS}
    return [
        (
            row.method,
            *(
                _percent(row.ap[metric], best[metric] if len(rows) > 1 and mark else None, mark)
                for metric in AP_METRICS
            ),
            _seconds(row.seconds_in_all),
            _seconds(row.seconds_on_maps),
        )
        for row in rows
    ]


def _percent(value: float | None, best: float | None, mark: str) -> str:
    if value is None:
        return "- "
    shown = f"{100 * value:.1f}"
    if value != best or not value:
        return shown + " "
    return f"{shown}*" if mark == "*" else f"**{shown}**"


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}" if value < 0.1 else f"{value:.2f}"


def _padded(line: Sequence[str], widths: Sequence[int]) -> list[str]:
    return [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))]
