"""Whether evaluations on the same images differ: figures with their intervals, and the classes that changed most.

Two runs are compared image by image: the interval of a difference is over samples of the images, the same for both.
Several trainings with other seeds form a group; the interval of a difference is then over the trainings.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, stdev
from typing import Any

from regionspot.cache.errors import InputError
from regionspot.evaluation.metrics.analysis import CONFIDENCE, SAMPLES
from regionspot.evaluation.metrics.average_precision import IouType
from regionspot.evaluation.report.runs import Run, Split

IOU_TYPE_NAMES: dict[IouType, str] = {"bbox": "boxes", "segm": "masks"}
CHANGED_CLASSES = 8  # gains, and losses, that the text lists
# Student's t at 97.5 % for 1, 2, ... degrees of freedom; 1.96 for more than these.
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


@dataclass(frozen=True)
class Estimate:
    """A figure from 0 to 1. `margin`: half of its interval at 95 %; of a group, the deviation of its runs."""

    value: float
    margin: float


@dataclass(frozen=True)
class Difference:
    """The difference of a figure to that of the first run, its interval at 95 %, and what this means."""

    value: float
    low: float
    high: float
    verdict: str

    @classmethod
    def of(cls, value: float, margin: float) -> Difference:
        verdict = "not distinguishable" if abs(value) <= margin else "higher" if value > 0 else "lower"
        return cls(value, value - margin, value + margin, verdict)


@dataclass(frozen=True)
class FigureRow:
    """One figure of all runs, and the differences of all but the first to it; None without ground truth."""

    metric: str
    values: list[Estimate | None]
    differences: list[Difference | None]


@dataclass(frozen=True)
class ClassChange:
    """Box AP of a class in the first run and in another one."""

    name: str
    frequency: str
    boxes: int
    before: float
    after: float


@dataclass(frozen=True)
class Comparison:
    """Evaluations on the same images; the first is what the others are compared with.

    names      folders; those of a group, with a comma between them
    seeds      number of runs of each; if more than one, intervals are over the trainings
    protocol   the fields of the protocols that differ, with the value of each
    figures    by IoU type
    changes    of all but the first: every class with ground truth, the largest gain first
    """

    names: list[str]
    methods: list[str]
    seeds: list[int]
    protocol: dict[str, list[Any]]
    figures: dict[str, list[FigureRow]]
    changes: list[list[ClassChange]]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def compare(groups: Sequence[Sequence[Run]], split: Split, samples: int = SAMPLES) -> Comparison:
    """Compare every group with the first one. A group is one run, or several that differ in the seed only.

    `samples` of the images give the intervals of single runs.

    Raises InputError if some groups are one run and others several: their intervals are of different things.
    """
    sizes = [len(group) for group in groups]
    if min(sizes) == 1 < max(sizes):
        raise InputError("one run cannot be compared with a group of several seeds; give at least two runs of each")
    runs = [group[0] for group in groups]

    def rows(iou_type: IouType) -> list[FigureRow]:
        return _over_images(runs, split, iou_type, samples) if max(sizes) == 1 else _over_trainings(groups, iou_type)

    return Comparison(
        names=[",".join(str(run.folder) for run in group) for group in groups],
        methods=[run.results["method"] for run in runs],
        seeds=sizes,
        protocol=_protocol_differences(runs),
        figures={
            iou_type: rows(iou_type)
            for iou_type in IOU_TYPE_NAMES
            if all(iou_type in run.iou_types for group in groups for run in group)
        },
        changes=[_class_changes(groups[0], other) for other in groups[1:]],
    )


def _over_images(runs: Sequence[Run], split: Split, iou_type: IouType, samples: int) -> list[FigureRow]:
    matches = [split.matches(run, iou_type) for run in runs]
    values = [each.intervals(samples) for each in matches]
    differences = [each.minus(matches[0], samples) for each in matches[1:]]
    rows = []
    for metric in values[0]:
        of_runs, to_first = [each[metric] for each in values], [each[metric] for each in differences]
        rows.append(
            FigureRow(
                metric,
                [Estimate(each.value, each.high - each.value) if each else None for each in of_runs],
                [Difference.of(each.value, each.high - each.value) if each else None for each in to_first],
            )
        )
    return rows


def _over_trainings(groups: Sequence[Sequence[Run]], iou_type: IouType) -> list[FigureRow]:
    """Intervals by Student's t with Welch's standard error, and the fewer degrees of freedom of the two groups."""
    rows = []
    for metric in groups[0][0].results[iou_type]:
        samples = [[run.results[iou_type][metric] for run in group] for group in groups]
        if None in samples[0]:
            rows.append(FigureRow(metric, [None] * len(groups), [None] * (len(groups) - 1)))
            continue
        values = [Estimate(fmean(sample), stdev(sample)) for sample in samples]
        errors = [each.margin / math.sqrt(len(sample)) for each, sample in zip(values, samples, strict=True)]
        differences = [
            Difference.of(
                value.value - values[0].value, _t(min(len(sample), len(samples[0]))) * math.hypot(error, errors[0])
            )
            for value, sample, error in zip(values[1:], samples[1:], errors[1:], strict=True)
        ]
        rows.append(FigureRow(metric, [*values], [*differences]))
    return rows


def _t(runs: int) -> float:
    return T_975[runs - 2] if runs - 2 < len(T_975) else 1.96


def _protocol_differences(runs: Sequence[Run]) -> dict[str, list[Any]]:
    protocols = [run.results["protocol"] for run in runs]
    fields = dict.fromkeys(field for protocol in protocols for field in protocol if field != "sha256")
    values = {field: [protocol.get(field) for protocol in protocols] for field in fields}
    return {field: each for field, each in values.items() if any(value != each[0] for value in each)}


def _class_changes(first: Sequence[Run], other: Sequence[Run]) -> list[ClassChange]:
    changes = []
    for row, before, after in zip(first[0].classes, _class_ap(first), _class_ap(other), strict=True):
        if before is not None and after is not None:
            changes.append(ClassChange(row["name"], row["frequency"], int(row["boxes"]), before, after))
    return sorted(changes, key=lambda change: (change.before - change.after, -change.boxes))


def _class_ap(group: Sequence[Run]) -> list[float | None]:
    """The mean of the runs."""
    of_classes = zip(*([row["AP"] for row in run.classes] for run in group), strict=True)
    return [fmean(map(float, values)) if all(values) else None for values in of_classes]


def comparison_text(comparison: Comparison) -> str:
    """The comparison as plain text, in points of 100."""
    letters = [chr(ord("A") + index) for index in range(len(comparison.names))]
    titles = zip(letters, comparison.names, comparison.methods, strict=True)
    parts = ["\n".join(f"{letter}  {name}  ({method})" for letter, name, method in titles)]
    if comparison.protocol:
        lines = []
        for field, values in comparison.protocol.items():
            of_runs = (f"{letter} {value}" for letter, value in zip(letters, values, strict=True))
            lines.append(f"  {field.replace('_', ' ')}: {', '.join(of_runs)}")
        parts.append("\n".join(["their protocols differ:", *lines]))
    parts += [_figures_text(rows, name, letters) for name, rows in _named(comparison.figures)]
    parts += [
        _changes_text(changes, letters[0], letter)
        for letter, changes in zip(letters[1:], comparison.changes, strict=True)
    ]
    margin, over = f"half of the interval at {CONFIDENCE:.0%}", "samples of the images"
    if max(comparison.seeds) > 1:
        margin, over = "the deviation of the runs of a group", "the runs of the groups"
    parts.append(
        f"in points of 100; +- is {margin}. Intervals of differences are over {over}.\n"
        f"At {CONFIDENCE:.0%}, one of 20 figures is found to differ where nothing does."
    )
    return "\n\n".join(parts)


def _named(figures: dict[str, list[FigureRow]]) -> list[tuple[str, list[FigureRow]]]:
    return [(name, figures[iou_type]) for iou_type, name in IOU_TYPE_NAMES.items() if iou_type in figures]


def _figures_text(rows: Sequence[FigureRow], name: str, letters: Sequence[str]) -> str:
    header = [name, *letters]
    for letter in letters[1:]:
        header += [f"{letter} - {letters[0]}", "", f"{letter} is"]
    lines = [header]
    for row in rows:
        line = [row.metric, *(f"{100 * v.value:.1f} +- {100 * v.margin:.1f}" if v else "-" for v in row.values)]
        for each in row.differences:
            interval = f"({100 * each.low:+.1f} to {100 * each.high:+.1f})" if each else ""
            line += [f"{100 * each.value:+.1f}" if each else "-", interval, each.verdict if each else ""]
        lines.append(line)
    return _aligned(lines)


def _changes_text(changes: Sequence[ClassChange], first: str, other: str) -> str:
    gains = [change for change in changes if change.after > change.before]
    losses = [change for change in reversed(changes) if change.after < change.before]
    same = len(changes) - len(gains) - len(losses)
    title = (
        f"box AP of {len(changes):,} classes: {len(gains):,} higher in {other}, {len(losses):,} lower, {same:,} equal"
    )
    header = ["", f"{other} - {first}", first, other, "boxes", "class"]
    lines = [
        [
            kind if not index else "",
            f"{100 * (change.after - change.before):+.1f}",
            f"{100 * change.before:.1f}",
            f"{100 * change.after:.1f}",
            f"{change.boxes:,}",
            change.name,
        ]
        for kind, some in (("gains", gains), ("losses", losses))
        for index, change in enumerate(some[:CHANGED_CLASSES])
    ]
    return f"{title}\n{_aligned([header, *lines])}"


def _aligned(lines: Sequence[Sequence[str]]) -> str:
    """Columns; the first and the last one, and those with words, to the left."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    left = [not any(cell[:1] in "+-0123456789(" and cell for cell in column[1:]) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if is_left else cell.rjust(width)
            for cell, width, is_left in zip(line, widths, left, strict=True)
        ).rstrip()
        for line in lines
    )
