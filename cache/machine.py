"""The machine that this process runs on: processors, memory, compute device, and the folder for downloads."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regionspot.cache.errors import InputError

if TYPE_CHECKING:
    import torch

_MEMINFO, _OWN_CGROUPS, _CGROUPS = Path("/proc/meminfo"), Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
# Instruction sets that multiply a dtype, by the keys of torch.cpu.get_capabilities; the last of each is ARM's.
_CPU_INSTRUCTIONS = {
    "bfloat16": ("avx512_bf16", "amx_bf16", "bf16"),
    "float16": ("avx512_fp16", "amx_fp16", "fp16_arith"),
}


def processors() -> int:
    """Number of processors that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def available_memory() -> int:
    """Bytes available without swapping, limited by this process's control groups."""
    match = re.search(r"^MemAvailable:\s+(\d+) kB", _read(_MEMINFO), re.MULTILINE)
    # Without /proc, all physical memory.
    free = int(match[1]) * 1024 if match else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([free, *_cgroup_limits()])


def home_folder(kind: str) -> Path:
    """The folder `kind` of downloaded or computed files: under `$REGIONSPOT_HOME`, by default ~/.cache/regionspot.

    It may not exist yet.
    """
    return Path(os.environ.get("REGIONSPOT_HOME") or "~/.cache/regionspot").expanduser() / kind


def compute_device(name: str | None = None) -> torch.device:
    """The device "cpu", "cuda", "cuda:1", ...; by default a GPU if there is one, else the CPU.

    Raises InputError for a name that torch does not know, and for a device that does not compute on this machine.
    """
    import torch  # takes seconds to import, and this package works without it

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"--device {name}: torch knows no such device; expected cpu, cuda or cuda:1") from None
    count = torch.cuda.device_count() if device.type == "cuda" else 0
    if device.type == "cuda" and (not count or not torch.cuda.is_available()):
        build = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        raise InputError(
            f"--device {name}: this torch sees no CUDA device (torch {torch.__version__}, {build}); check "
            "`nvidia-smi` and `regionspot doctor`, or use --device cpu"
        )
    if device.type == "cuda" and (device.index or 0) >= count:
        raise InputError(f"--device {name}: does not exist; this torch sees cuda:0 to cuda:{count - 1}")
    try:
        torch.ones(1, device=device).sum().item()
    except (RuntimeError, AssertionError, ImportError):
        raise InputError(
            f"--device {name}: this torch cannot compute on it here; expected cpu, cuda or cuda:1"
        ) from None
    return device


def cpu_supports(dtype: str) -> bool:
    """Whether this CPU has instructions for matrix products in a dtype ("bfloat16", "float16"); without, it is slower.

    REGIONSPOT_CPU_DTYPES, a list such as "float32,bfloat16", overrides the CPU's capabilities for tests.
    """
    if dtype == "float32":
        return True
    if (override := os.environ.get("REGIONSPOT_CPU_DTYPES")) is not None:
        return dtype in override.split(",")
    import torch

    # Before torch 2.7 capabilities are unknown; a superfluous warning is the smaller harm.
    capabilities: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(capabilities.get(name, False) for name in _CPU_INSTRUCTIONS[dtype])


def _cgroup_limits() -> Iterator[int]:
    """Memory limits of this process's control groups and of all their parents."""
    for line in _read(_OWN_CGROUPS).splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:  # version 2
            top, file = _CGROUPS, "memory.max"
        elif "memory" in controllers.split(","):
            top, file = _CGROUPS / "memory", "memory.limit_in_bytes"
        else:
            continue
        group = top / path.strip("/")
        # In a container this may be the host's path, of which only the top is visible here.
        for folder in (group, *group.parents):
            limit = _read(folder / file).strip()
            if folder.is_relative_to(top) and limit.isdigit():  # "max" means no limit
                yield int(limit)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
