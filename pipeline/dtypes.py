"""What the image encoders may compute in. Weights stay float32; autocast rounds on the way into each product."""

from __future__ import annotations

import torch

from regionspot.cache.errors import InputError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def check_dtype(dtype: str) -> str:
    """The name itself. Raises InputError for one that is not in DTYPES."""
    if dtype not in DTYPES:
        raise InputError(f"dtype {dtype!r}: unknown; expected one of {', '.join(DTYPES)}")
    return dtype


def autocast(device: torch.device, dtype: str) -> torch.autocast:
    """A context in which products are computed in `dtype`; for float32 one that changes nothing."""
    return torch.autocast(device.type, DTYPES[dtype], enabled=dtype != "float32")
