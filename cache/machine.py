"""What this process may use of the machine that it runs on."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from regionspot.cache.errors import InputError

if TYPE_CHECKING:
    import torch

_MEMINFO, _OWN_GROUPS, _GROUPS = Path("/proc/meminfo"), Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def processors() -> int:
    """Processors that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def available_memory() -> int:
    """Bytes that can be had without swapping, and no more than the control groups that this process is in allow."""
    said = re.search(r"^MemAvailable:\s+(\d+) kB", _read(_MEMINFO), re.MULTILINE)
    # Without /proc all that the machine has: better than a guess.
    free = int(said[1]) * 1024 if said else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([free, *_group_limits()])


def compute_device(asked: str | None = None) -> torch.device:
    """The device to compute on: "cpu", "cuda", "cuda:1", ...; None: a GPU where there is one, else the CPU.

    Raises InputError for a name that torch does not know, and for a device that does not compute on this machine.
    """
    import torch  # takes seconds, and this package is used without

    if asked is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(asked)
    except RuntimeError:
        raise InputError(f"--device {asked}: torch knows no such device; expected cpu, cuda or cuda:1") from None
    count = torch.cuda.device_count() if device.type == "cuda" else 0
    if device.type == "cuda" and (not count or not torch.cuda.is_available()):
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        raise InputError(
            f"--device {asked}: this torch sees no CUDA device (torch {torch.__version__}, {built}); see what "
            "`nvidia-smi` and `regionspot doctor` say, or take --device cpu"
        )
    if device.type == "cuda" and (device.index or 0) >= count:
        raise InputError(f"--device {asked}: there is none; this torch sees cuda:0 to cuda:{count - 1}")
    try:
        torch.ones(1, device=device).sum().item()
    except (RuntimeError, AssertionError, ImportError):
        raise InputError(
            f"--device {asked}: this torch cannot compute on it here; expected cpu, cuda or cuda:1"
        ) from None
    return device


def _group_limits() -> Iterator[int]:
    """Memory limits of this process's groups and of all that these are in."""
    for line in _read(_OWN_GROUPS).splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:  # version 2
            top, name = _GROUPS, "memory.max"
        elif "memory" in controllers.split(","):
            top, name = _GROUPS / "memory", "memory.limit_in_bytes"
        else:
            continue
        group = top / path.strip("/")
        # In a container the path may be the host's, of which only the top is to be seen here.
        for folder in (group, *group.parents):
            limit = _read(folder / name).strip()
            if folder.is_relative_to(top) and limit.isdigit():  # without one it says "max"
                yield int(limit)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
