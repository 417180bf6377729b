"""Draw regions on an image with Pillow: boxes, translucent masks, and readable labels.

The font size follows the size of the image. Labels do not overlap each other or the boxes: every label is placed at the
free position nearest to its box, with a line to the box if they are apart.
"""

from __future__ import annotations

import colorsys
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from regionspot.cache.errors import InputError
from regionspot.cache.storage.atomic_files import write_file

if TYPE_CHECKING:
    from regionspot.evaluation.inference.regions import Region

Colour = tuple[int, int, int]
Rectangle = tuple[float, float, float, float]  # left, top, right, bottom

MIN_SIDE = 640  # an image with a shorter long side is enlarged, or labels would cover it
MASK_OPACITY = 0.32
PLACING_SIDE = (
    1280  # labels are placed on a grid of about this size: at full size ten labels on 12 megapixels take 12 s
)
# Hues that are multiples of the golden angle stay far apart for any number of names.
GOLDEN_ANGLE = (3 - math.sqrt(5)) / 2


@dataclass(frozen=True)
class LabelledRegion:
    """One region to draw: box in pixels of the image, label, mask bool (h, w), colour."""

    box_xyxy: NDArray[np.float32]
    label: str
    mask: NDArray[np.bool_] | None = None
    colour: Colour | None = None


@dataclass(frozen=True)
class CanvasRegion:
    """A region with its box in pixels of the canvas; its mask is in pixels of the image."""

    box: Rectangle
    label: str
    mask: NDArray[np.bool_] | None
    colour: Colour


def colours_of(names: Sequence[str]) -> dict[str, Colour]:
    """A distinct colour for each name, by the order of their first occurrence."""
    return {name: _colour(index) for index, name in enumerate(dict.fromkeys(names))}


def draw_regions(
    image: Image.Image, regions: Sequence[LabelledRegion], min_side: int = MIN_SIDE, opacity: float = MASK_OPACITY
) -> Image.Image:
    """A copy of `image` (RGB) with the regions on it, enlarged by an integer factor to a long side of `min_side`.

    Large regions are drawn first, so that small ones stay visible. A region without a colour gets one by its label.
    Masks are tinted with `opacity`, 0 to 1; their outlines are always drawn.
    """
    factor = max(1, math.ceil(min_side / max(image.size)))
    canvas = image.convert("RGB").resize((image.width * factor, image.height * factor), Image.Resampling.BICUBIC)
    palette = colours_of([region.label for region in regions])
    width = max(2, round(max(canvas.size) / 300))
    on_canvas = [
        CanvasRegion(
            _scaled(region.box_xyxy, factor, canvas.size),
            region.label,
            region.mask,
            region.colour or palette[region.label],
        )
        for region in sorted(regions, key=lambda region: -_area(region.box_xyxy))
    ]
    for region in on_canvas:
        if region.mask is not None:
            _paint_mask(canvas, region.mask, region.colour, opacity)
    pen = ImageDraw.Draw(canvas)
    for region in on_canvas:
        _frame(pen, region.box, region.colour, width)
    _write_labels(pen, canvas.size, on_canvas, width)
    return canvas


def labelled(image: Image.Image, regions: Sequence[Region]) -> Image.Image:
    """A copy of `image` with the regions of `RegionSpot.predict`."""
    return draw_regions(
        image,
        [
            LabelledRegion(np.asarray(region.box_xyxy, np.float32), f"{region.name} {region.score:.2f}", region.mask)
            for region in regions
        ],
    )


def check_image_name(path: Path) -> Path:
    """Return the path. Raises InputError if Pillow cannot write images with its suffix."""
    try:
        _encoded(Image.new("RGB", (32, 32)), path)
    except (KeyError, OSError, ValueError):
        raise InputError(
            f"{path}: cannot write an image with the suffix {path.suffix!r}; expected .png or .jpg"
        ) from None
    return path


def save_image(image: Image.Image, path: Path) -> None:
    """Write an image atomically, in the format of the path's suffix.

    Raises InputError for an image that is too large for the format.
    """
    try:
        content = _encoded(image, path)
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path}: {image.width} x {image.height} pixels cannot be written in this format ({error}); use .png"
        ) from None
    write_file(path, content)


def _encoded(image: Image.Image, path: Path) -> bytes:
    content = io.BytesIO()
    # For PNG, whose default of 6 takes three times as long for a tenth less. Other formats have no such option.
    image.save(content, Image.registered_extensions()[path.suffix.lower()], compress_level=3)
    return content.getvalue()


