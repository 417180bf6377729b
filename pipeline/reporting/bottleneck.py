"""The slowest stage of an extraction, with advice.

Stages are timed in the thread that drives the encoders: the stage it waits for longest is the one that limits
throughput. If the encoders never wait, the device is the limit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

_MIN_SHARE = 0.3  # if no stage took this share of the time, no stage is the bottleneck

_ADVICE = {
    "decode": "images are decoded too slowly: increase --decode-threads ({threads} on {cores} cores), move the images "
    "to a faster or nearer disk, or run the same command on more machines, which share the cache",
    "encode": "the encoders are the limit, as intended: {half}more GPUs (--scheduler local), or the same command on "
    "more machines",
    "encode on a CPU": "the encoders run on a CPU: a GPU is much faster (--device cuda); without a GPU, {half}the same "
    "command on more machines",
    "tokens": "the token decoder is the limit: {regions:.0f} boxes per image; use fewer boxes (a higher score in "
    "--boxes), a GPU (--device cuda), or the same command on more machines",
    "write": "the cache's disk is too slow: halve the bytes with --encoding int8 --token-encoding int8, or use a "
    "faster or nearer disk; `regionspot doctor --cache PATH` measures its write throughput",
    "wait": "other runs held the remaining parts: smaller parts (--part-size, for a new cache) finish more evenly; if "
    "those runs are dead, --take-over processes their parts at once",
}
_HALF = "--dtype bfloat16 instead of float32 (needs a new cache), "


@dataclass(frozen=True)
class Bottleneck:
    """The stage with the largest share of the time (0 to 1), and what to change."""

    stage: str
    share: float
    advice: str


def find_bottleneck(
    shares: Mapping[str, float],
    *,
    device: str,
    regions_per_image: float,
    decode_threads: int,
    cores: int,
    half_is_faster: bool = False,
) -> Bottleneck | None:
    """The bottleneck of a run; None if no stage stands out, as in a run of a few images.

    shares          each stage's share of the run's time, 0 to 1
    device          of the encoders: "cpu", "cuda", "cuda:1"
    half_is_faster  the encoders compute in float32 on a device that is faster in bfloat16
    """
    stage = max(shares, key=shares.__getitem__, default="")
    if not stage or shares[stage] < _MIN_SHARE:
        return None
    on_cpu = stage == "encode" and device.startswith("cpu")
    template = _ADVICE.get("encode on a CPU" if on_cpu else stage, "")
    half = (f"{_HALF}or " if on_cpu else _HALF) if half_is_faster else ""
    advice = template.format(threads=decode_threads, cores=cores, regions=regions_per_image, half=half)
    return Bottleneck(stage, shares[stage], advice)
