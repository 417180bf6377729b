"""Training samples of the toy backbones: images of the toy world, drawn in memory.

No sample shows a rare class, so the backbones can recognise one only by its words.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from regionspot.pipeline.toy.rendering import COLOURS, GROUND, SHAPES, TEXTURES, Look, draw_image
from regionspot.pipeline.toy.world import toy_classes

BASE = tuple(entry.look for entry in toy_classes() if entry.weight > 0)  # the classes of training
CROWD = (5, 9)  # objects in an image, more than in the toy world: more regions per second of training
# Labels of a sample: whole names, then single words. Each group has a softmax of its own.
GROUPS = (tuple(look.name for look in BASE), SHAPES, tuple(COLOURS), TEXTURES)
NOTHING = -1  # label where no object is


@dataclass(frozen=True)
class Sample:
    """One image with its objects.

    pixels  uint8   (h, w, 3)
    owner   int8    (h, w)     index into `looks` of each pixel, or GROUND
    boxes   float32 (n, 4)     XYXY of the visible part of each look
    """

    pixels: NDArray[np.uint8]
    owner: NDArray[np.int8]
    looks: tuple[Look, ...]
    boxes: NDArray[np.float32]


def draw_samples(count: int, seed: int) -> Iterator[Sample]:
    """Yield `count` images of base classes, all equally frequent; the same for the same seed."""
    return iter(DrawnSamples(count, seed))


class DrawnSamples(Sequence[Sample]):
    """`count` images of base classes, all equally frequent, drawn at first use and kept in memory."""

    def __init__(self, count: int, seed: int) -> None:
        self._seed = seed
        self._drawn: list[Sample | None] = [None] * count

    def __len__(self) -> int:
        return len(self._drawn)

    def __getitem__(self, number: Any) -> Any:
        if (sample := self._drawn[number]) is None:
            sample = self._drawn[number] = _draw([self._seed, int(number)])
        return sample


def _draw(seed: list[int]) -> Sample:
    rng = np.random.default_rng(seed)
    looks = tuple(BASE[k] for k in rng.integers(0, len(BASE), rng.integers(CROWD[0], CROWD[1] + 1)))
    image = draw_image(looks, rng)
    boxes = [_box(image.owner == number) for number in range(len(looks))]
    return Sample(image.pixels, image.owner.astype(np.int8), looks, np.array(boxes, np.float32))


def _box(mask: NDArray[np.bool_]) -> tuple[int, int, int, int]:
    """Bounding box XYXY of a mask."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


# ---- for SAM: images, boxes and masks


