"""The trained head as a method of evaluation: end to end from images, or from a feature cache.

Both give the same probabilities up to the rounding of the cache. From images there are masks too; from a cache no
backbone runs at all, and of CLIP only the text tower is loaded, if the class names were never embedded before.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from regionspot.cache.errors import ImageError
from regionspot.cache.format.manifest import Manifest
from regionspot.cache.store import FeatureCache
from regionspot.evaluation.inference.region_spot import Prepared, RegionSpot
from regionspot.evaluation.inference.resumable import Unreadable
from regionspot.evaluation.inference.scoring import RegionScores, Timed, head_digest, head_probabilities
from regionspot.fusion.batches import decode_on_device
from regionspot.fusion.head import FusionHead
from regionspot.fusion.vocabulary import Vocabulary
from regionspot.pipeline.backbones.batch_size import Halving
from regionspot.pipeline.extraction.decode_ahead import default_threads
from regionspot.pipeline.images.decode import Exif, read_image

T = TypeVar("T")

CACHE_BATCH = 16


class HeadOnImages:
    """The head end to end: decode, both encoders, tokens and masks, head."""

    name = "head"

    def __init__(
        self,
        spot: RegionSpot,
        manifest: Manifest,
        images: Path,
        vocabulary: Vocabulary,
        *,
        masks: bool = True,
        exif: Exif = "auto",
    ) -> None:
        self.manifest, self.device = manifest, spot.device
        self._spot, self._text, self._masks = spot, spot.text(vocabulary), masks
        self._reader = ImageReader(manifest, images, self._prepare, exif)
        self._batch = spot.localizer.batch_size
        self.identity = {**spot.identity(), "vocabulary": vocabulary.digest, "masks": masks, "exif": exif}
        self.features = {each.name: {**each.provenance, "exif": exif} for each in (spot.localizer, spot.encoder)}

    def score(self, rows: Sequence[int], timed: Timed) -> Iterator[RegionScores | Unreadable]:
        """One answer a row; stages "photo", "sam", "clip", "tokens" (and masks), "head"."""
        for batch in self._reader.batches(rows, self._batch, timed):
            readable = [image for image in batch if not isinstance(image, Unreadable)]
            scored = iter(self._spot.score(readable, self._text, self._masks, timed) if readable else ())
            for image in batch:
                yield image if isinstance(image, Unreadable) else next(scored)

    def _prepare(self, image: Image.Image, row: int) -> Prepared:
        return self._spot.prepare(image, self.manifest.boxes_xyxy[self.manifest.regions(row)])


class HeadOnCache:
    """The head on stored features. `rows` of the manifest are the rows of the cache."""

    name = "head, from the cache"

    def __init__(
        self,
        head: FusionHead,
        cache: FeatureCache,
        vocabulary: Vocabulary,
        feature_sets: tuple[str, str],
        *,
        limit: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        """`feature_sets` are the names of the token set and the map set that the head was trained on."""
        self.device = torch.device(device)
        self.manifest = cache.manifest.head(limit)
        self._cache, self._sets = cache, feature_sets
        self._head = head.to(self.device).eval()
        self._pieces = Halving()
        self._text = vocabulary.embeddings.to(self.device)
        self._failed = {failure.row: failure.reason for failure in cache.failures()}
        self.identity = {
            "head_sha256": head_digest(head),
            "vocabulary": vocabulary.digest,
            "features": {name: cache.feature_sets[name].provenance for name in feature_sets},
        }
        self.features = {name: cache.feature_sets[name].provenance for name in feature_sets}

    def score(self, rows: Sequence[int], timed: Timed) -> Iterator[RegionScores | Unreadable]:
        """One answer a row; stages "read", "head". Raises NotExtractedError for a part that is not written yet."""
        for start in range(0, len(rows), CACHE_BATCH):
            batch = rows[start : start + CACHE_BATCH]
            readable = [row for row in batch if row not in self._failed]
            scored = iter(self._score(readable, timed) if readable else ())
            for row in batch:
                yield Unreadable(self._failed[row]) if row in self._failed else RegionScores(next(scored))

    def _score(self, rows: Sequence[int], timed: Timed) -> list[NDArray[np.float32]]:
        with timed("read"):
            batch = self._cache.read(rows, token_set=self._sets[0], map_set=self._sets[1])
        with timed("head"):
            sets = self._cache.feature_sets
            padded = decode_on_device(batch.tokens, batch.token_scale, sets[self._sets[0]], self.device).float()
            feature_maps = decode_on_device(
                batch.feature_map, batch.map_scale, sets[self._sets[1]], self.device
            ).float()
            counts = batch.region_mask.sum(axis=1).tolist()
            tokens: list[Tensor] = [padded[place, :count] for place, count in enumerate(counts)]
            return head_probabilities(self._head, tokens, feature_maps, self._text, self._pieces)


class ImageReader(Generic[T]):
    """Decodes images ahead in threads, in the order asked for; one that cannot be read becomes Unreadable."""

    def __init__(
        self, manifest: Manifest, images: Path, prepare: Callable[[Image.Image, int], T], exif: Exif = "auto"
    ) -> None:
        """`prepare(image, row)` makes of an image what is wanted; it runs in the threads too."""
        self._manifest, self._images, self._prepare, self._exif = manifest, images, prepare, exif
        self._threads = default_threads()

    def batches(self, rows: Sequence[int], size: int, timed: Timed) -> Iterator[list[T | Unreadable]]:
        """`size` prepared images at a time; waiting for them is the stage "photo"."""
        pending: deque[Future[T | Unreadable]] = deque()
        ahead = iter(rows)
        with ThreadPoolExecutor(self._threads, thread_name_prefix="decode") as pool:
            try:
                for start in range(0, len(rows), size):
                    wanted = len(rows[start : start + size])
                    with timed("photo"):
                        while len(pending) < size + 2 * self._threads and (row := next(ahead, None)) is not None:
                            pending.append(pool.submit(self._read, row))
                        batch = [pending.popleft().result() for _ in range(wanted)]
                    yield batch
            finally:
                for future in pending:
                    future.cancel()

    def _read(self, row: int) -> T | Unreadable:
        manifest = self._manifest
        stated = (int(manifest.heights[row]), int(manifest.widths[row]))
        try:
            image = read_image(self._images / str(manifest.paths[row]), stated, self._exif)
        except ImageError as error:
            return Unreadable(str(error))
        return self._prepare(image, row)
