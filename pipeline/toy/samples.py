"""What the toy backbones are trained on: images of the toy world, drawn into memory and cut into samples.

No sample ever shows a rare class, so what the backbones say about one is put together from its words alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from regionspot.pipeline.toy.rendering import COLOURS, GROUND, SHAPES, TEXTURES, Look, draw_image
from regionspot.pipeline.toy.world import OBJECTS, toy_classes

BASE = tuple(entry.look for entry in toy_classes() if entry.weight > 0)  # the classes that training may show
# What samples are named by: whole names, then single words, each group a question of its own.
GROUPS = (tuple(look.name for look in BASE), SHAPES, tuple(COLOURS), TEXTURES)


@dataclass(frozen=True)
class Sample:
    """One image and what it shows.

    pixels  uint8   (h, w, 3)
    owner   int8    (h, w)     position in `looks` of what a pixel shows, or GROUND
    boxes   float32 (n, 4)     XYXY of the visible part of each look
    """

    pixels: NDArray[np.uint8]
    owner: NDArray[np.int8]
    looks: tuple[Look, ...]
    boxes: NDArray[np.float32]


def draw_samples(count: int, seed: int) -> Iterator[Sample]:
    """`count` images of base classes, all equally often; the same for the same seed."""
    return (_draw([seed, number]) for number in range(count))


def _draw(seed: list[int]) -> Sample:
    rng = np.random.default_rng(seed)
    looks = tuple(BASE[k] for k in rng.integers(0, len(BASE), rng.integers(OBJECTS[0], OBJECTS[1] + 1)))
    image = draw_image(looks, rng)
    boxes = [_box(image.owner == number) for number in range(len(looks))]
    return Sample(image.pixels, image.owner.astype(np.int8), looks, np.array(boxes, np.float32))


def _box(mask: NDArray[np.bool_]) -> tuple[int, int, int, int]:
    """XYXY of what is True."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


# ---- for SAM: whole images, some of their boxes, and the masks of those


def mask_batch(
    samples: list[Sample], pixels: int, boxes_each: int, rng: np.random.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """images uint8 (B, 3, pixels, pixels) of that long side, padded right and below; boxes XYXY in their pixels
    (B, boxes_each, 4), a little off as a detector's are; masks float32 (B, boxes_each, pixels / 2, pixels / 2) 0..1.
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
        chosen = rng.integers(0, len(sample.looks), boxes_each)
        visible = owner == chosen[:, None, None]
        masks[row] = visible.reshape(boxes_each, pixels // 2, 2, pixels // 2, 2).mean(axis=(2, 4))
        sides = np.tile(sample.boxes[chosen, 2:] - sample.boxes[chosen, :2], 2)
        boxes[row] = (sample.boxes[chosen] + sides * rng.normal(0, 0.03, (boxes_each, 4))) * scale
    return torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(boxes), torch.from_numpy(masks)


def _mirrored(sample: Sample) -> Sample:
    boxes = sample.boxes.copy()
    boxes[:, [0, 2]] = sample.owner.shape[1] - boxes[:, [2, 0]]
    return replace(sample, pixels=sample.pixels[:, ::-1], owner=sample.owner[:, ::-1], boxes=boxes)


# ---- for CLIP: crops of one object and scenes of several, with all the names that are true of them


def named_batch(
    samples: list[Sample], pixels: int, grid: int, scene_share: float, rng: np.random.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """images uint8 (B, 3, pixels, pixels), aspect not kept; truth float32 (B, 160 + 8 + 6 + 4), 0 or 1 as GROUPS;
    local int64 (B, grid * grid, 3): shape, colour and texture of what each patch has in its middle, -1 for ground.
    """
    images = np.zeros((len(samples), pixels, pixels, 3), np.uint8)
    truth = np.zeros((len(samples), sum(len(group) for group in GROUPS)), np.float32)
    local = np.full((len(samples), grid * grid, 3), GROUND, np.int64)
    for row, sample in enumerate(samples):
        sample = _mirrored(sample) if rng.random() < 0.5 else sample
        window, shown = _scene(sample, rng) if rng.random() < scene_share else _crop(sample, rng)
        image = Image.fromarray(sample.pixels).resize((pixels, pixels), Image.Resampling.BILINEAR, window)
        images[row] = np.asarray(image)
        words = np.array([*(_words(look) for look in sample.looks), (GROUND, GROUND, GROUND)])
        local[row] = words[_middles(sample.owner, window, grid).ravel()]
        for number in shown:
            truth[row, _columns(sample.looks[number])] = 1
    return torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(truth), torch.from_numpy(local)


def _middles(owner: NDArray[np.int8], window: tuple[float, float, float, float], grid: int) -> NDArray[np.int8]:
    """(grid, grid): the owner in the middle of each patch of a window XYXY."""
    x1, y1, x2, y2 = window
    middle = (np.arange(grid) + 0.5) / grid
    middles: NDArray[np.int8] = owner[(y1 + middle * (y2 - y1)).astype(int)][:, (x1 + middle * (x2 - x1)).astype(int)]
    return middles


def _crop(sample: Sample, rng: np.random.Generator) -> tuple[tuple[float, float, float, float], list[int]]:
    """A window about one object, half of them exactly its box, and that object."""
    number = int(rng.integers(len(sample.looks)))
    x1, y1, x2, y2 = sample.boxes[number].tolist()
    left, right, up, down = rng.uniform(0, 0.5, 4) * float(rng.integers(2)) * [x2 - x1, x2 - x1, y2 - y1, y2 - y1]
    height, width = sample.owner.shape
    return (max(x1 - left, 0), max(y1 - up, 0), min(x2 + right, width), min(y2 + down, height)), [number]


def _scene(sample: Sample, rng: np.random.Generator) -> tuple[tuple[float, float, float, float], list[int]]:
    """Half or more of an image in each direction, and the objects of which it shows the larger part."""
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
