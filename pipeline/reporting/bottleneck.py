"""Which stage sets the pace of an extraction, and what to change about it.

Stages are timed where the thread that drives the encoders stands: what it waits for longest is what the run would gain
most from. A pipeline whose encoders are never kept waiting is as fast as its device.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

# Below this the driving thread did nothing of what is timed for most of the time: no advice would be honest.
_LEAST_SHARE = 0.3

_ADVICE = {
    "decode": "images come too slowly: give more --decode-threads ({threads} on {cores} cores), put them on a "
    "faster or nearer disk, or share the cache with further machines: start the same command on each",
    "encode": "the encoders are the limit, as they should be: {half}more GPUs (--scheduler local), or the same command "
    "on further machines",
    "encode on a CPU": "the encoders run on a CPU: a GPU is far faster (--device cuda); without one, {half}the same "
    "command on further machines",
    "tokens": "the token decoder is the limit: {regions:.0f} boxes an image; fewer boxes (a higher score in --boxes), "
    "a GPU (--device cuda), or the same command on further machines",
    "write": "the cache's disk is too slow: half the bytes with --encoding int8 --token-encoding int8, a faster or "
    "nearer disk; `regionspot doctor --cache PATH` measures its write rate",
    "wait": "other runs held the parts that were left: smaller parts (--part-size, for a new cache) end more evenly; "
    "if those runs are known to be gone, --take-over does their parts at once",
}
# A cache keeps the dtype that it was made in.
_HALF = "--dtype bfloat16 in place of float32 (for a new cache), "


@dataclass(frozen=True)
class Bottleneck:
    """The stage that took the largest share of the time, 0 to 1, and what to change."""

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
    """The bottleneck of a run with these shares; None where no stage stands out, as in a run of a few images.

    shares          each stage's share of the run's time, 0 to 1
    device          of the encoders: "cpu", "cuda", "cuda:1"
    half_is_faster  they compute in float32, and the device is faster in bfloat16
    """
    stage = max(shares, key=shares.__getitem__, default="")
    if not stage or shares[stage] < _LEAST_SHARE:
        return None
    on_cpu = stage == "encode" and device.startswith("cpu")
    words = _ADVICE.get("encode on a CPU" if on_cpu else stage, "")
    half = (f"{_HALF}or " if on_cpu else _HALF) if half_is_faster else ""
    advice = words.format(threads=decode_threads, cores=cores, regions=regions_per_image, half=half)
    return Bottleneck(stage, shares[stage], advice)
