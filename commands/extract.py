"""`regionspot extract`: images and frozen backbones to a cache."""

from __future__ import annotations

from typing import Annotated

import typer

from regionspot.commands.options import (
    EXTRACTION_FAILURES,
    MOST_IMAGES,
    MOST_THREADS,
    Annotations,
    Boxes,
    ClipWeights,
    Data,
    DatasetName,
    Device,
    DtypeName,
    ExifRule,
    Limit,
    MaxFailures,
    MetricsPort,
    PreprocessName,
    Preset,
    SamWeights,
    Split,
    TakeOver,
    TokensName,
    Weights,
)
from regionspot.commands.signals import AGAIN, on_stop

Dtype = Annotated[
    DtypeName,
    typer.Option(
        help="of the image encoders; auto: the cache's own, else float32 on a CPU, on a GPU bfloat16 for SAM and "
        "float16 for CLIP"
    ),
]


def extract(
    name: DatasetName,
    data: Data,
    cache: Annotated[str, typer.Option(help="the cache to fill: a folder ending in .zarr, or a URL: s3://...")],
    split: Split = "train",
    preset: Preset = "bl",
    localizer: Annotated[str | None, typer.Option(help="this one instead of the preset's; none: no tokens")] = None,
    encoder: Annotated[
        list[str] | None, typer.Option(help="instead of the preset's; may be given again; none: no maps")
    ] = None,
    boxes: Boxes = "gt",
    annotations: Annotations = None,
    limit: Limit = None,
    parts: Annotated[str | None, typer.Option(help='only these parts of the cache: "3,7-9"')] = None,
    shard: Annotated[str | None, typer.Option(help='only this share of the parts: "3/16", without a scheduler')] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="say how much there is to do and how long it takes; write nothing")
    ] = False,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="try just the images again that could not be read")
    ] = False,
    weights: Weights = None,
    sam_weights: SamWeights = None,
    clip_weights: ClipWeights = None,
    preprocess: Annotated[
        PreprocessName, typer.Option(help="reference: through 800 x 1333 pixels first, as the authors do")
    ] = "direct",
    tokens: Annotated[
        TokensName, typer.Option(help="first: location tokens; all: the other mask tokens and predicted IoUs as well")
    ] = "first",
    exif: ExifRule = "auto",
    part_size: Annotated[
        int | None,
        typer.Option(
            min=1, max=MOST_IMAGES, help="images a part, the unit of resuming; default: the cache's own, or 512"
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            min=1, max=MOST_IMAGES, help="images an encoder call; default: as in the parts there, else what suits"
        ),
    ] = None,
    decode_threads: Annotated[
        int | None, typer.Option(min=1, max=MOST_THREADS, help="that read images; default: a core each, 16 at most")
    ] = None,
    max_failures: MaxFailures = EXTRACTION_FAILURES,
    device: Device = None,
    dtype: Dtype = "auto",
    exact: Annotated[bool, typer.Option("--exact", help="float32 throughout, as --dtype float32")] = False,
    encoding: Annotated[str, typer.Option(help="maps: float16, float32, bfloat16, int8 (half the bytes)")] = "float16",
    token_encoding: Annotated[str, typer.Option(help="tokens, likewise; either may end in +zstd")] = "float16",
    scheduler: Annotated[
        str,
        typer.Option(
            help="workers to share the parts among: none, local (one a GPU), local:8, or a dask cluster's tcp://host:8786"
        ),
    ] = "none",
    room_check: Annotated[bool, typer.Option(help="refuse a disk that is too small for the features")] = True,
    metrics_port: MetricsPort = None,
    take_over: TakeOver = False,
) -> None:
    """Run the frozen backbones over a dataset, once, into a cache. Stopped and run again, it resumes.

    Any number of runs may share a cache: start the same command on as many machines as there are.
    """
    from regionspot.cache.errors import InputError
    from regionspot.cache.format.feature_dtypes import Encoding
    from regionspot.pipeline.datasets.failure_limit import FailureLimit
    from regionspot.pipeline.distributed.cluster import check_scheduler
    from regionspot.pipeline.extraction.config import ExtractConfig
    from regionspot.pipeline.extraction.part_choice import spans
    from regionspot.pipeline.extraction.part_selection import parse_shard
    from regionspot.pipeline.extraction.plan import check_part_size

    # Before annotations are read and models loaded, which takes minutes.
    if parts is not None:
        spans(parts)
    if shard is not None:
        parse_shard(shard)
    if exact and dtype not in ("auto", "float32"):
        raise InputError(f"--exact is --dtype float32, and --dtype {dtype} was given as well; leave one of them out")
    if dry_run and retry_failed:
        raise InputError("--dry-run and --retry-failed: give one of the two")
    on_workers = check_scheduler(scheduler) != "none"
    if on_workers and (dry_run or retry_failed or metrics_port is not None):
        raise InputError(
            f"scheduler {scheduler!r}: --dry-run, --retry-failed and --metrics-port want one process; leave it out"
        )
    if part_size is not None:
        check_part_size(cache, part_size)
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
        exif=exif,
        encoding=Encoding.parse(encoding),
        token_encoding=Encoding.parse(token_encoding),
        part_size=part_size or ExtractConfig.part_size,
        parts=parts,
        shard=shard,
        batch_size=batch_size,
        decode_threads=decode_threads,
        max_failures=FailureLimit.parse(max_failures),
        check_room=room_check,
        take_over=take_over,
        metrics_port=metrics_port,
    )
    if not dry_run:
        on_stop(AGAIN)
    if on_workers:
        from regionspot.pipeline.distributed.run import extract_on

        typer.echo(f"{cache}: {extract_on(scheduler, config).text()}")
    else:
        from regionspot.pipeline.extraction.run import Extraction  # imports torch

        config.check_models()
        extraction = Extraction.load(config)
        done = extraction.plan() if dry_run else extraction.retry() if retry_failed else extraction.run()
        typer.echo(f"{cache}: {done.text()}")
