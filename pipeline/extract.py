"""Photos in, cache out: decode ahead, encode in batches, write behind.

Threads decode and resize the pictures ahead, the calling thread keeps the encoders busy, one thread commits parts.
Between them stand two short queues, so memory does not grow with the dataset and the slowest stage sets the pace;
the summary names it. What is done is known from the cache alone: a run that was killed goes on with the parts that
have no record yet.
"""

from __future__ import annotations

import logging
import os
import queue
import socket
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from regionspot.cache.errors import InputError, PhotoError
from regionspot.cache.manifest import Manifest
from regionspot.cache.progress import Progress
from regionspot.cache.schema import FeatureSet
from regionspot.cache.store import FeatureCache, PictureFeatures
from regionspot.pipeline.encoder import SemanticEncoder
from regionspot.pipeline.localizer import Localizer
from regionspot.pipeline.photos import Exif, read_photo

log = logging.getLogger(__name__)

# A wrong photo folder shows in the first pictures: stop before a part of nothing but failures is committed.
FIRST_PICTURES = 10


@dataclass(frozen=True)
class Backbones:
    """The frozen models of one extraction; either may be left out to extract the other alone."""

    localizer: Localizer | None = None
    encoder: SemanticEncoder | None = None

    def feature_sets(self, exif: Exif = "auto") -> list[FeatureSet]:
        """What these models write into a cache, with the provenance that a later run must match."""
        sets = []
        if self.localizer is not None:
            provenance = {**self.localizer.provenance, "exif": exif}
            sets.append(FeatureSet(self.localizer.name, "token", (self.localizer.token_dim,), "float16", provenance))
        if self.encoder is not None:
            provenance = {**self.encoder.provenance, "exif": exif}
            sets.append(FeatureSet(self.encoder.name, "map", self.encoder.map_shape, "float16", provenance))
        return sets


@dataclass(frozen=True)
class ExtractSummary:
    """What one run of `extract` did. `shares` is each stage's share of the time, `bottleneck` the largest of them."""

    pictures: int
    failed: int
    parts: int
    parts_done_before: int
    seconds: float
    shares: dict[str, float]

    @property
    def bottleneck(self) -> str:
        return max(self.shares, key=self.shares.__getitem__, default="nothing")


@dataclass(frozen=True)
class _Decoded:
    """One picture ready for the encoders, or the reason why it is not."""

    row: int
    sam: Tensor | None = None
    clip: Tensor | None = None
    size: tuple[int, int] = (0, 0)
    failure: str | None = None


def extract(
    cache: FeatureCache,
    photo_folder: Path,
    backbones: Backbones,
    *,
    exif: Exif = "auto",
    batch_size: int = 8,
    decode_threads: int | None = None,
    max_failed_share: float = 0.2,
) -> ExtractSummary:
    """Run the backbones over every part of `cache` that has no record yet.

    A picture that cannot be read is recorded with its reason and skipped. Raises InputError when the first
    pictures all fail, or when more than `max_failed_share` of this run's do (V3Det's copies lack many photos; a
    mistyped folder lacks all); what is committed by then stays.
    """
    names = [feature_set.name for feature_set in backbones.feature_sets(exif)]
    parts = cache.pending_parts(names)
    rows = [row for part in parts for row in cache.part_rows(part)]
    progress = Progress(len(rows), "pictures")
    failed = 0
    with _Writer(cache, parts, names) as writer:
        decoded = _decode_ahead(cache.manifest, rows, photo_folder, backbones, exif, decode_threads)
        for batch in _timed_batches(decoded, batch_size, progress):
            for picture in _encode(batch, cache.manifest, backbones, progress):
                failed += picture.failure is not None
                with progress.timed("write"):
                    writer.put(picture)
                progress.step()
                _stop_if_hopeless(failed, progress.done, len(rows), max_failed_share, photo_folder, picture.failure)
    return ExtractSummary(
        len(rows), failed, len(parts), cache.n_parts - len(parts), progress.seconds, progress.shares()
    )


def _decode_ahead(
    manifest: Manifest,
    rows: Sequence[int],
    photo_folder: Path,
    backbones: Backbones,
    exif: Exif,
    threads: int | None,
) -> Iterator[_Decoded]:
    """The pictures at `rows`, in that order, decoded by threads that stay a little ahead."""
    count = threads or min(16, os.cpu_count() or 1)
    pending: deque[Future[_Decoded]] = deque()
    with ThreadPoolExecutor(count, thread_name_prefix="decode") as pool:
        try:
            for row in rows:
                pending.append(pool.submit(_decode, manifest, row, photo_folder, backbones, exif))
                if len(pending) > 4 * count:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


