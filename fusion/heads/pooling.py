"""Boxes on a feature map: the mean of the map under a box, or under each cell of a grid in the box.

The mean is over the area: a patch counts by the share of the box that it covers, so a box smaller than a patch has the
values of that patch and no box is without values.

B images, R regions (padded), T feature map tokens, D width, G cells on a side of the grid, S patches on a side
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from regionspot.cache.errors import InputError

SMALLEST = 1e-4  # of the image: the least width and height of a box, far below a patch. Padding has none


def relative_boxes(boxes_xyxy: NDArray[Any], heights: ArrayLike, widths: ArrayLike) -> NDArray[np.float32]:
    """float32 (..., R, 4): boxes in pixels divided by the size of their image; heights and widths are (...)."""
    sizes = np.stack([widths, heights, widths, heights], axis=-1)
    relative: NDArray[np.float32] = (boxes_xyxy / sizes[..., None, :]).astype(np.float32)
    return relative


def pool_boxes(feature_map: Tensor, boxes: Tensor, grid: int = 1) -> Tensor:
    """The mean of the map (B, T, D) in each cell of each box (B, R, 4): (B, R, G * G, D), cells in row-major order.

    Boxes are relative to the image, as `relative_boxes` returns them. Raises InputError if the map is not square.
    """
    patches = feature_map[:, 1:]  # the first is the class token
    weights = box_weights(boxes, map_side(feature_map), grid)
    images, regions, cells, _ = weights.shape
    pooled = weights.reshape(images, regions * cells, -1).to(patches.dtype) @ patches
    return pooled.reshape(images, regions, cells, -1)


def map_side(feature_map: Tensor) -> int:
    """S of a map (B, T, D). Raises InputError if it is not square."""
    patches = feature_map.shape[1] - 1
    side: int = round(patches**0.5)  # torch.compile cannot trace math.isqrt
    if side * side != patches:
        raise InputError(f"the feature map has {patches} patches, which is no square; use a head that needs no boxes")
    return side


def box_weights(boxes: Tensor, side: int, grid: int = 1) -> Tensor:
    """float32 (B, R, G * G, S * S), rows adding up to 1: the share of each cell of each box in each patch."""
    x, y = (_axis_weights(boxes[..., axis].float(), boxes[..., axis + 2].float(), side, grid) for axis in (0, 1))
    return (y[..., :, None, :, None] * x[..., None, :, None, :]).flatten(-4, -3).flatten(-2)


def patch_shares(boxes: Tensor, side: int) -> Tensor:
    """float32 (B, R, S * S): the part of each patch that lies in each box, 0 to 1; of the patches that a box smaller
    than a patch touches, the largest share is 1."""
    weights = box_weights(boxes, side).squeeze(2)
    return weights / weights.amax(dim=-1, keepdim=True)


def _axis_weights(low: Tensor, high: Tensor, side: int, grid: int) -> Tensor:
    """(B, R, G, S) along one axis, from the edges (B, R) of the boxes."""
    low = low.clamp(0, 1 - SMALLEST)[..., None]
    high = torch.maximum(high[..., None], low + SMALLEST).clamp(max=1)
    cells = low + (high - low) * torch.arange(grid + 1, device=low.device) / grid
    edges = torch.arange(side + 1, device=low.device) / side
    starts, ends = cells[..., :-1, None], cells[..., 1:, None]
    overlap = (torch.minimum(ends, edges[1:]) - torch.maximum(starts, edges[:-1])).clamp(min=0)
    return overlap / overlap.sum(dim=-1, keepdim=True)
