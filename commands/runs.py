"""`regionspot runs`: a table of training runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from regionspot.commands import options


def runs(
    folder: Annotated[list[Path], typer.Argument(help="runs, and folders with runs below them")],
    as_json: options.AsJson = False,
) -> None:
    """List training runs: preset, head, data, steps, loss, best validation score, images per second, state.

    Example: regionspot runs runs
    """
    from regionspot.fusion.training.runs import as_table, find_runs

    found = find_runs(folder)
    typer.echo(json.dumps([run.as_json() for run in found], indent=1) if as_json else as_table(found))
