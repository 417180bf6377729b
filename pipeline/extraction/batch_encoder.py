"""Encode decoded images in batches: feature maps by the encoders, tokens by the localizer.

Rounding depends on the batch shape. So every image has a fixed slot: batch k of a part is its rows from k * B on,
whatever earlier runs did. An image that cannot be read, or whose features are not requested, leaves its slot blank
(zeros, with its boxes) instead of moving its neighbours. The bytes of the features then depend only on the batch shape,
which the part record states.

On a GPU, results of a batch are copied to the host while the next batch runs, so the device never waits for the host.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from regionspot.cache.errors import CorruptPartError
from regionspot.cache.format.manifest import Manifest
from regionspot.cache.format.schema import EncodedFeatures, ImageFeatures
from regionspot.cache.store import FeatureCache
from regionspot.pipeline.backbones.batch_size import Halving
from regionspot.pipeline.backbones.bundle import Backbones
from regionspot.pipeline.backbones.protocols import Backbone, Localizer, SemanticEncoder
from regionspot.pipeline.extraction.decode_ahead import DecodedImage, Decoder, Requests, decode_ahead
from regionspot.pipeline.reporting.run_stats import RunStats

EMBEDDING = "embedding"  # in ImageFeatures.features, beside the feature sets


def encode_images(
    requests: Requests, decoder: Decoder, encode: BatchEncoder, batch_size: int, part_size: int, threads: int
) -> Generator[ImageFeatures, None, None]:
    """Decode the images of `requests` in threads, encode them in batches, and yield their features in order.

    Runs in one process and workers share this function, so that they write the same bytes.
    """
    with closing(decode_ahead(decoder, requests, threads)) as decoded:
        yield from encode(batches_of(decoded, batch_size, part_size, encode.stats))


def batches_of(
    images: Iterator[DecodedImage], size: int, part_size: int, stats: RunStats
) -> Iterator[list[DecodedImage]]:
    """Lists of `size` images, shorter at the end of a part; waiting for images counts as the stage "decode".

    `images` are all images of whole parts in order, including unreadable ones. Batches never cross parts: rounding
    depends on batch composition, and parts must be byte-identical.
    """
    batch: list[DecodedImage] = []
    while True:
        with stats.timed("decode"):
            image = next(images, None)
        if image is None:
            break
        batch.append(image)
        if len(batch) == size or (image.row + 1) % part_size == 0:
            yield batch
            batch = []
    if batch:
        yield batch


def choose_batch_size(batch_size: int | None, cache: FeatureCache, names: Sequence[str], backbones: Backbones) -> int:
    """The batch size of a run: `batch_size` if given, else that of the cache's parts, else the models' default.

    A resumed run so writes the bytes of an uninterrupted one, also on a GPU with more memory. The parts decide only if
    all feature sets `names` were computed with the same batch size.
    """
    if batch_size is not None:
        return batch_size
    sizes = {_recorded_batch_size(cache, name) for name in names}
    recorded = sizes.pop() if len(sizes) == 1 else None
    return recorded or backbones.batch_size


def _recorded_batch_size(cache: FeatureCache, name: str) -> int | None:
    written = set(range(cache.n_parts)).difference(cache.pending_parts([name]))
    try:
        batches = cache.record(min(written), name).batches if written else ()
    except CorruptPartError:  # `cache verify` reports it
        return None
    return batches[0][0] if batches else None


@dataclass
class _Slot:
    """The features of one image of a batch; on the host once the batch is ready.

    batch_sizes   as in `ImageFeatures`
    """

    features: dict[str, Tensor] = field(default_factory=dict)
    batch_sizes: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class _Launched:
    """A batch that the device is computing, until the event `ready`."""

    batch: list[DecodedImage]
    slots: list[_Slot]
    ready: torch.cuda.Event | None


@dataclass(frozen=True)
class _Input:
    """An image and one model's input; zeros for a blank slot."""

    image: DecodedImage
    values: Tensor


