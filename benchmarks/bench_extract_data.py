"""What the extraction benchmark runs over: images of real sizes that it draws itself, boxes, and prompts.

Weights are drawn too: what a product costs does not depend on its values, and no download is needed.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from regionspot.cache.format.manifest import Category, Manifest

WEIGHTS = "random:0"
TEMPLATE = "a photo of a {}"
SIZES = (
    (640, 480),
    (2000, 1500),
)  # width, height: an image of COCO's, and one as Objects365 and OpenImages have them too


@dataclass(frozen=True)
class Job:
    """One extraction to measure. `photos` files lie in `folder`, of SIZES in turn; each has `boxes` boxes."""

    preset: str
    folder: Path
    images: int
    boxes: int = 16

    def paths(self) -> list[Path]:
        return [self.folder / f"{row:06d}.jpg" for row in range(self.images)]

    def size(self, row: int) -> tuple[int, int]:
        """(height, width)."""
        width, height = SIZES[row % len(SIZES)]
        return height, width

    def write_images(self) -> None:
        """One file of each size; the others are links to them."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for row, path in enumerate(self.paths()):
            if row < len(SIZES):
                draw_image(row).save(path, quality=90)
            else:
                os.link(self.folder / f"{row % len(SIZES):06d}.jpg", path)

    def manifest(self, images: int | None = None) -> Manifest:
        """The first so many images with their boxes, as a dataset."""
        rows = range(images or self.images)
        sizes = np.array([self.size(row) for row in rows], np.int32)
        total = len(rows) * self.boxes
        return Manifest(
            dataset="drawn",
            split="train",
            image_ids=np.arange(len(rows), dtype=np.int64),
            paths=np.array([path.name for path in self.paths()[: len(rows)]], dtype=np.dtypes.StringDType()),
            heights=sizes[:, 0].copy(),
            widths=sizes[:, 1].copy(),
            offsets=np.arange(len(rows) + 1, dtype=np.int64) * self.boxes,
            boxes_xyxy=np.concatenate([boxes_in(self.size(row), self.boxes, row) for row in rows]),
            category_index=np.zeros(total, np.int32),
            annotation_ids=np.arange(total, dtype=np.int64),
            categories=(Category(1, "thing"),),
        )


def draw_image(seed: int) -> Image.Image:
    """Large and small shapes and some noise: a JPEG of about 0.2 bytes a pixel, as images have."""
    width, height = SIZES[seed % len(SIZES)]
    rng = np.random.default_rng(seed)
    image = np.zeros((height, width, 3), np.float32)
    for cells, weight in ((6, 0.6), (40, 0.3), (200, 0.1)):
        shapes = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), np.uint8))
        image += weight * np.asarray(shapes.resize((width, height), Image.Resampling.BICUBIC), np.float32)
    return Image.fromarray((image + rng.normal(0, 3, image.shape)).clip(0, 255).astype(np.uint8))


def boxes_in(size: tuple[int, int], count: int, seed: int) -> NDArray[np.float32]:
    """float32 (count, 4): XYXY, at least 8 pixels a side, within an image of that (height, width)."""
    height, width = size
    corners = np.random.default_rng(seed).uniform(0, 1, (count, 2, 2)) * [width - 8, height - 8]
    low, high = corners.min(1), corners.max(1) + 8
    return np.concatenate([low, high], 1).astype(np.float32)


def prompts(count: int) -> list[str]:
    """Prompts of ImageNet's class names in a template, in an order that mixes their lengths."""
    from open_clip import IMAGENET_CLASSNAMES  # imports torch and every model

    order = np.random.default_rng(0).permutation(len(IMAGENET_CLASSNAMES))[:count]
    return [TEMPLATE.format(IMAGENET_CLASSNAMES[row]) for row in order]
