"""Decode and resize images in threads ahead of the encoders; Pillow and torch release the GIL meanwhile."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image
from torch import Tensor

from regionspot.cache.errors import ImageError
from regionspot.cache.format.manifest import Manifest
from regionspot.cache.machine import processors
from regionspot.pipeline.backbones.bundle import Backbones
from regionspot.pipeline.images.decode import Exif, decode_image


@dataclass(frozen=True)
class DecodedImage:
    """One image as model inputs, or the reason why it could not be read.

    inputs   model name to the model's input; empty if the image could not be read
    size     (height, width) of the original; None if it was not read
    """

    row: int
    inputs: dict[str, Tensor] = field(default_factory=dict)
    size: tuple[int, int] | None = None
    orientation_ignored: bool = False
    failure: str | None = None


@dataclass(frozen=True)
class Decoder:
    """Reads an image once and resizes it for each model whose features are requested; thread-safe."""

    manifest: Manifest
    image_folder: Path
    backbones: Backbones
    exif: Exif

    def __call__(self, row: int, names: Sequence[str]) -> DecodedImage:
        stated_size = (int(self.manifest.heights[row]), int(self.manifest.widths[row]))
        try:
            decoded = decode_image(self.image_folder / str(self.manifest.paths[row]), stated_size, self.exif)
        except ImageError as error:
            return DecodedImage(row, failure=str(error))
        return DecodedImage(
            row,
            inputs=self.model_inputs(decoded.image, names),
            size=(decoded.image.height, decoded.image.width),
            orientation_ignored=decoded.orientation == "ignored",
        )

    def model_inputs(self, image: Image.Image, names: Sequence[str]) -> dict[str, Tensor]:
        """The inputs for the feature sets `names`, by model."""
        localizer, inputs = self.backbones.localizer, {}
        if localizer is not None and not localizer.outputs.keys().isdisjoint(names):
            inputs[localizer.name] = localizer.preprocess(image)
        for encoder in self.backbones.encoders:
            if not self.backbones.map_sets(encoder).keys().isdisjoint(names):
                inputs[encoder.name] = encoder.preprocess(image)
        if self.backbones.device.type == "cuda":  # pinned memory, for asynchronous copies to the device
            inputs = {name: values.pin_memory() for name, values in inputs.items()}
        return inputs


Requests = Generator[tuple[int, Sequence[str]], None, None]  # rows, with the names of the requested feature sets


def default_threads() -> int:
    """The default number of decoding threads."""
    return min(16, processors())


def decode_ahead(decoder: Decoder, requests: Requests, threads: int) -> Generator[DecodedImage, None, None]:
    """The images of `requests` in order, decoded ahead by threads. Closing the generator closes `requests`."""
    pending: deque[Future[DecodedImage]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="decode") as pool, closing(requests):
        try:
            for row, names in requests:
                pending.append(pool.submit(decoder, row, names))
                if len(pending) > 4 * threads:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
