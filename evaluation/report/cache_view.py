"""Show one image of a cache: its regions, its feature map, and the similarity of one region to the rest of the image.

image with its regions | map as colours, by PCA | cosine similarity of one region to every patch
"""

# T map tokens: class token, if there is one, then g x g patches in row-major order; D width

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
from regionspot.evaluation.report.drawing import Colour, LabelledRegion, colours_of, draw_regions
from regionspot.evaluation.report.sheet import BACKGROUND, CAPTION_TEXT, GAP, TEXT
from regionspot.pipeline.images.decode import Exif, read_image, stored_exif

BLANK = (214, 213, 209)  # instead of a missing image
HEAT_OPACITY = 0.68
LONG_SIDE, MIN_COLUMN = 620, 520  # pixels: long side of an image, minimum width of the text below it
TITLE, LINE = 62, 23  # pixels of height
MIN_COMPONENT = 0.02  # components smaller than this fraction of the first are rounding errors
CLIPPED = 2  # percent of the patches at both ends: an outlier must not take all the contrast


@dataclass(frozen=True)
class Panel:
    """An image with two lines of text below it."""

    image: Image.Image
    title: str
    detail: str


def show_image(
    cache: FeatureCache,
    image_id: int,
    image_folder: Path | None = None,
    region: int | None = None,
    map_set: str | None = None,
) -> Image.Image:
    """The panels of an image side by side.

    image_folder  root of the manifest's paths; without it, or if the image is missing, boxes are drawn on grey
    region        the one compared, by its number in the first panel; default: the largest below half of the image
    map_set       default: the only one of the cache; a cache without maps gives the first panel alone

    Raises InputError for an unknown image or region and for a map that is not a square of patches, NotExtractedError
    for an image that failed or is not extracted yet.
    """
    manifest = cache.manifest
    row = manifest.row_of(image_id)
    exif = stored_exif(feature_set.provenance for feature_set in cache.feature_sets.values())
    image, remark = _read_image(manifest, row, image_folder, exif)
    regions = _regions(manifest, row)
    selected = _select_region(cache, image_id, regions, region, image.size)
    maps = map_set_of(cache, map_set)
    count = f"{len(regions)} region{'' if len(regions) == 1 else 's'}"
    panels = [Panel(draw_regions(image, regions), str(manifest.paths[row]), f"{count}{remark}")]
    if maps is not None:
        patches = map_patches(cache, row, maps)
        panels.append(_pca_panel(patches, regions, image.size, maps.name))
        if selected is not None:
            panels.append(_similarity_panel(patches, regions[selected], image))
    return side_by_side(panels, f"{manifest.dataset} {manifest.split}, image {image_id} (row {row})")


def _pca_panel(
    patches: NDArray[np.float32], regions: Sequence[LabelledRegion], size: tuple[int, int], name: str
) -> Panel:
    colours, variance = pca_colours(patches)
    # The encoder resizes images to a square; resize its patches back to the shape of the image.
    resized = Image.fromarray(colours).resize(size, Image.Resampling.NEAREST)
    return Panel(
        _outlined(resized, regions),
        f"{name}: {len(patches)} x {len(patches)} patches, equal ones in equal colours",
        f"their first 3 principal components as red, green, blue: {variance:.0%} of the variance",
    )


def _similarity_panel(patches: NDArray[np.float32], region: LabelledRegion, image: Image.Image) -> Panel:
    sides = np.array([image.width, image.height] * 2, np.float32)
    similarity = box_similarity(patches, region.box_xyxy / sides)
    return Panel(
        draw_regions(_heat_map(image, similarity), [region]),
        f"what is like region {region.label}",
        f"cosine of its mean patch and each patch: {similarity.min():.2f} dark to {similarity.max():.2f} bright",
    )


