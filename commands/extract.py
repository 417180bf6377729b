"""`regionspot extract`: images and frozen backbones to a cache."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from regionspot.commands import options
from regionspot.commands.signals import AGAIN, on_stop

if TYPE_CHECKING:
    from regionspot.pipeline.extraction.dry_run import DryRun
    from regionspot.pipeline.extraction.retry import RetrySummary
    from regionspot.pipeline.reporting.run_summary import ExtractSummary

Dtype = Annotated[
    options.DtypeName,
    typer.Option(
        help="of the image encoders; auto: as in the cache, else float32 on a CPU, and on a GPU bfloat16 for SAM and "
        "float16 for CLIP"
    ),
]


def extract(
    name: options.DatasetName,
    data: options.Data,
    cache: Annotated[str, typer.Option(help="the cache to fill: a folder ending in .zarr, or a URL: s3://...")],
    split: options.Split = "train",
    preset: options.Preset = "bl",
    localizer: Annotated[
        str | None, typer.Option(help="this localizer instead of the preset's; none: no tokens")
    ] = None,
    encoder: Annotated[
        list[str] | None, typer.Option(help="instead of the preset's; can be repeated; none: no maps")
    ] = None,
    boxes: options.Boxes = "gt",
    annotations: options.Annotations = None,
    limit: options.Limit = None,
    parts: Annotated[str | None, typer.Option(help='only these parts of the cache: "3,7-9"')] = None,
    shard: Annotated[str | None, typer.Option(help='only this share of the parts: "3/16"')] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="estimate bytes and time, and write nothing")] = False,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="only extract the images that could not be read before")
    ] = False,
    weights: options.Weights = None,
    sam_weights: options.SamWeights = None,
    clip_weights: options.ClipWeights = None,
    preprocess: Annotated[
        options.PreprocessName, typer.Option(help="reference: through 800 x 1333 pixels first, as the authors do")
    ] = "direct",
    tokens: Annotated[
        options.TokensName,
        typer.Option(help="first: location tokens; all: also the other mask tokens and predicted IoUs"),
    ] = "first",
    maps: Annotated[
        options.MapName,
        typer.Option(
            "--map", help="feature: CLIP's feature maps; dense: also its dense maps, for regions without a head"
        ),
    ] = "feature",
    views: Annotated[
        options.ViewsName | None,
        typer.Option(help="flip: extract the mirrored images, beside the features of a run without this option"),
    ] = None,
    exif: options.ExifRule = "auto",
    part_size: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=options.MAX_IMAGES,
            help="images per part, the unit of resuming; default: as in the cache, or 512",
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            min=1, max=options.MAX_IMAGES, help="images per encoder call; default: as in the cache, else by memory"
        ),
    ] = None,
    decode_threads: Annotated[
        int | None,
        typer.Option(
            min=1, max=options.MAX_THREADS, help="threads that read images; default: one per core, at most 16"
        ),
    ] = None,
    max_failures: options.MaxFailures = options.EXTRACTION_FAILURES,
    device: options.Device = None,
    dtype: Dtype = "auto",
    exact: Annotated[bool, typer.Option("--exact", help="the same as --dtype float32")] = False,
    encoding: Annotated[str, typer.Option(help="maps: float16, float32, bfloat16, int8 (half the bytes)")] = "float16",
    token_encoding: Annotated[str, typer.Option(help="tokens, likewise; both accept +zstd")] = "float16",
    scheduler: options.Scheduler = "none",
    room_check: Annotated[bool, typer.Option(help="refuse a disk without enough space for the features")] = True,
    metrics_port: options.MetricsPort = None,
    take_over: options.TakeOver = False,
    as_json: options.AsJson = False,
) -> None:
    """Run the frozen backbones over a dataset, once, into a cache. A stopped run is resumed by the same command.

    Any number of runs can share a cache: start the same command on each machine.

    Example: regionspot extract o365 --data objects365 --cache o365.zarr --preset bl
    """
    from regionspot.cache.errors import InputError
    from regionspot.cache.format.feature_dtypes import Encoding
    from regionspot.pipeline.datasets.failure_limit import FailureLimit
    from regionspot.pipeline.distributed.cluster import check_scheduler
    from regionspot.pipeline.extraction.config import ExtractConfig
    from regionspot.pipeline.extraction.plan import check_part_size

    if exact and dtype not in ("auto", "float32"):
        raise InputError(f"--exact means --dtype float32, and --dtype {dtype} was given as well; remove one of them")
    if dry_run and retry_failed:
        raise InputError("--dry-run and --retry-failed: give one of the two")
    distributed = check_scheduler(scheduler) != "none"
    if distributed and (dry_run or retry_failed or metrics_port is not None):
        raise InputError(
            f"scheduler {scheduler!r}: --dry-run, --retry-failed and --metrics-port need a single process; remove "
            "--scheduler"
        )
    config = ExtractConfig(
        cache=cache,
        dataset=name,
        data=str(data),
        split=split,
        annotations=str(annotations) if annotations else None,
        boxes=boxes,
        limit=limit,
        preset=preset,
        localizer=localizer,
        encoders=tuple(encoder or ()),
        weights=weights,
        sam_weights=sam_weights,
        clip_weights=clip_weights,
        device=device,
        dtype="float32" if exact else dtype,
        preprocess=preprocess,
        tokens=tokens,
        dense=maps == "dense",
        views=views,
        exif=exif,
        encoding=Encoding.parse(encoding),
        token_encoding=Encoding.parse(token_encoding),
        part_size=part_size or ExtractConfig.part_size,
        parts=parts,
        shard=shard,
        batch_size=batch_size,
        decode_threads=decode_threads,
        max_failures=FailureLimit.parse(max_failures),
        check_disk_space=room_check,
        take_over=take_over,
        metrics_port=metrics_port,
    )
    if part_size is not None:
        check_part_size(cache, part_size)
    if not dry_run:
        on_stop(AGAIN)
    if distributed:
        from regionspot.pipeline.distributed.run import extract_on

        result: DryRun | ExtractSummary | RetrySummary = extract_on(scheduler, config)
    else:
        from regionspot.pipeline.extraction.extract import Extraction  # imports torch

        config.check_models()
        extraction = Extraction.load(config)
        result = extraction.dry_run() if dry_run else extraction.retry() if retry_failed else extraction.run()
    typer.echo(options.json_text(result) if as_json else f"{cache}: {result.text()}")
