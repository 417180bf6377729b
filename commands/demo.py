"""`regionspot demo` and `regionspot toy-world`: the whole pipeline on a generated dataset."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from regionspot.commands import options
from regionspot.commands.signals import AGAIN, on_stop, raise_if_stopped


def toy_world(
    out: Annotated[Path, typer.Argument(help="folder to write the dataset into")],
    images: options.WorldSize = 1000,
    seed: options.WorldSeed = 0,
) -> None:
    """Generate a small dataset of named shapes with LVIS annotations; its rare classes are only in val.

    Example: regionspot toy-world toy --pictures 200
    """
    from regionspot.pipeline.toy.world import make_toy_world

    typer.echo(make_toy_world(out, images, seed))


def demo(
    context: typer.Context,
    out: Annotated[Path, typer.Argument(help="folder for all outputs")],
    images: options.WorldSize = 3000,
    seed: options.WorldSeed = 0,
) -> None:
    """Run every stage, by its command, on a toy world; needs no download.

    Example: regionspot demo build/demo
    """
    from regionspot.evaluation.demo import run_demo

    command = context.find_root().command

    def run_stage(arguments: Sequence[str]) -> None:
        try:
            command.main(list(arguments), standalone_mode=False)
            raise_if_stopped()
        finally:
            on_stop(AGAIN)  # replaces the advice of the stage: the demo itself resumes

    on_stop(AGAIN)
    typer.echo(run_demo(run_stage, out, images, seed))
