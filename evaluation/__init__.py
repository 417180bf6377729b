"""Inference end to end from a picture and boxes, LVIS AP, labelled pictures."""

from regionspot.evaluation.region_spot import Region, RegionSpot

__all__ = ["Region", "RegionSpot"]
