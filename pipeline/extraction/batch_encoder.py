"""Decoded images in, features out: batches through the encoders, their boxes through the token decoder together.

How a product rounds depends on the shape of its batch. So every image has a fixed slot: batch k of a part is its rows
from k * B on, whichever parts a run has done before, and an image that cannot be read, or of which nothing is wanted,
leaves its slot blank (zeros, and its boxes) instead of moving its neighbours. Their bytes then depend on the batch's
shape alone, which the part's record states.

On a GPU the results of a batch are fetched when the next one is under way, so the device never waits for the host to
look at what it made.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
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
from regionspot.pipeline.extraction.decode_ahead import DecodedImage, Decoder, Jobs, decode_ahead
from regionspot.pipeline.reporting.run_stats import RunStats


def features_of(
    jobs: Jobs, decoder: Decoder, encode: BatchEncoder, batch_size: int, part_size: int, threads: int | None
) -> Generator[ImageFeatures, None, None]:
    """Features of the images of `jobs`, in order: decoded ahead by threads, then encoded in batches.

    All ways to extract go through here, in one process or in a worker, so that the bytes are the same.
    """
    with closing(decode_ahead(decoder, jobs, threads)) as decoded:
        yield from encode(batches_of(decoded, batch_size, part_size, encode.stats))


def batches_of(
    images: Iterator[DecodedImage], size: int, part_size: int, stats: RunStats
) -> Iterator[list[DecodedImage]]:
    """Lists of `size` images, shorter at a part's end; waiting for them is the decoders' share of the time.

    `images` are those of whole parts, in order, the unreadable ones among them. No batch spans two parts: a part shall
    hold the same bytes whichever parts its run has done before.
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


def images_at_a_time(asked: int | None, cache: FeatureCache, names: Sequence[str], backbones: Backbones) -> int:
    """The batch size of a run: what is asked for, else that of the parts that are there, else what suits the models.

    The second so that a resumed run gives the bytes of one that was never stopped, also on a GPU with more memory. It
    needs all the feature sets `names` to have been made in batches of one size.
    """
    if asked is not None:
        return asked
    sizes = {_recorded_size(cache, name) for name in names}
    recorded = sizes.pop() if len(sizes) == 1 else None
    return recorded or backbones.batch_size


def _recorded_size(cache: FeatureCache, name: str) -> int | None:
    written = set(range(cache.n_parts)).difference(cache.pending_parts([name]))
    try:
        batches = cache.record(min(written), name).batches if written else ()
    except CorruptPartError:  # for `cache verify` to report
        return None
    return batches[0][0] if batches else None


@dataclass
class _Slot:
    """What the models made of one image of a batch: on the host, once the batch is ready.

    batch_sizes   as `ImageFeatures` has them
    """

    features: dict[str, Tensor] = field(default_factory=dict)
    batch_sizes: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class _Launched:
    """A batch that the device is at work on, until `ready`."""

    batch: list[DecodedImage]
    slots: list[_Slot]
    ready: torch.cuda.Event | None


class BatchEncoder:
    """Runs the backbones over batches of decoded images, in order.

    stats   counts the time in each stage and the ignored orientations
    """

    def __init__(self, manifest: Manifest, backbones: Backbones, stats: RunStats) -> None:
        self.stats = stats
        self._manifest, self._backbones = manifest, backbones
        self._device = backbones.device
        self._pieces = defaultdict[str, Halving](Halving)  # by model: a batch that fits one may be too much for another

    def __call__(self, batches: Iterable[list[DecodedImage]]) -> Iterator[ImageFeatures]:
        """The wanted features of each image, in order; one that failed, or whose features did, has its reason."""
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

    def _launch(self, batch: list[DecodedImage]) -> _Launched:
        slots = [_Slot() for _ in batch]
        for encoder in self._backbones.encoders:
            self._fill(slots, batch, encoder, [encoder.name], self._maps_by(encoder))
        if (localizer := self._backbones.localizer) is not None:
            self._fill(slots, batch, localizer, localizer.outputs, self._tokens_by(localizer))
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
        """Put the feature sets `names` of a model into the slots of the images that they are wanted of."""
        pieces, there = self._pieces[model.name], [model.name in image.inputs for image in batch]
        if not any(there):
            for slot, size in zip(slots, pieces.sizes(len(batch)), strict=True):
                slot.batch_sizes.update(dict.fromkeys(names, size))
            return
        some = batch[there.index(True)].inputs[model.name]
        blank = torch.zeros(some.shape, dtype=some.dtype, device=self._device)
        inputs = [_Input(image, image.inputs.get(model.name, blank)) for image in batch]
        results = ((features, len(piece)) for piece in pieces.results(compute, inputs) for features in piece)
        for slot, wanted, (features, size) in zip(slots, there, results, strict=True):
            slot.batch_sizes.update(dict.fromkeys(names, size))
            if wanted:
                slot.features.update(features)

    def _maps_by(self, encoder: SemanticEncoder) -> Callable[[Sequence[_Input]], list[dict[str, Tensor]]]:
        def compute(inputs: Sequence[_Input]) -> list[dict[str, Tensor]]:
            with self.stats.timed("encode"):
                maps = encoder.encode(torch.stack([self._on_device(each.values) for each in inputs])).float()
                return [{encoder.name: feature_map} for feature_map in self._on_host(maps)]

        return compute

    def _tokens_by(self, localizer: Localizer) -> Callable[[Sequence[_Input]], list[dict[str, Tensor]]]:
        manifest = self._manifest

        def compute(inputs: Sequence[_Input]) -> list[dict[str, Tensor]]:
            with self.stats.timed("encode"):
                embeddings = localizer.encode([self._on_device(each.values) for each in inputs])
            with self.stats.timed("tokens"):
                boxes = [manifest.boxes_xyxy[manifest.regions(each.image.row)] for each in inputs]
                # The stated size of an image that was not read is as good as any: nobody gets its tokens.
                sizes = [each.image.size or self._stated_size(each.image.row) for each in inputs]
                found = localizer.outputs_of_images(embeddings, boxes, sizes)
                return [{name: self._on_host(values) for name, values in features.items()} for features in found]

        return compute

    def _stated_size(self, row: int) -> tuple[int, int]:
        return max(int(self._manifest.heights[row]), 1), max(int(self._manifest.widths[row]), 1)

    def _on_device(self, values: Tensor) -> Tensor:
        return values.to(self._device, non_blocking=self._device.type == "cuda")

    def _on_host(self, values: Tensor) -> Tensor:
        # On CUDA into pinned memory, to be read behind an event. Elsewhere there is none to wait for.
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
        """Why an image fails whose features hold NaN or infinity: it must cost itself only, and never be stored."""
        for name, values in features.items():
            # Both show in the extremes, which take no memory for a mask.
            if values.numel() and not torch.isfinite(torch.stack(torch.aminmax(values))).all():
                return (
                    f"{self._manifest.paths[row]}: its {name} features are not finite; the backbone overflows in its "
                    "dtype: extract into another cache with --dtype float32"
                )
        return None


@dataclass(frozen=True)
class _Input:
    """An image and what one model takes of it; zeros for a blank slot."""

    image: DecodedImage
    values: Tensor
