"""What a device can do: calls a second of some work, and operations a second of one large product."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch


def matrix_rate(side: int, device: torch.device, seconds: float) -> float:
    """Operations a second of a bfloat16 product of `side` x `side`."""
    one, other = torch.randn(2, side, side, device=device, dtype=torch.bfloat16)
    return rate_of(lambda: one @ other, device, seconds) * 2 * side**3


def rate_of(work: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Calls a second, after two that are not counted; none waits for the one before it."""
    for _ in range(2):
        work()
    wait(device)
    calls, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        for _ in range(4):  # so that the device, not this loop, sets the pace
            work()
        calls += 4
        wait(device)
    return calls / (time.perf_counter() - started)


def wait(device: torch.device) -> None:
    """Until the device has done all that was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
