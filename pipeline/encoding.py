"""Decoded pictures in, features out: batches through the encoders, their boxes through the token decoder together.

On a GPU the results of a batch are fetched when the next one is under way, so the device never waits for the host to
look at what it made.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from regionspot.cache.manifest import Manifest
from regionspot.cache.progress import Progress
from regionspot.cache.schema import PictureFeatures, Stored
from regionspot.pipeline.batch_size import Halving
from regionspot.pipeline.decoding import Decoded
from regionspot.pipeline.frozen_models import Backbones
from regionspot.pipeline.models import Localizer, SemanticEncoder


def batches_of(pictures: Iterator[Decoded], size: int, part_size: int, progress: Progress) -> Iterator[list[Decoded]]:
    """Lists of `size` pictures, shorter at a part's end; waiting for them is the decoders' share of the time.

    None spans two parts: how a product rounds may depend on what else is in its batch, and a part shall hold the same
    bytes whichever parts its run has done before.
    """
    batch: list[Decoded] = []
    while True:
        with progress.timed("decode"):
            picture = next(pictures, None)
        if picture is None:
            break
        batch.append(picture)
        if len(batch) == size or (picture.row + 1) % part_size == 0:
            yield batch
            batch = []
    if batch:
        yield batch


@dataclass(frozen=True)
class _Launched:
    """A batch that the device is at work on. `outputs`: by row, feature set and on the host, once `ready` is."""

    batch: list[Decoded]
    outputs: dict[int, dict[str, Tensor]]
    ready: torch.cuda.Event | None


class BatchEncoder:
    """Runs the backbones over batches of decoded pictures, in order.

    ignored_orientations   pictures so far whose EXIF would have turned them, but whose annotations want them as stored
    """

    def __init__(self, manifest: Manifest, backbones: Backbones, progress: Progress) -> None:
        self.progress = progress
        self._manifest, self._backbones = manifest, backbones
        self._device = backbones.device
        self._pieces = defaultdict[str, Halving](Halving)  # by model: a batch that fits one may be too much for another
        self.ignored_orientations = 0

    def __call__(self, batches: Iterable[list[Decoded]]) -> Iterator[PictureFeatures]:
        """The wanted features of each picture, in order; one that failed passes with its reason."""
        under_way: _Launched | None = None
        for batch in batches:
            launched = self._launch(batch)
            if launched.ready is None:
                yield from self._collect(launched)
                continue
            if under_way is not None:
                yield from self._collect(under_way)
            under_way = launched
        if under_way is not None:
            yield from self._collect(under_way)

    def _launch(self, batch: list[Decoded]) -> _Launched:
        outputs: dict[int, dict[str, Tensor]] = {picture.row: {} for picture in batch}
        for encoder in self._backbones.encoders:
            self._encode(encoder, batch, outputs)
        if self._backbones.localizer is not None:
            self._localize(self._backbones.localizer, batch, outputs)
        ready = None
        if self._device.type == "cuda":
            ready = torch.cuda.Event()
            ready.record()
        return _Launched(batch, outputs, ready)

    def _encode(self, encoder: SemanticEncoder, batch: list[Decoded], outputs: dict[int, dict[str, Tensor]]) -> None:
        wanting = [picture for picture in batch if encoder.name in picture.inputs]
        if not wanting:
            return
        with self.progress.timed("encode"):
            inputs = [self._on_device(picture.inputs[encoder.name]) for picture in wanting]
            maps = self._pieces[encoder.name](lambda piece: encoder.encode(torch.stack(list(piece))), inputs).float()
            for picture, feature_map in zip(wanting, self._on_host(maps), strict=True):
                outputs[picture.row][encoder.name] = feature_map

    def _localize(self, localizer: Localizer, batch: list[Decoded], outputs: dict[int, dict[str, Tensor]]) -> None:
        wanting = [picture for picture in batch if localizer.name in picture.inputs]
        if not wanting:
            return
        with self.progress.timed("encode"):
            inputs = [self._on_device(picture.inputs[localizer.name]) for picture in wanting]
            embeddings = self._pieces[localizer.name](localizer.encode, inputs)
        with self.progress.timed("tokens"):
            boxes = [self._manifest.boxes_xyxy[self._manifest.regions(picture.row)] for picture in wanting]
            found = localizer.outputs_of_pictures(embeddings, boxes, [picture.size for picture in wanting])
            for picture, of_picture in zip(wanting, found, strict=True):
                for name, values in of_picture.items():
                    outputs[picture.row][name] = self._on_host(values)

    def _on_device(self, values: Tensor) -> Tensor:
        return values.to(self._device, non_blocking=self._device.type == "cuda")

    def _on_host(self, values: Tensor) -> Tensor:
        # On CUDA into pinned memory, to be read behind an event. Elsewhere there is none to wait for.
        return values.to("cpu", non_blocking=self._device.type == "cuda")

    def _collect(self, launched: _Launched) -> Iterator[PictureFeatures]:
        if launched.ready is not None:
            with self.progress.timed("encode"):
                launched.ready.synchronize()
        for picture in launched.batch:
            self.ignored_orientations += picture.orientation_ignored
            features: dict[str, NDArray[Any] | Stored] = {
                name: values.numpy() for name, values in launched.outputs[picture.row].items()
            }
            yield PictureFeatures(picture.row, features, picture.failure)
