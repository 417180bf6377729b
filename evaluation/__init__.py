"""Inference end to end from an image and boxes, LVIS AP, labelled images.

RegionSpot is imported on first access, so that importing this package for LVIS AP alone does not load torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from regionspot.evaluation.inference.naming import threshold_at_precision
    from regionspot.evaluation.inference.region_spot import RegionSpot
    from regionspot.evaluation.inference.regions import Region, Regions

# The module of each name.
_MODULES = {
    "Region": "regions",
    "RegionSpot": "region_spot",
    "Regions": "regions",
    "threshold_at_precision": "naming",
}
__all__ = ["Region", "RegionSpot", "Regions", "threshold_at_precision"]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.inference.{_MODULES[name]}"), name)
