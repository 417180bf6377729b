"""Draws the toy world's images: objects with a shape, a colour and a texture on a cluttered background.

All random choices come from the given generator, so an image is the same on every machine. Shapes are polygons, filled
at four times their size and averaged down for smooth edges. Large objects are drawn first, so that small ones lie on
top.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

SHAPES = ("circle", "square", "triangle", "star", "cross", "heart", "ring", "crescent")
COLOURS = {
    "red": (212, 38, 38),
    "orange": (242, 138, 28),
    "yellow": (240, 222, 52),
    "green": (46, 164, 66),
    "blue": (48, 88, 214),
    "purple": (146, 58, 182),
}
TEXTURES = ("plain", "striped", "dotted", "checkered")

SIDES = (192, 320)  # pixels, height and width of an image
SIZES = (28.0, 150.0)  # pixels across an object, drawn log-uniformly
VISIBLE = 0.9  # smallest visible share of an object
GROUND = -1  # owner of background pixels
SMOOTHING = 4  # supersampling factor of shapes
HALF = 127  # coverage (0..255) above which a pixel belongs to the object
GRAIN = 5  # largest random change of a pixel, in grey levels

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Look:
    """An object's appearance, which is its class name: "striped green star"."""

    texture: str
    colour: str
    shape: str

    @property
    def name(self) -> str:
        return f"{self.texture} {self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """pixels uint8 (h, w, 3) RGB; owner int16 (h, w): index of the look that a pixel shows, or GROUND."""

    pixels: NDArray[np.uint8]
    owner: NDArray[np.int16]


def draw_image(looks: Sequence[Look], rng: np.random.Generator) -> Scene:
    """An image with all `looks`, each completely inside and at least VISIBLE of it visible."""
    height, width = (int(side) for side in rng.integers(SIDES[0], SIDES[1] + 1, 2))
    canvas = _ground(height, width, rng)
    owner = np.full((height, width), GROUND, np.int16)
    sizes = np.sort(np.exp(rng.uniform(np.log(SIZES[0]), np.log(SIZES[1]), len(looks))))[::-1]
    whole = np.zeros(len(looks), np.int64)  # pixels of each object, including hidden ones
    visible = np.zeros(len(looks), np.int64)
    for number, (look, size) in enumerate(zip(looks, sizes, strict=True)):
        cover, window = _place(look.shape, min(float(size), 0.6 * min(height, width)), owner, whole, visible, rng)
        corner = (window[1].start, window[0].start)
        canvas.paste(_fill(look, cover.shape, float(size), rng), corner, Image.fromarray(cover))
        solid = cover > HALF
        visible -= _shown(owner[window][solid], len(looks))
        owner[window][solid] = number
        whole[number] = visible[number] = np.count_nonzero(solid)
    grain = rng.integers(-GRAIN, GRAIN + 1, (height, width, 1), np.int16)
    return Scene((np.asarray(canvas) + grain).clip(0, 255).astype(np.uint8), owner)


def _place(
    shape: str,
    size: float,
    owner: NDArray[np.int16],
    whole: NDArray[np.int64],
    visible: NDArray[np.int64],
    rng: np.random.Generator,
) -> tuple[NDArray[np.uint8], tuple[slice, slice]]:
    """Coverage (h, w) of a shape, and a window of the image where it leaves VISIBLE of every earlier object.

    Tries a few positions, then smaller shapes, so that an image always contains all its objects.
    """
    while True:
        cover = _outline(shape, size, rng)
        solid = cover > HALF
        for _ in range(8):
            top, left = (int(rng.integers(0, room + 1)) for room in np.subtract(owner.shape, cover.shape))
            window = np.s_[top : top + cover.shape[0], left : left + cover.shape[1]]
            if (visible - _shown(owner[window][solid], len(whole)) >= VISIBLE * whole).all():
                return cover, window
        size = max(0.8 * size, 0.75 * SIZES[0])


def _shown(owner: NDArray[np.int16], objects: int) -> NDArray[np.intp]:
    """Number of these pixels that show each object, (objects,)."""
    return np.bincount(owner + 1, minlength=objects + 1)[1:]


def _outline(shape: str, size: float, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Coverage (h, w) in 0..255 of a shape about `size` pixels across, slightly rotated and stretched."""
    angle, stretch = rng.uniform(-0.35, 0.35), np.exp(rng.uniform(-0.2, 0.2))
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    outlines = [points * [stretch, 1 / stretch] @ turn.T * (size / 2) for points in _outlines(shape)]
    low, high = outlines[0].min(axis=0), outlines[0].max(axis=0)
    width, height = np.ceil(high - low).astype(int) + 1
    image = Image.new("L", (width * SMOOTHING, height * SMOOTHING))
    pen = ImageDraw.Draw(image)
    for points, ink in zip(outlines, (255, 0), strict=False):
        pen.polygon(((points - low + 0.5) * SMOOTHING).ravel().tolist(), fill=ink)
    return np.asarray(image.reduce(SMOOTHING))


