"""A picture with its regions on it: boxes, translucent masks, names and scores that can be read.

Two things make such pictures useless and are avoided here: labels in a fixed font size, unreadable on a large photo
and covering a small one, and labels on top of each other. Sizes follow the picture, and every label takes the free
place nearest to its box. Pillow draws it all, with the font that it brings along.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from regionspot.cache.errors import InputError

if TYPE_CHECKING:
    from regionspot.evaluation.region_spot import Region

Colour = tuple[int, int, int]
Rectangle = tuple[float, float, float, float]  # left, top, right, bottom

LEAST_SIDE = 640  # a picture whose long side is shorter is enlarged, or its labels would cover it
MASK_OPACITY = 0.32
# One golden angle a name round the colour circle keeps any number of hues as far apart as they can be.
GOLDEN_ANGLE = (3 - math.sqrt(5)) / 2


@dataclass(frozen=True)
class Drawn:
    """One region to draw: box in pixels of the picture, its label, a mask bool (h, w) or None, a colour or None."""

    box_xyxy: NDArray[np.float32]
    label: str
    mask: NDArray[np.bool_] | None = None
    colour: Colour | None = None


def colours_of(names: Sequence[str]) -> dict[str, Colour]:
    """A colour a name, in the order in which names first appear; as different as their number allows."""
    return {name: _colour(place) for place, name in enumerate(dict.fromkeys(names))}


def draw_regions(photo: Image.Image, regions: Sequence[Drawn], least_side: int = LEAST_SIDE) -> Image.Image:
    """A copy of `photo` (RGB) with the regions on it, enlarged by a whole factor to a long side of `least_side`.

    Large regions are drawn first, so that small ones inside them stay visible. Regions without a colour get one by
    their label.
    """
    factor = max(1, math.ceil(least_side / max(photo.size)))
    canvas = photo.convert("RGB").resize((photo.width * factor, photo.height * factor), Image.Resampling.BICUBIC)
    palette = colours_of([region.label for region in regions])
    ordered = sorted(regions, key=lambda region: -_area(region.box_xyxy))
    coloured = [(region, region.colour or palette[region.label]) for region in ordered]
    for region, colour in coloured:
        if region.mask is not None:
            _paint_mask(canvas, region.mask, colour)
    pen = ImageDraw.Draw(canvas)
    width = max(2, round(max(canvas.size) / 300))
    boxes = [_scaled(region.box_xyxy, factor, canvas.size) for region, _ in coloured]
    for box, (_, colour) in zip(boxes, coloured, strict=True):
        _frame(pen, box, colour, width)
    _write_labels(pen, canvas.size, boxes, [(region.label, colour) for region, colour in coloured], width)
    return canvas


def labelled(photo: Image.Image, regions: Sequence[Region]) -> Image.Image:
    """A copy of `photo` with what `RegionSpot.predict` found in it."""
    return draw_regions(
        photo,
        [
            Drawn(np.asarray(found.box_xyxy, np.float32), f"{found.name} {found.score:.2f}", found.mask)
            for found in regions
        ],
    )


def check_picture_name(path: Path) -> Path:
    """The path itself. Raises InputError for an ending that is no picture format, before hours of work are lost."""
    if path.suffix.lower() not in Image.registered_extensions():
        raise InputError(f"{path}: no picture can be written with the ending {path.suffix!r}; expected .png or .jpg")
    return path


def font_for(size: tuple[int, int]) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """The built-in font at a height that can be read when a picture of `size` fills a screen."""
    return ImageFont.load_default(max(13, round(max(size) / 42)))


def _colour(place: int) -> Colour:
    hue = (0.02 + place * GOLDEN_ANGLE) % 1
    lightness = (0.60, 0.48, 0.72)[place % 3]
    red, green, blue = colorsys.hls_to_rgb(hue, lightness, 0.85)
    return round(red * 255), round(green * 255), round(blue * 255)


def _area(box: NDArray[np.float32]) -> float:
    return float((box[2] - box[0]) * (box[3] - box[1]))


def _scaled(box: NDArray[np.float32], factor: int, size: tuple[int, int]) -> Rectangle:
    """The box in canvas pixels, at least two pixels wide and high, inside the canvas."""
    left, top = (float(min(max(0, box[axis] * factor), size[axis] - 3)) for axis in (0, 1))
    right, bottom = (float(min(box[2 + axis] * factor, size[axis] - 1)) for axis in (0, 1))
    return left, top, max(right, left + 2), max(bottom, top + 2)


def _paint_mask(canvas: Image.Image, mask: NDArray[np.bool_], colour: Colour) -> None:
    """Tint the mask and draw its rim, in place."""
    stencil = Image.fromarray(mask.astype(np.uint8) * 255).resize(canvas.size, Image.Resampling.NEAREST)
    tint = Image.new("RGB", canvas.size, colour)
    canvas.paste(tint, mask=stencil.point([round(level * MASK_OPACITY) for level in range(256)]))
    rim_width = 2 * max(1, round(max(canvas.size) / 900)) + 1  # an odd window, as the filter wants it
    inside = np.asarray(stencil.filter(ImageFilter.MinFilter(rim_width)))
    rim = Image.fromarray(np.where(inside > 0, 0, np.asarray(stencil)).astype(np.uint8))
    canvas.paste(tint, mask=rim)


def _frame(pen: ImageDraw.ImageDraw, box: Rectangle, colour: Colour, width: int) -> None:
    # A dark line on either side keeps a light colour visible on a light ground.
    left, top, right, bottom = box
    pen.rectangle((left - 1, top - 1, right + 1, bottom + 1), outline=(20, 20, 20), width=width + 2)
    pen.rectangle(box, outline=colour, width=width)


def _write_labels(
    pen: ImageDraw.ImageDraw,
    size: tuple[int, int],
    boxes: Sequence[Rectangle],
    labels: Sequence[tuple[str, Colour]],
    width: int,
) -> None:
    """Write small regions' labels first: they have the fewest places near their box."""
    font = font_for(size)
    ascent = pen.textbbox((0, 0), "Ág", font=font)
    pad = max(2, round((ascent[3] - ascent[1]) / 5))
    taken: list[Rectangle] = []
    for box, (label, colour) in reversed(list(zip(boxes, labels, strict=True))):
        text = _shortened(pen, label, font, size[0] - 2 * pad)
        extent = (pen.textlength(text, font=font) + 2 * pad, ascent[3] - ascent[1] + 2 * pad)
        place = _free_place(box, extent, size, taken, boxes, width)
        taken.append(place)
        pen.rectangle(place, fill=colour, outline=(20, 20, 20))
        ink = (0, 0, 0) if _luminance(colour) > 0.36 else (255, 255, 255)
        pen.text((place[0] + pad, place[1] + pad - ascent[1]), text, fill=ink, font=font)


