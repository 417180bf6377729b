"""The command line: one command per verb, no logic of its own.

Results go to stdout, progress and warnings to stderr. What the user can mend is said in one line with exit code 2;
`--debug` shows where it came from. Ctrl-C and SIGTERM end in one line as well (commands/signals.py). Modules are
imported inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import typer

from regionspot.cache.errors import InputError, RegionSpotError
from regionspot.cache.progress import CLEAR_LINE, log_to
from regionspot.commands.cache import cache_app
from regionspot.commands.doctor import doctor
from regionspot.commands.extract import extract
from regionspot.commands.options import (
    EVALUATION_FAILURES,
    EXTRACTION_FAILURES,
    MOST_IMAGES,
    MOST_STEPS,
    Annotations,
    BaselineName,
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
    PreprocessName,
    Preset,
    SamWeights,
    ScheduleName,
    Seed,
    Split,
    Templates,
    TemplatesName,
    Weights,
    WorldSeed,
    WorldSize,
)
from regionspot.commands.signals import AGAIN, on_stop, signals_interrupt, stop_line

app = typer.Typer(
    help="Recognise any region of an image by name.",
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
    name: DatasetName,
    data: Data,
    split: Split = "train",
    annotations: Annotations = None,
    boxes: Boxes = "gt",
    max_failures: MaxFailures = EXTRACTION_FAILURES,
) -> None:
    """Say what a dataset split holds, what reading it dropped and which images are missing."""
    from dataclasses import replace

    from regionspot.pipeline.datasets.failure_limit import FailureLimit
    from regionspot.pipeline.datasets.proposals import with_boxes
    from regionspot.pipeline.datasets.registry import describe, image_folder_of, read_dataset, require_regions

    limit = FailureLimit.parse(max_failures)
    manifest = with_boxes(read_dataset(name, data, split, annotations, max_failures=limit), boxes, limit)
    typer.echo(describe(manifest, image_folder_of(name, data, split, manifest)).text())
    require_regions(replace(manifest, remarks=()))  # they stand in the report


app.command()(extract)
app.command()(doctor)


@app.command()
def train(
    cache: Annotated[list[str], typer.Option(help="a cache to learn from, a folder or URL; may be given again")],
    out: Annotated[Path, typer.Option(help="folder of the head, its checkpoints, metrics and curves")],
    preset: Preset = "bl",
    localizer: Annotated[str | None, typer.Option(help="learn from this one's tokens instead of the preset's")] = None,
    encoder: Annotated[str | None, typer.Option(help="learn from this one's maps instead of the preset's")] = None,
    schedule: Annotated[ScheduleName, typer.Option(help="learning rates and length of the run")] = "paper",
    ratio: Annotated[
        list[float] | None, typer.Option(min=0, help="share of the batches, one a cache; default: by size")
    ] = None,
    iterations: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=MOST_STEPS,
            help="steps; the schedule keeps its shape. More of them, with --resume, lengthen a run",
        ),
    ] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, max=MOST_IMAGES, help="images a step")] = None,
    lr: Annotated[float | None, typer.Option(min=0, help="learning rate")] = None,
    seed: Seed = None,
    templates: Annotated[TemplatesName, typer.Option(help="sentences around a name")] = "reference",
    weights: Weights = None,
    clip_weights: ClipWeights = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="from the last checkpoint in --out, if there is one")
    ] = False,
    checkpoint_every: Annotated[
        int, typer.Option(min=1, max=MOST_STEPS, help="steps; a checkpoint is saved every 10 minutes as well")
    ] = 2000,
    local_copy: LocalCopy = None,
    local_limit: LocalLimit = None,
    device: Device = None,
) -> None:
    """Train a fusion head from one or more caches."""
    from regionspot.cache.outputs import check_output_folder
    from regionspot.cache.store import FeatureCache
    from regionspot.evaluation.inference.vocabularies import cache_vocabulary
    from regionspot.fusion.config import train_config
    from regionspot.fusion.train import train as run
    from regionspot.pipeline.backbones.builders import get_preset
    from regionspot.pipeline.backbones.registry import stored_name
    from regionspot.pipeline.backbones.weights import check_source

    check_output_folder(out, cache)
    for source in (weights, clip_weights):
        check_source(source)  # which a stored vocabulary does without
    config = train_config(schedule, iterations=iterations, batch_size=batch_size, lr=lr, seed=seed)
    sets = get_preset(preset)
    tokens, maps = stored_name(localizer or sets.localizer), stored_name(encoder or sets.encoder)
    caches = [FeatureCache.open(path, local_copy=local_copy, local_limit=local_limit) for path in cache]
    vocabularies = [cache_vocabulary(one, maps, templates, clip_weights or weights, device) for one in caches]
    on_stop("run the same command with --resume to resume")
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
    baseline: Annotated[BaselineName | None, typer.Option(help="instead of a head; needs no training")] = None,
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
        PreprocessName | None, typer.Option(help="default: as the features that the head was trained on")
    ] = None,
    max_failures: MaxFailures = EVALUATION_FAILURES,
    device: Device = None,
    dtype: Dtype = "auto",
) -> None:
    """LVIS AP of a head or a baseline, end to end from images. Stopped and run again, it resumes."""
    from regionspot.evaluation.evaluate import LvisEvaluation, evaluate_lvis
    from regionspot.evaluation.report.tables import results_text
    from regionspot.pipeline.datasets.failure_limit import FailureLimit

    asked = LvisEvaluation(
        data=data,
        out=out,
        dataset=dataset,
        split=split,
        annotations=annotations,
        checkpoint=checkpoint,
        preset=preset,
        baseline=baseline,
        cache=cache,
        boxes=boxes,
        limit=limit,
        masks=masks,
        templates=templates,
        exif=exif,
        weights=weights,
        sam_weights=sam_weights,
        clip_weights=clip_weights,
        device=device,
        dtype=dtype,
        preprocess=preprocess,
        check_weights=check_weights,
        max_failures=FailureLimit.parse(max_failures),
    )
    on_stop(AGAIN)
    typer.echo(results_text(evaluate_lvis(asked)))


@app.command()
def predict(
    image: Annotated[Path, typer.Argument(help="the image")],
    checkpoint: Checkpoint,
    boxes: Annotated[str | None, typer.Option(help='"x1,y1,x2,y2;..." in pixels, or @FILE as --boxes-file')] = None,
    names: Annotated[
        str | None, typer.Option(help='what a box may be: "dog,red umbrella", or @FILE as --names-file')
    ] = None,
    boxes_file: Annotated[Path | None, typer.Option(help="JSON: [[x1, y1, x2, y2], ...]")] = None,
    names_file: Annotated[Path | None, typer.Option(help="text: one name a line")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="image with boxes, masks, names and scores")] = None,
    top: Annotated[int, typer.Option(min=1, help="names listed for each box")] = 5,
    preset: OptionalPreset = None,
    templates: Templates = None,
    weights: Weights = None,
    sam_weights: SamWeights = None,
    clip_weights: ClipWeights = None,
    device: Device = None,
    dtype: Dtype = "auto",
) -> None:
    """Name the boxes of one image: JSON to stdout, the labelled image to --out."""
    from regionspot.cache.outputs import check_output_file
    from regionspot.evaluation.inference.boxes import boxes_from, names_from
    from regionspot.evaluation.inference.region_spot import RegionSpot
    from regionspot.evaluation.report.drawing import check_image_name, labelled, save_image
    from regionspot.pipeline.images.decode import read_image

    if out:
        inputs = (image, checkpoint, boxes_file, names_file, weights, sam_weights, clip_weights)
        check_output_file(check_image_name(out), inputs)
    asked, words = boxes_from(boxes, boxes_file), names_from(names, names_file)
    pixels = read_image(image, exif="apply")
    spot = RegionSpot.load(
        checkpoint, weights, device, preset=preset, sam_weights=sam_weights, clip_weights=clip_weights, dtype=dtype
    )
    regions = spot.predict(pixels, asked, words, templates, masks=out is not None, top=top)
    typer.echo(json.dumps([region.as_json() for region in regions], indent=1, allow_nan=False))
    if out:
        save_image(labelled(pixels, regions), out)


@app.command("toy-world")
def toy_world(
    out: Annotated[Path, typer.Argument(help="folder to write the world into")],
    images: WorldSize = 1000,
    seed: WorldSeed = 0,
) -> None:
    """Draw a small world of named shapes with LVIS-form annotations; its rare classes are only in val."""
    from regionspot.pipeline.toy.world import make_toy_world

    typer.echo(make_toy_world(out, images, seed))


@app.command()
def demo(
    out: Annotated[Path, typer.Argument(help="folder for everything that it makes")],
    images: WorldSize = 3000,
    seed: WorldSeed = 0,
) -> None:
    """The main job on a toy world, every stage by its public command; needs no download."""
    from regionspot.evaluation.demo import run_demo

    def stage(arguments: Sequence[str]) -> None:
        try:
            _run(arguments)
        finally:
            on_stop(AGAIN)  # the demo resumes, however this stage would by itself

    on_stop(AGAIN)
    typer.echo(run_demo(stage, out, images, seed))


def main() -> None:
    """Entry point of `regionspot`: all ways in which a command can end."""
    with signals_interrupt():
        try:
            # Not standalone: typer would draw a box around errors, and say nothing of Ctrl-C.
            sys.exit(_run(sys.argv[1:]))
        except (Exception, KeyboardInterrupt) as error:
            # First: whatever fails while a signal is answered is not what the user wants to know.
            line, code = stop_line() or _error_line(error) or (None, 1)
            if line is None or "--debug" in sys.argv:
                raise
    logging.shutdown()  # a progress line that is being drawn ends here
    with suppress(OSError):  # nobody may be listening any more
        # A terminal has written ^C where the line begins.
        clear = CLEAR_LINE if sys.stderr.isatty() else ""
        print(f"{clear}regionspot: {' '.join(line.split())}", file=sys.stderr)
    sys.exit(code)


def _run(arguments: Sequence[str]) -> int:
    """The command's exit code."""
    for before, word in pairwise(["regionspot", *arguments]):
        # An unset shell variable, nearly always. A path of this name would be the working folder.
        if re.fullmatch(r"(--[\w-]+=)?\s*", word):
            raise InputError(f"the argument behind {(word.strip() or before).removesuffix('=')} is empty; give a value")
    code = app(list(arguments), standalone_mode=False)
    if stop_line():  # which typer makes an exit code of its own of
        raise KeyboardInterrupt
    return int(code or 0)


def _error_line(error: BaseException) -> tuple[str, int] | None:
    """What the user is told of an error that can be mended, and the exit code; None for a bug of ours."""
    if isinstance(error, RegionSpotError | OSError):
        return str(error), 2
    if hasattr(error, "format_message"):  # a wrong command line; typer has click's classes under different names
        return error.format_message().replace("Value error, ", "") or "give one of these commands", 2
    return None


if __name__ == "__main__":
    main()
