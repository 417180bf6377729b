"""Features as a cache stores them, decoded where they are used: what crosses the bus is the stored form, the smallest.

float16, float32   as they are; a head turns them into its own dtype
bfloat16           its bits, read as what they are
int8               code * scale of its row * deviation of its channel + mean of its channel, in float32
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from regionspot.cache.format.encodings import require_statistics
from regionspot.cache.format.schema import FeatureSet


def decode_on_device(
    stored: NDArray[Any], scales: NDArray[np.float16], feature_set: FeatureSet, device: torch.device
) -> Tensor:
    """Features (..., D) on a device, from a batch's arrays: `stored` (..., D) and, for int8, the `scales` (...).

    A copy from page-locked memory may be under way still when this returns. Raises InputError for an int8 set without
    statistics.
    """
    values = torch.from_numpy(stored).to(device, non_blocking=True)
    if feature_set.dtype == "bfloat16":
        return values.view(torch.bfloat16)
    if feature_set.dtype != "int8":
        return values
    statistics = require_statistics(feature_set)
    deviation, mean = (torch.tensor(each, device=device) for each in (statistics.deviation, statistics.mean))
    factors = torch.from_numpy(scales).to(device, non_blocking=True).float().unsqueeze(-1)
    return values.float().mul_(factors).mul_(deviation).add_(mean)
