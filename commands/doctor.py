"""`regionspot doctor`: check whether this machine can extract."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from regionspot.commands import options


def doctor(
    cache: Annotated[
        str | None, typer.Option(help="where features will be written: free space and write throughput")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="folder of a dataset: annotations and images")] = None,
    dataset: Annotated[str, typer.Option(help="name of the dataset in --data")] = "o365",
    split: options.Split = "train",
    annotations: options.Annotations = None,
    preset: Annotated[
        options.PresetName | None, typer.Option(help="check its weights, and send an image through its models")
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="folder of the official files, or random:SEED; default: the download folder")
    ] = None,
    device: options.Device = None,
    metrics_port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="check whether `extract` can serve metrics there")
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Check in less than a minute what extraction needs; exit code 1 if something fails.

    Example: regionspot doctor --dataset o365 --data objects365 --cache o365.zarr --preset bl
    """
    from regionspot.pipeline.doctor.report import DoctorOptions, is_healthy
    from regionspot.pipeline.doctor.report import as_json as to_json
    from regionspot.pipeline.doctor.run import examine

    requested = DoctorOptions(cache, data, dataset, split, preset, weights, device, metrics_port, annotations)
    findings = []
    for finding in examine(requested):
        findings.append(finding)
        if not as_json:
            typer.echo(finding.line())
    if as_json:
        typer.echo(json.dumps(to_json(findings), indent=1, allow_nan=False))
    raise typer.Exit(0 if is_healthy(findings) else 1)
