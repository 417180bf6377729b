"""A sheet of labelled images: what was recognised, right in green and wrong in red, to be taken in at a glance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from regionspot.cache.errors import ImageError
from regionspot.cache.format.manifest import NO_CATEGORY, Manifest
from regionspot.evaluation.metrics.detections import Detections
from regionspot.evaluation.report.drawing import Drawn, draw_regions
from regionspot.pipeline.images.decode import Exif, read_image

RIGHT, WRONG = (70, 200, 90), (235, 70, 60)
PAPER, INK, QUIET = (250, 250, 248), (25, 25, 25), (110, 110, 110)
GAP, CAPTION = 16, 30  # pixels


@dataclass(frozen=True)
class Captioned:
    """One image of a sheet and the line beneath it."""

    image: Image.Image
    caption: str = ""


def contact_sheet(images: Sequence[Captioned], columns: int = 3, cell: int = 620, title: str = "") -> Image.Image:
    """The images in rows of `columns` under a title, the long side of each `cell` pixels: labels come out alike.

    A row is as high as its highest image.
    """
    title_font, caption_font = ImageFont.load_default(28), ImageFont.load_default(19)
    cells = [(_fitted(each.image, cell), each.caption) for each in images]
    rows = [cells[start : start + columns] for start in range(0, len(cells), columns)]
    heights = [max(image.height for image, _ in row) + CAPTION + GAP for row in rows]
    top = GAP + (28 + 2 * GAP if title else 0)
    wide = GAP + min(columns, max(1, len(cells))) * (cell + GAP)
    sheet = Image.new("RGB", (wide, top + sum(heights)), PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((GAP, GAP), title, fill=INK, font=title_font)
    for row, height in zip(rows, heights, strict=True):
        for place, (image, caption) in enumerate(row):
            left = GAP + place * (cell + GAP)
            sheet.paste(image, (left, top))
            pen.text((left, top + image.height + 5), caption, fill=QUIET, font=caption_font)
        top += height
    return sheet


def _fitted(image: Image.Image, cell: int) -> Image.Image:
    scale = cell / max(image.size)
    return image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))


def judged_sheet(
    manifest: Manifest,
    images: Path,
    detections: Detections,
    count: int = 6,
    columns: int = 3,
    title: str = "",
    exif: Exif = "auto",
) -> Image.Image:
    """A sheet of the first images with the best name of every region.

    Where the manifest knows the region's class, a right name is green and a wrong one red, with the right one behind
    it. Images that cannot be read or have no detections are left out. `exif` is the rule of the features.
    """
    drawn: list[Captioned] = []
    for row in range(len(manifest)):
        if len(drawn) == count:
            break
        image = _judged(manifest, images, detections, row, exif)
        if image is not None:
            drawn.append(image)
    return contact_sheet(drawn, columns, title=title)


def _judged(manifest: Manifest, images: Path, detections: Detections, row: int, exif: Exif) -> Captioned | None:
    stated = (int(manifest.heights[row]), int(manifest.widths[row]))
    best = _best_of_regions(detections.take(detections.image_ids == manifest.image_ids[row]))
    try:
        image = read_image(images / str(manifest.paths[row]), stated, exif)
    except ImageError:
        return None
    if not len(best):
        return None
    names = {category.id: category.name for category in manifest.categories}
    truths = _truths(manifest, row, best.boxes_xywh)
    drawn = []
    for place, truth in enumerate(truths):
        label, colour = _label(names[int(best.category_ids[place])], float(best.scores[place]), truth)
        x, y, wide, high = best.boxes_xywh[place]
        mask = None if best.masks is None else best.masks.decode(int(best.regions[place]))
        drawn.append(Drawn(np.array([x, y, x + wide, y + high], np.float32), label, mask, colour))
    known = [truth for truth in truths if truth is not None]
    right = sum(names[int(found)] == truth for found, truth in zip(best.category_ids, truths, strict=True))
    caption = f"{manifest.paths[row]}" + (f"   {right} of {len(known)} right" if known else "")
    # No tint: a green one would turn an orange thing yellow, and the eye could not check the name.
    return Captioned(draw_regions(image, drawn, opacity=0), caption)


def _best_of_regions(detections: Detections) -> Detections:
    """The first, and so best, detection of every region."""
    _, first = np.unique(detections.regions, return_index=True)
    return detections.take(np.sort(first))


def _truths(manifest: Manifest, row: int, boxes_xywh: NDArray[np.float64]) -> list[str | None]:
    """The true name of each box, None where the manifest does not know it. Boxes are told apart by where they lie."""
    regions = manifest.regions(row)
    corners = manifest.boxes_xyxy[regions].astype(np.float64)
    corners[:, 2:] -= corners[:, :2]
    found = []
    for box in boxes_xywh:
        index = int(manifest.category_index[regions][int(np.abs(corners - box).sum(axis=1).argmin())])
        found.append(None if index == NO_CATEGORY or manifest.scores is not None else manifest.categories[index].name)
    return found


def _label(name: str, score: float, truth: str | None) -> tuple[str, tuple[int, int, int] | None]:
    if truth is None:
        return f"{name} {score:.2f}", None
    if name == truth:
        return f"{name} {score:.2f}", RIGHT
    return f"{name} {score:.2f} (is {truth})", WRONG
