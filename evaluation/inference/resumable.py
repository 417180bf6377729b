"""Long inference that survives being killed: images in, detections out, in parts that are written once.

A part is the result of 64 consecutive images, one file under a folder named by a digest of everything that decides
its numbers. A run that was stopped goes on with the parts that are not there; one with another head, other boxes or
other classes finds a folder of its own and mixes nothing.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from regionspot.cache.errors import InputError
from regionspot.cache.format.manifest import Manifest
from regionspot.cache.progress import Progress
from regionspot.cache.storage.atomic_files import remove_abandoned, to_json, write_file
from regionspot.evaluation.inference.scoring import RegionScores, Timed
from regionspot.evaluation.metrics.detections import (
    DETECTIONS_PER_IMAGE,
    Detections,
    concatenate,
    detections_of_image,
    from_columns,
    to_columns,
)
from regionspot.pipeline.datasets.failure_limit import EVALUATION_LIMIT, FailureLimit

log = logging.getLogger(__name__)

PART_SIZE = 64  # a multiple of every method's batch, so that a resumed run makes the same batches


@dataclass(frozen=True)
class Unreadable:
    """Stands in place of an image's scores; `reason` is one line."""

    reason: str


class Method(Protocol):
    """One way to score regions: a head or a baseline, over the images and boxes of its manifest.

    name      as it stands in tables
    identity  what decides its numbers besides the manifest, ready for JSON
    features  provenance of the features that it scores, by backbone
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

    def score(self, rows: Sequence[int], timed: Timed) -> Iterator[RegionScores | Unreadable]:
        """One answer a row, in order; classes are the manifest's categories. Enters `timed` by stage."""
        ...


@dataclass(frozen=True)
class Inference:
    """What a method said about some images.

    failures  {image id: reason} of images that could not be read or scored; they have no detections
    seconds   of each stage, over all parts, also those of an earlier run
    """

    detections: Detections
    failures: dict[int, str]
    seconds: dict[str, float]
    images: int


def infer(
    method: Method,
    folder: Path,
    *,
    detections_per_image: int = DETECTIONS_PER_IMAGE,
    max_failures: FailureLimit = EVALUATION_LIMIT,
) -> Inference:
    """The best detections of every image of the method's manifest, going on with what `folder` already holds.

    Parts with images that could not be read are tried again. Raises InputError as soon as more than
    `max_failures` of all images are known to be unreadable, or when `folder` cannot be written.
    """
    parts = _Parts(folder, method, detections_per_image)
    found = {part: stored for part in range(len(parts)) if (stored := parts.load(part)) is not None}
    pending = [part for part in range(len(parts)) if part not in found]
    rows = [row for part in pending for row in parts.rows(part)]
    if found:
        log.info("%s: %d of %d parts are done already", parts.folder, len(found), len(parts))
    progress = Progress(len(rows), "images")
    scores = method.score(rows, _timed(progress, method.device))
    for part in pending:
        found[part] = _infer_part(method, parts.rows(part), scores, progress, detections_per_image)
        parts.save(part, found[part])
        _stop_if_too_many_failed(method.manifest, found.values(), max_failures)
    return _joined([found[part] for part in sorted(found)])


def _infer_part(
    method: Method, rows: range, scores: Iterator[RegionScores | Unreadable], progress: Progress, limit: int
) -> Inference:
    """The next part's detections; its seconds are what the stages took since the part before."""
    manifest = method.manifest
    category_ids = np.array([category.id for category in manifest.categories], np.int64)
    before = dict(progress.stage_seconds)
    detections, failures = [], {}
    for row, of_image in zip(rows, islice(scores, len(rows)), strict=True):
        image_id, regions = int(manifest.image_ids[row]), manifest.regions(row)
        if isinstance(of_image, Unreadable):
            failures[image_id] = of_image.reason
        elif problem := of_image.not_finite():
            failures[image_id] = f"{manifest.paths[row]}: {problem}"
        else:
            detections.append(
                detections_of_image(
                    image_id,
                    manifest.boxes_xyxy[regions],
                    of_image.probabilities,
                    category_ids,
                    None if manifest.scores is None else manifest.scores[regions],
                    of_image.masks,
                    limit,
                )
            )
        progress.step()
    seconds = {stage: total - before.get(stage, 0.0) for stage, total in progress.stage_seconds.items()}
    return Inference(concatenate(detections), failures, seconds, len(rows))


def _timed(progress: Progress, device: torch.device) -> Timed:
    @contextmanager
    def stage(name: str) -> Iterator[None]:
        with progress.timed(name):
            yield
            if device.type == "cuda":
                torch.cuda.synchronize(device)  # a GPU answers before it is done

    return stage


def _stop_if_too_many_failed(manifest: Manifest, parts: Any, limit: FailureLimit) -> None:
    reasons = [reason for part in parts for reason in part.failures.values()]
    if not limit.allows(len(reasons), len(manifest)):
        raise InputError(
            f"{len(reasons)} of {len(manifest)} images could not be read, more than --max-failures {limit} allows "
            f"(the first: {reasons[0]}); check --data, or allow more"
        )


def _joined(parts: Sequence[Inference]) -> Inference:
    seconds: dict[str, float] = {}
    for part in parts:
        for stage, spent in part.seconds.items():
            seconds[stage] = seconds.get(stage, 0.0) + spent
    failures = {image_id: reason for part in parts for image_id, reason in part.failures.items()}
    images = sum(part.images for part in parts)
    return Inference(concatenate([part.detections for part in parts]), failures, seconds, images)


class _Parts:
    """The files of one evaluation: `folder/<digest>/00000.npz`, each of PART_SIZE images."""

    def __init__(self, folder: Path, method: Method, limit: int) -> None:
        self._images = len(method.manifest)
        identity = {
            "method": method.name,
            "identity": method.identity,
            "manifest": method.manifest.digest(),
            "category_ids": [category.id for category in method.manifest.categories],
            "detections_per_picture": limit,
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

    def save(self, part: int, inference: Inference) -> None:
        notes = {"failures": inference.failures, "seconds": inference.seconds, "pictures": inference.images}
        text = json.dumps(notes, allow_nan=False)
        columns: dict[str, Any] = {"notes": np.array(text), **to_columns(inference.detections)}
        buffer = io.BytesIO()
        np.savez(buffer, **columns)
        write_file(self._path(part), buffer.getvalue())

    def load(self, part: int) -> Inference | None:
        """A part of an earlier run; None where it is not there, is damaged, or had images that failed."""
        try:
            with np.load(self._path(part)) as columns:
                notes = json.loads(str(columns["notes"]))
                detections = from_columns(columns)
        except FileNotFoundError:
            return None
        except (zipfile.BadZipFile, KeyError, ValueError, EOFError, OSError):
            log.warning("%s: is damaged and is made again", self._path(part))
            return None
        return None if notes["failures"] else Inference(detections, {}, notes["seconds"], notes["pictures"])

    def _path(self, part: int) -> Path:
        return self.folder / f"{part:05d}.npz"
