"""Resumable inference: the detections of all images of a manifest, saved in parts.

A part is one file with the detections of 64 consecutive images. Its folder is named by a digest of everything that
decides the detections, so another head, other boxes or other classes use another folder. A stopped run resumes with the
missing parts.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from regionspot.cache.errors import InputError
from regionspot.cache.format.manifest import Manifest
from regionspot.cache.progress import Progress
from regionspot.cache.storage.atomic_files import remove_abandoned, to_json, write_file
from regionspot.evaluation.inference.scoring import FailedImage, Parts, RegionScores
from regionspot.evaluation.metrics.accuracy import UNKNOWN, class_ranks
from regionspot.evaluation.metrics.detections import Detections, concatenate, from_columns, to_columns
from regionspot.evaluation.metrics.selection import BEST, Selection, detections_of_image
from regionspot.pipeline.datasets.failure_limit import EVALUATION_LIMIT, FailureLimit
from regionspot.pipeline.extraction.malloc import keep_memory
from regionspot.pipeline.reporting.run_stats import RunStats

log = logging.getLogger(__name__)

PART_SIZE = 64  # a multiple of the usual batch sizes: the last batch of a part is smaller otherwise


class ScoringMethod(Protocol):
    """Scores the regions of a manifest: a head or a baseline.

    name      shown in tables
    identity  everything that decides its scores except the manifest; JSON-able
    features  provenance of the features, by backbone
    """

    @property
    def name(self) -> str: ...

    @property
    def manifest(self) -> Manifest: ...

    @property
    def identity(self) -> dict[str, Any]: ...

    @property
    def features(self) -> Mapping[str, Mapping[str, Any]]: ...

    @property
    def device(self) -> torch.device: ...

    def score(self, parts: Parts, stats: RunStats) -> Iterator[RegionScores | FailedImage]:
        """One result per row of these parts, in order; classes are the manifest's categories.

        `stats` measures the stages. Batches never cross parts.
        """
        ...


@dataclass(frozen=True)
class InferenceResult:
    """The detections of some images.

    class_ranks  int32 (M,), of every region of these images; see `accuracy.class_ranks`
    failures     {image id: reason} of images that could not be read or scored; they have no detections
    seconds      of each stage, including the parts of earlier runs
    """

    detections: Detections
    class_ranks: NDArray[np.int32]
    failures: dict[int, str]
    seconds: dict[str, float]
    images: int


def infer(
    method: ScoringMethod,
    folder: Path,
    *,
    selection: Selection = BEST,
    max_failures: FailureLimit = EVALUATION_LIMIT,
) -> InferenceResult:
    """The detections of every image of the method's manifest; resumes from the parts in `folder`.

    Parts with failed images are retried. Raises InputError as soon as more than `max_failures` of all images have
    failed, and if `folder` cannot be written.
    """
    keep_memory()
    inference = Inference(method, folder, selection, max_failures)
    files, stats, progress = inference.files, inference.stats, inference.progress

    def step() -> None:
        stats.seconds = progress.seconds
        progress.step()

    pending = inference.pending
    scores = method.score([files.rows(part) for part in pending], stats)
    for part in pending:
        result = infer_part(method, files.rows(part), scores, stats, selection, step)
        with stats.timed("write"):
            files.save(part, result)
        inference.add(part, result)
    return inference.merged()


class Inference:
    """The parts of one inference that are done, by this run or an earlier one.

    pending   the other parts, at the start
    stats     of this run
    progress  of the images of the pending parts
    """

    def __init__(self, method: ScoringMethod, folder: Path, selection: Selection, max_failures: FailureLimit) -> None:
        self.files, self._method, self._max_failures = PartFiles(folder, method, selection), method, max_failures
        loaded = {part: self.files.load(part) for part in range(len(self.files))}
        self._results = {part: result for part, result in loaded.items() if result is not None}
        self.pending = [part for part in loaded if part not in self._results]
        if self._results:
            log.info("%s: %d of %d parts are done already", self.files.folder, len(self._results), len(loaded))
        self.stats = RunStats()
        images = sum(len(self.files.rows(part)) for part in self.pending)
        self.progress = Progress(images, "images", shares=self.stats.shares)

    def add(self, part: int, result: InferenceResult) -> None:
        """Add a finished part. Raises InputError if too many images have failed."""
        self._results[part] = result
        reasons = [reason for of_part in self._results.values() for reason in of_part.failures.values()]
        manifest = self._method.manifest
        if not self._max_failures.allows(len(reasons), len(manifest)):
            raise InputError(
                f"{len(reasons)} of {len(manifest)} images could not be read, more than --max-failures "
                f"{self._max_failures} allows (the first: {reasons[0]}); check --data, or allow more"
            )

    def merged(self) -> InferenceResult:
        """The result of all parts, in order."""
        results = [self._results[part] for part in sorted(self._results)]
        seconds = Counter[str]()
        for result in results:
            seconds.update(result.seconds)
        return InferenceResult(
            concatenate([result.detections for result in results]),
            np.concatenate([np.empty(0, np.int32), *(result.class_ranks for result in results)]),
            {image_id: reason for result in results for image_id, reason in result.failures.items()},
            dict(seconds),
            sum(result.images for result in results),
        )


def infer_part(
    method: ScoringMethod,
    rows: range,
    scores: Iterator[RegionScores | FailedImage],
    stats: RunStats,
    selection: Selection,
    step: Callable[[], None] = lambda: None,
) -> InferenceResult:
    """The detections of the next part of `scores`; its seconds are those of the stages since the previous part.

    `step` is called after each image.
    """
    manifest = method.manifest
    category_ids = np.array([category.id for category in manifest.categories], np.int64)
    before = dict(stats.stage_seconds)
    detections, ranks, failures = [], [], {}
    for row, image_scores in zip(rows, islice(scores, len(rows)), strict=True):
        image_id, regions = int(manifest.image_ids[row]), manifest.regions(row)
        classes = manifest.category_index[regions]
        ranks.append(np.full(len(classes), UNKNOWN, np.int32))
        if isinstance(image_scores, FailedImage):
            failures[image_id] = image_scores.reason
        elif problem := image_scores.not_finite():
            failures[image_id] = f"{manifest.paths[row]}: {problem}"
        else:
            with stats.timed("select"):
                ranks[-1] = class_ranks(image_scores.probabilities, classes)
                best = detections_of_image(
                    image_id,
                    manifest.boxes_xyxy[regions],
                    image_scores.probabilities,
                    category_ids,
                    None if manifest.scores is None else manifest.scores[regions],
                    selection=selection,
                )
            if image_scores.masks is not None:
                with stats.timed("masks"):
                    kept, indices = np.unique(best.regions, return_inverse=True)
                    best = replace(best, regions=indices, masks=image_scores.masks(kept))
            detections.append(best)
        step()
    seconds = {stage: total - before.get(stage, 0.0) for stage, total in stats.stage_seconds.items()}
    return InferenceResult(concatenate(detections), np.concatenate(ranks), failures, seconds, len(rows))


class PartFiles:
    """The files of one inference: `folder/<digest>/00000.npz`, each with PART_SIZE images."""

    def __init__(self, folder: Path, method: ScoringMethod, selection: Selection) -> None:
        self._images = len(method.manifest)
        identity = {
            "method": method.name,
            "identity": method.identity,
            "manifest": method.manifest.digest(),
            "category_ids": [category.id for category in method.manifest.categories],
            "selection": asdict(selection),
            "part_size": PART_SIZE,
        }
        document = to_json(identity)
        self.folder = folder / hashlib.sha256(document).hexdigest()[:16]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_file(self.folder / "identity.json", document)
        except OSError as error:
            raise InputError(f"{self.folder}: cannot be written ({error.strerror}); name another --out") from None
        remove_abandoned(self.folder)

    def __len__(self) -> int:
        return -(-self._images // PART_SIZE)

    def rows(self, part: int) -> range:
        return range(part * PART_SIZE, min(self._images, (part + 1) * PART_SIZE))

    def save(self, part: int, result: InferenceResult, run: str = "") -> None:
        """Write a part; `run` is the id of a distributed run."""
        notes = {"failures": result.failures, "seconds": result.seconds, "images": result.images, "run": run}
        text = json.dumps(notes, allow_nan=False)
        columns: dict[str, Any] = {"notes": np.array(text), "class_ranks": result.class_ranks}
        columns |= to_columns(result.detections)
        buffer = io.BytesIO()
        np.savez(buffer, **columns)
        write_file(self._path(part), buffer.getvalue())

    def load(self, part: int, run: str | None = None) -> InferenceResult | None:
        """A finished part; None if it is missing, damaged, or has failed images and was not written by `run`."""
        try:
            with np.load(self._path(part)) as columns:
                notes = json.loads(str(columns["notes"]))
                detections, ranks = from_columns(columns), columns["class_ranks"]
        except FileNotFoundError:
            return None
        except (zipfile.BadZipFile, KeyError, ValueError, EOFError, OSError):
            log.warning("%s: is damaged and is computed again", self._path(part))
            return None
        failures = {int(image_id): reason for image_id, reason in notes["failures"].items()}
        if failures and notes.get("run") != run:
            return None
        return InferenceResult(detections, ranks, failures, notes["seconds"], notes["images"])

    def existing(self) -> set[int]:
        """The parts that have a file."""
        return {int(path.stem) for path in self.folder.glob("*.npz")}

    def _path(self, part: int) -> Path:
        return self.folder / f"{part:05d}.npz"
