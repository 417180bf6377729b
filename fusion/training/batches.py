"""The batch of every training step, read ahead, copied to the training device and decoded there.

A batch follows from the seed and the step alone, so a resumed run gets the same batches as a run that was never
stopped. The batches of one cache are those of its loader, epoch after epoch; several caches alternate.
"""

# B images, R regions (padded), T map tokens, C location token, D width of the map

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from regionspot.cache.errors import InputError
from regionspot.cache.format.encodings import require_statistics
from regionspot.cache.format.schema import FeatureSet
from regionspot.cache.reading.batch import Batch
from regionspot.cache.reading.loader import Loader
from regionspot.fusion.training.config import TrainConfig
from regionspot.fusion.training.distributed import SINGLE, Group
from regionspot.fusion.training.negatives import CountedClasses, repeat_factors, repeated_rows
from regionspot.fusion.training.training_sets import TrainingSet

log = logging.getLogger(__name__)

# Fractional part of the golden ratio: its multiples modulo 1 fill every interval of [0, 1) more evenly than random
# numbers do, so the ratios of the caches also hold over short intervals of a run.
GOLDEN = 0.6180339887498949


HostBatch = tuple[int, int, Batch]  # step, index of the training set, batch


@dataclass(frozen=True, eq=False)
class TrainingBatch:
    """The images of one step that this process computes, on the device; valid until the next batch is requested.

    set_index    of the training set that the images are from
    rows         int64 (B,) of its manifest, on the host
    stored_bytes of the features in the cache
    tokens       (B, R, C), region_mask bool (B, R), feature_map (B, T, D)
    boxes        float32 (B, R, 4), x1, y1, x2, y2 divided by the image's width and height; padding is 0
    categories   int64 (B, R), -1 for padding and unknown classes
    known        int64 (N,), indices of the regions with a known class in the flattened (B * R)
    class_ids    int64 (K,), the classes that count in this step; None: all
    ignored      bool (B, K), True where a class is no negative for the regions of an image; None: nowhere
    """

    step: int
    set_index: int
    training_set: TrainingSet
    rows: NDArray[np.int64]
    stored_bytes: int
    tokens: Tensor
    region_mask: Tensor
    feature_map: Tensor
    boxes: Tensor
    categories: Tensor
    known: Tensor
    class_ids: Tensor | None = None
    ignored: Tensor | None = None

    def __len__(self) -> int:
        return len(self.rows)


def batch_shares(training_sets: Sequence[TrainingSet], ratios: Sequence[float] | None = None) -> NDArray[np.float64]:
    """Share of the batches that each training set gives; they add up to 1.

    `ratios` are in any unit; default: the number of usable images. Raises InputError unless there is one positive ratio
    for each training set.
    """
    sizes = [len(training_set.rows) for training_set in training_sets]
    weights = np.asarray(sizes if ratios is None else ratios, dtype=np.float64)
    if weights.shape != (len(sizes),) or not (np.isfinite(weights).all() and (weights > 0).all()):
        raise InputError(f"ratios {weights.tolist()}: expected {len(sizes)} numbers above 0, one for each cache")
    shares: NDArray[np.float64] = weights / weights.sum()
    return shares


def set_of_steps(shares: NDArray[np.float64], steps: int) -> NDArray[np.int64]:
    """int64 (steps,): index of the training set that each step reads from."""
    edges = np.cumsum(shares)[:-1]
    return np.searchsorted(edges, np.arange(steps) * GOLDEN % 1.0, side="right").astype(np.int64)


