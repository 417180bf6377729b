"""One image of a cache to look at: its image and regions, what its map tells apart, and what one region is like.

image with its regions | map as colours, by PCA | likeness of one region to every patch
"""

# T map tokens: class token, where there is one, then g x g patches row by row; D width

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from regionspot.cache.errors import ImageError, InputError
from regionspot.cache.format.manifest import NO_CATEGORY, Manifest
from regionspot.cache.format.schema import FeatureSet
from regionspot.cache.reading.dask_arrays import read_decoded
from regionspot.cache.store import FeatureCache
from regionspot.evaluation.report.drawing import Colour, Drawn, colours_of, draw_regions
from regionspot.evaluation.report.map_views import box_likeness, pca_colours, stretched
from regionspot.evaluation.report.sheet import GAP, INK, PAPER, QUIET
from regionspot.pipeline.images.decode import Exif, read_image, stored_exif

BLANK = (214, 213, 209)  # where there is no image
HEAT_OPACITY = 0.68
LONG_SIDE, LEAST_COLUMN = 620, 520  # pixels of each view's longer side, and of the room for the words below it
TITLE, LINE = 62, 23  # pixels of height


@dataclass(frozen=True)
class View:
    """An image, what it shows, and how that came about."""

    image: Image.Image
    what: str
    detail: str


def show_image(
    cache: FeatureCache,
    image_id: int,
    images: Path | None = None,
    region: int | None = None,
    map_set: str | None = None,
) -> Image.Image:
    """The views of an image side by side, each with two lines that say what it shows.

    images    folder that the manifest's paths start from; without it, or where it lacks the image, boxes lie on grey
    region    the one compared, as numbered in the first view; default: the largest that covers less than half
    map_set   default: the cache's only one; a cache without maps gives the first view alone

    Raises InputError for an image or region that is not there and for a map that is no square of patches,
    NotExtractedError for an image that failed or is not extracted yet.
    """
    manifest = cache.manifest
    row = manifest.row_of(image_id)
    exif = stored_exif(each.provenance for each in cache.feature_sets.values())
    image, remark = _image(manifest, row, images, exif)
    drawn = _regions(manifest, row)
    chosen = _chosen(cache, image_id, drawn, region, image.size)
    maps = _map_set(cache, map_set)
    views = [_region_view(image, drawn, str(manifest.paths[row]), remark)]
    if maps is not None:
        patches = _patches(cache, row, maps)
        views.append(_colour_view(patches, drawn, image.size, maps.name))
        if chosen is not None:
            views.append(_likeness_view(patches, drawn[chosen], image))
    return side_by_side(views, f"{manifest.dataset} {manifest.split}, image {image_id} (row {row})")


def _region_view(image: Image.Image, drawn: Sequence[Drawn], path: str, remark: str) -> View:
    count = f"{len(drawn)} region{'' if len(drawn) == 1 else 's'}"
    return View(draw_regions(image, drawn), path, f"{count}{remark}")


def _colour_view(patches: NDArray[np.float32], drawn: Sequence[Drawn], size: tuple[int, int], name: str) -> View:
    colours, share = pca_colours(patches)
    # Squeezed into a square for the encoder, the patches are spread over the image again.
    spread = Image.fromarray(colours).resize(size, Image.Resampling.NEAREST)
    return View(
        _outlined(spread, drawn),
        f"{name}: {len(patches)} x {len(patches)} patches, equal ones in equal colours",
        f"their first 3 principal components as red, green, blue: {share:.0%} of the variance",
    )


def _likeness_view(patches: NDArray[np.float32], region: Drawn, image: Image.Image) -> View:
    sides = np.array([image.width, image.height] * 2, np.float32)
    likeness = box_likeness(patches, region.box_xyxy / sides)
    return View(
        draw_regions(_heated(image, likeness), [region]),
        f"what is like region {region.label}",
        f"cosine of its mean patch and each patch: {likeness.min():.2f} dark to {likeness.max():.2f} bright",
    )


def _map_set(cache: FeatureCache, name: str | None) -> FeatureSet | None:
    of_kind = {each.name: each for each in cache.feature_sets.values() if each.kind == "map"}
    if name is None and len(of_kind) <= 1:
        return next(iter(of_kind.values()), None)
    if name not in of_kind:
        held = ", ".join(of_kind) or "none"
        raise InputError(f"{cache.path}: its map feature sets are {held}; name one of them with --map-set")
    return of_kind[name]


