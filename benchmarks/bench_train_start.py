"""From the start of a process to its first training step, and its peak memory, by the number of images in the cache.

python -m benchmarks.bench_train_start CACHE PRESET RUN_FOLDER    # one training step; times and memory as JSON
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.goals import say


@dataclass(frozen=True)
class Start:
    """Seconds since the process started: all modules imported, the cache opened, the first step begun.

    megabytes   peak of resident memory, after one step and its checkpoint
    """

    imported: float
    opened: float
    first_step: float
    megabytes: float


def measure_start(cache: Path, preset: str, run_folder: Path) -> Start:
    """Train one step in a new process."""
    say(f"start of a run on {cache.name}")
    started = time.time()
    command = [sys.executable, "-m", "benchmarks.bench_train_start", str(cache), preset, str(run_folder)]
    measured = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    times = {name: measured[name] - started for name in ("imported", "opened", "first_step")}
    return Start(**times, megabytes=measured["megabytes"])


def _train_one_step(path: str, preset: str, run_folder: str) -> dict[str, float]:
    from torch.nn.modules.module import register_module_forward_pre_hook

    from benchmarks.bench_train_data import TrainingData
    from regionspot.cache import FeatureCache
    from regionspot.fusion.training.config import TrainConfig
    from regionspot.fusion.training.train import train

    times = {"imported": time.time()}
    cache = FeatureCache.open(path)
    times["opened"] = time.time()

    def note(module: Any, inputs: Any) -> None:
        times.setdefault("first_step", time.time())

    register_module_forward_pre_hook(note)
    vocabulary = TrainingData(preset, len(cache)).vocabulary()
    train([cache], [vocabulary], Path(run_folder), TrainConfig(iterations=1, warmup=0))
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    # Not getrusage: a new process starts with the peak of the one that started it.
    return {**times, "megabytes": int(status["VmHWM"].split()[0]) / 1024}


if __name__ == "__main__":
    print(json.dumps(_train_one_step(*sys.argv[1:])))