def read_batches(
    training_sets: Sequence[TrainingSet],
    shares: NDArray[np.float64],
    config: TrainConfig,
    device: torch.device,
    first_step: int = 0,
    end_step: int | None = None,
    group: Group = SINGLE,
) -> Generator[TrainingBatch]:
    """The batches of steps `first_step` to `end_step` - 1 (default: to the end of the run), read ahead by threads.

    `config.batch_size` images are shared by all processes of `group`. On a GPU, a batch is copied from page-locked
    memory on a stream of its own while the step before computes. Raises the error of a failed read at the step whose
    batch it concerns.
    """
    decoders = [(DeviceDecoder(one.tokens, device), DeviceDecoder(one.maps, device)) for one in training_sets]

    counted_classes = [
        CountedClasses(
            one.cache.manifest,
            one.rows,
            sampled=config.negatives,
            seed=config.seed + index,
            unverified=config.unverified,
        )
        for index, one in enumerate(training_sets)
    ]
    for one, counted in zip(training_sets, counted_classes, strict=True):
        if counted.verified_only:
            log.info("%s: only the classes that were verified in an image are its negatives", one.cache.path)

    def to_device(step: int, index: int, batch: Batch) -> TrainingBatch:
        decode_tokens, decode_maps = decoders[index]
        regions = _regions(batch, config.max_regions, [config.seed, step])
        if config.padding == "reference":
            regions = _taken(regions, repeated_regions(regions["region_mask"]))
        categories = regions["categories"].astype(np.int64)
        boxes = training_sets[index].relative_boxes(batch.rows, regions["boxes_xyxy"], regions["region_mask"])
        arrays = (regions["region_mask"], boxes, categories, np.flatnonzero(categories >= 0))
        mask, boxes_on_device, categories_on_device, known = (
            torch.from_numpy(array).to(device, non_blocking=True) for array in arrays
        )
        class_ids, ignored = (
            None if array is None else torch.from_numpy(array).to(device, non_blocking=True)
            for array in counted_classes[index].of_step(step, batch.rows, categories)
        )
        return TrainingBatch(
            step=step,
            set_index=index,
            training_set=training_sets[index],
            rows=batch.rows.copy(),
            stored_bytes=sum(
                array.nbytes for array in (batch.tokens, batch.token_scale, batch.feature_map, batch.map_scale)
            ),
            tokens=decode_tokens(regions["tokens"], regions["token_scale"]),
            region_mask=mask,
            feature_map=decode_maps(batch.feature_map, batch.map_scale),
            boxes=boxes_on_device,
            categories=categories_on_device,
            known=known,
            class_ids=class_ids,
            ignored=ignored,
        )

    end_step = config.iterations if end_step is None else end_step
    with closing(_host_batches(training_sets, shares, config, first_step, end_step, group, device)) as host_batches:
        if device.type == "cuda":
            yield from _copied_ahead(host_batches, to_device, device)
        else:
            for host_batch in host_batches:
                yield to_device(*host_batch)


def _host_batches(
    training_sets: Sequence[TrainingSet],
    shares: NDArray[np.float64],
    config: TrainConfig,
    first_step: int,
    end_step: int,
    group: Group,
    device: torch.device,
) -> Generator[HostBatch]:
    set_indices = set_of_steps(shares, end_step)
    steps_done = np.bincount(set_indices[:first_step], minlength=len(shares))
    with ExitStack() as stack:
        streams = []
        for index, (training_set, done) in enumerate(zip(training_sets, steps_done.tolist(), strict=True)):
            rows_of_epoch = _rows_of_epochs(training_set, config.repeat_threshold, config.seed + index)
            loader = training_set.cache.loader(
                config.batch_size,
                seed=config.seed + index,
                rows=rows_of_epoch(0),
                map_set=training_set.maps.name,
                token_set=training_set.tokens.name,
                rank=group.rank,
                world_size=group.size,
                share_batches=True,
                pack=config.pack,
                pin_memory=device.type == "cuda",
            )
            epoch, batches = divmod(done, len(loader))
            loader.load_state_dict({**loader.state_dict(), "epoch": epoch, "batches": batches})
            streams.append(stack.enter_context(closing(_all_epochs(loader, rows_of_epoch))))
        for step, index in enumerate(set_indices[first_step:].tolist(), start=first_step):
            yield step, index, next(streams[index])


def _rows_of_epochs(training_set: TrainingSet, threshold: float, seed: int) -> Callable[[int], NDArray[np.int64]]:
    """The rows of an epoch, as many in every epoch."""
    if not threshold:
        return lambda epoch: training_set.rows
    factors = repeat_factors(training_set.cache.manifest, training_set.rows, threshold)
    return lambda epoch: repeated_rows(training_set.rows, factors, seed, epoch)


def _all_epochs(loader: Loader, rows_of_epoch: Callable[[int], NDArray[np.int64]]) -> Generator[Batch]:
    while True:
        loader.rows = rows_of_epoch(loader.epoch)
        yield from loader


def _copied_ahead(
    host_batches: Iterator[HostBatch],
    to_device: Callable[[int, int, Batch], TrainingBatch],
    device: torch.device,
) -> Iterator[TrainingBatch]:
    """Each batch is yielded after the copy of the next one has started, on a stream of its own."""
    stream, previous = torch.cuda.Stream(device), None
    for host_batch in host_batches:
        with torch.cuda.stream(stream):
            batch = to_device(*host_batch)
            copied = stream.record_event()
        if previous is not None:
            yield _handed_over(*previous)
        copied.synchronize()  # the next host batch reuses the memory of this one
        previous = batch, copied
    if previous is not None:
        yield _handed_over(*previous)


