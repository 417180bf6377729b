"""The report of an evaluation: one HTML file that needs no server and no network.

This module prepares the data; report.html.jinja has all of the page. Charts are inline SVG.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from regionspot.cache.outputs import check_output_folder
from regionspot.cache.storage.atomic_files import write_file
from regionspot.evaluation.metrics.analysis import Matches
from regionspot.evaluation.metrics.average_precision import ApResult, average_precision, coco_ap
from regionspot.evaluation.report.comparison import IOU_TYPE_NAMES, compare
from regionspot.evaluation.report.examples import best_and_worst
from regionspot.evaluation.report.protocol import protocol_lines
from regionspot.evaluation.report.runs import Run, Split

REPORT = "report.html"
FREQUENCY_NAMES = {"r": "rare", "c": "common", "f": "frequent"}
CONFUSIONS = 30
SAMPLES = 50  # of the images, for intervals: their margins are then exact to 10 %, in a quarter of compare's time
CLASS_CURVE_STEP = 5  # of the 101 recalls: a small curve has 21 points


def write_report(out: Path, split: Split, run: Run, other: Run | None = None, *, samples: int = SAMPLES) -> Path:
    """Write `report.html` into the folder `out`, and return its path.

    `other` is shown beside `run`, which is compared with it. `samples` are those of `compare`.

    Raises InputError if `out` cannot be written.
    """
    check_output_folder(out)
    out.mkdir(parents=True, exist_ok=True)
    write_file(out / REPORT, _template().render(_content(split, run, other, samples)).encode())
    return out / REPORT


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": _percent, "signed": _signed}
    return environment.get_template("report.html.jinja")


def _percent(value: float | None) -> str:
    return "\N{EN DASH}" if value is None else f"{100 * value:.1f}"


def _signed(value: float | None) -> str:
    return "\N{EN DASH}" if value is None else f"{100 * value:+.1f}".replace("-", "\N{MINUS SIGN}")


def _points(values: Sequence[float], width: float, height: float) -> str:
    """The points of an SVG line over values from 0 to 1 at equal distances."""
    step = width / (len(values) - 1)
    return " ".join(f"{index * step:.4g},{(1 - value) * height:.4g}" for index, value in enumerate(values))


def _content(split: Split, run: Run, other: Run | None, samples: int) -> dict[str, Any]:
    runs = [run] if other is None else [run, other]
    # The differences are to the other run.
    comparison = compare([[each] for each in reversed(runs)], split, samples)
    matches = [split.matches(each, "bbox") for each in runs]
    ap = [_box_ap(each, split) for each in runs]
    best, worst = best_and_worst(runs, split)
    return {
        "runs": [each.results | {"folder": str(each.folder)} for each in runs],
        "protocols": [protocol_lines(each.results["protocol"]) for each in runs],
        "protocol_differences": [name.replace("_", " ") for name in comparison.protocol],
        "figures": {
            name: [(row, list(reversed(row.values)), _meaning(row.metric)) for row in comparison.figures[iou_type]]
            for iou_type, name in IOU_TYPE_NAMES.items()
            if iou_type in comparison.figures
        },
        "groups": _groups(runs),
        "curves": [_curves(each, split) for each in ap],
        "calibration": [each.calibration() for each in matches],
        "errors": [each.errors() for each in matches],
        "confusions": _confusions(matches, split),
        "is_lvis": run.is_lvis,
        "classes": _classes(runs, ap),
        "examples": {"best": best, "worst": worst},
    }


def _box_ap(run: Run, split: Split) -> ApResult:
    return (average_precision if run.is_lvis else coco_ap)(split.ground_truth, run.detections, "bbox")


def _meaning(metric: str) -> str:
    """A metric in words."""
    kind, group = metric[:2], metric[2:].partition("@")[0]
    groups = {
        "50": "IoU 0.50",
        "75": "IoU 0.75",
        "s": "under 32² pixels",
        "m": "32² to 96² pixels",
        "l": "over 96² pixels",
        "r": "rare classes",
        "c": "common classes",
        "f": "frequent classes",
    }
    shown = groups.get(group, "IoU 0.50 to 0.95")
    return shown if kind == "AP" else f"recall, {shown}"


def _groups(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Classes by frequency, and by whether they were trained on, with the AP of each run; without empty groups.

    `ap` holds for each run a list by IoU type, or None where it is not known.
    """
    groups = []
    for frequency, name in FREQUENCY_NAMES.items():
        if rows := [row for row in runs[0].classes if row["frequency"] == frequency]:
            ap = [[run.results[iou_type][f"AP{frequency}"] for iou_type in run.iou_types] for run in runs]
            groups.append(_group(name, rows, ap))
    for seen, key, name in (("yes", "seen", "seen in training"), ("no", "unseen", "not seen in training")):
        if rows := [row for row in runs[0].classes if row["seen_in_training"] == seen]:
            splits = [run.results["zero_shot_split"] for run in runs]
            known = [split and [split[key].get(iou_type) for iou_type in IOU_TYPE_NAMES] for split in splits]
            groups.append(_group(name, rows, known))
    return groups


