"""Every head on the toy world: AP, parameters, and seconds to train.

Each type of head is trained from the cache that `make demo` fills, by the schedule `toy`, and evaluated from a cache of
the validation split. Both caches, and the world, are made where they are not there yet.

    make bench-heads            half an hour on two cores

A killed run resumes; remove build/bench/heads to train again.
"""

from __future__ import annotations

import logging
import math
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from benchmarks.goals import SCRATCH, Report, options, say, versions
from regionspot.cache import FeatureCache
from regionspot.evaluation.evaluate import EvaluationOptions, evaluate
from regionspot.evaluation.inference.cache_vocabulary import cache_vocabulary
from regionspot.fusion.checkpoint import load_checkpoint
from regionspot.fusion.training.config import TrainConfig, train_config
from regionspot.fusion.training.train import train
from regionspot.pipeline.backbones.bundle import Backbones
from regionspot.pipeline.datasets.registry import image_folder_of, read_dataset
from regionspot.pipeline.extraction.config import ExtractConfig
from regionspot.pipeline.extraction.extract import extract, open_for_extraction
from regionspot.pipeline.toy.world import make_toy_world

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "docs" / "heads.md"  # whose first program is the class MyHead
OWN = "my_head.py:MyHead"
# Table, type of head, its options.
HEADS: list[tuple[str, str, dict[str, Any]]] = [
    *(("Heads", head, {}) for head in ("fusion", "guided", "roi_pool", "mlp", "linear", OWN, "prototypes")),
    ("Options of `guided`", "guided", {"box_bias": False}),
    ("Options of `guided`", "guided", {"pooled_residual": False}),
    ("Options of `guided`", "guided", {"region_attention": True}),
]

PROTOCOL = """
Toy world of {images} images and its shipped SAM and CLIP: {train} training images with {regions} regions of {classes}
classes, cached in float16. Schedule `toy`{shortened}, seeds {seeds}, float32 on the CPU; `prototypes` is one pass over
the cache. Box AP by `hotcoco` in % on {val} validation images with ground-truth boxes, from a cache, and its standard
error; rare classes (APr) are never trained on. `{own}` is the class of docs/heads.md. Seconds are those
of the training steps. AP, APr and seconds are means over the seeds.
"""


@dataclass(frozen=True)
class Scale:
    """How much is done, and where. `data` holds the world and both caches."""

    data: Path
    runs: Path
    images: int
    seeds: tuple[int, ...]
    iterations: int | None  # None: the schedule's own


FULL = Scale(ROOT / "build" / "demo", SCRATCH / "heads" / "full", images=3000, seeds=(0, 1), iterations=None)
QUICK = Scale(SCRATCH / "heads" / "toy", SCRATCH / "heads" / "quick", images=60, seeds=(0,), iterations=20)


def main() -> None:
    arguments = options(__doc__ or "")
    logging.basicConfig(format="%(message)s")
    logging.getLogger("regionspot").setLevel(logging.INFO)
    scale = QUICK if arguments.quick else FULL
    make_toy_world(scale.data / "world", scale.images)
    caches = {split: extracted(scale.data, split) for split in ("train", "val")}
    scale.runs.mkdir(parents=True, exist_ok=True)
    own_class = re.search(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    assert own_class is not None
    (scale.runs / OWN.split(":")[0]).write_text(own_class[1])
    report = Report(
        "heads",
        "Heads on the toy world",
        PROTOCOL.format(
            images=f"{scale.images:,}",
            train=f"{len(caches['train']):,}",
            regions=f"{caches['train'].manifest.region_count.sum():,}",
            classes=len(caches["train"].categories),
            val=len(caches["val"]),
            shortened=f" cut to {scale.iterations} steps" if scale.iterations else "",
            seeds=", ".join(map(str, scale.seeds)),
            own=OWN,
        ),
        versions(["numpy", "torch", "zarr", "hotcoco"]),
    )
    for table, head, head_options in HEADS:
        runs = [run_of(head, head_options, seed, caches, scale) for seed in scale.seeds]
        add_row(report, table, ", ".join([head, *(f"{name}={value}" for name, value in head_options.items())]), runs)
    report.finish(arguments.results)


def extracted(data: Path, split: str) -> FeatureCache:
    """The cache of a split of the toy world in `data`, as `regionspot extract toy` makes it."""
    path, world = data / f"{split}.zarr", data / "world"
    say(f"extract the {split} split into {path}")
    manifest = read_dataset("toy", world, split)
    images, backbones = image_folder_of("toy", world, split, manifest), Backbones.load("toy", device="cpu")
    cache = open_for_extraction(path, manifest, images, backbones, ExtractConfig())
    extract(cache, images, backbones)
    return FeatureCache.open(path)


@dataclass(frozen=True)
class Run:
    """One trained head: AP, APr and APs in %, the number of trained weights, (CPU) seconds of its training."""

    ap: float
    apr: float
    aps: float
    parameters: int
    seconds: float
    cpu_seconds: float

    @classmethod
    def of(cls, folder: Path, config: TrainConfig, caches: Mapping[str, FeatureCache], world: Path) -> Run:
        """Train in `folder` on the cache "train", or resume, and evaluate on the cache "val"."""
        vocabulary = cache_vocabulary(caches["train"], "toy_clip", device="cpu")
        started = time.process_time()
        result = train(
            [caches["train"]],
            [vocabulary],
            folder,
            config,
            preset="toy",
            resume=True,
            device="cpu",
        )
        cpu_seconds = time.process_time() - started
        assert result is not None
        evaluation = EvaluationOptions(
            data=world,
            out=folder / "val",
            dataset="toy",
            checkpoint=result.checkpoint,
            head_class=config.head,
            cache=caches["val"].path,
            masks=False,
            device="cpu",
        )
        box = evaluate(evaluation)["bbox"]
        module = load_checkpoint(result.checkpoint, head_class=config.head).head
        parameters = sum(parameter.numel() for parameter in module.parameters())
        ap, apr, aps = (100 * (box[name] or 0.0) for name in ("AP", "APr", "APs"))
        return cls(ap, apr, aps, parameters, result.seconds, cpu_seconds)


def run_of(head: str, head_options: dict[str, Any], seed: int, caches: dict[str, FeatureCache], scale: Scale) -> Run:
    say(f"{head} {head_options or ''}, seed {seed}")
    kind = f"{scale.runs / head}" if head == OWN else head
    folder = scale.runs / "_".join([head.partition(".")[0], *head_options, str(seed)])
    config = train_config("toy", seed=seed, iterations=scale.iterations, head=kind, head_options=head_options)
    return Run.of(folder, config, caches, scale.data / "world")


def add_row(report: Report, table: str, head: str, runs: list[Run]) -> None:
    columns: dict[str, Any] = {"head": f"`{head}`"}
    for name, values in (("AP", [run.ap for run in runs]), ("APr", [run.apr for run in runs])):
        error = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
        columns |= {name: mean(values), f"± {name}": error}
    seconds = mean(run.seconds for run in runs)
    report.add_row(table, **columns, parameters=f"{runs[0].parameters:,}", seconds=seconds)


if __name__ == "__main__":
    main()
