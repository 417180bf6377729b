"""`regionspot doctor`: is everything there and does it work; no logic of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from regionspot.commands.options import Annotations, Device, PresetName, Split


def doctor(
    cache: Annotated[str | None, typer.Option(help="where features are to be written: room and write rate")] = None,
    data: Annotated[Path | None, typer.Option(help="folder of a dataset: annotations and photos")] = None,
    dataset: Annotated[str, typer.Option(help="which dataset --data is")] = "o365",
    split: Split = "train",
    annotations: Annotations = None,
    preset: Annotated[
        PresetName | None, typer.Option(help="look at its weights, and send an image through its models too")
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="folder of the official files, or random:SEED; default: where downloads lie")
    ] = None,
    device: Device = None,
    metrics_port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="whether `extract` could serve metrics there")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="for programs")] = False,
) -> None:
    """Look at everything that extraction needs, in less than a minute; exit code 1 where something fails."""
    from regionspot.pipeline.doctor.run import Asked, examine, is_healthy
    from regionspot.pipeline.doctor.run import as_json as to_json

    found = []
    for finding in examine(Asked(cache, data, dataset, split, preset, weights, device, metrics_port, annotations)):
        found.append(finding)
        if not as_json:
            typer.echo(finding.line())
    if as_json:
        typer.echo(json.dumps(to_json(found), indent=1, allow_nan=False))
    raise typer.Exit(0 if is_healthy(found) else 1)