def _patches(cache: FeatureCache, row: int, maps: FeatureSet) -> NDArray[np.float32]:
    """float32 (g, g, D): the image's map without its class token, where it has one."""
    tokens, width = maps.shape
    first = 1 if maps.provenance.get("class_token", True) else 0
    side = math.isqrt(tokens - first)
    if side * side != tokens - first:
        expected = "one and a square of patches" if first else "a square of patches"
        raise InputError(f"{cache.path}: {maps.name} has {tokens} tokens, expected {expected}")
    values = read_decoded(cache.reader(maps.name), [row])[0, first:].astype(np.float32)
    return values.reshape(side, side, width)


def _regions(manifest: Manifest, row: int) -> list[Drawn]:
    """The image's regions, numbered and named, each in its own colour."""
    place = manifest.regions(row)
    labels = [
        f"{number} {'unnamed' if index == NO_CATEGORY else manifest.categories[index].name}"
        for number, index in enumerate(manifest.category_index[place])
    ]
    palette = colours_of(labels)
    boxes = manifest.boxes_xyxy[place]
    return [Drawn(box, label, colour=palette[label]) for box, label in zip(boxes, labels, strict=True)]


def _chosen(
    cache: FeatureCache, image_id: int, drawn: Sequence[Drawn], region: int | None, size: tuple[int, int]
) -> int | None:
    if region is not None and not 0 <= region < len(drawn):
        raise InputError(f"{cache.path}: image {image_id} has no region {region}; it has {len(drawn)}, from 0 on")
    if region is not None or not drawn:
        return region
    boxes = np.stack([each.box_xyxy for each in drawn])
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1) / math.prod(size)
    # A box of nearly everything is like nearly everything.
    return int(np.where(areas < 0.5, areas, -areas).argmax())


def _image(manifest: Manifest, row: int, images: Path | None, exif: Exif) -> tuple[Image.Image, str]:
    """The image, or grey of its size, and a remark on that."""
    height, width = int(manifest.heights[row]), int(manifest.widths[row])
    blank = Image.new("RGB", (width, height), BLANK)
    if images is None:
        return blank, "; no folder of images given"
    try:
        return read_image(images / str(manifest.paths[row]), (height, width), exif), ""
    except ImageError as error:
        return blank, f"; image {str(error).partition(': ')[2].partition(';')[0]}"


def _outlined(image: Image.Image, drawn: Sequence[Drawn]) -> Image.Image:
    """The image enlarged as the others, with frames thin and colourless, so that its own colours stay."""
    enlarged = draw_regions(image, [])
    pen = ImageDraw.Draw(enlarged)
    for region in drawn:
        left, top, right, bottom = (region.box_xyxy * (enlarged.width / image.width)).tolist()
        pen.rectangle((left, top, max(right, left + 3), max(bottom, top + 3)), outline=(0, 0, 0), width=3)
        pen.rectangle((left + 1, top + 1, max(right, left + 3) - 1, max(bottom, top + 3) - 1), outline=(255, 255, 255))
    return enlarged


def _heated(image: Image.Image, likeness: NDArray[np.float32]) -> Image.Image:
    """The image in grey under colours from dark (unlike) to bright (like)."""
    from matplotlib import colormaps  # half a second to import, for this view alone

    shares = stretched(likeness.reshape(-1, 1).astype(np.float64)).reshape(likeness.shape)
    heat = Image.fromarray((colormaps["inferno"](shares)[..., :3] * 255).astype(np.uint8))
    spread = heat.resize(image.size, Image.Resampling.BICUBIC)
    return Image.blend(image.convert("L").convert("RGB"), spread, HEAT_OPACITY)


def side_by_side(views: Sequence[View], title: str) -> Image.Image:
    """The views in one row, equally high, under a title; below each its two lines, in letters small enough to fit."""
    high = min(round(LONG_SIDE * view.image.height / max(view.image.size)) for view in views)
    images = [view.image.resize((round(view.image.width * high / view.image.height), high)) for view in views]
    columns = [max(image.width, LEAST_COLUMN) for image in images]
    sheet = Image.new("RGB", (GAP + sum(columns) + GAP * len(columns), TITLE + high + GAP + 2 * LINE), PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((GAP, GAP), title, fill=INK, font=ImageFont.load_default(26))
    left = GAP
    for view, image, wide in zip(views, images, columns, strict=True):
        sheet.paste(image, (left, TITLE))
        for line, (text, ink) in enumerate(((view.what, INK), (view.detail, QUIET))):
            _write_fitted(pen, (left, TITLE + high + 6 + line * LINE), text, ink, wide)
        left += wide + GAP
    return sheet


def _write_fitted(pen: ImageDraw.ImageDraw, place: tuple[int, int], text: str, ink: Colour, wide: int) -> None:
    """A line of text in the largest font, down to a small one, in which it is at most `wide` pixels."""
    for size in range(17, 11, -1):
        font = ImageFont.load_default(size)
        if pen.textlength(text, font=font) <= wide:
            break
    pen.text(place, text, fill=ink, font=font)
