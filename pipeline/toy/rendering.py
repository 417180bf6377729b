"""Draws the toy world's images: objects of a shape, a colour and a texture on cluttered ground.

Only numpy and Pillow, and every choice comes from the generator that is handed in, so an image is the same on every
machine. Shapes are polygons, filled at four times the size and averaged down, which gives smooth edges in well under
a millisecond. Large objects are drawn first: small ones then lie on them instead of vanishing below them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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

SIDES = (192, 320)  # pixels of an image's side
SIZES = (16.0, 150.0)  # pixels across an object, drawn log-uniformly
VISIBLE = 0.42  # an object never shows less of itself
GROUND = -1  # owner of a pixel that belongs to no object
SMOOTHING = 4  # shapes are filled this much larger and averaged down

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Look:
    """What an object is, and so its class name: "striped green star"."""

    texture: str
    colour: str
    shape: str

    @property
    def name(self) -> str:
        return f"{self.texture} {self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """pixels uint8 (h, w, 3) RGB; owner int16 (h, w): which of the looks a pixel shows, GROUND where none."""

    pixels: NDArray[np.uint8]
    owner: NDArray[np.int16]


def draw_image(looks: Sequence[Look], rng: np.random.Generator) -> Scene:
    """One image that shows every one of `looks`, each at least VISIBLE of itself and wholly inside."""
    height, width = (int(side) for side in rng.integers(SIDES[0], SIDES[1] + 1, 2))
    canvas = _ground(height, width, rng)
    owner = np.full((height, width), GROUND, np.int16)
    sizes = np.sort(np.exp(rng.uniform(np.log(SIZES[0]), np.log(SIZES[1]), len(looks))))[::-1]
    whole = np.zeros(len(looks), np.int64)  # pixels of each object, hidden ones included
    for number, (look, size) in enumerate(zip(looks, sizes, strict=True)):
        cover, window = _place(look.shape, min(float(size), 0.6 * min(height, width)), owner, whole, rng)
        canvas[window] += (_fill(look, cover.shape, float(size), rng) - canvas[window]) * cover[..., None]
        owner[window][cover > 0.5] = number
        whole[number] = np.count_nonzero(cover > 0.5)
    canvas += 3 * rng.standard_normal((height, width, 1), np.float32)
    return Scene(canvas.clip(0, 255).astype(np.uint8), owner)


def _place(
    shape: str, size: float, owner: NDArray[np.int16], whole: NDArray[np.int64], rng: np.random.Generator
) -> tuple[Floats, tuple[slice, slice]]:
    """A shape's coverage (h, w) and the window of the image for it, where it hides no earlier object too far.

    Tries a few places, then a smaller shape: an image always holds all the objects it was dealt.
    """
    visible = np.bincount(owner.ravel() + 1, minlength=len(whole) + 1)[1:]
    while True:
        cover = _outline(shape, size, rng)
        solid = cover > 0.5
        for _ in range(8):
            top, left = (int(rng.integers(0, room + 1)) for room in np.subtract(owner.shape, cover.shape))
            window = np.s_[top : top + cover.shape[0], left : left + cover.shape[1]]
            hidden = np.bincount(owner[window][solid] + 1, minlength=len(whole) + 1)[1:]
            if (visible - hidden >= VISIBLE * whole).all():
                return cover, window
        size = max(0.8 * size, 0.75 * SIZES[0])


def _outline(shape: str, size: float, rng: np.random.Generator) -> Floats:
    """Coverage float32 (h, w) in 0..1 of a shape about `size` pixels across, turned and stretched a little."""
    angle, stretch = rng.uniform(-0.35, 0.35), np.exp(rng.uniform(-0.2, 0.2))
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    outlines = [points * [stretch, 1 / stretch] @ turn.T * (size / 2) for points in _outlines(shape)]
    low, high = outlines[0].min(axis=0), outlines[0].max(axis=0)
    width, height = np.ceil(high - low).astype(int) + 1
    image = Image.new("L", (width * SMOOTHING, height * SMOOTHING))
    pen = ImageDraw.Draw(image)
    for points, ink in zip(outlines, (255, 0), strict=False):
        pen.polygon([(x, y) for x, y in (points - low + 0.5) * SMOOTHING], fill=ink)
    cover: Floats = np.asarray(image.reduce(SMOOTHING), np.float32) / np.float32(255)
    return cover


def _outlines(shape: str) -> list[NDArray[np.float64]]:
    """Corners (n, 2) of a shape in about -1..1, y down; a second outline is cut out of the first."""
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
    raise ValueError(f"no shape is called {shape!r}")


def _fill(look: Look, size_hw: tuple[int, ...], size: float, rng: np.random.Generator) -> Floats:
    """The paint of an object, (h, w, 3): its colour in two tones that alternate as its texture says."""
    tone = np.array(COLOURS[look.colour], np.float32) * rng.uniform(0.85, 1.1) + rng.uniform(-14, 14, 3)
    other = 0.3 * tone if rng.random() < 0.5 else 0.25 * tone + 0.75 * 245  # a dark or a pale second tone
    mix = _pattern(look.texture, size_hw, size, rng)[..., None]
    return np.asarray(tone + (other - tone) * mix, np.float32)


def _pattern(texture: str, size_hw: tuple[int, ...], size: float, rng: np.random.Generator) -> Floats:
    """How much of the second tone each pixel has, float32 (h, w) in 0..1; edges one pixel soft."""
    period = max(5.0, size * rng.uniform(0.2, 0.3))  # under five pixels JPEG leaves only a grey
    angle, (phase_u, phase_v) = rng.uniform(0, np.pi), rng.uniform(0, 2 * np.pi, 2)
    y, x = np.mgrid[: size_hw[0], : size_hw[1]].astype(np.float32) * np.float32(2 * np.pi / period)
    u = np.sin(np.cos(angle) * x + np.sin(angle) * y + phase_u)
    v = np.sin(np.cos(angle) * y - np.sin(angle) * x + phase_v)
    field = {"plain": -np.ones_like(u), "striped": u, "dotted": u + v - 0.75, "checkered": 2 * u * v}[texture]
    share: Floats = (0.5 + field * np.float32(period / 6)).clip(0, 1)
    return share


def _ground(height: int, width: int, rng: np.random.Generator) -> Floats:
    """Cluttered ground (h, w, 3): a slope between two dull tones, smooth noise, grey blobs and lines."""
    corner = _dull(rng, 4).reshape(2, 2, 3) + 0.5 * rng.uniform(-40, 40, (2, 2, 1))
    slope = Image.fromarray(corner.clip(0, 255).astype(np.uint8)).resize((width, height), Image.Resampling.BILINEAR)
    pen = ImageDraw.Draw(slope)
    for tone in _dull(rng, int(rng.integers(4, 10))):
        x, y, reach = rng.uniform(0, width), rng.uniform(0, height), rng.uniform(4, 40, 2)
        pen.ellipse([x - reach[0], y - reach[1], x + reach[0], y + reach[1]], fill=tuple(tone.astype(int).tolist()))
    for tone in _dull(rng, int(rng.integers(4, 10))):
        ends = (rng.uniform(0, 1, (2, 2)) * [width, height]).ravel().tolist()
        pen.line(ends, fill=tuple(tone.astype(int).tolist()), width=int(rng.integers(1, 5)))
    coarse = Image.fromarray(rng.integers(0, 256, (int(rng.integers(4, 40)),) * 2, np.uint8))
    noise = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.float32) - 128
    return np.asarray(slope, np.float32) + noise[..., None] * np.float32(rng.uniform(0.05, 0.25))


def _dull(rng: np.random.Generator, count: int) -> NDArray[np.float64]:
    """`count` tones near grey, (count, 3): no object has such a colour."""
    return rng.uniform(60, 200, (count, 1)) + rng.uniform(-18, 18, (count, 3))