def pca_colours(patches: NDArray[np.float32]) -> tuple[NDArray[np.uint8], float]:
    """RGB uint8 (g, g, 3) of patches (g, g, D) by their principal components, and the fraction of variance shown.

    Each channel is one component, scaled between its outermost `CLIPPED` percent. The largest weight of a component is
    positive, so the colours are reproducible.
    """
    flat = patches.reshape(-1, patches.shape[-1]).astype(np.float64)
    flat -= flat.mean(axis=0)
    scores, lengths, axes = np.linalg.svd(flat, full_matrices=False)
    shown = min(3, int((lengths > MIN_COMPONENT * lengths[0]).sum()))
    signs = np.sign(axes[np.arange(shown), np.abs(axes[:shown]).argmax(axis=1)])
    values = np.zeros((len(flat), 3))
    values[:, :shown] = scores[:, :shown] * lengths[:shown] * signs
    colours = np.round(255 * _rescaled(values)).astype(np.uint8).reshape(*patches.shape[:2], 3)
    return colours, float((lengths[:shown] ** 2).sum() / max((lengths**2).sum(), 1e-12))


def box_similarity(patches: NDArray[np.float32], box_xyxy: NDArray[np.float32]) -> NDArray[np.float32]:
    """float32 (g, g): cosine similarity of each patch (g, g, D) and the mean of the patches inside a box.

    The box is in fractions of the image, 0 to 1; patches are weighted by their overlap with it.
    """
    weights = _overlap(box_xyxy[1::2], len(patches))[:, None] * _overlap(box_xyxy[0::2], len(patches))
    mean = np.einsum("yx,yxd->d", weights, patches)
    lengths = np.linalg.norm(patches, axis=-1) * np.linalg.norm(mean)
    similarity: NDArray[np.float32] = (patches @ mean / np.maximum(lengths, 1e-12)).astype(np.float32)
    return similarity


def _overlap(interval: NDArray[np.float32], cells: int) -> NDArray[np.float64]:
    """float64 (cells,): the fraction of each of `cells` equal cells of [0, 1] inside `interval`, never all 0."""
    first = min(float(interval[0]) * cells, cells - 1e-3)
    last = max(float(interval[1]) * cells, first + 1e-3)
    edges = np.arange(cells)
    overlap: NDArray[np.float64] = np.clip(np.minimum(edges + 1, last) - np.maximum(edges, first), 0, None)
    return overlap