def _shortened(
    pen: ImageDraw.ImageDraw, text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, room: float
) -> str:
    if pen.textlength(text, font=font) <= room:
        return text
    while text and pen.textlength(text + "...", font=font) > room:
        text = text[:-1]
    return text + "..."


def _luminance(colour: Colour) -> float:
    """Perceived brightness from 0 to 1 (ITU-R BT.601 weights)."""
    return (0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]) / 255


def _free_place(
    box: Rectangle,
    extent: tuple[float, float],
    size: tuple[int, int],
    labels: Sequence[Rectangle],
    boxes: Sequence[Rectangle],
    width: int,
) -> Rectangle:
    """The best place for a label of this extent: in the picture, off other labels and small objects, near its box."""
    room = np.array(size) - 1 - extent
    corners = np.maximum(0, np.minimum(list(_places(box, extent, width)), room))
    places = np.concatenate([corners, corners + extent], axis=1)
    on_labels = _overlaps(places, labels).sum(axis=1) / (extent[0] * extent[1])
    # Measured in shares of the box: a label hides a cup, but nothing of the table that it stands on.
    on_boxes = (_overlaps(places, boxes) / [(b[2] - b[0]) * (b[3] - b[1]) for b in boxes]).sum(axis=1)
    cost = 20 * on_labels + on_boxes + 0.02 * np.arange(len(places))
    left, top, right, bottom = places[cost.argmin()].tolist()
    return left, top, right, bottom


def _places(box: Rectangle, extent: tuple[float, float], width: int) -> Iterator[tuple[float, float]]:
    """Left-top corners to try for a label: the box's corners outside, inside, then down its sides and away from it."""
    left, top, right, bottom = box
    wide, high = extent
    outer, inner = left - width / 2, left + width
    yield outer, top - high
    yield inner, top + width
    yield outer, bottom
    for x in (right - wide, outer):
        yield x, top - high
        yield x, bottom
    yield right, top
    yield left - wide, top
    for step in range(1, 12):
        for x in (inner, right - wide - width, right, left - wide):
            yield x, top + step * high
        yield outer, top - (step + 1) * high
        yield outer, bottom + step * high


def _overlaps(places: NDArray[np.float64], others: Sequence[Rectangle]) -> NDArray[np.float64]:
    """Area in pixels (P, N) that each of P rectangles (P, 4) shares with each of N others."""
    ours, theirs = places[:, None], np.asarray(others, np.float64).reshape(1, -1, 4)
    sides = np.minimum(ours[..., 2:], theirs[..., 2:]) - np.maximum(ours[..., :2], theirs[..., :2])
    areas: NDArray[np.float64] = sides.clip(min=0).prod(axis=-1)
    return areas
