"""`regionspot dataset`: what a dataset contains."""

from __future__ import annotations

import typer

from regionspot.commands import options


def dataset(
    name: options.DatasetName,
    data: options.Data,
    split: options.Split = "train",
    annotations: options.Annotations = None,
    boxes: options.Boxes = "gt",
    max_failures: options.MaxFailures = options.EXTRACTION_FAILURES,
    as_json: options.AsJson = False,
) -> None:
    """Show what a dataset split contains, which records were dropped and which images are missing.

    Example: regionspot dataset coco --data my_images --annotations my.json
    """
    from dataclasses import replace

    from regionspot.pipeline.datasets.failure_limit import FailureLimit
    from regionspot.pipeline.datasets.proposals import with_boxes
    from regionspot.pipeline.datasets.registry import describe, image_folder_of, read_dataset, require_regions

    limit = FailureLimit.parse(max_failures)
    manifest = with_boxes(read_dataset(name, data, split, annotations, max_failures=limit), boxes, limit)
    report = describe(manifest, image_folder_of(name, data, split, manifest))
    typer.echo(options.json_text(report) if as_json else report.text())
    require_regions(replace(manifest, remarks=()))  # the report contains the remarks
