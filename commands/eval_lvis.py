"""`regionspot eval-lvis`: LVIS AP from images."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from regionspot.commands import options
from regionspot.commands.signals import AGAIN, on_stop


def eval_lvis(
    data: options.Data,
    out: Annotated[Path, typer.Option(help="folder for the results and for what a later run resumes from")],
    checkpoint: Annotated[Path | None, typer.Option(help="a trained head, ours or one released by the authors")] = None,
    head: options.HeadClass = None,
    baseline: Annotated[options.BaselineName | None, typer.Option(help="instead of a head; needs no training")] = None,
    dataset: Annotated[str, typer.Option(help="lvis, or toy")] = "lvis",
    split: options.Split = "val",
    annotations: options.Annotations = None,
    boxes: options.Boxes = "gt",
    cache: Annotated[str | None, typer.Option(help="read features from this cache; no backbones, no masks")] = None,
    masks: Annotated[bool, typer.Option(help="compute and evaluate masks")] = True,
    limit: options.Limit = None,
    preset: options.OptionalPreset = None,
    templates: options.Templates = None,
    names_from: options.NamesFrom = "name",
    weights: options.Weights = None,
    sam_weights: options.SamWeights = None,
    clip_weights: options.ClipWeights = None,
    check_weights: Annotated[
        bool, typer.Option(help="refuse other weights and features than the head was trained on")
    ] = True,
    exif: options.OptionalExif = None,
    preprocess: Annotated[
        options.PreprocessName | None, typer.Option(help="default: as for the features that the head was trained on")
    ] = None,
    max_failures: options.MaxFailures = options.EVALUATION_FAILURES,
    device: options.Device = None,
    dtype: options.Dtype = "auto",
    scheduler: options.Scheduler = "none",
) -> None:
    """LVIS AP of a head or a baseline, end to end from images. A stopped run is resumed by the same command.

    Example: regionspot eval-lvis --data lvis --boxes glip.json --checkpoint runs/bl/head.safetensors --out runs/bl/eval
    """
    from regionspot.evaluation.evaluate import LvisEvaluation, evaluate_lvis
    from regionspot.evaluation.report.tables import results_text
    from regionspot.pipeline.datasets.failure_limit import FailureLimit
    from regionspot.pipeline.distributed.cluster import check_scheduler

    evaluation = LvisEvaluation(
        data=data,
        out=out,
        dataset=dataset,
        split=split,
        annotations=annotations,
        checkpoint=checkpoint,
        head_class=head,
        preset=preset,
        baseline=baseline,
        cache=cache,
        boxes=boxes,
        limit=limit,
        masks=masks,
        templates=templates,
        names_from=names_from,
        exif=exif,
        weights=weights,
        sam_weights=sam_weights,
        clip_weights=clip_weights,
        device=device,
        dtype=dtype,
        preprocess=preprocess,
        check_weights=check_weights,
        max_failures=FailureLimit.parse(max_failures),
        scheduler=check_scheduler(scheduler),
    )
    on_stop(AGAIN)
    typer.echo(results_text(evaluate_lvis(evaluation)))
