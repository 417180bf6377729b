"""`regionspot eval` and `regionspot eval-lvis`: COCO AP and LVIS AP, from images or a cache.

They are one command with two ways to count. `eval-lvis` has the options that LVIS AP alone has.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from regionspot.cache.errors import InputError
from regionspot.cache.outputs import check_output_folder
from regionspot.commands import options
from regionspot.commands.signals import AGAIN, on_stop


def _evaluate(
    data: options.Data,
    out: Annotated[Path, typer.Option(help="folder for the results and for what a later run resumes from")],
    metric: str,
    checkpoint: Annotated[Path | None, typer.Option(help="a trained head, ours or one released by the authors")] = None,
    head: options.HeadClass = None,
    baseline: Annotated[options.BaselineName | None, typer.Option(help="instead of a head; needs no training")] = None,
    dataset: Annotated[str, typer.Option(help="coco, lvis, o365, v3det or toy")] = "coco",
    split: options.Split = "val",
    annotations: options.Annotations = None,
    boxes: options.Boxes = "gt",
    cache: Annotated[str | None, typer.Option(help="read features from this cache; no backbones, no masks")] = None,
    masks: Annotated[bool, typer.Option(help="compute and evaluate masks")] = True,
    mask_threshold: Annotated[
        options.MaskThresholdName,
        typer.Option(help="make masks as SAM does, or as the authors; see docs/evaluation.md"),
    ] = "sam",
    limit: options.Limit = None,
    selection: Annotated[
        options.SelectionName, typer.Option(help="which detections of an image count; see docs/evaluation.md")
    ] = "best",
    score: Annotated[
        options.ScoreName | None, typer.Option(help="class times box, or its root; default: by --selection")
    ] = None,
    detections_per_image: Annotated[
        int | None, typer.Option(min=1, max=1_000_000, help="default: 300, or 3,000 with --fixed-ap")
    ] = None,
    fixed_ap: Annotated[
        bool, typer.Option("--fixed-ap", help="fixed AP as well: 10,000 detections of a class, no limit per image")
    ] = False,
    engine: Annotated[options.EngineName, typer.Option(help="lvis: the official package, with the same figures")] = (
        "hotcoco"
    ),
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
    report: Annotated[Path | None, typer.Option(help="folder for report.html, as by `regionspot report`")] = None,
    compare: Annotated[Path | None, typer.Option(help="results of the same images, to show in the report")] = None,
    scheduler: options.Scheduler = "none",
) -> None:
    from regionspot.evaluation.evaluate import EvaluationOptions, evaluate
    from regionspot.evaluation.report.page import write_report
    from regionspot.evaluation.report.runs import read_run, read_split_of
    from regionspot.evaluation.report.tables import results_text
    from regionspot.pipeline.datasets.failure_limit import FailureLimit
    from regionspot.pipeline.distributed.cluster import check_scheduler

    evaluation = EvaluationOptions(
        data=data,
        out=out,
        metric="lvis" if metric == "lvis" else "coco",
        engine=engine,
        fixed=fixed_ap,
        selection=selection,
        score=score,
        detections_per_image=detections_per_image,
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
        mask_threshold=mask_threshold,
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
    if compare is not None and report is None:
        raise InputError("--compare is shown in the report; give --report too, or use `regionspot compare`")
    others = [] if compare is None else [read_run(compare)]  # before hours of inference
    if report is not None:
        check_output_folder(report)
    on_stop(AGAIN)
    typer.echo(results_text(evaluate(evaluation)))
    if report is not None:
        runs = [read_run(out), *others]
        typer.echo(f"\n{write_report(report, read_split_of(runs, data, annotations), *runs)}")


def _command(name: str, help_text: str, fixed: dict[str, Any], defaults: dict[str, Any]) -> Callable[..., None]:
    """`_evaluate` under a name, without the options in `fixed`, and with other defaults."""

    @functools.wraps(_evaluate)
    def run(**values: Any) -> None:
        _evaluate(**fixed, **values)

    parameters = [
        parameter.replace(default=defaults.get(parameter.name, parameter.default), kind=parameter.KEYWORD_ONLY)
        for parameter in inspect.signature(_evaluate, eval_str=True).parameters.values()
        if parameter.name not in fixed
    ]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    run.__name__, run.__doc__ = name, help_text
    return run


evaluate = _command(
    "eval",
    """COCO AP of a head or a baseline on any annotations in COCO's format. The same command resumes a stopped run.

    Example: regionspot eval --data my_images --annotations my.json --checkpoint runs/my/head.safetensors --out my_eval
    """,
    fixed={"metric": "coco", "fixed_ap": False, "engine": "hotcoco"},
    defaults={},
)
eval_lvis = _command(
    "eval-lvis",
    """LVIS AP of a head or a baseline. The same command resumes a stopped run.

    Example: regionspot eval-lvis --data lvis --boxes glip.json --checkpoint runs/bl/head.safetensors --out runs/bl/eval
    """,
    fixed={"metric": "lvis"},
    defaults={"dataset": "lvis"},
)
