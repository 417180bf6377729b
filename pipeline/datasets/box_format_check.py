"""Diagnose boxes in a wrong format: corners instead of sizes, fractions instead of pixels.

A file with corners instead of x, y, width, height is read without an error, but its boxes are too large and clipped at
the border. If many boxes are clipped or dropped, a sample is interpreted in the other formats that tools write, and the
format in which nearly all boxes fit is reported.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

Floats: TypeAlias = NDArray[np.float64]
BoxFormat: TypeAlias = Literal["xywh", "xyxy", "normalised"]  # normalised: corners from 0 to 1

_MIN_FITTING = 0.95  # share of boxes that must fit in another format
_TOLERANCE = 0.01  # of a side: annotated boxes reach a little over the border
_CORNERS, _SIZES, _CENTRES = "x1, y1, x2, y2", "x, y, width, height", "centre x, centre y, width, height"
_YX_CORNERS = "y1, x1, y2, x2"  # TensorFlow
_PIXELS, _FRACTIONS, _PER_CENT = "in pixels", "from 0 to 1", "from 0 to 100"
_OTHER_ORDER = "their corners are in another order than x1, y1, x2, y2"
_EXPECTED = {"xywh": (_SIZES, _PIXELS), "xyxy": (_CORNERS, _PIXELS), "normalised": (_CORNERS, _FRACTIONS)}


@np.errstate(over="ignore")  # of absurd numbers, which fit in no format
def diagnose_boxes(stated: Floats, sizes: Floats, box_format: BoxFormat) -> str | None:
    """Describe the format that boxes seem to have, if they do not fit their images in the expected `box_format`.

    None: they fit. "": no other format fits better.

    stated  float64 (M, 4) as in the file
    sizes   float64 (M, 2) width and height of each box's image
    """
    finite = np.isfinite(stated).all(axis=1)
    stated, sizes = stated[finite], sizes[finite]
    order, unit = _EXPECTED[box_format]
    units = {_PIXELS: np.ones_like(sizes), _FRACTIONS: sizes, _PER_CENT: sizes / 100}
    corners = _corners(stated * np.tile(units[unit], 2), order)
    if not len(stated) or _fit(corners, sizes):
        return None
    if box_format == "normalised" and _fit(_sorted_corners(corners), sizes):
        return _OTHER_ORDER
    # The expected order and unit first.
    orders = sorted((_CORNERS, _SIZES, _CENTRES, _YX_CORNERS), key=lambda other: other != order)
    for other_unit in sorted(units, key=lambda other: other != unit):
        for other_order in orders:
            if _fit(_corners(stated * np.tile(units[other_unit], 2), other_order), sizes):
                return f"they look like {other_order} {other_unit}, expected {order} {unit}"
    if _fit(corners, sizes[:, ::-1]):
        return "they fit images whose height and width are swapped"
    if order == _CORNERS and _fit(_sorted_corners(corners), sizes):
        return _OTHER_ORDER
    factor = np.quantile(corners[:, 2:] / sizes, 0.99, axis=0)
    if box_format == "normalised" and factor.max() > 2:
        return f"they reach to {factor.max():.3g}, which looks like pixels; expected {order} {unit}"
    if factor.min() > 1 + 5 * _TOLERANCE:
        return f"they look like boxes of larger images: they reach to {factor.max():.2g} times the stated size"
    return ""


def _corners(stated: Floats, order: str) -> Floats:
    first, second = stated[:, :2], stated[:, 2:]
    if order == _YX_CORNERS:
        first, second = first[:, ::-1], second[:, ::-1]
    elif order == _SIZES:
        second = first + second
    elif order == _CENTRES:
        first, second = first - second / 2, first + second / 2
    return np.concatenate([first, second], axis=1)


def _sorted_corners(corners: Floats) -> Floats:
    return np.sort(corners.reshape(-1, 2, 2), axis=1).reshape(-1, 4)


def _fit(corners: Floats, sizes: Floats) -> bool:
    """Whether nearly all boxes lie inside their image and are at least one pixel wide and high."""
    tolerance = 1 + _TOLERANCE * sizes
    large = (corners[:, 2:] - corners[:, :2] >= 1).all(axis=1)
    inside = ((corners[:, :2] >= -tolerance) & (corners[:, 2:] <= sizes + tolerance)).all(axis=1)
    return float((large & inside).mean()) >= _MIN_FITTING
