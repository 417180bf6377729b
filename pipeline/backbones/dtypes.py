"""Choose the dtype in which the image encoders compute. Weights stay float32; autocast rounds the inputs of products.

The dtype changes the features' bytes, so it is chosen only once: "auto" is resolved when a feature set is created, and
written into its provenance. Resuming, retrying, evaluation and prediction read it from there (`stored_dtype`).
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any, Literal

import torch

from regionspot.cache.errors import InputError, unknown_name
from regionspot.cache.machine import cpu_supports

log = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
AUTO = "auto"
Kind = Literal["localizer", "encoder"]


def stored_dtype(provenance: Mapping[str, Any]) -> str:
    """The dtype (a name in DTYPES) in the provenance of features; "auto" if it has none.

    Imported tokens have none, and backbones of other packages may have none.
    """
    dtype = provenance.get("dtype")
    return dtype if isinstance(dtype, str) and dtype in DTYPES else AUTO


def resolve_dtype(requested: str, device: str | torch.device, kind: Kind) -> str:
    """Resolve a dtype name or "auto" to a name in DTYPES that the device supports.

    Warns once if the CPU has to emulate the dtype. Raises InputError for an unknown name and an unsupported dtype.
    """
    place = torch.device(device)
    if requested == AUTO:
        return auto_dtype(place, kind)
    if requested not in DTYPES:
        raise unknown_name("dtype", requested, (AUTO, *DTYPES))
    if requested == "bfloat16" and place.type == "cuda" and not gpu_has_bfloat16(place):
        major, minor = torch.cuda.get_device_capability(place)
        raise InputError(
            f"dtype bfloat16: {place} has compute capability {major}.{minor}, bfloat16 needs 8.0 or later; use such a "
            "GPU, --device cpu, or another --dtype with its own cache"
        )
    if requested != "float32" and not torch.amp.is_autocast_available(place.type):
        raise InputError(f"dtype {requested}: torch does not compute in it on {place.type}; use float32")
    if place.type == "cpu" and not cpu_supports(requested):
        _warn_of_emulation(requested)
    return requested


def auto_dtype(device: torch.device, kind: Kind) -> str:
    """The default dtype of a device.

    float32 on every CPU, so that a cache does not depend on which machine created it. On a GPU bfloat16 for SAM, about
    as precise there as float16 and without overflow, and float16 for CLIP, where bfloat16's error is eight times as
    large (benchmarks/results/extract.md).
    """
    if device.type != "cuda":
        return "float32"
    return "bfloat16" if kind == "localizer" and gpu_has_bfloat16(device) else "float16"


def gpu_has_bfloat16(device: torch.device) -> bool:
    """Whether the tensor cores support bfloat16: compute capability 8.0 or later (CUDA C++ Programming Guide).

    Older GPUs can store bfloat16, but cuBLAS and the attention kernels refuse it.
    """
    return torch.cuda.get_device_capability(device) >= (8, 0)


@cache
def _warn_of_emulation(dtype: str) -> None:
    log.warning("this CPU has no instructions for %s and emulates it, slower than float32", dtype)


def half_is_faster(dtypes: Iterable[str], device: torch.device) -> bool:
    """Whether one of these dtypes is float32 on a device that is faster in bfloat16."""
    can = gpu_has_bfloat16(device) if device.type == "cuda" else device.type == "cpu" and cpu_supports("bfloat16")
    return can and "float32" in dtypes


def autocast(device: torch.device, dtype: str) -> torch.autocast:
    """An autocast context for `dtype`; disabled for float32."""
    return torch.autocast(device.type, DTYPES[dtype], enabled=dtype != "float32")
