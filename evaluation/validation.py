"""Scores of a head while it trains, from the cache of a validation split; no backbone runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import nn

from regionspot.cache.errors import InputError
from regionspot.cache.store import FeatureCache
from regionspot.evaluation.inference.methods import HeadOnCache
from regionspot.evaluation.inference.scoring import FailedImage
from regionspot.evaluation.metrics.accuracy import accuracies, class_ranks
from regionspot.evaluation.metrics.average_precision import average_precision
from regionspot.evaluation.metrics.detections import concatenate
from regionspot.evaluation.metrics.ground_truth import GroundTruth, read_ground_truth
from regionspot.evaluation.metrics.selection import detections_of_image
from regionspot.fusion.training.training_sets import open_training_set, require_same_backbones
from regionspot.fusion.vocabulary import Vocabulary
from regionspot.pipeline.reporting.run_stats import RunStats

AP_METRICS = ("AP", "APr", "APc", "APf")


def cache_validator(
    cache: FeatureCache,
    vocabulary: Vocabulary,
    token_set: str,
    map_set: str,
    *,
    annotations: Path | None = None,
    limit: int | None = None,
    trained_on: FeatureCache | None = None,
) -> Callable[[nn.Module], dict[str, float]]:
    """A function that scores a head on the regions of `cache` whose class is known; all scores are from 0 to 1.

    AP, APr, APc, APf   only with `annotations`, an LVIS file of the split: box AP as `eval-lvis` reports it for these
                        boxes, and of rare, common and frequent classes. A metric without ground truth is left out
    top1, top5          share of the regions whose right class is the best one, or among the best five
    class_accuracy      mean over the classes of their top1

    vocabulary   of the cache's classes
    limit        so many images, evenly spaced over the split; default: all
    trained_on   a cache that the head is trained on; must hold features of the same models and options

    Raises InputError for a cache without usable images, other features than those of `trained_on`, and annotations of
    other images or classes. The function raises InputError if scores are not finite.
    """
    usable = open_training_set(cache, map_set, token_set)
    if trained_on is not None:
        require_same_backbones(usable, open_training_set(trained_on, map_set, token_set))
    rows = usable.rows
    if limit is not None and limit < len(rows):
        rows = rows[np.linspace(0, len(rows) - 1, limit).round().astype(np.int64)]
    ground_truth = None if annotations is None else _ground_truth(annotations, cache, rows)
    return _Validation(cache, vocabulary, token_set, map_set, rows, ground_truth)


def _ground_truth(annotations: Path, cache: FeatureCache, rows: NDArray[np.int64]) -> GroundTruth:
    ground_truth = read_ground_truth(annotations)
    unknown = [each.name for each in cache.categories if each.id not in ground_truth.category_ids]
    if unknown:
        raise InputError(
            f"{annotations}: does not define {len(unknown)} of the {len(cache.categories)} classes of {cache.path}, "
            f"the first: {unknown[0]}; give the annotations that the cache was extracted with"
        )
    return ground_truth.restrict(cache.manifest.image_ids[rows])


@dataclass(frozen=True, eq=False)
class _Validation:
    cache: FeatureCache
    vocabulary: Vocabulary
    token_set: str
    map_set: str
    rows: NDArray[np.int64]
    ground_truth: GroundTruth | None

    def __call__(self, head: nn.Module) -> dict[str, float]:
        cache, manifest = self.cache, self.cache.manifest
        device = next(head.parameters()).device
        method = HeadOnCache(head, cache, self.vocabulary, self.token_set, self.map_set, device=device)
        category_ids = np.array([category.id for category in cache.categories], np.int64)
        ranks, classes, detections = [], [], []
        scores_of_images = method.score([self.rows.tolist()], RunStats())
        for row, scores in zip(self.rows.tolist(), scores_of_images, strict=True):
            assert not isinstance(scores, FailedImage)  # these rows have features
            if problem := scores.not_finite():
                raise InputError(f"validation on {cache.path}: {manifest.paths[row]}: {problem}")
            regions = manifest.regions(row)
            classes.append(manifest.category_index[regions])
            ranks.append(class_ranks(scores.probabilities, classes[-1]))
            if self.ground_truth is not None:
                image_id, boxes = int(manifest.image_ids[row]), manifest.boxes_xyxy[regions]
                detections.append(detections_of_image(image_id, boxes, scores.probabilities, category_ids))
        result = {}
        if self.ground_truth is not None:
            ap = average_precision(self.ground_truth, concatenate(detections), "bbox")
            result = {name: value for name in AP_METRICS if (value := ap[name]) is not None}
        return {**result, **accuracies(np.concatenate(ranks), np.concatenate(classes))}
