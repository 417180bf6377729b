"""Which options of a head pay: every option of the guided head alone and left out, depth, map, encoding, data.

All heads are trained for the same number of steps, from caches of one toy world, with the same seeds, and evaluated on
the same validation images. Trainings run side by side, one thread each. An option pays where it changes AP by more than
two standard deviations of its runs.

    make ablate                 40 minutes on two cores

The result of each training is kept, and a killed run continues with the next one; remove build/bench/ablate to start
again.
"""

from __future__ import annotations

import json
import logging
import math
import multiprocessing
import os
import shutil
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np

from benchmarks.ablate_chart import draw
from benchmarks.goals import SCRATCH, Report, options, say, versions
from benchmarks.heads import Run, extracted
from regionspot.cache import FeatureCache, ImageFeatures
from regionspot.cache.format.feature_dtypes import Encoding
from regionspot.cache.machine import processors
from regionspot.cache.tools.merge_subset_convert import convert, subset
from regionspot.fusion.training.config import train_config
from regionspot.pipeline.toy.world import make_toy_world

CHART = Path(__file__).resolve().parents[1] / "docs" / "bench_ablations.png"
REFERENCE, GUIDED = "reference", "guided"
# The guided head without its options, which equals the fusion head, by test (tests/fusion/test_guided_head.py).
WITHOUT = {"box_bias": False, "pooled_residual": False, "region_attention": True}
ATTENTION_LOSS = 0.05


@dataclass(frozen=True)
class Variant:
    """A head to train; `data` names the caches (`caches_of`), `decoder` has fields of TrainConfig."""

    table: str
    name: str
    head: str
    options: dict[str, Any] = field(default_factory=dict)
    data: str = "all"
    decoder: dict[str, int] = field(default_factory=dict)


BOTH = ((REFERENCE, "fusion"), (GUIDED, "guided"))
ALONE, LEFT_OUT, DEPTH, FEATURES, IMAGES = (
    "Reference head with one option",
    "Guided head with one option changed",
    "Layers",
    "Features",
    "Training images",
)
VARIANTS = [
    Variant(ALONE, REFERENCE, "fusion"),
    Variant(ALONE, "reference, box_bias=true", "guided", {**WITHOUT, "box_bias": True}),
    Variant(ALONE, "reference, pooled_residual=true", "guided", {**WITHOUT, "pooled_residual": True}),
    Variant(ALONE, "reference, region_attention=false", "guided", {**WITHOUT, "region_attention": False}),
    Variant(ALONE, f"reference, attention_loss={ATTENTION_LOSS}", "fusion", {"attention_loss": ATTENTION_LOSS}),
    Variant(LEFT_OUT, GUIDED, "guided"),
    Variant(LEFT_OUT, "guided, box_bias=false", "guided", {"box_bias": False}),
    Variant(LEFT_OUT, "guided, pooled_residual=false", "guided", {"pooled_residual": False}),
    Variant(LEFT_OUT, "guided, region_attention=true", "guided", {"region_attention": True}),
    *(Variant(DEPTH, f"{name}, {n}", head, decoder={"layers": n}) for name, head in BOTH for n in (1, 3)),
    *(Variant(FEATURES, f"{name}, int8", head, data="int8") for name, head in BOTH),
    *(Variant(FEATURES, f"{name}, map of half the side", head, data="half") for name, head in BOTH),
    *(Variant(IMAGES, f"{name}, {n:,}", head, data=str(n)) for name, head in BOTH for n in (500, 1000)),
]

PROTOCOL = """
Toy world of {images:,} images and its shipped SAM and CLIP: {train:,} training images with {regions:,} regions of
{classes} classes, {val} validation images with ground-truth boxes; rare classes (APr) are never trained on, small
regions (APs) have less than 32 x 32 pixels. Features in float16, maps of {side} x {side} patches. Every head: schedule
`toy` cut to {steps} steps of {batch} images, 2 layers, float32, one thread; seeds {seeds}. Box AP by `hotcoco` in %,
from a cache: mean over the seeds, and standard deviation of single runs. "Gain" is that in AP over `reference` or over
`guided`, "deviations" the same in standard deviations of single runs (root mean square of both rows, at least
{least} AP). CPU seconds are those of the training; seconds are on a machine with other work.
"""
LEAST_DEVIATION = 0.1  # of AP: that of three runs may be small by chance


