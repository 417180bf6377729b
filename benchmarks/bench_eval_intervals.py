"""How often confidence intervals contain the figure of the population, for `make bench-eval`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import hotcoco
import numpy as np

from benchmarks.bench_eval_data import world
from regionspot.evaluation.metrics.analysis import CONFIDENCE, SAMPLES, Matches, _differences
from regionspot.evaluation.metrics.detections import Detections, concatenate
from regionspot.evaluation.metrics.ground_truth import GroundTruth

IMAGES, PER_IMAGE, CLASSES = 60, 30, 6
FIGURES = ("AP", "AP50", "AP75", "APr", "APc", "APf", "AR@300")


def coverage(datasets: int) -> list[dict[str, Any]]:
    """Per figure: the share of 95 % intervals that contain the population's value, ours and hotcoco's percentiles."""
    rng = np.random.default_rng(0)
    worlds = [world(IMAGES, PER_IMAGE, seed=seed, classes=CLASSES) for seed in range(datasets)]
    kept = [rng.random(len(detections)) > 0.2 for _, detections in worlds]
    everything = _concatenated(worlds)
    whole = Matches(*everything, "bbox")
    fewer = Matches(everything[0], everything[1].take(np.concatenate(kept)), "bbox")
    population = {"figure": whole.intervals(samples=2), "difference": fewer.minus(whole, samples=2)}
    hits: dict[tuple[str, str], list[tuple[bool, bool]]] = {}
    for (truth, detections), rows in zip(worlds, kept, strict=True):
        matches, fewer = Matches(truth, detections, "bbox"), Matches(truth, detections.take(rows), "bbox")
        nothing = matches._evaluate(detections.take(np.empty(0, np.int64)))
        cases = (("figure", nothing, matches._evaluation), ("difference", matches._evaluation, fewer._evaluation))
        for question, *evaluations in cases:
            own = hotcoco.compare(*evaluations, n_bootstrap=SAMPLES)["ci"]
            for figure, interval in _differences(*evaluations, SAMPLES, CONFIDENCE).items():
                expected = population[question][figure]
                if figure in FIGURES and interval is not None and expected is not None:
                    hit = interval.low <= expected.value <= interval.high
                    percentile = own[figure]["lower"] <= expected.value <= own[figure]["upper"]
                    hits.setdefault((question, figure), []).append((hit, percentile))
    return [
        {
            "what": question,
            "figure": figure,
            "intervals": len(pairs),
            "percent": 100 * float(np.mean([ours for ours, _ in pairs])),
            "percent of hotcoco's": 100 * float(np.mean([percentile for _, percentile in pairs])),
        }
        for (question, figure), pairs in hits.items()
    ]


def _concatenated(worlds: list[tuple[GroundTruth, Detections]]) -> tuple[GroundTruth, Detections]:
    """All datasets as one, with other image ids."""
    images, annotations, detections = [], [], []
    for number, (truth, each) in enumerate(worlds):
        shift = 1000 * number
        images += [{**image, "id": image["id"] + shift} for image in truth.images]
        annotations += [{**entry, "image_id": entry["image_id"] + shift} for entry in truth.annotations]
        detections.append(replace(each, image_ids=each.image_ids + shift))
    return GroundTruth(Path("all.json"), images, worlds[0][0].categories, annotations), concatenate(detections)