def _rescaled(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Values (n, C) rescaled to 0 to 1 in each column, with the outermost percents clipped; 0.5 if all are equal."""
    low, high = np.percentile(values, [CLIPPED, 100 - CLIPPED], axis=0)
    extent = high - low
    constant = extent < 1e-9
    rescaled: NDArray[np.float64] = np.where(
        constant, 0.5, np.clip((values - low) / np.where(constant, 1, extent), 0, 1)
    )
    return rescaled


def map_set_of(cache: FeatureCache, name: str | None) -> FeatureSet | None:
    """The maps of that name, by default the only ones; None if there are none. Raises InputError."""
    maps = {feature_set.name: feature_set for feature_set in cache.feature_sets.values() if feature_set.kind == "map"}
    if name is None and len(maps) <= 1:
        return next(iter(maps.values()), None)
    if name not in maps:
        names = ", ".join(maps) or "none"
        raise InputError(f"{cache.path}: its map feature sets are {names}; name one of them with --map-set")
    return maps[name]


def map_patches(cache: FeatureCache, row: int, maps: FeatureSet) -> NDArray[np.float32]:
    """float32 (g, g, D): the map of the image without its class token."""
    tokens, width = maps.shape
    first = 1 if maps.provenance.get("class_token", True) else 0
    side = math.isqrt(tokens - first)
    if side * side != tokens - first:
        expected = "one and a square of patches" if first else "a square of patches"
        raise InputError(f"{cache.path}: {maps.name} has {tokens} tokens, expected {expected}")
    values = read_decoded(cache.reader(maps.name), [row])[0, first:].astype(np.float32)
    return values.reshape(side, side, width)


def _regions(manifest: Manifest, row: int) -> list[LabelledRegion]:
    """The regions of the image with number, name and a colour each."""
    regions = manifest.regions(row)
    labels = [
        f"{number} {'unnamed' if index == NO_CATEGORY else manifest.categories[index].name}"
        for number, index in enumerate(manifest.category_index[regions])
    ]
    palette = colours_of(labels)
    boxes = manifest.boxes_xyxy[regions]
    return [LabelledRegion(box, label, colour=palette[label]) for box, label in zip(boxes, labels, strict=True)]


def _select_region(
    cache: FeatureCache, image_id: int, regions: Sequence[LabelledRegion], number: int | None, size: tuple[int, int]
) -> int | None:
    if number is not None and not 0 <= number < len(regions):
        raise InputError(f"{cache.path}: image {image_id} has no region {number}; it has {len(regions)}, from 0 on")
    if number is not None or not regions:
        return number
    boxes = np.stack([region.box_xyxy for region in regions])
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1) / math.prod(size)
    # A box that covers most of the image is similar to most patches.
    return int(np.where(areas < 0.5, areas, -areas).argmax())


def _read_image(manifest: Manifest, row: int, image_folder: Path | None, exif: Exif) -> tuple[Image.Image, str]:
    """The image and "", or a grey one of its size and the reason."""
    height, width = int(manifest.heights[row]), int(manifest.widths[row])
    blank = Image.new("RGB", (width, height), BLANK)
    if image_folder is None:
        return blank, "; no folder of images given"
    try:
        return read_image(image_folder / str(manifest.paths[row]), (height, width), exif), ""
    except ImageError as error:
        return blank, f"; image {str(error).partition(': ')[2].partition(';')[0]}"


def _outlined(image: Image.Image, regions: Sequence[LabelledRegion]) -> Image.Image:
    """The image enlarged like the other panels, with thin black and white frames."""
    enlarged = draw_regions(image, [])
    pen = ImageDraw.Draw(enlarged)
    for region in regions:
        left, top, right, bottom = (region.box_xyxy * (enlarged.width / image.width)).tolist()
        pen.rectangle((left, top, max(right, left + 3), max(bottom, top + 3)), outline=(0, 0, 0), width=3)
        pen.rectangle((left + 1, top + 1, max(right, left + 3) - 1, max(bottom, top + 3) - 1), outline=(255, 255, 255))
    return enlarged


def _heat_map(image: Image.Image, similarity: NDArray[np.float32]) -> Image.Image:
    """The image in grey under colours from dark (dissimilar) to bright (similar)."""
    from matplotlib import colormaps  # its import takes half a second

    values = _rescaled(similarity.reshape(-1, 1).astype(np.float64)).reshape(similarity.shape)
    heat = Image.fromarray((colormaps["inferno"](values)[..., :3] * 255).astype(np.uint8))
    resized = heat.resize(image.size, Image.Resampling.BICUBIC)
    return Image.blend(image.convert("L").convert("RGB"), resized, HEAT_OPACITY)


def side_by_side(panels: Sequence[Panel], title: str) -> Image.Image:
    """The panels in one row of equal height under a title, each above its two lines of text."""
    height = min(round(LONG_SIDE * panel.image.height / max(panel.image.size)) for panel in panels)
    images = [panel.image.resize((round(panel.image.width * height / panel.image.height), height)) for panel in panels]
    columns = [max(image.width, MIN_COLUMN) for image in images]
    sheet = Image.new("RGB", (GAP + sum(columns) + GAP * len(columns), TITLE + height + GAP + 2 * LINE), BACKGROUND)
    pen = ImageDraw.Draw(sheet)
    pen.text((GAP, GAP), title, fill=TEXT, font=ImageFont.load_default(26))
    left = GAP
    for panel, image, width in zip(panels, images, columns, strict=True):
        sheet.paste(image, (left, TITLE))
        for line, (text, colour) in enumerate(((panel.title, TEXT), (panel.detail, CAPTION_TEXT))):
            _write_fitted(pen, (left, TITLE + height + 6 + line * LINE), text, colour, width)
        left += width + GAP
    return sheet


def _write_fitted(pen: ImageDraw.ImageDraw, position: tuple[int, int], text: str, colour: Colour, width: int) -> None:
    """Write a line of text in the largest font, down to a small one, that fits into `width` pixels."""
    for size in range(17, 11, -1):
        font = ImageFont.load_default(size)
        if pen.textlength(text, font=font) <= width:
            break
    pen.text(position, text, fill=colour, font=font)
