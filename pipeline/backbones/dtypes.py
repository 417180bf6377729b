"""What the image encoders compute in. Weights stay float32; autocast rounds on the way into each product.

The dtype decides the features' bytes, so it is chosen once: "auto" becomes the name of a dtype where a feature set is
made, that name stands in its provenance, and whoever resumes, retries, evaluates or predicts with these features takes
it from there (`dtype_of`).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any, Literal

import torch

from regionspot.cache.errors import InputError, unknown_name

log = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
AUTO = "auto"
# Any of these instruction sets will do (keys of torch.cpu.get_capabilities; the last of each is ARM's).
CPU_INSTRUCTIONS = {
    "bfloat16": ("avx512_bf16", "amx_bf16", "bf16"),
    "float16": ("avx512_fp16", "amx_fp16", "fp16_arith"),
}

Kind = Literal["localizer", "encoder"]


def dtype_of(provenance: Mapping[str, Any]) -> str:
    """The name in DTYPES that features of this provenance were computed in; "auto" where it states none.

    Imported tokens state none, and neither do backbones of other packages that know no dtypes.
    """
    dtype = provenance.get("dtype")
    return dtype if isinstance(dtype, str) and dtype in DTYPES else AUTO


def resolve_dtype(requested: str, device: str | torch.device, kind: Kind) -> str:
    """The name in DTYPES that `requested` means on this device, which can compute in it.

    A CPU without instructions for a dtype emulates it, and a warning says so once. Raises InputError for a name that is
    neither "auto" nor in DTYPES, and for a dtype that the device cannot compute in.
    """
    place = torch.device(device)
    if requested == AUTO:
        return auto_dtype(place, kind)
    if requested not in DTYPES:
        raise unknown_name("dtype", requested, (AUTO, *DTYPES))
    if requested == "bfloat16" and place.type == "cuda" and not gpu_has_bfloat16(place):
        major, minor = torch.cuda.get_device_capability(place)
        raise InputError(
            f"dtype bfloat16: {place} has compute capability {major}.{minor}, bfloat16 takes 8.0 or later; use such a "
            "GPU, --device cpu, or another --dtype with a cache of its own"
        )
    if requested != "float32" and not torch.amp.is_autocast_available(place.type):
        raise InputError(f"dtype {requested}: torch does not compute in it on {place.type}; use float32")
    if place.type == "cpu" and not cpu_supports(requested):
        _warn_of_emulation(requested)
    return requested


def auto_dtype(device: torch.device, kind: Kind) -> str:
    """What suits a device: float32 on every CPU, so that no cache depends on which of several machines came first.

    On a GPU bfloat16 for SAM, about as near as float16 there and never out of range, and float16 for CLIP, where
    bfloat16 is eight times as far off. Errors: benchmarks/results/extract.md.
    """
    if device.type != "cuda":
        return "float32"
    return "bfloat16" if kind == "localizer" and gpu_has_bfloat16(device) else "float16"


def gpu_has_bfloat16(device: torch.device) -> bool:
    """Whether its tensor cores multiply bfloat16: from compute capability 8.0 on (CUDA C++ Programming Guide).

    Older ones hold bfloat16 numbers, but cuBLAS and the attention kernels refuse to multiply them.
    """
    return torch.cuda.get_device_capability(device) >= (8, 0)


def cpu_supports(dtype: str) -> bool:
    """Whether this CPU has instructions for products in `dtype`. Nothing but speed depends on it.

    REGIONSPOT_CPU_DTYPES, a list such as "float32,bfloat16", stands in for what the CPU says, so that the tests can be
    run as on another machine.
    """
    if dtype == "float32":
        return True
    if (stated := os.environ.get("REGIONSPOT_CPU_DTYPES")) is not None:
        return dtype in stated.split(",")
    # Of a torch that cannot say what its CPU has, nothing is known: a warning too many costs little.
    has: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(has.get(name, False) for name in CPU_INSTRUCTIONS[dtype])


@cache
def _warn_of_emulation(dtype: str) -> None:
    log.warning("this CPU has no instructions for %s and emulates it, slower than float32", dtype)


def half_is_faster(dtypes: Iterable[str], device: torch.device) -> bool:
    """Whether what is computed in one of these dtypes on a device would be done sooner in bfloat16."""
    can = gpu_has_bfloat16(device) if device.type == "cuda" else device.type == "cpu" and cpu_supports("bfloat16")
    return can and "float32" in dtypes


def autocast(device: torch.device, dtype: str) -> torch.autocast:
    """A context in which products are computed in `dtype`; for float32 one that changes nothing."""
    return torch.autocast(device.type, DTYPES[dtype], enabled=dtype != "float32")
