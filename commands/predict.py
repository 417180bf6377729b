"""`regionspot predict`: names for the boxes of one image."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from regionspot.commands import options


def predict(
    image: Annotated[Path, typer.Argument(help="the image")],
    checkpoint: options.Checkpoint,
    boxes: Annotated[str | None, typer.Option(help='"x1,y1,x2,y2;..." in pixels, or @FILE as --boxes-file')] = None,
    names: Annotated[
        str | None, typer.Option(help='candidate names: "dog,red umbrella", or @FILE as --names-file')
    ] = None,
    boxes_file: Annotated[Path | None, typer.Option(help="JSON: [[x1, y1, x2, y2], ...]")] = None,
    names_file: Annotated[Path | None, typer.Option(help="text: one name per line")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="image with boxes, masks, names and scores")] = None,
    head: options.HeadClass = None,
    top: Annotated[int, typer.Option(min=1, help="names per box")] = 5,
    preset: options.OptionalPreset = None,
    templates: options.Templates = None,
    weights: options.Weights = None,
    sam_weights: options.SamWeights = None,
    clip_weights: options.ClipWeights = None,
    device: options.Device = None,
    dtype: options.Dtype = "auto",
) -> None:
    """Name the boxes of one image: JSON to stdout, the labelled image to --out.

    Example: regionspot predict street.jpg --checkpoint head.safetensors --boxes "210,80,330,400" --names "dog,car"
    """
    from regionspot.cache.outputs import check_output_file
    from regionspot.evaluation.inference.boxes import boxes_from, names_from
    from regionspot.evaluation.inference.region_spot import RegionSpot
    from regionspot.evaluation.report.drawing import check_image_name, labelled, save_image
    from regionspot.pipeline.images.decode import read_image

    if out:
        inputs = (image, checkpoint, boxes_file, names_file, weights, sam_weights, clip_weights)
        check_output_file(check_image_name(out), inputs)
    parsed_boxes, parsed_names = boxes_from(boxes, boxes_file), names_from(names, names_file)
    pixels = read_image(image, exif="apply")
    model = RegionSpot.load(
        checkpoint,
        weights,
        device,
        preset=preset,
        head_class=head,
        sam_weights=sam_weights,
        clip_weights=clip_weights,
        dtype=dtype,
    )
    regions = model.predict(pixels, parsed_boxes, parsed_names, templates, with_masks=out is not None, top=top)
    typer.echo(json.dumps([region.as_json() for region in regions], indent=1, allow_nan=False))
    if out:
        save_image(labelled(pixels, regions), out)