class BatchEncoder:
    """Runs the backbones over batches of decoded images, in order.

    stats         counts the time in each stage and the ignored orientations
    device_lock   held during each call of a model, for encoders of several threads that share one device
    keep_embeddings   also return the localizer's embedding of each image, as EMBEDDING: masks are computed from it
    """

    def __init__(
        self,
        manifest: Manifest,
        backbones: Backbones,
        stats: RunStats,
        device_lock: AbstractContextManager[object] | None = None,
        keep_embeddings: bool = False,
    ) -> None:
        self.stats, self._keep_embeddings = stats, keep_embeddings
        self._manifest, self._backbones = manifest, backbones
        self._device, self._device_lock = backbones.device, device_lock or nullcontext()
        # Per model: a batch that fits one model may be too large for another.
        self._halving = defaultdict[str, Halving](Halving)

    def __call__(self, batches: Iterable[list[DecodedImage]]) -> Iterator[ImageFeatures]:
        """The features of each image in order; unreadable images, and non-finite features, as failures."""
        running: _Launched | None = None
        for batch in batches:
            launched = self._launch(batch)
            if launched.ready is None:
                yield from self._collect(launched)
                continue
            if running is not None:
                yield from self._collect(running)
            running = launched
        if running is not None:
            yield from self._collect(running)

    def _launch(self, batch: list[DecodedImage]) -> _Launched:
        slots = [_Slot() for _ in batch]
        for encoder in self._backbones.encoders:
            names = self._backbones.map_sets(encoder)
            self._fill(slots, batch, encoder, names, partial(self._compute_maps, encoder))
        if (localizer := self._backbones.localizer) is not None:
            self._fill(slots, batch, localizer, localizer.outputs, partial(self._compute_tokens, localizer))
        ready = None
        if self._device.type == "cuda":
            ready = torch.cuda.Event()
            ready.record()
        return _Launched(batch, slots, ready)

    def _fill(
        self,
        slots: list[_Slot],
        batch: list[DecodedImage],
        model: Backbone,
        names: Collection[str],
        compute: Callable[[Sequence[_Input]], list[dict[str, Tensor]]],
    ) -> None:
        """Compute the feature sets `names` of a model for those images that have an input for it."""
        halving, has_input = self._halving[model.name], [model.name in image.inputs for image in batch]
        if not any(has_input):
            for slot, size in zip(slots, halving.sizes(len(batch)), strict=True):
                slot.batch_sizes.update(dict.fromkeys(names, size))
            return
        example = batch[has_input.index(True)].inputs[model.name]
        blank = torch.zeros(example.shape, dtype=example.dtype, device=self._device)
        inputs = [_Input(image, image.inputs.get(model.name, blank)) for image in batch]
        results = ((features, len(piece)) for piece in halving.results(compute, inputs) for features in piece)
        for slot, requested, (features, size) in zip(slots, has_input, results, strict=True):
            slot.batch_sizes.update(dict.fromkeys(names, size))
            if requested:
                slot.features.update(features)

    def _compute_maps(self, encoder: SemanticEncoder, inputs: Sequence[_Input]) -> list[dict[str, Tensor]]:
        with self.stats.timed("encode"):
            batch = torch.stack([self._to_device(item.values) for item in inputs])
            with self._device_lock:
                maps = self._backbones.encode_maps(encoder, batch)
            on_host = {name: self._to_host(values) for name, values in maps.items()}
            return [{name: values[index] for name, values in on_host.items()} for index in range(len(inputs))]

    def _compute_tokens(self, localizer: Localizer, inputs: Sequence[_Input]) -> list[dict[str, Tensor]]:
        with self.stats.timed("encode"):
            batch = [self._to_device(item.values) for item in inputs]
            with self._device_lock:
                embeddings = localizer.encode(batch)
        with self.stats.timed("tokens"):
            boxes = [self._manifest.boxes_xyxy[self._manifest.regions(item.image.row)] for item in inputs]
            # Tokens of an unreadable image are discarded, so its stated size is good enough.
            sizes = [item.image.size or self._stated_size(item.image.row) for item in inputs]
            with self._device_lock:
                outputs = localizer.outputs_of_images(embeddings, boxes, sizes)
            if self._keep_embeddings:
                outputs = [{**features, EMBEDDING: one} for features, one in zip(outputs, embeddings, strict=True)]
            return [{name: self._to_host(values) for name, values in features.items()} for features in outputs]

    def _stated_size(self, row: int) -> tuple[int, int]:
        return max(int(self._manifest.heights[row]), 1), max(int(self._manifest.widths[row]), 1)

    def _to_device(self, values: Tensor) -> Tensor:
        return values.to(self._device, non_blocking=self._device.type == "cuda")

    def _to_host(self, values: Tensor) -> Tensor:
        # From CUDA asynchronously into pinned memory, which is read after the batch's event.
        return values.to("cpu", non_blocking=self._device.type == "cuda")

    def _collect(self, launched: _Launched) -> Iterator[ImageFeatures]:
        if launched.ready is not None:
            with self.stats.timed("encode"):
                launched.ready.synchronize()
        for image, slot in zip(launched.batch, launched.slots, strict=True):
            self.stats.ignored_orientations += image.orientation_ignored
            features: dict[str, NDArray[Any] | EncodedFeatures] = {
                name: values.numpy() for name, values in slot.features.items()
            }
            failure = image.failure or self._not_finite(image.row, slot.features)
            yield ImageFeatures(image.row, features, failure, slot.batch_sizes)

    def _not_finite(self, row: int, features: Mapping[str, Tensor]) -> str | None:
        """Why an image with NaN or infinity in its features fails: they must never be stored."""
        for name, values in features.items():
            # The extremes show NaN and infinity without allocating a mask.
            if values.numel() and not torch.isfinite(torch.stack(torch.aminmax(values))).all():
                return (
                    f"{self._manifest.paths[row]}: its {name} features are not finite; the backbone overflows in its "
                    "dtype: use --dtype float32, and another cache"
                )
        return None
