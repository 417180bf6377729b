"""`regionspot serve`: the web page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from regionspot.commands import options
from regionspot.commands.signals import on_stop


def serve(
    checkpoint: Annotated[Path | None, typer.Option(help="a trained head, ours or one released by the authors")] = None,
    preset: Annotated[
        options.PresetName | None, typer.Option(help="the pair of backbones; alone: regions are named without a head")
    ] = None,
    cache: Annotated[str | None, typer.Option(help="a cache to explore")] = None,
    data: Annotated[Path | None, typer.Option(help="folder of the cache's dataset, for its images")] = None,
    index: Annotated[Path | None, typer.Option(help="folder of the cache's index; default: CACHE.regions")] = None,
    head: options.HeadClass = None,
    weights: options.Weights = None,
    sam_weights: options.SamWeights = None,
    clip_weights: options.ClipWeights = None,
    device: options.Device = None,
    dtype: options.Dtype = "auto",
    host: Annotated[str, typer.Option(help="address to listen on; 0.0.0.0: every machine may use the page")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free one")] = 7860,
    browser: Annotated[bool, typer.Option(help="open the page in a browser")] = False,
) -> None:
    """A web page to name regions of your own images, and to explore a cache and search in it.

    Example: regionspot serve --checkpoint runs/bl/head.safetensors --cache val.zarr --data lvis
    """
    from regionspot.cache.errors import InputError

    if not (checkpoint or preset or cache):
        raise InputError("serve: there is nothing to show; give --checkpoint or --preset, or --cache, or both")
    if data and not cache:
        raise InputError("--data: is the folder of a cache's images; give --cache too")
    try:
        from regionspot.evaluation.serve.run import load_page, run_page
    except ImportError as error:
        raise InputError(f"serve: {error.name} is not installed; run pip install 'regionspot[demo]'") from None

    page = load_page(
        checkpoint,
        preset,
        cache,
        data,
        index,
        head_class=head,
        weights=weights,
        sam_weights=sam_weights,
        clip_weights=clip_weights,
        device=device,
        dtype=dtype,
        host=host,
    )
    on_stop("")
    run_page(page, host, port, browser)
