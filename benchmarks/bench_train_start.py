"""From the start of a process to its first training step, and its peak memory, by the number of images in the cache.

python -m benchmarks.bench_train_start CACHE PRESET RUN_FOLDER    # one training step; times and memory as JSON
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.goals import say

_MEMORY = {"peak": "VmHWM", "mapped": "RssFile"}  # lines of /proc/self/status


@dataclass(frozen=True)
class Start:
    """Seconds since the process started: all modules imported, the cache opened, the first step begun.

    peak, mapped    MB of resident memory after one step and its checkpoint: the peak, and mapped files, which the
                    kernel may drop at any time
    in_use          MB, the peak without mapped files where malloc returns freed memory to the system
    """

    imported: float
    opened: float
    first_step: float
    peak: float
    mapped: float
    in_use: float


def measure_start(cache: Path, preset: str, run_folder: Path) -> Start:
    """Train one step in each of two new processes, the second one for its memory in use."""
    say(f"start of a run on {cache.name}")
    started = time.time()
    first = _run(cache, preset, run_folder / "first", {})
    second = _run(cache, preset, run_folder / "second", {"MALLOC_TRIM_THRESHOLD_": str(1 << 20)})
    times = {name: first[name] - started for name in ("imported", "opened", "first_step")}
    return Start(**times, peak=first["peak"], mapped=first["mapped"], in_use=second["peak"] - second["mapped"])


def _run(cache: Path, preset: str, run_folder: Path, environment: dict[str, str]) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.bench_train_start", str(cache), preset, str(run_folder)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, env={**os.environ, **environment}).stdout
    measured: dict[str, float] = json.loads(output)
    return measured


def _train_one_step(path: str, preset: str, run_folder: str) -> dict[str, float]:
    from torch.nn.modules.module import register_module_forward_pre_hook

    from benchmarks.bench_train_data import TrainingData
    from regionspot.cache import FeatureCache
    from regionspot.fusion.training.config import TrainConfig
    from regionspot.fusion.training.train import train

    times = {"imported": time.time()}
    cache = FeatureCache.open(path, manifest_on_disk=True)
    times["opened"] = time.time()

    def note(module: Any, inputs: Any) -> None:
        times.setdefault("first_step", time.time())

    register_module_forward_pre_hook(note)
    vocabulary = TrainingData(preset, len(cache)).vocabulary()
    train([cache], [vocabulary], Path(run_folder), TrainConfig(iterations=1, warmup=0))
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    # Not getrusage: a new process starts with the peak of the one that started it.
    return {**times, **{name: int(status[key].split()[0]) / 1024 for name, key in _MEMORY.items()}}


if __name__ == "__main__":
    print(json.dumps(_train_one_step(*sys.argv[1:])))