@dataclass(frozen=True)
class Scale:
    """How much is done, and where."""

    folder: Path
    images: int
    seeds: tuple[int, ...]
    steps: int


FULL = Scale(SCRATCH / "ablate" / "full", images=3400, seeds=(0, 1, 2), steps=400)
QUICK = Scale(SCRATCH / "ablate" / "quick", images=60, seeds=(0,), steps=2)


def main() -> None:
    arguments = options(__doc__ or "")
    logging.basicConfig(format="%(message)s")
    scale = QUICK if arguments.quick else FULL
    if not (scale.folder / "world" / "toy_val.json").exists():  # written last
        make_toy_world(scale.folder / "world", scale.images)
    whole = {split: extracted(scale.folder, split) for split in ("train", "val")}
    data = {name: caches_of(scale, name, whole) for name in dict.fromkeys(variant.data for variant in VARIANTS)}
    runs = run_all(scale, data)
    train = whole["train"]
    report = Report(
        "ablations",
        "Options of the fusion and the guided head, one by one",
        PROTOCOL.format(
            images=scale.images,
            train=len(train),
            regions=train.manifest.region_count.sum(),
            classes=len(train.categories),
            val=len(whole["val"]),
            side=math.isqrt(train.feature_sets["toy_clip"].shape[0] - 1),
            steps=scale.steps,
            batch=train_config("toy").batch_size,
            seeds=", ".join(map(str, scale.seeds)),
            least=LEAST_DEVIATION,
        ),
        versions(["numpy", "torch", "zarr", "hotcoco"]),
    )
    for variant in VARIANTS:
        base = GUIDED if variant.name.startswith(GUIDED) else REFERENCE
        report.add_row(variant.table, **columns_of(variant, runs[variant.name], runs[base]))
    add_goals(report, runs)
    report.finish(arguments.results)
    draw(arguments.results / CHART.name if arguments.quick else CHART, report.rows)


def caches_of(scale: Scale, data: str, whole: dict[str, FeatureCache]) -> dict[str, Path]:
    """The caches "train" and "val" of a variant's data, made from those of the whole world where they are missing."""
    made = {split: scale.folder / f"{split}_{data}.zarr" for split in whole}
    for split, cache in whole.items():
        if data == "half":
            halve_maps(cache, made[split])
        elif data == "int8":
            convert(cache.path, made[split], dict.fromkeys(cache.feature_sets, Encoding.parse(data)))
        elif data == "all" or split == "val":
            made[split] = Path(cache.path)
        else:
            subset(cache.path, made[split], np.arange(min(int(data), len(cache))))
    return made


