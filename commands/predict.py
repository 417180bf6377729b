"""`regionspot predict`: names for the regions of images."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from regionspot.commands import options


def predict(
    images: Annotated[list[str], typer.Argument(help="images, folders, patterns such as '**/*.jpg', or - for a list")],
    checkpoint: Annotated[
        Path | None, typer.Option(help="a trained head, ours or one of the authors; default: CLIP alone, by --method")
    ] = None,
    boxes: Annotated[
        str | None, typer.Option(help='"x1,y1,x2,y2;..." in pixels, or @FILE; default: SAM proposes regions')
    ] = None,
    names: Annotated[
        str | None, typer.Option(help='candidate names: "dog,red umbrella", or @FILE as --names-file')
    ] = None,
    boxes_file: Annotated[
        Path | None,
        typer.Option(
            help="[[x1, y1, x2, y2], ...], COCO annotations or results, LabelMe, Label Studio; docs/predict.md"
        ),
    ] = None,
    names_file: Annotated[Path | None, typer.Option(help="text: one name per line; or JSON with categories")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="the image with boxes, masks, names and scores; or their folder")
    ] = None,
    form: Annotated[
        options.PredictionForm, typer.Option("--format", help="of the JSON: regions of each image, or COCO's results")
    ] = "regions",
    masks: Annotated[bool, typer.Option("--masks", help="masks in the JSON, as COCO's RLE")] = False,
    method: Annotated[
        options.ZeroShotName | None,
        typer.Option(help="without a checkpoint: CLIP's dense map in the region (the default), or CLIP on its crop"),
    ] = None,
    unknown_below: Annotated[
        float | None, typer.Option(min=-1, max=1, help='the name is "unknown" below this similarity; docs/predict.md')
    ] = None,
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
    """Name the regions of images: JSON to stdout, labelled images to --out.

    One file gives a list of regions, several a list with an object for each image. Images that fail are listed, and
    the exit code is 1.

    Example: regionspot predict street.jpg --checkpoint head.safetensors --boxes "210,80,330,400" --names "dog,car"
    """
    from regionspot.cache.errors import InputError
    from regionspot.cache.outputs import check_output_file, check_output_folder
    from regionspot.evaluation.inference.box_files import boxes_of_images
    from regionspot.evaluation.inference.boxes import boxes_from, names_from
    from regionspot.evaluation.inference.image_list import list_images, names_one_file
    from regionspot.evaluation.inference.region_spot import RegionSpot
    from regionspot.evaluation.report.drawing import check_image_name
    from regionspot.evaluation.report.predictions import Predictions, PredictionWriter, draw_into, labelled_paths
    from regionspot.pipeline.images.decode import read_image

    if checkpoint is not None and method is not None:
        raise InputError(f"--method {method}: names regions without a head; leave out --checkpoint or --method")
    single = names_one_file(images)
    if out and single:
        inputs = (*images, checkpoint, boxes_file, names_file, weights, sam_weights, clip_weights)
        check_output_file(check_image_name(out), inputs)
    given_boxes, (given_names, category_ids) = boxes_from(boxes, boxes_file), names_from(names, names_file)
    files = list_images(images, sys.stdin)
    pixels = read_image(files[0], exif="apply") if single else None
    boxes_by_image = boxes_of_images(given_boxes, files)
    targets = labelled_paths(check_output_folder(out), files) if out and not single else None
    if checkpoint is None:
        spot = RegionSpot.zero_shot(
            preset or "bl",
            method or "dense",
            weights,
            device,
            dtype=dtype,
            sam_weights=sam_weights,
            clip_weights=clip_weights,
        )
    else:
        spot = RegionSpot.load(
            checkpoint,
            weights,
            device,
            preset=preset,
            head_class=head,
            dtype=dtype,
            sam_weights=sam_weights,
            clip_weights=clip_weights,
        )
    spot.vocabulary(given_names, templates)  # wrong names are refused once, not for each image
    name_regions = partial(
        spot.predict,
        names=given_names,
        templates=templates,
        with_masks=masks or out is not None,
        top=top,
        unknown_below=unknown_below,
    )
    writer = PredictionWriter(partial(typer.echo, nl=False), form, masks, category_ids)
    if pixels is not None:
        regions = name_regions(pixels, boxes_by_image[0])
        writer.single(files[0], regions)
        if out:
            draw_into(out, pixels, regions)
        return
    predictions = Predictions(name_regions, files, boxes_by_image, targets)
    writer.all(iter(predictions))
    for failure in predictions.failures:
        typer.echo(failure, err=True)
    if predictions.failures:
        typer.echo(f"{len(predictions.failures)} of {len(files)} images failed", err=True)
        raise typer.Exit(1)