def _decode(manifest: Manifest, row: int, photo_folder: Path, backbones: Backbones, exif: Exif) -> _Decoded:
    stated = (int(manifest.heights[row]), int(manifest.widths[row]))
    try:
        photo = read_photo(photo_folder / str(manifest.paths[row]), stated, exif)
    except PhotoError as error:
        return _Decoded(row, failure=str(error))
    return _Decoded(
        row,
        sam=None if backbones.localizer is None else backbones.localizer.preprocess(photo),
        clip=None if backbones.encoder is None else backbones.encoder.preprocess(photo),
        size=(photo.height, photo.width),
    )


def _timed_batches(pictures: Iterator[_Decoded], size: int, progress: Progress) -> Iterator[list[_Decoded]]:
    """Lists of `size` pictures, the last one shorter; waiting for them is the decoders' share of the time."""
    while True:
        with progress.timed("decode"):
            batch = [picture for _, picture in zip(range(size), pictures, strict=False)]
        if not batch:
            return
        yield batch


@torch.inference_mode()
def _encode(
    batch: list[_Decoded], manifest: Manifest, backbones: Backbones, progress: Progress
) -> Iterator[PictureFeatures]:
    """Features of each picture of the batch, in order; a picture that failed passes through with its reason."""
    good = [picture for picture in batch if picture.failure is None]
    features: dict[int, dict[str, np.ndarray[Any, Any]]] = {picture.row: {} for picture in good}
    if good and backbones.encoder is not None:
        with progress.timed("encode"):
            maps = backbones.encoder.encode(torch.stack([p.clip for p in good if p.clip is not None]))
            for picture, feature_map in zip(good, maps.float().cpu().numpy(), strict=True):
                features[picture.row][backbones.encoder.name] = feature_map
    if good and backbones.localizer is not None:
        with progress.timed("encode"):
            embeddings = backbones.localizer.encode([p.sam for p in good if p.sam is not None])
        with progress.timed("tokens"):
            for picture, embedding in zip(good, embeddings, strict=True):
                boxes = manifest.boxes_xyxy[manifest.regions(picture.row)]
                tokens = backbones.localizer.tokens(embedding, boxes, picture.size)
                features[picture.row][backbones.localizer.name] = tokens.float().cpu().numpy()
    for picture in batch:
        yield PictureFeatures(picture.row, features.get(picture.row, {}), picture.failure)


def _stop_if_hopeless(
    failed: int, seen: int, total: int, max_share: float, photo_folder: Path, reason: str | None
) -> None:
    first = min(FIRST_PICTURES, total)
    if reason is not None and ((failed == seen == first) or failed > max(FIRST_PICTURES, max_share * seen)):
        raise InputError(
            f"{photo_folder}: {failed} of the first {seen} pictures could not be read (the last: {reason}); "
            "check --data, or allow more with --max-failed"
        )


class _Writer:
    """Commits parts in a thread of its own, one after the other, fed by `put` in row order.

    Leaving the `with` block waits for the last part; leaving it by an error drops the part in flight, which then
    has no record and is done again by the next run.
    """

    def __init__(self, cache: FeatureCache, parts: Sequence[int], feature_sets: Sequence[str]) -> None:
        self._cache, self._parts, self._sets = cache, parts, feature_sets
        self._queue: queue.Queue[PictureFeatures | None] = queue.Queue(maxsize=64)
        self._abandoned = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="write", daemon=True)

    def __enter__(self) -> _Writer:
        self._thread.start()
        return self

    def put(self, picture: PictureFeatures) -> None:
        """Hand over the next picture. Raises what stopped the writer, if something did."""
        while True:
            if self._error is not None:
                raise self._error
            try:
                return self._queue.put(picture, timeout=0.2)
            except queue.Full:
                continue

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._abandoned.set()
        self._thread.join()
        if kind is None and self._error is not None:
            raise self._error

    def _run(self) -> None:
        worker = f"{socket.gethostname()}:{os.getpid()}"
        try:
            for part in self._parts:
                self._cache.write_part(part, self._pictures(len(self._cache.part_rows(part))), self._sets, worker)
        except BaseException as error:
            self._error = error

    def _pictures(self, count: int) -> Iterator[PictureFeatures]:
        for _ in range(count):
            yield self._next()

    def _next(self) -> PictureFeatures:
        while not self._abandoned.is_set():
            try:
                return self._queue.get(timeout=0.2)
            except queue.Empty:
                continue
        raise _Abandoned


class _Abandoned(Exception):
    """The run is stopping; the part in flight is not committed."""
