"""What a run's speed and numbers depend on beside the code: machine, installed versions, models and where they are."""

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


@dataclass(frozen=True)
class Environment:
    """Where a run is at work; of a run by workers, where the first of them is.

    models          name and origin of the weights of each feature set's model
    device          of the models: "cpu", "cuda", "cuda:1"
    half_is_faster  they compute in float32, and the device is faster in bfloat16
    """

    machine: dict[str, str | int]
    versions: dict[str, str]
    models: dict[str, str]
    device: str
    half_is_faster: bool
    decode_threads: int

    @classmethod
    def here(cls, cache: FeatureCache, backbones: Backbones, decode_threads: int | None) -> Environment:
        """That of this process; `decode_threads` as they were asked for."""
        from regionspot.pipeline.extraction.decode_ahead import default_threads  # imports torch

        models = {name: weights_of(each) for name, each in cache.feature_sets.items()}
        threads = decode_threads or default_threads()
        return cls(machine(), versions(), models, str(backbones.device), backbones.half_is_faster, threads)


def weights_of(feature_set: FeatureSet) -> str:
    """Where a model's weights are from and which they are, as its provenance says."""
    provenance = feature_set.provenance
    return f"{provenance.get('weights_origin')}, SHA-256 {str(provenance.get('weights_sha256'))[:12]}"


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
