"""`regionspot compare` and `regionspot report`: whether evaluations differ, and one evaluation on a page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from regionspot.cache.errors import InputError
from regionspot.commands import options

RESULTS_HELP = "the --out folder of an evaluation"


def compare(
    results: Annotated[
        list[str], typer.Argument(help=f"{RESULTS_HELP}; of trainings with other seeds: folders with commas between")
    ],
    data: options.Data,
    annotations: options.Annotations = None,
    as_json: options.AsJson = False,
) -> None:
    """Compare evaluations on the same images with the first one: every figure with its interval, and the classes.

    Example: regionspot compare runs/bl/eval runs/bb/eval --data lvis
    """
    from regionspot.evaluation.report.comparison import compare, comparison_text
    from regionspot.evaluation.report.runs import read_run, read_split_of

    if len(results) < 2:
        raise InputError(f"{results[0]}: is one evaluation; give at least two")
    groups = [[read_run(Path(folder)) for folder in names.split(",")] for names in results]
    split = read_split_of([run for group in groups for run in group], data, annotations)
    comparison = compare(groups, split)
    text = json.dumps(comparison.as_json(), indent=1, allow_nan=False) if as_json else comparison_text(comparison)
    typer.echo(text)


def report(
    results: Annotated[Path, typer.Argument(help=RESULTS_HELP)],
    data: options.Data,
    out: Annotated[Path | None, typer.Option(help="folder for the page; default: that of the results")] = None,
    compare: Annotated[Path | None, typer.Option(help="show these results of the same images beside it")] = None,
    annotations: options.Annotations = None,
) -> None:
    """Write report.html: protocol, figures, curves, errors, classes and images of an evaluation, for any browser.

    Example: regionspot report runs/bl/eval --data lvis --compare runs/bb/eval
    """
    from regionspot.evaluation.report.page import write_report
    from regionspot.evaluation.report.runs import read_run, read_split_of

    runs = [read_run(folder) for folder in (results, compare) if folder is not None]
    typer.echo(write_report(out or results, read_split_of(runs, data, annotations), *runs))