def _group(name: str, rows: Sequence[dict[str, str]], ap: list[Any]) -> dict[str, Any]:
    boxes = [int(row["boxes"]) for row in rows]
    return {
        "name": name,
        "classes": len(rows),
        "with_boxes": sum(map(bool, boxes)),
        "boxes": sum(boxes),
        "ap": ap,
    }


def _curves(ap: ApResult, split: Split) -> dict[str, str]:
    """Precision by recall, the mean of the classes, as points of a line in a square of 100."""
    precision, all_classes = ap.precision[..., 0], np.ones(len(ap.classes.category_ids), bool)
    selected = {
        "IoU 0.50": (precision[:1], all_classes),
        "IoU 0.75": (precision[5:6], all_classes),
        "IoU 0.50 to 0.95": (precision, all_classes),
    }
    for frequency, name in FREQUENCY_NAMES.items():
        selected[f"{name}, IoU 0.50"] = (precision[:1], ap.classes.frequencies == frequency)
    curves = {}
    for name, (values, classes) in selected.items():
        known = values[:, :, classes & (precision[0, 0] > -1)]
        if known.size:
            curves[name] = _points(known.mean(axis=(0, 2)).tolist(), 100, 100)
    return curves


def _confusions(matches: Sequence[Matches], split: Split) -> list[dict[str, Any]]:
    """The strongest ones of the first run, with their number in each."""
    names = split.category_names
    counts = [
        {(each.category_id, each.predicted_id): each.count for each in run.confusions(strongest)}
        for run, strongest in zip(matches, (CONFUSIONS, 100_000), strict=False)
    ]
    return [
        {"true": names[pair[0]], "predicted": names[pair[1]], "counts": [each.get(pair, 0) for each in counts]}
        for pair in counts[0]
    ]


def _classes(runs: Sequence[Run], ap: Sequence[ApResult]) -> list[dict[str, Any]]:
    """A row per class; AP is None without ground truth, and `curve` is None too."""
    rows = []
    for index, of_runs in enumerate(zip(*(run.classes for run in runs), strict=True)):
        row = of_runs[0]
        values = [_number(each["AP"]) for each in of_runs]
        known = [value for value in values if value is not None]
        curve = ap[0].precision[0, ::CLASS_CURVE_STEP, index, 0]
        rows.append(
            {
                "name": row["name"],
                "frequency": FREQUENCY_NAMES.get(row["frequency"], ""),
                "boxes": int(row["boxes"]),
                "seen": row["seen_in_training"],
                "ap": values,
                "ap50": _number(row["AP50"]),
                "mask_ap": _number(row["mask_AP"]),
                "gain": known[0] - known[1] if len(known) == 2 else None,
                "curve": _points(curve.tolist(), 56, 18) if curve[0] > -1 else None,
            }
        )
    return rows


def _number(text: str) -> float | None:
    return float(text) if text else None
