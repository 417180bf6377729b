"""What the image encoders may compute in. Weights stay float32; autocast rounds on the way into each product."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch

from regionspot.cache.errors import unknown_name

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
AUTO = "auto"

Kind = Literal["localizer", "encoder"]


def check_dtype(dtype: str) -> str:
    """The name itself. Raises InputError for one that is not in DTYPES."""
    if dtype not in DTYPES:
        raise unknown_name("dtype", dtype, (AUTO, *DTYPES))
    return dtype


def resolve_dtype(asked: str, device: str | torch.device, kind: Kind) -> str:
    """The name in DTYPES that `asked` means on this device; "auto" is the fastest that costs no accuracy to speak of.

    On a GPU that is bfloat16 for SAM, about as near as float16 there and never out of range, and float16 for CLIP,
    where bfloat16 is eight times as far off. On a CPU it is bfloat16 where there are instructions for it: emulated, it
    takes four times as long as float32, which is what every other device gets. Errors: benchmarks/results/extract.md.

    Raises InputError for a name that is neither "auto" nor in DTYPES.
    """
    if asked != AUTO:
        return check_dtype(asked)
    place = torch.device(device)
    if place.type == "cuda":
        return "bfloat16" if kind == "localizer" and gpu_has_bfloat16(place) else "float16"
    return "bfloat16" if place.type == "cpu" and cpu_has_bfloat16() else "float32"


def gpu_has_bfloat16(device: torch.device) -> bool:
    """Whether its tensor cores multiply bfloat16: from compute capability 8.0 on (CUDA C++ Programming Guide)."""
    return torch.cuda.get_device_capability(device) >= (8, 0)


def cpu_has_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16: AVX512-BF16 or AMX on x86, the BF16 extension on ARM."""
    # A torch that cannot say what its CPU has computes in float32, which is never wrong.
    found: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(found.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def autocast(device: torch.device, dtype: str) -> torch.autocast:
    """A context in which products are computed in `dtype`; for float32 one that changes nothing."""
    return torch.autocast(device.type, DTYPES[dtype], enabled=dtype != "float32")
