"""Inference end to end from an image and boxes, LVIS AP, labelled images.

RegionSpot is imported on first access, so that importing this package for LVIS AP alone does not load torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from regionspot.evaluation.inference.region_spot import Region, RegionSpot

__all__ = ["Region", "RegionSpot"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from regionspot.evaluation.inference import region_spot

    return getattr(region_spot, name)