def halve_maps(cache: FeatureCache, path: Path) -> None:
    """A copy of the cache whose maps are means over 2 x 2 patches; the class token stays."""
    if path.exists():
        return
    maps = cache.feature_sets["toy_clip"]
    side = math.isqrt(maps.shape[0] - 1) // 2
    half = replace(maps, shape=(1 + side * side, maps.shape[1]))
    sets = {**cache.feature_sets, maps.name: half}
    unfinished = path.with_suffix(".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    made = FeatureCache.create(unfinished, cache.manifest, list(sets.values()), part_size=cache.part_size)

    def image(row: int) -> ImageFeatures:
        batch = cache.read(np.array([row]))
        patches = batch.feature_map[0, 1:].astype(np.float32).reshape(side, 2, side, 2, -1).mean(axis=(1, 3))
        pooled = np.concatenate([batch.feature_map[0, :1].astype(np.float32), patches.reshape(side * side, -1)])
        return ImageFeatures(row, {maps.name: pooled, "toy_sam": batch.tokens[0].astype(np.float32)})

    for part in range(made.n_parts):
        made.write_part(part, (image(row) for row in made.part_rows(part)), list(sets))
    unfinished.rename(path)


def run_all(scale: Scale, data: dict[str, dict[str, Path]]) -> dict[str, list[Run]]:
    """The runs of each variant, one per seed, those that are missing in the file of results trained now."""
    results = scale.folder / "results.jsonl"
    done: dict[tuple[str, int], Run] = {}
    if results.exists():
        for line in map(json.loads, results.read_text().splitlines()):
            key = line.pop("variant"), line.pop("seed")
            done[key] = Run(**line)
    # By seed, so that the first numbers of all variants are there early.
    missing = [(variant, seed) for seed in scale.seeds for variant in VARIANTS if (variant.name, seed) not in done]
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes started below
    with ProcessPoolExecutor(processors(), multiprocessing.get_context("spawn")) as pool:
        futures = {
            pool.submit(train_and_evaluate, variant, seed, scale, data[variant.data]): (variant, seed)
            for variant, seed in missing
        }
        for future in as_completed(futures):
            (variant, seed), run = futures[future], future.result()
            done[variant.name, seed] = run
            with results.open("a") as file:
                print(json.dumps({"variant": variant.name, "seed": seed, **asdict(run)}), file=file)
            count = f"{len(done)}/{len(VARIANTS) * len(scale.seeds)}"
            say(f"{count} {variant.name}, seed {seed}: AP {run.ap:.1f}, APr {run.apr:.1f}, {run.cpu_seconds:.0f} CPU s")
    return {variant.name: [done[variant.name, seed] for seed in scale.seeds] for variant in VARIANTS}


def train_and_evaluate(variant: Variant, seed: int, scale: Scale, caches: dict[str, Path]) -> Run:
    """One training, in a process of its own."""
    import torch

    torch.set_num_threads(1)
    config = train_config(
        "toy", seed=seed, iterations=scale.steps, head=variant.head, head_options=variant.options, **variant.decoder
    )
    folder = scale.folder / "runs" / f"{variant.name.replace(' ', '_')}_{seed}"
    opened = {split: FeatureCache.open(path) for split, path in caches.items()}
    return Run.of(folder, config, opened, scale.folder / "world")


def columns_of(variant: Variant, runs: Sequence[Run], base: Sequence[Run]) -> dict[str, Any]:
    columns: dict[str, Any] = {"head": variant.name}
    for title, name in (("AP", "ap"), ("APr", "apr"), ("APs", "aps")):
        values = [getattr(run, name) for run in runs]
        columns |= {title: mean(values), f"± {title}": deviation(values)}
    gain = mean(run.ap for run in runs) - mean(run.ap for run in base)
    both = math.hypot(deviation([run.ap for run in runs]), deviation([run.ap for run in base])) / math.sqrt(2)
    columns |= {"gain": gain, "deviations": gain / max(both, LEAST_DEVIATION)}
    columns |= {"parameters": f"{runs[0].parameters:,}", "CPU s": mean(run.cpu_seconds for run in runs)}
    return {**columns, "s": mean(run.seconds for run in runs)}


def deviation(values: Sequence[float]) -> float:
    return stdev(values) if len(values) > 1 else 0.0


def add_goals(report: Report, runs: dict[str, list[Run]]) -> None:
    def gain(metric: str, of: str, over: str) -> float:
        return mean(getattr(run, metric) for run in runs[of]) - mean(getattr(run, metric) for run in runs[over])

    report.add_goal("guided - reference, AP", gain("ap", GUIDED, REFERENCE), at_least=4.0)
    report.add_goal("guided - reference, APr", gain("apr", GUIDED, REFERENCE), at_least=3.0)
    third = f"{GUIDED}, 1,000"
    report.add_goal("guided on a third of the images - reference on all, AP", gain("ap", third, REFERENCE), at_least=0)
    report.add_goal(
        "guided on a third of the images - reference on all, APr", gain("apr", third, REFERENCE), at_least=0
    )


if __name__ == "__main__":
    main()