def _handed_over(batch: TrainingBatch, copied: torch.cuda.Event) -> TrainingBatch:
    """Make the current stream wait for the copy, and keep the memory until that stream has used it."""
    current = torch.cuda.current_stream(batch.tokens.device)
    current.wait_event(copied)
    for value in vars(batch).values():
        if isinstance(value, Tensor):
            value.record_stream(current)
    return batch


def _regions(batch: Batch, maximum: int, key: Sequence[int]) -> dict[str, NDArray[Any]]:
    """The columns of regions of a batch; with a `maximum` > 0, a random choice of so many regions of each image.

    Regions of known class are chosen first. `key` is the seed of the choice.
    """
    names = ("tokens", "token_scale", "region_mask", "categories", "boxes_xyxy")
    columns = {name: getattr(batch, name) for name in names}
    images, regions = batch.region_mask.shape
    if not maximum or regions <= maximum:
        return columns
    order = np.tile(np.arange(regions) / regions, (images, 1))
    for image in np.flatnonzero(batch.region_mask.sum(axis=1) > maximum).tolist():
        # Seeded by the image, so that the choice does not depend on the other images of the batch.
        order[image] = np.random.default_rng([*key, int(batch.rows[image])]).random(regions)
    order += (batch.categories < 0) + 2.0 * ~batch.region_mask
    return _taken(columns, np.sort(np.argsort(order, axis=1)[:, :maximum], axis=1))


def repeated_regions(region_mask: NDArray[np.bool_]) -> NDArray[np.int64]:
    """int64 (B, R): the region in each slot when regions are repeated in place of padding, as in the authors' batches.

    region_mask   bool (B, R), regions first; R is the largest count of the batch, to which the authors repeat

    Each of an image's n regions is repeated R // n times in a row, and its last R % n regions once more
    (`prepare_prompt_train` in util/preprocessing.py of Surrey-UP-Lab/RegionSpot). All slots are real inputs of the head
    then. Equal to the authors' loss and gradients; dropout is drawn for each repetition, as theirs is. Each of several
    processes repeats to the largest count of its own images, as theirs do. An image without regions keeps its padding.
    """
    slots = np.arange(region_mask.shape[1])
    count = np.maximum(region_mask.sum(axis=1, keepdims=True), 1)
    repeats, more = len(slots) // count, len(slots) % count
    first = (count - more) * repeats  # slots of the regions without an additional repetition
    region: NDArray[np.int64] = np.where(
        slots < first, slots // repeats, count - more + (slots - first) // (repeats + 1)
    )
    return region


def _taken(columns: dict[str, NDArray[Any]], regions: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
    """The columns (B, R, ...) at the regions (B, S) of each image."""
    images = np.arange(len(regions))[:, None]
    return {name: column[images, regions] if column.shape[1] else column for name, column in columns.items()}


class DeviceDecoder:
    """Decodes features of one feature set on a device.

    The stored form, which is the smallest, is copied to the device and decoded there. float16 and float32 stay as they
    are; int8 becomes float32: code * scale of the row * deviation of the channel + mean of the channel. A copy from
    page-locked memory may still be running when a call returns. Raises InputError for an int8 set without statistics.
    """

    def __init__(self, feature_set: FeatureSet, device: torch.device) -> None:
        self._dtype, self._device = feature_set.dtype, device
        if self._dtype == "int8":
            statistics = require_statistics(feature_set)
            self._deviation, self._mean = (
                torch.tensor(array, device=device) for array in (statistics.deviation, statistics.mean)
            )

    def __call__(self, stored: NDArray[Any], scales: NDArray[np.float16]) -> Tensor:
        """Features (..., D) on the device, from `stored` (..., D) of a batch and, for int8, its `scales` (...)."""
        values = torch.from_numpy(stored).to(self._device, non_blocking=True)
        if self._dtype == "bfloat16":
            return values.view(torch.bfloat16)
        if self._dtype != "int8":
            return values
        factors = torch.from_numpy(scales).to(self._device, non_blocking=True).float().unsqueeze(-1)
        return values.float().mul_(factors).mul_(self._deviation).add_(self._mean)