def font_for(size: tuple[int, int]) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's font, readable when an image of `size` fills the screen."""
    return ImageFont.load_default(max(13, round(max(size) / 42)))


def _colour(index: int) -> Colour:
    hue = (0.02 + index * GOLDEN_ANGLE) % 1
    lightness = (0.60, 0.48, 0.72)[index % 3]
    red, green, blue = colorsys.hls_to_rgb(hue, lightness, 0.85)
    return round(red * 255), round(green * 255), round(blue * 255)


def _area(box: NDArray[np.float32]) -> float:
    return float((box[2] - box[0]) * (box[3] - box[1]))


def _scaled(box: NDArray[np.float32], factor: int, size: tuple[int, int]) -> Rectangle:
    """The box in pixels of the canvas: clipped, and at least two pixels wide and high."""
    left, top = (float(min(max(0, box[axis] * factor), size[axis] - 3)) for axis in (0, 1))
    right, bottom = (float(min(box[2 + axis] * factor, size[axis] - 1)) for axis in (0, 1))
    return left, top, max(right, left + 2), max(bottom, top + 2)


def _paint_mask(canvas: Image.Image, mask: NDArray[np.bool_], colour: Colour, opacity: float) -> None:
    """Tint the mask and draw its outline, in place."""
    stencil = Image.fromarray(_enlarged(mask, canvas.size).astype(np.uint8) * 255)
    tint = Image.new("RGB", canvas.size, colour)
    canvas.paste(tint, mask=stencil.point([round(level * opacity) for level in range(256)]))
    # A mean of 255 is a minimum of 255, and found in a quarter of the time of MinFilter, in a tenth for large images.
    inside = np.asarray(stencil.filter(ImageFilter.BoxBlur(max(1, round(max(canvas.size) / 900)))))
    outline = Image.fromarray(np.where(inside == 255, 0, np.asarray(stencil)).astype(np.uint8))
    canvas.paste(tint, mask=outline)


def _enlarged(mask: NDArray[np.bool_], size: tuple[int, int]) -> NDArray[np.bool_]:
    return np.asarray(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST), bool)


def _frame(pen: ImageDraw.ImageDraw, box: Rectangle, colour: Colour, width: int) -> None:
    # Dark lines on both sides keep a light colour visible on a light background.
    left, top, right, bottom = box
    pen.rectangle((left - 1, top - 1, right + 1, bottom + 1), outline=(20, 20, 20), width=width + 2)
    pen.rectangle(box, outline=colour, width=width)


def _write_labels(
    pen: ImageDraw.ImageDraw,
    size: tuple[int, int],
    regions: Sequence[CanvasRegion],
    width: int,
) -> None:
    """Place the labels of small regions first: they have the fewest free positions near their box."""
    font = font_for(size)
    ascent = pen.textbbox((0, 0), "Ág", font=font)
    pad = max(2, round((ascent[3] - ascent[1]) / 5))
    obstacles = _obstacles(size, regions)
    written: list[tuple[CanvasRegion, str, Rectangle]] = []
    for region in reversed(regions):
        text = _shortened(pen, region.label, font, size[0] - 2 * pad)
        extent = (math.ceil(pen.textlength(text, font=font)) + 2 * pad, math.ceil(ascent[3] - ascent[1]) + 2 * pad)
        position = _label_position(region.box, extent, obstacles, width)
        obstacles.add(position)
        if _gaps(np.array(position), region.box).max() > extent[1] / 2:
            _leader(pen, position, region, width)
        written.append((region, text, position))
    for region, text, position in written:  # after all lines, so that a line never covers a label
        pen.rectangle(position, fill=region.colour, outline=(20, 20, 20))
        ink = (0, 0, 0) if _luminance(region.colour) > 0.36 else (255, 255, 255)
        pen.text((position[0] + pad, position[1] + pad - ascent[1]), text, fill=ink, font=font)


def _leader(pen: ImageDraw.ImageDraw, position: Rectangle, region: CanvasRegion, width: int) -> None:
    """Draw a line from a label to its box."""
    ends = []
    for axis in (0, 1):
        low, high = max(position[axis], region.box[axis]), min(position[axis + 2], region.box[axis + 2])
        middle = (low + high) / 2
        between = (middle, middle) if low <= high else (position[axis + 2], region.box[axis])
        ends.append(between if low <= high or position[axis + 2] < region.box[axis] else (position[axis], high))
    line = list(zip(*ends, strict=True))
    pen.line(line, fill=(20, 20, 20), width=width + 2)
    pen.line(line, fill=region.colour, width=width)


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


