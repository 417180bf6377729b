"""The command line: one command per verb, no logic of its own.

Results go to stdout, progress and warnings to stderr. What the user can mend is said in one line with exit code 2;
`--debug` shows where it came from. Modules are imported inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Annotated, Literal, cast

import typer

from regionspot.cache.errors import RegionSpotError
from regionspot.cache.progress import log_to
from regionspot.cli_cache import cache_app
from regionspot.cli_doctor import doctor
from regionspot.cli_extract import extract
from regionspot.cli_options import (
    EVALUATION_FAILURES,
    Annotations,
    Boxes,
    Checkpoint,
    ClipWeights,
    Data,
    DatasetName,
    Device,
    Dtype,
    Limit,
    LocalCopy,
    LocalLimit,
    MaxFailures,
    OptionalExif,
    OptionalPreset,
    Preset,
    SamWeights,
    Split,
    Templates,
    Weights,
    manifest_of,
)

app = typer.Typer(
    help="Recognise any region of a picture by name.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(cache_app, name="cache")

Debug = Annotated[bool, typer.Option("--debug", help="show the traceback of an error")]


@app.callback()
def _options(debug: Debug = False) -> None:
    log_to(sys.stderr)


@app.command()
def dataset(
    name: DatasetName, data: Data, split: Split = "train", annotations: Annotations = None, boxes: Boxes = "gt"
) -> None:
    """Say what a dataset split holds, what reading it dropped and which photos are missing."""
    from regionspot.pipeline.datasets import describe, photo_dir

    manifest = manifest_of(name, data, split, annotations, boxes, None)
    typer.echo(describe(manifest, photo_dir(name, data, split, manifest)).text())


app.command()(extract)
app.command()(doctor)


@app.command()
def train(
    cache: Annotated[list[str], typer.Option(help="a cache to learn from, a folder or URL; may be given again")],
    out: Annotated[Path, typer.Option(help="folder of the head, its checkpoints, metrics and curves")],
    preset: Preset = "bl",
    localizer: Annotated[str | None, typer.Option(help="learn from this one's tokens instead of the preset's")] = None,
    encoder: Annotated[str | None, typer.Option(help="learn from this one's maps instead of the preset's")] = None,
    schedule: Annotated[str, typer.Option(help="the run's rates and length: paper or toy")] = "paper",
    ratio: Annotated[
        list[float] | None, typer.Option(help="share of the batches, one a cache; default: by size")
    ] = None,
    iterations: Annotated[int | None, typer.Option(help="steps; the schedule keeps its shape")] = None,
    batch_size: Annotated[int | None, typer.Option(help="pictures a step")] = None,
    lr: Annotated[float | None, typer.Option(help="learning rate")] = None,
    seed: Annotated[int | None, typer.Option(help="of the weights, batches and dropout")] = None,
    templates: Annotated[str, typer.Option(help="sentences around a name: reference, imagenet or plain")] = "reference",
    weights: Weights = None,
    clip_weights: ClipWeights = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on from the last checkpoint in --out")] = False,
    checkpoint_every: Annotated[int, typer.Option(help="steps")] = 2000,
    local_copy: LocalCopy = None,
    local_limit: LocalLimit = None,
    device: Device = None,
) -> None:
    """Train a fusion head from one or more caches."""
    from regionspot.cache.store import FeatureCache
    from regionspot.evaluation.vocabularies import cache_vocabulary
    from regionspot.fusion.config import train_config
    from regionspot.fusion.train import train as run
    from regionspot.pipeline.backbones import preset_named
    from regionspot.pipeline.registry import stored_name

    config = train_config(schedule, iterations=iterations, batch_size=batch_size, lr=lr, seed=seed)
    sets = preset_named(preset)
    tokens, maps = stored_name(localizer or sets.localizer), stored_name(encoder or sets.encoder)
    caches = [FeatureCache.open(path, local_copy=local_copy, local_limit=local_limit) for path in cache]
    vocabularies = [cache_vocabulary(one, maps, templates, clip_weights or weights, device) for one in caches]
    result = run(
        caches,
        vocabularies,
        out,
        config,
        preset=None if localizer or encoder else preset,
        ratios=ratio,
        map_set=maps,
        token_set=tokens,
        resume=resume,
        device=device,
        checkpoint_every=checkpoint_every,
    )
    typer.echo(f"{result.checkpoint}: {result.text()}")


@app.command("eval-lvis")
def eval_lvis(
    data: Data,
    out: Annotated[Path, typer.Option(help="folder of the results and of what a later run goes on with")],
    checkpoint: Annotated[Path | None, typer.Option(help="a trained head, ours or one released by the authors")] = None,
    baseline: Annotated[str | None, typer.Option(help="crop or pooled instead of a head, no training")] = None,
    dataset: Annotated[str, typer.Option(help="lvis, or toy")] = "lvis",
    split: Split = "val",
    annotations: Annotations = None,
    boxes: Boxes = "gt",
    cache: Annotated[str | None, typer.Option(help="features from here instead of the backbones; no masks")] = None,
    masks: Annotated[bool, typer.Option(help="make masks, and evaluate them")] = True,
    limit: Limit = None,
    preset: OptionalPreset = None,
    templates: Templates = None,
    weights: Weights = None,
    sam_weights: SamWeights = None,
    clip_weights: ClipWeights = None,
    check_weights: Annotated[
        bool, typer.Option(help="refuse other weights and features than the head was trained on")
    ] = True,
    exif: OptionalExif = None,
    preprocess: Annotated[
        str | None, typer.Option(help="direct or reference; default: as the features that the head was trained on")
    ] = None,
    max_failures: MaxFailures = EVALUATION_FAILURES,
    device: Device = None,
    dtype: Dtype = "auto",
) -> None:
    """LVIS AP of a head or a baseline, end to end from photos. Killed and run again, it goes on."""
    from regionspot.evaluation.evaluate import LvisEvaluation, evaluate_lvis
    from regionspot.evaluation.report import results_text
    from regionspot.pipeline.failure_limit import FailureLimit
    from regionspot.pipeline.photos import check_exif

    asked = LvisEvaluation(
        data=data,
        out=out,
        dataset=dataset,
        split=split,
        annotations=annotations,
        checkpoint=checkpoint,
        preset=preset,
        baseline=cast("Literal['crop', 'pooled'] | None", baseline),
        cache=cache,
        boxes=boxes,
        limit=limit,
        masks=masks,
        templates=templates,
        exif=check_exif(exif) if exif else None,
        weights=weights,
        sam_weights=sam_weights,
        clip_weights=clip_weights,
        device=device,
        dtype=dtype,
        preprocess=preprocess,
        check_weights=check_weights,
        max_failures=FailureLimit.parse(max_failures),
    )
    typer.echo(results_text(evaluate_lvis(asked)))


@app.command()
def predict(
    photo: Annotated[Path, typer.Argument(help="the picture")],
    checkpoint: Checkpoint,
    boxes: Annotated[str, typer.Option(help='"x1,y1,x2,y2;..." in pixels, or a JSON file of such boxes')],
    names: Annotated[str, typer.Option(help='what a box may be: "dog,red umbrella", or a file with a name a line')],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="picture with boxes, masks, names and scores")] = None,
    top: Annotated[int, typer.Option(help="names listed for each box")] = 5,
    preset: OptionalPreset = None,
    templates: Templates = None,
    weights: Weights = None,
    sam_weights: SamWeights = None,
    clip_weights: ClipWeights = None,
    device: Device = None,
    dtype: Dtype = "auto",
) -> None:
    """Name the boxes of one picture: JSON to stdout, the labelled picture to --out."""
    from regionspot.evaluation.boxes import parse_boxes, parse_names
    from regionspot.evaluation.drawing import check_picture_name, labelled
    from regionspot.evaluation.region_spot import RegionSpot
    from regionspot.pipeline.photos import read_photo

    asked, words = parse_boxes(boxes), parse_names(names)
    picture = read_photo(photo, exif="apply")
    target = check_picture_name(out) if out else None
    spot = RegionSpot.load(
        checkpoint, weights, device, preset=preset, sam_weights=sam_weights, clip_weights=clip_weights, dtype=dtype
    )
    regions = spot.predict(picture, asked, words, templates, masks=target is not None, top=top)
    if target:
        labelled(picture, regions).save(target)
    typer.echo(json.dumps([region.as_json() for region in regions], indent=1))


@app.command("toy-world")
def toy_world(
    out: Annotated[Path, typer.Argument(help="folder to write the world into")],
    pictures: Annotated[int, typer.Option(help="training and validation together")] = 1000,
    seed: Annotated[int, typer.Option(help="another seed, another world")] = 0,
) -> None:
    """Draw a small world of named shapes with LVIS-form annotations; its rare classes are only in val."""
    from regionspot.pipeline.toy_world import make_toy_world

    typer.echo(make_toy_world(out, pictures, seed))


@app.command()
def demo(
    out: Annotated[Path, typer.Argument(help="folder for everything that it makes")],
    pictures: Annotated[int, typer.Option(help="of the toy world")] = 3000,
    seed: Annotated[int, typer.Option(help="of the toy world")] = 0,
) -> None:
    """The main job on a toy world, every stage by its public command; needs no download."""
    from regionspot.evaluation.demo import run_demo

    typer.echo(run_demo(lambda arguments: app(arguments, standalone_mode=False), out, pictures, seed))


def main() -> None:
    """Entry point of `regionspot`."""
    try:
        app()
    except KeyboardInterrupt:
        logging.shutdown()  # a progress line that is being drawn ends here
        print("regionspot: stopped; the same command again goes on where it stopped", file=sys.stderr)
        sys.exit(130)
    except (RegionSpotError, OSError) as error:
        if "--debug" in sys.argv:
            raise
        logging.shutdown()
        print(f"regionspot: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
