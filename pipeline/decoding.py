"""Photos read and resized ahead of the encoders, by threads: Pillow and torch let go of the interpreter meanwhile."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from regionspot.cache.errors import PhotoError
from regionspot.cache.manifest import Manifest
from regionspot.pipeline.encoder import SemanticEncoder
from regionspot.pipeline.localizer import Localizer
from regionspot.pipeline.photos import Exif, decode_photo


@dataclass(frozen=True)
class Decoded:
    """One picture ready for the encoders that want it, or the reason why it is not."""

    row: int
    sam: Tensor | None = None
    clip: Tensor | None = None
    size: tuple[int, int] = (0, 0)
    orientation_ignored: bool = False
    failure: str | None = None


@dataclass(frozen=True)
class Decoder:
    """Reads and resizes one picture for the feature sets that are wanted of it. Called from threads."""

    manifest: Manifest
    photo_folder: Path
    localizer: Localizer | None
    encoder: SemanticEncoder | None
    exif: Exif

    def __call__(self, row: int, names: Sequence[str]) -> Decoded:
        stated = (int(self.manifest.heights[row]), int(self.manifest.widths[row]))
        try:
            photo = decode_photo(self.photo_folder / str(self.manifest.paths[row]), stated, self.exif)
        except PhotoError as error:
            return Decoded(row, failure=str(error))
        localizer, encoder = self.localizer, self.encoder
        return Decoded(
            row,
            sam=localizer.preprocess(photo.image) if localizer and localizer.name in names else None,
            clip=encoder.preprocess(photo.image) if encoder and encoder.name in names else None,
            size=(photo.image.height, photo.image.width),
            orientation_ignored=photo.orientation == "ignored",
        )


Jobs = Generator[tuple[int, Sequence[str]], None, None]  # rows, and the feature sets wanted of each


def decode_ahead(decoder: Decoder, jobs: Jobs, threads: int | None) -> Generator[Decoded, None, None]:
    """The pictures of `jobs`, in that order, decoded by threads that stay a little ahead. Closing it closes `jobs`."""
    count = threads or min(16, os.cpu_count() or 1)
    pending: deque[Future[Decoded]] = deque()
    with ThreadPoolExecutor(count, thread_name_prefix="decode") as pool, closing(jobs):
        try:
            for row, names in jobs:
                pending.append(pool.submit(decoder, row, names))
                if len(pending) > 4 * count:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
