"""What a frozen encoder's map of one image tells apart, as colours: no head and no attention has touched it."""

# g x g patches row by row, D width

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

FAINTEST = 0.02  # a component that moves less than this share of the first is rounding, and stretched would be noise
CLIPPED = 2  # percent of the patches at either end: one odd patch must not take all the contrast


def pca_colours(patches: NDArray[np.float32]) -> tuple[NDArray[np.uint8], float]:
    """RGB uint8 (g, g, 3) of patches (g, g, D), equal ones in equal colours, and the share of variance it shows.

    The components are those of these patches alone. Each channel is one of them, from dark to bright between its
    outermost `CLIPPED` percent; a component's sign is that of its largest weight, so that it comes out alike again.
    """
    flat = patches.reshape(-1, patches.shape[-1]).astype(np.float64)
    flat -= flat.mean(axis=0)
    along, lengths, axes = np.linalg.svd(flat, full_matrices=False)
    shown = min(3, int((lengths > FAINTEST * lengths[0]).sum()))
    signs = np.sign(axes[np.arange(shown), np.abs(axes[:shown]).argmax(axis=1)])
    values = np.zeros((len(flat), 3))
    values[:, :shown] = along[:, :shown] * lengths[:shown] * signs
    colours = np.round(255 * stretched(values)).astype(np.uint8).reshape(*patches.shape[:2], 3)
    return colours, float((lengths[:shown] ** 2).sum() / max((lengths**2).sum(), 1e-12))


def box_likeness(patches: NDArray[np.float32], box_xyxy: NDArray[np.float32]) -> NDArray[np.float32]:
    """float32 (g, g): cosine of each patch (g, g, D) and the mean of those that a box covers.

    The box is in shares of the image, 0 to 1; a patch that it covers in part counts in part.
    """
    weights = _cover(box_xyxy[1::2], len(patches))[:, None] * _cover(box_xyxy[0::2], len(patches))
    mean = np.einsum("yx,yxd->d", weights, patches)
    lengths = np.linalg.norm(patches, axis=-1) * np.linalg.norm(mean)
    likeness: NDArray[np.float32] = (patches @ mean / np.maximum(lengths, 1e-12)).astype(np.float32)
    return likeness


def _cover(span: NDArray[np.float32], cells: int) -> NDArray[np.float64]:
    """float64 (cells,): the share of each cell of a row that lies in `span`, at least a sliver of one."""
    first = min(float(span[0]) * cells, cells - 1e-3)
    last = max(float(span[1]) * cells, first + 1e-3)
    edges = np.arange(cells)
    covered: NDArray[np.float64] = np.clip(np.minimum(edges + 1, last) - np.maximum(edges, first), 0, None)
    return covered


def stretched(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Values (n, C) from 0 to 1 in each column, its outermost percents clipped; 0.5 where they are all equal."""
    low, high = np.percentile(values, [CLIPPED, 100 - CLIPPED], axis=0)
    wide = high - low
    even = wide < 1e-9
    spread: NDArray[np.float64] = np.where(even, 0.5, np.clip((values - low) / np.where(even, 1, wide), 0, 1))
    return spread
