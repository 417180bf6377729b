"""An extraction whose GPU is simulated by sleeping: all but the encoders is the real thing, and nothing needs torch.

What each image's features are follows from its row, so the same cache comes out whoever writes which part. It serves
to measure how a run scales to more workers than a machine has cores, and to kill workers by the hundred.
"""

from __future__ import annotations

import os
import signal
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from regionspot.cache import Category, FeatureCache, FeatureSet, ImageFeatures, Manifest
from regionspot.pipeline.distributed.worker import PARTS_AT_ONCE, FeatureParts, PartMaker
from regionspot.pipeline.reporting.run_stats import RunStats

SETS = (FeatureSet("clip", "map", (5, 8)), FeatureSet("sam", "token", (6,)))


def make_cache(path: Path, images: int, part_size: int) -> FeatureCache:
    """An empty cache of made-up images with 0 to 6 regions each."""
    counts = np.arange(images) % 7
    regions = int(counts.sum())
    manifest = Manifest(
        dataset="toy",
        split="train",
        image_ids=np.arange(images),
        paths=np.array([f"{row:06d}.jpg" for row in range(images)], dtype=np.dtypes.StringDType()),
        heights=np.full(images, 480, np.int32),
        widths=np.full(images, 640, np.int32),
        offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        boxes_xyxy=np.tile(np.float32([10, 20, 30, 40]), (regions, 1)),
        category_index=np.zeros(regions, np.int32),
        annotation_ids=np.arange(regions),
        categories=(Category(1, "shape"),),
    )
    return FeatureCache.create(path, manifest, SETS, part_size)


@dataclass(frozen=True)
class SimulatedJob:
    """Parts of a `make_cache`, of which each image keeps the worker's one GPU for so many seconds.

    failing, deadly   rows of an image that cannot be read, and of one that kills its worker
    slow              process id of a worker that waits until the others have written all parts but its own
    """

    cache: str
    seconds: float = 0.0
    failing: int | None = None
    deadly: int | None = None
    slow: int | None = None
    run: str = field(default_factory=lambda: uuid.uuid4().hex)

    def open(self) -> PartMaker:
        cache = FeatureCache.open(self.cache, "a")
        return PartMaker(FeatureParts(cache, list(cache.feature_sets), SimulatedEncoder(cache, self), self.run))


class SimulatedEncoder:
    """Features that follow from the row."""

    def __init__(self, cache: FeatureCache, job: SimulatedJob) -> None:
        self._cache, self._job = cache, job
        self._gpu = threading.Lock()

    def __call__(self, rows: range, names: Sequence[str], stats: RunStats) -> Iterator[ImageFeatures]:
        regions = self._cache.manifest.region_count
        while self._job.slow == os.getpid() and len(self._cache.pending_parts()) > PARTS_AT_ONCE:
            time.sleep(0.01)
        for row in rows:
            with stats.timed("encode"), self._gpu:
                time.sleep(self._job.seconds)
            if row == self._job.deadly:
                os.kill(os.getpid(), signal.SIGKILL)
            if row == self._job.failing:
                yield ImageFeatures(row, {}, f"{row:06d}.jpg: is not there")
                continue
            count = int(regions[row])
            shapes = {each.name: each.shape if each.kind == "map" else (count, *each.shape) for each in SETS}
            # Each set from a seed of its own: a part of which one set is there already is asked for the other alone.
            yield ImageFeatures(
                row, {name: np.random.default_rng([row, len(name)]).standard_normal(shapes[name]) for name in names}
            )
