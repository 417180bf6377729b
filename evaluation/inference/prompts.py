"""What a caller points at in an image, checked and turned into boxes.

    boxes   used as they are
    points  SAM segments what they select; the box around that mask
    masks   the box around each
    none    SAM segments everything in the image; the boxes around its masks

Every prompt becomes a box because a head is trained on the location tokens of boxes: the token of a point, or of a box
with a mask, is one that it has never seen. So a point has the result of its box.
"""

# n prompts, k points of a prompt, h, w pixels of the image

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from regionspot.cache.errors import InputError
from regionspot.pipeline.backbones.protocols import PointLocalizer

_POINTS = "a point (x, y), or a list of points (x, y, label) with the label 1 inside of the region and 0 outside"


def boxes_of_points(
    points: Sequence[Any] | NDArray[Any], localizer: PointLocalizer, embedding: Tensor, size: tuple[int, int]
) -> NDArray[np.float32]:
    """float32 (n, 4): the boxes around what SAM segments for each prompt, in an image of `size` (height, width).

    points     n prompts; each is a point (x, y), or k points (x, y, label)
    embedding  of the image, by the localizer

    Raises InputError for anything else, for a point outside of the image, and if nothing is segmented.
    """
    prompts = [_prompt(prompt, number, size) for number, prompt in enumerate(points, start=1)]
    boxes = np.zeros((len(prompts), 4), np.float32)
    counts = np.array([len(prompt) for prompt in prompts], np.int64)
    for count in np.unique(counts):  # prompts with the same number of points are decoded together
        rows = np.flatnonzero(counts == count)
        values = np.stack([prompts[row] for row in rows])
        masks = localizer.masks_of_points(embedding, values[..., :2], values[..., 2].astype(np.int64), size)
        for row, mask in zip(rows, masks, strict=True):
            if not mask.any():
                raise InputError(f"point {row + 1} of {len(prompts)}: {localizer.name} segments nothing there")
            boxes[row] = box_of_mask(mask)
    return boxes


def check_masks(masks: Sequence[ArrayLike] | NDArray[Any], size: tuple[int, int]) -> NDArray[np.bool_]:
    """bool (n, h, w): the masks of an image of `size` (height, width).

    Raises InputError for masks of another size or type, and for an empty one.
    """
    if isinstance(masks, bool):
        raise InputError(
            f"masks is {masks}, expected masks of regions; `with_masks` decides whether masks are returned"
        )
    checked = [np.asarray(mask) for mask in masks]
    for number, mask in enumerate(checked, start=1):
        if mask.shape != size or mask.dtype.kind not in "biu":
            raise InputError(
                f"mask {number} of {len(checked)} is {mask.dtype} of shape {mask.shape}, expected bool of the image's "
                f"shape {size}, height and width"
            )
        if not mask.any():
            raise InputError(f"mask {number} of {len(checked)} has no pixel")
    return np.stack(checked).astype(np.bool_) if checked else np.zeros((0, *size), np.bool_)


def box_of_mask(mask: NDArray[np.bool_]) -> NDArray[np.float32]:
    """float32 (4,): the box around the pixels of a mask (h, w) that has some."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], np.float32)


def _prompt(prompt: Any, number: int, size: tuple[int, int]) -> NDArray[np.float32]:
    """float32 (k, 3): x, y and label of each point of a prompt."""
    try:
        values = np.asarray(prompt, np.float32)
    except (TypeError, ValueError):
        values = np.zeros(0, np.float32)
    if values.shape == (2,):
        values = np.array([[*values, 1]], np.float32)
    if values.ndim != 2 or values.shape[1] != 3 or not len(values):
        raise InputError(f"point {number} is {prompt!r}, expected {_POINTS}")
    inside = (values[:, :2] >= 0).all(axis=1) & (values[:, :2] <= size[::-1]).all(axis=1)
    if not inside.all() or not np.isin(values[:, 2], (0, 1)).all():
        raise InputError(
            f"point {number} is {values.tolist()}, expected {_POINTS}, in an image that is {size[1]} wide and "
            f"{size[0]} high"
        )
    return values
