"""Options that several commands have, in the same words, and what they come to together."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from regionspot.cache.claims import CLAIM_SECONDS
from regionspot.pipeline.failure_limit import EVALUATION_LIMIT, EXTRACTION_LIMIT

if TYPE_CHECKING:
    from regionspot.cache.manifest import Manifest

DatasetName = Annotated[str, typer.Argument(help="o365, o365v2, openimages, v3det, lvis, coco or toy")]
Data = Annotated[Path, typer.Option(help="folder of the dataset: annotation files and photos")]
Split = Annotated[str, typer.Option(help="train, val, ...")]
Annotations = Annotated[Path | None, typer.Option(help="this annotation file instead of the dataset's own")]
Boxes = Annotated[str, typer.Option(help="gt, or a detector's proposals file")]
Limit = Annotated[int | None, typer.Option(help="only the first pictures")]
TakeOver = Annotated[
    bool,
    typer.Option(
        "--take-over",
        help="do at once what other runs on this cache were doing: only when they are known to be gone. Without it, a "
        f"run on another machine counts as gone when it shows no life for {CLAIM_SECONDS:.0f} seconds",
    ),
]
EXTRACTION_FAILURES, EVALUATION_FAILURES = str(EXTRACTION_LIMIT), str(EVALUATION_LIMIT)

Preset = Annotated[str, typer.Option(help="backbones: bb, bl, bl336 or toy")]
OptionalPreset = Annotated[str | None, typer.Option(help="backbones, where the checkpoint does not state them")]
Checkpoint = Annotated[Path, typer.Option(help="a trained head, ours or one released by the authors")]
Templates = Annotated[
    str | None, typer.Option(help="prompt templates: reference, imagenet, plain; default: the checkpoint's")
]
Weights = Annotated[
    str | None,
    typer.Option(help="folder of the official files, or random:SEED for benchmarks; default: downloaded once"),
]
SamWeights = Annotated[str | None, typer.Option(help="this SAM file instead")]
ClipWeights = Annotated[str | None, typer.Option(help="this CLIP file instead")]
ExifRule = Annotated[str, typer.Option(help="orientation: auto (where the stated size asks for it), apply or ignore")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1; default: a GPU where there is one")]
OptionalExif = Annotated[
    str | None,
    typer.Option(help="orientation: auto, apply or ignore; default: as for the features that the head was trained on"),
]
Dtype = Annotated[
    str,
    typer.Option(
        help="of the image encoders: float32, bfloat16, float16, or auto: as of the features the head was trained on"
    ),
]
LocalCopy = Annotated[Path | None, typer.Option(help="of a remote cache: keep what is read of it in this folder")]
LocalLimit = Annotated[str | None, typer.Option(help="of --local-copy: 500GB; what was used least lately goes first")]
MaxFailures = Annotated[
    str, typer.Option(help='stop when more images than this are broken: "1%" of all images, or "200"')
]


def manifest_of(name: str, data: Path, split: str, annotations: Path | None, boxes: str, limit: int | None) -> Manifest:
    """The split with the boxes asked for."""
    from regionspot.pipeline.datasets import read_dataset
    from regionspot.pipeline.proposals import with_boxes

    return with_boxes(read_dataset(name, data, split, annotations), boxes).head(limit)