@dataclass(frozen=True)
class Obstacles:
    """What a label should not cover.

    scale   pixels of the canvas in one of these
    solid   bool (h, w)             pixels of masks and labels: covered only as the last resort
    shares  float64 (h + 1, w + 1)  integral image of 1 / pixels of the box, in boxes without a mask: covering a small
                                    box costs more than a large one
    """

    scale: int
    solid: NDArray[np.bool_]
    shares: NDArray[np.float64]

    def add(self, position: Rectangle) -> None:
        """Add a rectangle of the canvas to the solid pixels."""
        left, top, right, bottom = (round(edge) for edge in position)
        rows = slice(top // self.scale, bottom // self.scale + 1)
        self.solid[rows, left // self.scale : right // self.scale + 1] = True


def _obstacles(size: tuple[int, int], regions: Sequence[CanvasRegion]) -> Obstacles:
    scale = max(1, max(size) // PLACING_SIDE)
    size = -(-size[0] // scale), -(-size[1] // scale)
    solid, shares = np.zeros(size[::-1], bool), np.zeros(size[::-1])
    for region in regions:
        if region.mask is not None and region.mask.any():
            solid[_enlarged(region.mask, size)] = True
        else:
            left, top, right, bottom = (round(edge / scale) for edge in region.box)
            shares[top : bottom + 1, left : right + 1] += 1 / ((right - left + 1) * (bottom - top + 1))
    return Obstacles(scale, solid, _integral(shares))


def _label_position(box: Rectangle, extent: tuple[int, int], obstacles: Obstacles, line_width: int) -> Rectangle:
    """The position of a label of size `extent` (width, height): the one that covers least, then the nearest to the box.

    Positions above the box are preferred to those below and beside it.
    """
    scale = obstacles.scale
    width, height = -(-extent[0] // scale), -(-extent[1] // scale)
    rows, columns = obstacles.solid.shape
    if scale > 1:  # the last row and column may be partly outside of the canvas
        rows, columns = rows - 1, columns - 1
    box = box[0] / scale, box[1] / scale, box[2] / scale, box[3] / scale
    line_width = math.ceil(line_width / scale)
    last_x, last_y = max(0, columns - 1 - width), max(0, rows - 1 - height)
    # Candidates: aligned with the edges of the box, and every 5 pixels.
    x = np.unique(
        np.clip([*range(0, last_x + 1, 5), box[0] - line_width / 2, box[0] + line_width, box[2] - width], 0, last_x)
    )
    y = np.unique(np.clip([*range(0, last_y + 1, 5), box[1] - height, box[1] + line_width, box[3]], 0, last_y))
    left, top = (values.ravel() for values in np.meshgrid(x.astype(int), y.astype(int)))
    positions = np.stack([left, top, left + width, top + height], axis=1)
    gap = np.hypot(*_gaps(positions, box).T) / height
    order = 0.1 * (top > box[1] - height) + 0.02 * np.abs(left - box[0]) / width
    solid = _sums(_integral(obstacles.solid), positions)
    covered = 1000 * solid / (width * height) + 10 * _sums(obstacles.shares, positions)
    x1, y1 = (positions[(covered + gap + order).argmin(), :2] * scale).tolist()
    return x1, y1, x1 + extent[0], y1 + extent[1]


def _gaps(positions: NDArray[Any], box: Rectangle) -> NDArray[np.float64]:
    """(..., 2): distance of each rectangle XYXY from the box along x and y; 0 if they overlap."""
    low, high = np.array(box[:2]) - positions[..., 2:], positions[..., :2] - np.array(box[2:])
    gaps: NDArray[np.float64] = np.maximum(low, high).clip(min=0)
    return gaps


def _integral(values: NDArray[Any]) -> NDArray[np.float64]:
    """(h + 1, w + 1): at each place the sum of the values (h, w) above and left of it."""
    table = np.zeros((values.shape[0] + 1, values.shape[1] + 1))
    table[1:, 1:] = values.cumsum(axis=0, dtype=np.float64).cumsum(axis=1)
    return table


def _sums(table: NDArray[np.float64], positions: NDArray[Any]) -> NDArray[np.float64]:
    """The sum of an integral image over each rectangle XYXY, including its edges."""
    left, top = positions[:, 0], positions[:, 1]
    right, bottom = (np.minimum(positions[:, 2 + k] + 1, table.shape[1 - k] - 1) for k in (0, 1))
    sums: NDArray[np.float64] = table[bottom, right] - table[top, right] - table[bottom, left] + table[top, left]
    return sums
