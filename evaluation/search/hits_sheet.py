"""A contact sheet of found regions, each with what is around it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from regionspot.cache.errors import ImageError
from regionspot.cache.format.manifest import Manifest
from regionspot.evaluation.report.sheet import CaptionedImage, contact_sheet
from regionspot.evaluation.search.region_index import Hit
from regionspot.pipeline.images.decode import Exif, read_image

CELL = 300  # pixels
CONTEXT = 1.8  # side of the square that is shown, in longer sides of the box
FRAME = (235, 70, 60)
BLANK = (214, 213, 209)  # instead of an image that cannot be read


def hits_sheet(manifest: Manifest, image_folder: Path, hits: Sequence[Hit], title: str, exif: Exif) -> Image.Image:
    """The hits in rows of five, best first, with similarity and name; grey where the image cannot be read."""
    cells = [
        CaptionedImage(
            region_crop(manifest, image_folder / hit.path, hit.row, hit.box_xyxy, exif),
            f"{hit.similarity:.3f}  {hit.name or 'unnamed'}",
        )
        for hit in hits
    ]
    return contact_sheet(cells, columns=5, cell=CELL, title=title)


def region_crop(
    manifest: Manifest, file: Path, row: int, box_xyxy: Sequence[float], exif: Exif, cell: int = CELL
) -> Image.Image:
    """A square of `cell` pixels around a box, which is framed; grey beyond the image, or if `file` is unreadable."""
    x1, y1, x2, y2 = box_xyxy
    width, height = int(manifest.widths[row]), int(manifest.heights[row])
    try:
        image = read_image(file, (height, width), exif)
    except ImageError:
        return Image.new("RGB", (cell, cell), BLANK)
    side = round(max(8.0, CONTEXT * max(x2 - x1, y2 - y1)))
    left, top = _start(x1, x2, side, width), _start(y1, y2, side, height)
    square = Image.new("RGB", (side, side), BLANK)
    square.paste(image, (-left, -top))
    square, scale = square.resize((cell, cell), Image.Resampling.BICUBIC), cell / side
    edges = [(x1 - left) * scale, (y1 - top) * scale, (x2 - left) * scale, (y2 - top) * scale]
    pen = ImageDraw.Draw(square)
    pen.rectangle([edges[0] - 2, edges[1] - 2, edges[2] + 2, edges[3] + 2], outline=(20, 20, 20), width=4)
    pen.rectangle([edges[0] - 1, edges[1] - 1, edges[2] + 1, edges[3] + 1], outline=FRAME, width=2)
    return square


def _start(low: float, high: float, side: int, length: int) -> int:
    """Where a square of `side` starts on an axis: with the box in its middle, but inside of the image if it fits."""
    middle = round((low + high - side) / 2)
    return min(max(middle, 0), length - side) if side <= length else (length - side) // 2
