"""What a run's speed and numbers depend on beside the code: the machine, and the versions of what is installed."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

from regionspot.cache.machine import processors

# Those that decide the pixels, the features and the bytes.
PACKAGES = (
    "regionspot",
    "torch",
    "torchvision",
    "segment-anything",
    "open_clip_torch",
    "numpy",
    "pillow",
    "simplejpeg",
    "zarr",
)


def machine() -> dict[str, str | int]:
    """Processor, cores that this process may use, memory, GPUs, system; nothing that names a particular host."""
    return {
        "cpu": _cpu(),
        "cores": processors(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9),
        "gpu": gpus() or "none",
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }


def gpus() -> str:
    """The GPUs that torch may use, as in "2 x NVIDIA H200"; "" where there is none."""
    import torch  # takes a second; who only wants versions need not wait

    names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))


def versions(packages: Iterable[str] = PACKAGES) -> dict[str, str]:
    """Installed versions by the packages' own names; those that are not installed are left out."""
    found = {}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return platform.processor() or platform.machine()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