def mask_batch(
    samples: list[Sample], pixels: int, boxes_each: int, rng: np.random.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """images uint8 (B, 3, pixels, pixels), resized by the long side and padded; boxes float32 (B, boxes_each, 4) XYXY
    in their pixels, with noise like a detector's; masks float32 (B, boxes_each, pixels / 2, pixels / 2) in 0..1.
    """
    images = np.zeros((len(samples), pixels, pixels, 3), np.uint8)
    masks = np.zeros((len(samples), boxes_each, pixels // 2, pixels // 2), np.float32)
    boxes = np.zeros((len(samples), boxes_each, 4), np.float32)
    for row, sample in enumerate(samples):
        sample = _mirrored(sample) if rng.random() < 0.5 else sample
        height, width = sample.owner.shape
        scale = pixels / max(height, width)
        h, w = round(height * scale), round(width * scale)
        images[row, :h, :w] = np.asarray(Image.fromarray(sample.pixels).resize((w, h), Image.Resampling.BILINEAR))
        owner = np.full((pixels, pixels), GROUND, np.int8)
        owner[:h, :w] = sample.owner[np.arange(h) * height // h][:, np.arange(w) * width // w]
        chosen = np.resize(rng.permutation(len(sample.looks)), boxes_each)
        visible = owner == chosen[:, None, None]
        masks[row] = visible.reshape(boxes_each, pixels // 2, 2, pixels // 2, 2).mean(axis=(2, 4))
        sides = np.tile(sample.boxes[chosen, 2:] - sample.boxes[chosen, :2], 2)
        boxes[row] = (sample.boxes[chosen] + sides * rng.normal(0, 0.03, (boxes_each, 4))) * scale
    return torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(boxes), torch.from_numpy(masks)


def _mirrored(sample: Sample) -> Sample:
    boxes = sample.boxes.copy()
    boxes[:, [0, 2]] = sample.owner.shape[1] - boxes[:, [2, 0]]
    return replace(sample, pixels=sample.pixels[:, ::-1], owner=sample.owner[:, ::-1], boxes=boxes)


# ---- for CLIP: crops of one object and scenes of several, with their labels


@dataclass(frozen=True)
class NamedBatch:
    """B images with at most R regions, and their labels; P = grid * grid patches.

    images        uint8   (B, 3, pixels, pixels)      aspect not kept
    truth         float32 (B, 160 + 8 + 6 + 4)        multi-hot labels, as GROUPS
    patch_words   int64   (B, P, 3)                   shape, colour, texture at the centre of each patch
    region_words  int64   (B, R, 3)                   the same for each region, NOTHING in padding
    region_share  float32 (B, R, P)                   weights of the patches in a region's box, with sum 1
    """

    images: Tensor
    truth: Tensor
    patch_words: Tensor
    region_words: Tensor
    region_share: Tensor


def named_batch(
    samples: list[Sample], pixels: int, grid: int, scene_share: float, rng: np.random.Generator
) -> NamedBatch:
    """A batch of scenes, each with probability `scene_share`, and of crops of one object."""
    images = np.zeros((len(samples), pixels, pixels, 3), np.uint8)
    truth = np.zeros((len(samples), sum(len(group) for group in GROUPS)), np.float32)
    patch_words = np.full((len(samples), grid * grid, 3), NOTHING, np.int64)
    region_words = np.full((len(samples), CROWD[1], 3), NOTHING, np.int64)
    region_share = np.zeros((len(samples), CROWD[1], grid * grid), np.float32)
    for row, sample in enumerate(samples):
        sample = _mirrored(sample) if rng.random() < 0.5 else sample
        window, shown = _scene(sample, rng) if rng.random() < scene_share else _crop(sample, rng)
        image = Image.fromarray(sample.pixels).resize((pixels, pixels), Image.Resampling.BILINEAR, window)
        images[row] = np.asarray(image)
        words = np.array([*(_words(look) for look in sample.looks), (NOTHING,) * 3])
        patch_words[row] = words[_centres(sample.owner, window, grid).ravel()]
        region_words[row, : len(shown)] = words[shown]
        region_share[row, : len(shown)] = _shares(sample.boxes[shown], window, grid)
        for number in shown:
            truth[row, _columns(sample.looks[number])] = 1
    return NamedBatch(
        torch.from_numpy(images).permute(0, 3, 1, 2),
        *(torch.from_numpy(values) for values in (truth, patch_words, region_words, region_share)),
    )


def _centres(owner: NDArray[np.int8], window: tuple[float, float, float, float], grid: int) -> NDArray[np.int8]:
    """The owner at the centre of each patch of a window XYXY, (grid, grid)."""
    x1, y1, x2, y2 = window
    middle = (np.arange(grid) + 0.5) / grid
    centres: NDArray[np.int8] = owner[(y1 + middle * (y2 - y1)).astype(int)][:, (x1 + middle * (x2 - x1)).astype(int)]
    return centres


def _shares(boxes: NDArray[np.float32], window: tuple[float, float, float, float], grid: int) -> NDArray[np.float32]:
    """Share of the visible part of each box XYXY that lies in each patch, (n, grid * grid)."""
    edges = np.arange(grid + 1, dtype=np.float32)
    inside = []
    for axis in (0, 1):
        low, high = ((boxes[:, axis + k, None] - window[axis]) / (window[axis + 2] - window[axis]) for k in (0, 2))
        inside.append((np.minimum(high * grid, edges[1:]) - np.maximum(low * grid, edges[:-1])).clip(0))
    areas = (inside[1][:, :, None] * inside[0][:, None, :]).reshape(len(boxes), -1)
    shares: NDArray[np.float32] = areas / areas.sum(axis=1, keepdims=True)
    return shares


def _crop(sample: Sample, rng: np.random.Generator) -> tuple[tuple[float, float, float, float], list[int]]:
    """A window around one object, exactly its box in half of the cases, and the index of the object."""
    number = int(rng.integers(len(sample.looks)))
    x1, y1, x2, y2 = sample.boxes[number].tolist()
    left, right, up, down = rng.uniform(0, 0.5, 4) * float(rng.integers(2)) * [x2 - x1, x2 - x1, y2 - y1, y2 - y1]
    height, width = sample.owner.shape
    return (max(x1 - left, 0), max(y1 - up, 0), min(x2 + right, width), min(y2 + down, height)), [number]


def _scene(sample: Sample, rng: np.random.Generator) -> tuple[tuple[float, float, float, float], list[int]]:
    """A window of at least half of the image in each direction, and the objects that are mostly inside."""
    height, width = sample.owner.shape
    if rng.random() < 0.5:
        return (0, 0, width, height), list(range(len(sample.looks)))
    w, h = width * rng.uniform(0.5, 1), height * rng.uniform(0.5, 1)
    x, y = rng.uniform(0, width - w), rng.uniform(0, height - h)
    low = np.maximum(sample.boxes[:, :2], [x, y])
    high = np.minimum(sample.boxes[:, 2:], [x + w, y + h])
    inside = (high - low).clip(0).prod(axis=1) / (sample.boxes[:, 2:] - sample.boxes[:, :2]).prod(axis=1)
    shown = np.flatnonzero(inside > 0.6).tolist()
    return ((x, y, x + w, y + h), shown) if shown else ((0, 0, width, height), list(range(len(sample.looks))))


def _words(look: Look) -> tuple[int, int, int]:
    """Positions of a look's shape, colour and texture in their groups."""
    return SHAPES.index(look.shape), list(COLOURS).index(look.colour), TEXTURES.index(look.texture)


def _columns(look: Look) -> list[int]:
    """Where the truth about a look stands: its name, its shape, its colour, its texture."""
    starts = np.cumsum([0, *(len(group) for group in GROUPS)])
    return [int(start) + place for start, place in zip(starts, (BASE.index(look), *_words(look)), strict=False)]