@cache
def _outlines(shape: str) -> list[NDArray[np.float64]]:
    """Corners (n, 2) of a shape in about -1..1, y down; a second outline is a hole in the first."""
    turn = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    circle = np.stack([np.sin(turn), -np.cos(turn)], axis=1)
    if shape == "circle":
        return [circle]
    if shape == "ring":
        return [circle, 0.52 * circle]
    if shape == "crescent":
        return [circle, 0.8 * circle + [0.5, 0]]
    if shape == "square":
        return [0.88 * np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]])]
    if shape == "triangle":
        return [np.array([[0, -1], [1, 0.85], [-1, 0.85]])]
    if shape == "star":
        tip = np.arange(10) * np.pi / 5
        return [np.stack([np.sin(tip), -np.cos(tip)], axis=1) * np.tile([1.05, 0.42], 5)[:, None]]
    if shape == "cross":
        arm = np.array([[-0.34, -0.34], [-0.34, -1], [0.34, -1]])
        quarter = np.array([[0, 1], [-1, 0]])
        return [np.concatenate([arm @ np.linalg.matrix_power(quarter, k) for k in range(4)])]
    if shape == "heart":  # the well-known parametric heart, scaled to -1..1
        y = 13 * np.cos(turn) - 5 * np.cos(2 * turn) - 2 * np.cos(3 * turn) - np.cos(4 * turn)
        return [np.stack([np.sin(turn) ** 3, -(y + 2.5) / 14.5], axis=1)]
    raise ValueError(f"unknown shape {shape!r}")


def _fill(look: Look, size_hw: tuple[int, ...], size: float, rng: np.random.Generator) -> Image.Image:
    """The colours of an object: two tones of its colour, alternating by its texture."""
    tone = np.array(COLOURS[look.colour]) * rng.uniform(0.85, 1.1) + rng.uniform(-14, 14, 3)
    other = 0.3 * tone if rng.random() < 0.5 else 0.25 * tone + 0.75 * 245  # a dark or a pale second tone
    paint = Image.new("RGB", (size_hw[1], size_hw[0]), _ink(tone))
    if look.texture != "plain":
        paint.paste(_ink(other), mask=Image.fromarray(_pattern(look.texture, size_hw, size, rng)))
    return paint


def _pattern(texture: str, size_hw: tuple[int, ...], size: float, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Weight of the second tone, (h, w) in 0..255, with edges one pixel soft."""
    period = max(5.0, size * rng.uniform(0.2, 0.3))  # below five pixels JPEG leaves only grey
    angle, (phase_u, phase_v) = rng.uniform(0, np.pi), rng.uniform(0, 2 * np.pi, 2)
    y, x = (np.arange(side, dtype=np.float32) * np.float32(2 * np.pi / period) for side in size_hw)
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    u = _wave(sin * y + np.float32(phase_u), cos * x)
    if texture == "striped":
        field = u
    else:
        v = _wave(cos * y + np.float32(phase_v), -sin * x)
        field = u + v - np.float32(0.75) if texture == "dotted" else 2 * u * v
    return ((0.5 + field * np.float32(period / 6)) * 255).clip(0, 255).astype(np.uint8)


def _wave(rows: Floats, columns: Floats) -> Floats:
    """sin(rows + columns), (h, w), by the addition theorem: h + w sines instead of h * w."""
    wave: Floats = np.outer(np.sin(rows), np.cos(columns)) + np.outer(np.cos(rows), np.sin(columns))
    return wave


def _ground(height: int, width: int, rng: np.random.Generator) -> Image.Image:
    """A cluttered background: a gradient between dull tones, grey blobs and lines, smooth noise."""
    corner = _dull(rng, 4).reshape(2, 2, 3) + 0.5 * rng.uniform(-40, 40, (2, 2, 1))
    slope = Image.fromarray(corner.clip(0, 255).astype(np.uint8)).resize((width, height), Image.Resampling.BILINEAR)
    pen = ImageDraw.Draw(slope)
    for tone in _dull(rng, int(rng.integers(4, 10))):
        x, y, reach = rng.uniform(0, width), rng.uniform(0, height), rng.uniform(4, 40, 2)
        pen.ellipse([x - reach[0], y - reach[1], x + reach[0], y + reach[1]], fill=_ink(tone))
    for tone in _dull(rng, int(rng.integers(4, 10))):
        ends = (rng.uniform(0, 1, (2, 2)) * [width, height]).ravel().tolist()
        pen.line(ends, fill=_ink(tone), width=int(rng.integers(1, 5)))
    coarse = Image.fromarray(rng.integers(0, 256, (int(rng.integers(4, 40)),) * 2, np.uint8))
    noise = coarse.resize((width, height), Image.Resampling.BILINEAR).convert("RGB")
    return Image.blend(slope, noise, float(rng.uniform(0.05, 0.25)))


def _ink(tone: NDArray[np.float64]) -> tuple[int, int, int]:
    red, green, blue = tone.clip(0, 255).astype(int).tolist()
    return red, green, blue


def _dull(rng: np.random.Generator, count: int) -> NDArray[np.float64]:
    """`count` tones near grey, (count, 3), which no object has."""
    return rng.uniform(60, 200, (count, 1)) + rng.uniform(-18, 18, (count, 3))
