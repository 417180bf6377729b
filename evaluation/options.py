"""The options of an evaluation: picklable, so that workers load the same method."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from regionspot.evaluation.inference.baselines import Baseline
from regionspot.evaluation.inference.cache_vocabulary import NamesFrom
from regionspot.evaluation.metrics.average_precision import Engine
from regionspot.evaluation.metrics.selection import Rule, Score
from regionspot.evaluation.report.protocol import Metric
from regionspot.pipeline.backbones.dtypes import AUTO
from regionspot.pipeline.backbones.protocols import MaskThreshold
from regionspot.pipeline.datasets.failure_limit import EVALUATION_LIMIT, FailureLimit
from regionspot.pipeline.datasets.proposals import GROUND_TRUTH
from regionspot.pipeline.extraction.config import absolute, absolute_if_exists, absolute_weights
from regionspot.pipeline.images.decode import Exif


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """The options of an evaluation.

    data, dataset, split, annotations   as for `read_dataset`; the dataset must be in COCO's format
    out          folder of results.json, detections.json and the parts for resuming
    metric, engine, fixed   as in `Protocol`; "lvis" needs LVIS's format
    selection, score, detections_per_image   of an image's detections, as in `Selection`. None: the square root for
                 "tokenize-anything", else the product; and 300, or 3,000 for fixed AP
    checkpoint   the head; may be None for a baseline, then `preset` names the encoder
    head_class   `file.py:Class` or `package.module:Class` of a head of the user's own class, whose code is then run
    baseline     one of baselines.py instead of the head; only "dense-mask" has masks, only "dense" takes a cache
    cache        read features from this cache instead of running the backbones; without masks then
    boxes        "gt", or a detector's proposals file
    limit        evaluate only the first images, against their own ground truth
    masks, mask_threshold   whether masks are computed, and the size at which: see `MaskThreshold`
    templates    a template set; None: those that the head was trained with
    names_from   "name", "synonyms" or "definitions": what the prompts contain
    exif, preprocess, dtype   of images; by default (None, None, "auto") those of the head's training features, which
                 are always those of `cache`; for a baseline: "auto", "direct", the default of the device
    check_weights  refuse other weights and features than the head was trained on; False: only log the difference
    scheduler    workers, see pipeline/distributed/cluster.py; `out` must be on a disk that they share
    """

    data: Path
    out: Path
    metric: Metric = "lvis"
    engine: Engine = "hotcoco"
    fixed: bool = False
    selection: Rule = "best"
    score: Score | None = None
    detections_per_image: int | None = None
    dataset: str = "lvis"
    split: str = "val"
    annotations: Path | None = None
    checkpoint: Path | None = None
    head_class: str | None = None
    preset: str | None = None
    baseline: Baseline | None = None
    cache: str | Path | None = None
    boxes: str = GROUND_TRUTH
    limit: int | None = None
    masks: bool = True
    mask_threshold: MaskThreshold = "sam"
    templates: str | None = None
    names_from: NamesFrom = "name"
    exif: Exif | None = None
    weights: str | None = None
    sam_weights: str | None = None
    clip_weights: str | None = None
    device: str | None = None
    dtype: str = AUTO
    preprocess: str | None = None
    check_weights: bool = True
    max_failures: FailureLimit = EVALUATION_LIMIT
    scheduler: str = "none"

    def with_absolute_paths(self) -> EvaluationOptions:
        """The same evaluation for processes with another working directory."""
        file, _, head = (self.head_class or "").rpartition(":")
        return replace(
            self,
            data=self.data.absolute(),
            out=self.out.absolute(),
            annotations=self.annotations and self.annotations.absolute(),
            checkpoint=self.checkpoint and self.checkpoint.absolute(),
            head_class=f"{absolute(file)}:{head}" if file.endswith(".py") else self.head_class,
            cache=self.cache and absolute(str(self.cache)),
            boxes=self.boxes if self.boxes == GROUND_TRUTH else absolute_if_exists(self.boxes),
            weights=absolute_weights(self.weights),
            sam_weights=absolute_weights(self.sam_weights),
            clip_weights=absolute_weights(self.clip_weights),
        )
