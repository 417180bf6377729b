"""`regionspot train`: a head from caches."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from regionspot.cache.errors import InputError
from regionspot.commands import options
from regionspot.commands.signals import on_stop


def train(
    cache: Annotated[list[str], typer.Option(help="a cache to train from, a folder or URL; can be repeated")],
    out: Annotated[Path, typer.Option(help="folder for the head, its checkpoints, metrics and curves")],
    preset: Annotated[
        options.TrainPresetName,
        typer.Option(help="the pair of backbones; stage1-, stage2- and fast- before it choose a schedule"),
    ] = "bl",
    localizer: Annotated[str | None, typer.Option(help="train on this localizer's tokens, not the preset's")] = None,
    encoder: Annotated[str | None, typer.Option(help="train on this encoder's feature maps, not the preset's")] = None,
    schedule: Annotated[
        options.ScheduleName | None, typer.Option(help="learning rates and number of steps; default: paper")
    ] = None,
    init: Annotated[Path | None, typer.Option(help="start from this head: another run's, or a released one")] = None,
    ratio: Annotated[
        list[float] | None, typer.Option(min=0, help="share of the batches, one per cache; default: by the schedule")
    ] = None,
    head: Annotated[
        str, typer.Option(help="fusion, guided, linear, mlp, roi_pool, prototypes, or your own class: file.py:Class")
    ] = "fusion",
    head_option: Annotated[
        list[str] | None, typer.Option(help="an argument of the head's class: hidden=512; can be repeated")
    ] = None,
    iterations: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=options.MAX_STEPS,
            help="steps; the schedule is scaled to them. More steps with --resume lengthen a run",
        ),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, max=options.MAX_IMAGES, help="images per step, of all processes together")
    ] = None,
    max_regions: Annotated[
        int | None,
        typer.Option(min=0, help="at most so many regions of an image, a random choice in every epoch; 0: all"),
    ] = None,
    views: Annotated[
        options.ViewsName | None,
        typer.Option(help="flip: half of the batches are of mirrored images, which `extract --views flip` has added"),
    ] = None,
    pack: Annotated[
        bool | None, typer.Option("--pack/--no-pack", help="batches of images with similar numbers of regions")
    ] = None,
    padding: Annotated[
        options.PaddingName | None, typer.Option(help="mask padding, or repeat regions in its place like the authors")
    ] = None,
    negatives: Annotated[
        int | None, typer.Option(min=0, help="draw so many classes as negatives at each step; 0: all classes")
    ] = None,
    unverified: Annotated[
        options.UnverifiedName | None,
        typer.Option(help="classes that were not verified in an image (LVIS, OpenImages); negative: like the authors"),
    ] = None,
    repeat_threshold: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="repeat images with a class on less than this share of images; LVIS: 0.001"),
    ] = None,
    compile: Annotated[bool, typer.Option("--compile", help="compile the head by torch.compile")] = False,
    lr: Annotated[float | None, typer.Option(min=0, help="learning rate")] = None,
    clip_norm: Annotated[float | None, typer.Option(min=0, help="maximum norm of all gradients together")] = None,
    seed: options.Seed = None,
    templates: Annotated[options.TemplatesName, typer.Option(help="prompt templates of the class names")] = "reference",
    names_from: options.NamesFrom = "name",
    weights: options.Weights = None,
    clip_weights: options.ClipWeights = None,
    resume: Annotated[bool, typer.Option("--resume", help="from the last checkpoint in --out, if any")] = False,
    checkpoint_every: Annotated[
        int, typer.Option(min=1, max=options.MAX_STEPS, help="steps between checkpoints; also every 10 minutes")
    ] = 2000,
    keep_checkpoints: Annotated[int, typer.Option(min=1, help="keep the heads of the last checkpoints")] = 3,
    val_cache: Annotated[
        str | None, typer.Option(help="validate on this cache, a folder or URL, and keep the best head")
    ] = None,
    val_annotations: Annotated[
        Path | None, typer.Option(help="LVIS annotations of --val-cache: the best head is that with the best AP")
    ] = None,
    val_every: Annotated[
        int | None,
        typer.Option(min=1, max=options.MAX_STEPS, help="steps between validations; default: 2,000, or 50 a run"),
    ] = None,
    val_images: Annotated[
        int | None, typer.Option(min=1, help="validate on so many images, evenly spaced; default: all")
    ] = None,
    log_to: Annotated[
        options.TrackerName | None, typer.Option(help="send the metrics to this tracker; TensorBoard needs no option")
    ] = None,
    local_copy: options.LocalCopy = None,
    local_limit: options.LocalLimit = None,
    device: options.Device = None,
) -> None:
    """Train a fusion head from one or more caches.

    Example: regionspot train --cache o365.zarr --preset bl --out runs/bl --resume
    """
    from regionspot.cache.outputs import check_output_folder
    from regionspot.cache.store import FeatureCache
    from regionspot.evaluation.inference.cache_vocabulary import cache_vocabulary
    from regionspot.evaluation.validation import cache_validator
    from regionspot.fusion.heads.spec import parse_options
    from regionspot.fusion.training.config import train_config
    from regionspot.fusion.training.trackers import require_tracker
    from regionspot.fusion.training.train import train as run
    from regionspot.pipeline.backbones.builders import get_preset
    from regionspot.pipeline.backbones.registry import stored_name
    from regionspot.pipeline.backbones.weights import check_source

    pair, schedule_name = pair_and_schedule(preset, schedule)
    check_output_folder(out, [*cache, init, val_cache, val_annotations])
    for source in (weights, clip_weights):
        check_source(source)  # also where a stored vocabulary makes them unnecessary
    config = train_config(
        schedule_name,
        head=head,
        head_options=parse_options(head_option or ()),
        iterations=iterations,
        batch_size=batch_size,
        lr=lr,
        clip_norm=clip_norm,
        seed=seed,
        max_regions=max_regions,
        views=views,
        pack=pack,
        padding=padding,
        negatives=negatives,
        unverified=unverified,
        repeat_threshold=repeat_threshold,
    )
    require_tracker(log_to)
    if val_annotations and not val_cache:
        raise InputError(f"--val-annotations {val_annotations}: needs a cache of these images; give --val-cache, too")
    backbones = get_preset(pair)
    tokens, maps = stored_name(localizer or backbones.localizer), stored_name(encoder or backbones.encoder)
    caches = [
        FeatureCache.open(path, local_copy=local_copy, local_limit=local_limit, manifest_on_disk=True) for path in cache
    ]
    text = partial(
        cache_vocabulary,
        map_set=maps,
        templates=templates,
        source=clip_weights or weights,
        device=device,
        names_from=names_from,
    )
    vocabularies = [text(one) for one in caches]
    validate = None
    if val_cache:
        validated = FeatureCache.open(val_cache)
        validate = cache_validator(
            validated,
            text(validated),
            tokens,
            maps,
            annotations=val_annotations,
            limit=val_images,
            trained_on=caches[0],
        )
    on_stop("run the same command with --resume to resume")
    result = run(
        caches,
        vocabularies,
        out,
        config,
        preset=None if localizer or encoder else pair,
        ratios=ratio,
        map_set=maps,
        token_set=tokens,
        init=init,
        compile=compile,
        resume=resume,
        device=device,
        validate=validate,
        validate_every=val_every,
        checkpoint_every=checkpoint_every,
        kept_checkpoints=keep_checkpoints,
        log_to=log_to,
    )
    if result:
        typer.echo(f"{result.checkpoint}: {result.text()}")


def pair_and_schedule(preset: str, schedule: str | None) -> tuple[str, str]:
    """The pair of backbones and the schedule of --preset, which may name both: "stage2-bl".

    Raises InputError if --schedule is given, too.
    """
    stage, _, pair = preset.rpartition("-")
    if stage and schedule:
        raise InputError(f"--preset {preset}: chooses the schedule; leave --schedule {schedule} out")
    return pair, schedule or {"": "paper", "stage1": "paper"}.get(stage, stage)
