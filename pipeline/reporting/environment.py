"""The environment that a run's speed and numbers depend on: machine, package versions, models and their weights."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from regionspot.cache.format.schema import FeatureSet
from regionspot.cache.machine import processors
from regionspot.cache.store import FeatureCache

if TYPE_CHECKING:
    from regionspot.pipeline.backbones.bundle import Backbones

# Packages that decide pixels, features or bytes.
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


@dataclass(frozen=True)
class Environment:
    """The environment of a run; of a distributed run, that of its first worker.

    models          feature set name to the origin and SHA-256 of its model's weights
    device          of the models: "cpu", "cuda", "cuda:1"
    half_is_faster  the models compute in float32 on a device that is faster in bfloat16
    """

    machine: dict[str, str | int]
    versions: dict[str, str]
    models: dict[str, str]
    device: str
    half_is_faster: bool
    decode_threads: int

    @classmethod
    def of_process(cls, cache: FeatureCache, backbones: Backbones, decode_threads: int) -> Environment:
        """The environment of this process."""
        models = {name: weights_text(feature_set) for name, feature_set in cache.feature_sets.items()}
        return cls(machine(), versions(), models, str(backbones.device), backbones.half_is_faster, decode_threads)


def weights_text(feature_set: FeatureSet) -> str:
    """Origin and SHA-256 of the weights, from the feature set's provenance."""
    provenance = feature_set.provenance
    return f"{provenance.get('weights_origin')}, SHA-256 {str(provenance.get('weights_sha256'))[:12]}"


def machine() -> dict[str, str | int]:
    """CPU model, cores available to this process, memory, GPUs, operating system; no host name."""
    return {
        "cpu": _cpu_model(),
        "cores": processors(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9),
        "gpu": gpu_names() or "none",
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }


def gpu_names() -> str:
    """The GPUs that torch can use, such as "2 x NVIDIA H200"; "" without a GPU."""
    import torch  # takes a second, and callers that need only versions do not pay it

    names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))


def versions(packages: Iterable[str] = PACKAGES) -> dict[str, str]:
    """Installed versions by package name; packages that are not installed are left out."""
    installed = {}
    for name in packages:
        try:
            installed[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return installed


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return platform.processor() or platform.machine()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
