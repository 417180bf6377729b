"""What the boxes of a file look like, where they do not fit their images: corners for sizes, shares for pixels.

A file with corners where x, y, width and height are expected reads without an error: every box is there, too large, and
cut at the image's border. So where many boxes are cut or dropped, a sample of them is read in the other ways that tools
write boxes, and one in which nearly all fit is named.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

Floats: TypeAlias = NDArray[np.float64]
BoxFormat: TypeAlias = Literal["xywh", "xyxy", "normalised"]  # the last one: corners from 0 to 1

_FITTING = 0.95  # share of boxes that must fit in another reading
_SLACK = 0.01  # of a side: boxes of annotators reach a little over the border
_CORNERS, _SIZES, _CENTRES = "x1, y1, x2, y2", "x, y, width, height", "centre x, centre y, width, height"
_YX_CORNERS = "y1, x1, y2, x2"  # TensorFlow
_PIXELS, _SHARES, _PER_CENT = "in pixels", "from 0 to 1", "from 0 to 100"
_OTHER_ORDER = "their corners stand in another order than x1, y1, x2, y2"
_EXPECTED = {"xywh": (_SIZES, _PIXELS), "xyxy": (_CORNERS, _PIXELS), "normalised": (_CORNERS, _SHARES)}


def diagnose_boxes(stated: Floats, sizes: Floats, form: BoxFormat) -> str | None:
    """What boxes that were read as `form` may be instead, in words.

    "" where nothing fits better; None where they fit their images as they are.

    stated  float64 (M, 4) as they stand in the file
    sizes   float64 (M, 2) width and height of the image of each
    """
    finite = np.isfinite(stated).all(axis=1)
    stated, sizes = stated[finite], sizes[finite]
    shape, unit = _EXPECTED[form]
    units = {_PIXELS: np.ones_like(sizes), _SHARES: sizes, _PER_CENT: sizes / 100}
    corners = _corners(stated * np.tile(units[unit], 2), shape)
    if not len(stated) or _fit(corners, sizes):
        return None
    if form == "normalised" and _fit(_in_order(corners), sizes):
        return _OTHER_ORDER
    shapes = sorted(
        (_CORNERS, _SIZES, _CENTRES, _YX_CORNERS), key=lambda other: other != shape
    )  # the expected ones first
    for other_unit in sorted(units, key=lambda other: other != unit):
        for other_shape in shapes:
            if _fit(_corners(stated * np.tile(units[other_unit], 2), other_shape), sizes):
                return f"they look like {other_shape} {other_unit}, expected {shape} {unit}"
    if _fit(corners, sizes[:, ::-1]):
        return "they fit images whose height and width are swapped"
    if shape == _CORNERS and _fit(_in_order(corners), sizes):
        return _OTHER_ORDER
    times = np.quantile(corners[:, 2:] / sizes, 0.99, axis=0)
    if form == "normalised" and times.max() > 2:
        return f"they reach to {times.max():.3g}, which looks like pixels; expected {shape} {unit}"
    if times.min() > 1 + 5 * _SLACK:
        return f"they look like boxes of larger images: they reach to {times.max():.2g} times the stated size"
    return ""


def _corners(stated: Floats, shape: str) -> Floats:
    first, second = stated[:, :2], stated[:, 2:]
    if shape == _YX_CORNERS:
        first, second = first[:, ::-1], second[:, ::-1]
    elif shape == _SIZES:
        second = first + second
    elif shape == _CENTRES:
        first, second = first - second / 2, first + second / 2
    return np.concatenate([first, second], axis=1)


def _in_order(corners: Floats) -> Floats:
    return np.sort(corners.reshape(-1, 2, 2), axis=1).reshape(-1, 4)


def _fit(corners: Floats, sizes: Floats) -> bool:
    """Whether nearly all boxes have a pixel of width and height, and lie inside their image."""
    slack = 1 + _SLACK * sizes
    large = (corners[:, 2:] - corners[:, :2] >= 1).all(axis=1)
    inside = ((corners[:, :2] >= -slack) & (corners[:, 2:] <= sizes + slack)).all(axis=1)
    return float((large & inside).mean()) >= _FITTING
