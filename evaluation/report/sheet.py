"""A contact sheet of labelled images: correct classes in green, wrong ones in red."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from regionspot.cache.errors import ImageError
from regionspot.cache.format.manifest import NO_CATEGORY, Manifest
from regionspot.evaluation.metrics.detections import Detections
from regionspot.evaluation.report.drawing import LabelledRegion, draw_regions
from regionspot.pipeline.images.decode import Exif, read_image

CORRECT, WRONG = (70, 200, 90), (235, 70, 60)
BACKGROUND, TEXT, CAPTION_TEXT = (250, 250, 248), (25, 25, 25), (110, 110, 110)
GAP, CAPTION = 16, 30  # pixels


@dataclass(frozen=True)
class CaptionedImage:
    """One image of a sheet with the line below it."""

    image: Image.Image
    caption: str = ""


def contact_sheet(images: Sequence[CaptionedImage], columns: int = 3, cell: int = 620, title: str = "") -> Image.Image:
    """The images in rows of `columns` under a title, each resized to a long side of `cell` pixels."""
    title_font, caption_font = ImageFont.load_default(28), ImageFont.load_default(19)
    cells = [(_resized(item.image, cell), item.caption) for item in images]
    rows = [cells[start : start + columns] for start in range(0, len(cells), columns)]
    heights = [max(image.height for image, _ in row) + CAPTION + GAP for row in rows]
    top = GAP + (28 + 2 * GAP if title else 0)
    width = GAP + min(columns, max(1, len(cells))) * (cell + GAP)
    sheet = Image.new("RGB", (width, top + sum(heights)), BACKGROUND)
    pen = ImageDraw.Draw(sheet)
    pen.text((GAP, GAP), title, fill=TEXT, font=title_font)
    for row, height in zip(rows, heights, strict=True):
        for column, (image, caption) in enumerate(row):
            left = GAP + column * (cell + GAP)
            sheet.paste(image, (left, top))
            pen.text((left, top + image.height + 5), caption, fill=CAPTION_TEXT, font=caption_font)
        top += height
    return sheet


def _resized(image: Image.Image, cell: int) -> Image.Image:
    scale = cell / max(image.size)
    return image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))


def detections_sheet(
    manifest: Manifest,
    image_folder: Path,
    detections: Detections,
    count: int = 6,
    columns: int = 3,
    title: str = "",
    exif: Exif = "auto",
) -> Image.Image:
    """A sheet of the first images with the best class of every region.

    If the manifest states the class of a region, a correct class is green; a wrong one is red, followed by the correct
    one. Images that cannot be read or have no detections are left out. `exif` is the EXIF rule of the features.
    """
    drawn = (_draw_detections(manifest, image_folder, detections, row, exif) for row in range(len(manifest)))
    images = list(islice((image for image in drawn if image is not None), count))
    return contact_sheet(images, columns, title=title)


def _draw_detections(
    manifest: Manifest, image_folder: Path, detections: Detections, row: int, exif: Exif
) -> CaptionedImage | None:
    stated_size = (int(manifest.heights[row]), int(manifest.widths[row]))
    best = _best_of_regions(detections.take(detections.image_ids == manifest.image_ids[row]))
    try:
        image = read_image(image_folder / str(manifest.paths[row]), stated_size, exif)
    except ImageError:
        return None
    if not len(best):
        return None
    category_names = {category.id: category.name for category in manifest.categories}
    names = [category_names[category_id] for category_id in best.category_ids.tolist()]
    true_names = _true_names(manifest, row, best.boxes_xywh)
    regions = []
    for index, (name, true_name) in enumerate(zip(names, true_names, strict=True)):
        label, colour = _label(name, float(best.scores[index]), true_name)
        x, y, width, height = best.boxes_xywh[index]
        mask = None if best.masks is None else best.masks.decode(int(best.regions[index]))
        regions.append(LabelledRegion(np.array([x, y, x + width, y + height], np.float32), label, mask, colour))
    known = sum(true_name is not None for true_name in true_names)
    correct = sum(name == true_name for name, true_name in zip(names, true_names, strict=True))
    caption = f"{manifest.paths[row]}" + (f"   {correct} of {known} right" if known else "")
    # No tint: it would change the colour of the object.
    return CaptionedImage(draw_regions(image, regions, opacity=0), caption)


def _best_of_regions(detections: Detections) -> Detections:
    """The first detection of every region, which is the best one."""
    _, first = np.unique(detections.regions, return_index=True)
    return detections.take(np.sort(first))


def _true_names(manifest: Manifest, row: int, boxes_xywh: NDArray[np.float64]) -> list[str | None]:
    """The class name of the nearest region of the manifest for each box; None if unknown."""
    regions = manifest.regions(row)
    xywh = manifest.boxes_xyxy[regions].astype(np.float64)
    xywh[:, 2:] -= xywh[:, :2]
    names = []
    for box in boxes_xywh:
        index = int(manifest.category_index[regions][int(np.abs(xywh - box).sum(axis=1).argmin())])
        names.append(None if index == NO_CATEGORY or manifest.scores is not None else manifest.categories[index].name)
    return names


def _label(name: str, score: float, true_name: str | None) -> tuple[str, tuple[int, int, int] | None]:
    if true_name is None:
        return f"{name} {score:.2f}", None
    if name == true_name:
        return f"{name} {score:.2f}", CORRECT
    return f"{name} {score:.2f} (is {true_name})", WRONG
