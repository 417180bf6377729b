"""Options that several commands share.

Every number has a range and every choice a list, so a wrong value is refused before anything is loaded. A choice is a
Literal instead of the library's table, because importing the table imports torch; a test compares the two.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from regionspot.cache.format.schema import MAX_PART_SIZE
from regionspot.cache.writing.claims import CLAIM_SECONDS
from regionspot.pipeline.datasets.failure_limit import EVALUATION_LIMIT, EXTRACTION_LIMIT

PresetName = Literal["bb", "bl", "bl336", "toy"]
DtypeName = Literal["auto", "float32", "bfloat16", "float16"]
PreprocessName = Literal["direct", "reference"]
TemplatesName = Literal["reference", "imagenet", "plain"]
NamesFromName = Literal["name", "synonyms", "definitions"]
PaddingName = Literal["mask", "reference"]
UnverifiedName = Literal["ignored", "negative"]
ScheduleName = Literal["paper", "stage2", "fast", "toy"]
TrackerName = Literal["trackio", "wandb"]
TokensName = Literal["first", "all"]
MapName = Literal["feature", "dense"]
ViewsName = Literal["flip"]
BaselineName = Literal["crop", "pooled", "dense", "dense-mask"]
SelectionName = Literal["best", "reference", "tokenize-anything"]
ScoreName = Literal["product", "sqrt"]
EngineName = Literal["hotcoco", "lvis"]
MaskThresholdName = Literal["sam", "reference"]
ExifName = Literal["auto", "apply", "ignore"]
ZeroShotName = Literal["crop", "dense"]
PredictionForm = Literal["regions", "coco"]

DatasetName = Annotated[str, typer.Argument(help="o365, o365v2, openimages, v3det, lvis, coco or toy")]
Data = Annotated[Path, typer.Option(help="folder of the dataset: annotation files and images")]
Split = Annotated[str, typer.Option(help="train, val, ...")]
Annotations = Annotated[Path | None, typer.Option(help="this annotation file instead of the dataset's")]
Boxes = Annotated[str, typer.Option(help="gt, or a detector's proposals file")]
Limit = Annotated[int | None, typer.Option(min=1, help="only the first N images, in this run")]
Scheduler = Annotated[
    str, typer.Option(help="workers: none, local (one per GPU), local:8, or the tcp://host:8786 of a dask cluster")
]
TakeOver = Annotated[
    bool,
    typer.Option(
        "--take-over",
        help="take over the parts of other runs on this cache at once: only if these runs are dead. Without it, a run "
        f"on another machine counts as dead when its heartbeat stops for {CLAIM_SECONDS:.0f} seconds",
    ),
]
EXTRACTION_FAILURES, EVALUATION_FAILURES = str(EXTRACTION_LIMIT), str(EVALUATION_LIMIT)

# A pair of backbones, alone or with the schedule that it is trained by; see fusion/training/config.py.
TrainPresetName = Literal[
    "bb", "bl", "bl336", "toy",
    "stage1-bb", "stage1-bl", "stage1-bl336",
    "stage2-bb", "stage2-bl", "stage2-bl336",
    "fast-bb", "fast-bl", "fast-bl336",
]  # fmt: skip

Preset = Annotated[PresetName, typer.Option(help="the pair of backbones")]
OptionalPreset = Annotated[
    PresetName | None, typer.Option(help="the pair of backbones, if the checkpoint does not state it")
]
Checkpoint = Annotated[Path, typer.Option(help="a trained head, ours or one released by the authors")]
HeadClass = Annotated[
    str | None,
    typer.Option(help="file.py:Class of a head of your own class, as it was trained; this code is then run"),
]
Templates = Annotated[
    TemplatesName | None, typer.Option(help="prompt templates; default: those that the head was trained with")
]
NamesFrom = Annotated[
    NamesFromName, typer.Option(help="what the prompts contain: the name, all synonyms, or name and definition")
]
Weights = Annotated[
    str | None,
    typer.Option(help="folder of the official files, or random:SEED for benchmarks; default: downloaded once"),
]
SamWeights = Annotated[str | None, typer.Option(help="this file of SAM weights instead")]
ClipWeights = Annotated[str | None, typer.Option(help="this file of CLIP weights instead")]
ExifRule = Annotated[
    ExifName, typer.Option(help="EXIF orientation; auto: applied if the size in the annotations requires it")
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1; default: a GPU if available")]
OptionalExif = Annotated[
    ExifName | None, typer.Option(help="EXIF orientation; default: as for the features that the head was trained on")
]
Dtype = Annotated[
    DtypeName, typer.Option(help="of the image encoders; auto: as for the features that the head was trained on")
]
LocalCopy = Annotated[Path | None, typer.Option(help="for a remote cache: keep a copy of what is read in this folder")]
LocalLimit = Annotated[
    str | None, typer.Option(help="size of --local-copy: 500GB; the least recently used is deleted first")
]
MaxFailures = Annotated[
    str, typer.Option(help='stop when more images, or annotations, than this are unreadable: "1%" of all, or "200"')
]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON")]
MetricsPort = Annotated[
    int | None, typer.Option(min=1, max=65535, help="serve Prometheus metrics at this port during the run: 9400")
]
_SEED = {"min": 0, "max": 2**32 - 1}
Seed = Annotated[int | None, typer.Option(**_SEED, help="random seed of weights, batches and dropout")]
WorldSeed = Annotated[int, typer.Option(**_SEED, help="random seed of the toy world")]
WorldSize = Annotated[
    int, typer.Option("--pictures", min=40, max=1_000_000, help="images of the toy world, training and validation")
]
# Upper bounds where memory or threads run out, far beyond normal use.
MAX_IMAGES, MAX_THREADS, MAX_STEPS = MAX_PART_SIZE, 1024, 10_000_000


def json_text(result: Any) -> str:
    """A result, which is a dataclass, for --json."""
    return json.dumps(asdict(result), indent=1, default=str, allow_nan=False)
