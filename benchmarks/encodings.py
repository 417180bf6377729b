"""The cost of each encoding: bytes per image, error of the features, and AP of a head trained on them.

The toy world is extracted once in float32 and converted, so that every encoding, float16 too, is compared with the
backbones' own outputs. A head is trained on each encoding and evaluated on validation features of the same encoding,
from several seeds: training amplifies rounding, and two runs that differ in the last bits of a few features end a point
of AP apart. The effect of the encoding alone shows where one head is evaluated on all encodings.

    make bench-encodings            a quarter of an hour on two cores

A killed run resumes; remove build/bench/encodings to start again.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np

from benchmarks.goals import SCRATCH, Report, options, say, versions
from regionspot.cache import FeatureCache
from regionspot.cache.format.feature_dtypes import Encoding
from regionspot.cache.format.part_record import load_record
from regionspot.cache.format.schema import record_file
from regionspot.cache.reading.dask_arrays import read_decoded
from regionspot.cache.tools.merge_subset_convert import convert
from regionspot.evaluation.evaluate import EvaluationOptions, evaluate
from regionspot.evaluation.inference.cache_vocabulary import cache_vocabulary
from regionspot.fusion.training.config import train_config
from regionspot.fusion.training.train import train as train_head
from regionspot.pipeline.backbones.bundle import Backbones
from regionspot.pipeline.datasets.registry import image_folder_of, read_dataset
from regionspot.pipeline.extraction.config import ExtractConfig
from regionspot.pipeline.extraction.extract import extract, open_for_extraction
from regionspot.pipeline.toy.world import make_toy_world

TRAINED = ("float32", "float16", "bfloat16", "int8")
COMPRESSED = ("float16+zstd", "bfloat16+zstd", "int8+zstd")  # no number changes, so nothing is trained on them
IMAGES = Path(__file__).resolve().parents[2] / "shared" / "data" / "coco_mini"  # 200 real images, where they are
ROWS_AT_ONCE = 50
Scores = dict[str, list[dict[str, float]]]  # of each encoding, AP and APr in % of every seed
FLOAT32 = Encoding("float32")

PROTOCOL = """
Toy world of {images} images, its shipped SAM and CLIP (maps of {tokens} tokens of {width} channels, float32), whose
features were converted to each encoding; int8's statistics are of 64 images. Rows are map tokens and location tokens:
cosine and relative error (root mean square of the error over that of the features) are those of decoded rows against
float32. The head: schedule `toy`{shortened}, seeds {seeds}, trained on the training split in that encoding, box AP on
the validation split in the same encoding, ground-truth boxes, by `lvis`; mean over the seeds and its standard error.
Rare classes (APr) are never trained on. "One head": those trained on float16, evaluated on the validation split in each
encoding.
"""


@dataclass(frozen=True)
class Scale:
    """How much is done, and where."""

    folder: Path
    images: int
    seeds: tuple[int, ...]
    iterations: int | None  # None: the schedule's own
    from_images: bool


FULL = Scale(SCRATCH / "encodings" / "full", images=1000, seeds=(0, 1), iterations=None, from_images=True)
QUICK = Scale(SCRATCH / "encodings" / "quick", images=60, seeds=(0,), iterations=20, from_images=False)


def main() -> None:
    arguments = options(__doc__ or "")
    logging.basicConfig(format="%(message)s")
    logging.getLogger("regionspot").setLevel(logging.INFO)
    scale = QUICK if arguments.quick else FULL
    world, train, val = (scale.folder / name for name in ("world", "train_float32.zarr", "val_float32.zarr"))
    make_toy_world(world, scale.images)
    extract_float32("toy", world, "train", train)
    extract_float32("toy", world, "val", val)
    maps = FeatureCache.open(train).feature_sets["toy_clip"]
    report = Report(
        "encodings",
        "What an encoding costs",
        PROTOCOL.format(
            images=scale.images,
            tokens=maps.shape[0],
            width=maps.shape[1],
            shortened=f" cut to {scale.iterations} steps" if scale.iterations else "",
            seeds=", ".join(map(str, scale.seeds)),
        ),
        versions(["numpy", "torch", "zarr", "lvis"]),
    )
    add_features(report, "Features, toy world", train)
    if scale.from_images and IMAGES.is_dir():
        images = extract_float32("coco", IMAGES, "val", scale.folder / "images_float32.zarr")
        add_features(
            report, f"Features, {len(FeatureCache.open(images))} real images (COCO) by the toy weights", images
        )
    add_heads(report, scale)
    report.finish(arguments.results)


def extract_float32(dataset: str, data: Path, split: str, out: Path) -> Path:
    """The features as the backbones say them, in a new cache."""
    say(f"extract {dataset} {split} into {out}")
    manifest = read_dataset(dataset, data, split)
    images = image_folder_of(dataset, data, split, manifest)
    backbones = Backbones.load("toy", device="cpu")
    cache = open_for_extraction(
        out, manifest, images, backbones, ExtractConfig(encoding=FLOAT32, token_encoding=FLOAT32)
    )
    extract(cache, images, backbones)
    return out


def converted(source: Path, words: str) -> Path:
    """The cache in another encoding, beside the one in float32."""
    if words == "float32":
        return source
    made = source.with_name(source.name.replace("float32", words))
    convert(source, made, dict.fromkeys(FeatureCache.open(source).feature_sets, Encoding.parse(words)))
    return made


def add_features(report: Report, table: str, source: Path) -> None:
    """A row an encoding: what it takes on disk and what is lost."""
    plain = FeatureCache.open(source)
    for words in (*TRAINED, *COMPRESSED):
        cache = FeatureCache.open(converted(source, words))
        lost = {name: Lost.of(plain, cache, name) for name in plain.feature_sets if "+" not in words}
        columns: dict[str, Any] = {"KB an image": bytes_of(cache) / len(cache) / 1e3}
        columns["of float16"] = bytes_of(cache) / bytes_of(FeatureCache.open(converted(source, "float16")))
        for name, feature_set in plain.feature_sets.items():
            found = lost.get(name)
            columns |= {
                f"{feature_set.kind}: relative error": found.relative if found else "as without",
                f"{feature_set.kind}: 1 - cosine, mean": found.mean_angle if found else "",
                f"{feature_set.kind}: worst": found.worst_angle if found else "",
            }
        report.add_row(table, encoding=words, **columns)


@dataclass(frozen=True)
class Lost:
    """Relative error of all values, and 1 - cosine of the rows, mean and largest."""

    relative: float
    mean_angle: float
    worst_angle: float

    @classmethod
    def of(cls, plain: FeatureCache, cache: FeatureCache, name: str) -> Lost:
        error = power = 0.0
        angles = []
        rows = plain.valid_rows([name])
        for first in range(0, len(rows), ROWS_AT_ONCE):
            wanted = rows[first : first + ROWS_AT_ONCE]
            given, found = (
                read_decoded(each.reader(name), wanted)
                .reshape(-1, plain.feature_sets[name].shape[-1])
                .astype(np.float64)
                for each in (plain, cache)
            )
            error += float(np.square(found - given).sum())
            power += float(np.square(given).sum())
            product = np.linalg.norm(given, axis=1) * np.linalg.norm(found, axis=1)
            angles.append(1 - (given * found).sum(axis=1) / product)
        every = np.maximum(np.concatenate(angles), 0)
        return cls(math.sqrt(error / power), float(every.mean()), float(every.max()))


def bytes_of(cache: FeatureCache) -> int:
    """What the features take on disk: records, indexes, scales and checksums of every part."""
    records = (
        load_record(cache.storage, record_file(name, part))
        for name in cache.feature_sets
        for part in range(cache.n_parts)
    )
    return sum(sum(record.files.values()) for record in records)


def add_heads(report: Report, scale: Scale) -> None:
    """Train on each encoding in turn, seed by seed; then evaluate the heads of float16 on all of them."""
    trained: Scores = {words: [] for words in TRAINED}
    alike: Scores = {words: [] for words in TRAINED}
    for seed in scale.seeds:
        for words in TRAINED:
            head = head_on(words, seed, scale)
            trained[words].append(evaluated(head, words, scale))
        for words in TRAINED:
            alike[words].append(evaluated(scale.folder / f"run_float16_{seed}", words, scale))
    add_scores(report, "Heads trained and evaluated on each", trained)
    add_scores(report, "One head, evaluated on each", alike)
    for words in ("int8", "bfloat16"):
        report.add_goal(f"AP lost by {words} against float16, one head", lost(alike, words), at_most=0.3)
        report.add_goal(f"AP lost by {words} against float16, heads trained on each", lost(trained, words), at_most=0.3)


def add_scores(report: Report, table: str, scores: Scores) -> None:
    for words, each in scores.items():
        columns: dict[str, Any] = {}
        for metric in ("AP", "APr"):
            values = [score[metric] for score in each]
            error = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
            columns |= {metric: mean(values), f"± {metric}": error}
            columns[f"{metric} of each seed"] = " ".join(f"{value:.1f}" for value in values)
        report.add_row(table, encoding=words, **columns)


def lost(scores: Scores, words: str) -> float:
    """How much less AP than on float16, in points; the mean over the seeds."""
    return mean(full["AP"] - score["AP"] for full, score in zip(scores["float16"], scores[words], strict=True))


def head_on(words: str, seed: int, scale: Scale) -> Path:
    """The folder of a head trained on this encoding from this seed."""
    say(f"train on {words}, seed {seed}")
    cache = FeatureCache.open(converted(scale.folder / "train_float32.zarr", words))
    run = scale.folder / f"run_{words}_{seed}"
    config = train_config("toy", seed=seed, iterations=scale.iterations)
    vocabulary = cache_vocabulary(cache, "toy_clip", device="cpu")
    train_head([cache], [vocabulary], run, config, preset="toy", resume=True, device="cpu")
    return run


def evaluated(run: Path, words: str, scale: Scale) -> dict[str, float]:
    """AP and APr in % of a head on the validation split in this encoding."""
    evaluation = EvaluationOptions(
        data=scale.folder / "world",
        out=run / f"eval_{words}",
        dataset="toy",
        preset="toy",
        checkpoint=run / "head.safetensors",
        cache=converted(scale.folder / "val_float32.zarr", words),
        masks=False,
        device="cpu",
    )
    box = evaluate(evaluation)["bbox"]
    return {metric: 100 * (box[metric] or 0.0) for metric in ("AP", "APr")}


if __name__ == "__main__":
    main()
