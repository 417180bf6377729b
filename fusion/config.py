"""What decides a training run's numbers, the named configurations, and when a run saves.

`paper` is the authors' (configs/Base-RegionSpot.yaml and configs/objects365_*.yaml of Surrey-UP-Lab/RegionSpot).
Milestones are shares of the run and not steps, so a run of another length keeps the shape of its schedule. A run that
is lengthened has the learning rates of the longer run from then on: where it was stopped before its first milestone,
its numbers are those of a run that was that long from the start.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

from regionspot.cache.errors import InputError, unknown_name
from regionspot.fusion.head import HEADS

Precision = Literal["auto", "float32", "bfloat16"]

# A run saves after so many steps, and when so many seconds have passed since it saved or, the first time, began: a
# killed run loses what it did since then.
CHECKPOINT_STEPS = 2000
CHECKPOINT_SECONDS = 600.0
FIRST_CHECKPOINT_SECONDS = 60.0


@dataclass(frozen=True)
class TrainConfig:
    """One training run. Field by field what decides its numbers; devices, paths and intervals are no part of it.

    clip_norm      largest norm of all gradients together
    milestones     shares of the run after which the rate is multiplied by `decay`
    warmup         steps over which the rate rises linearly from `warmup_factor` of itself; at most a tenth of the run
    layers .. dropout  of the head; its other shapes follow from the features and the vocabulary
    precision      of the head's forward pass: "auto" is bfloat16 on a GPU and float32 elsewhere; weights, logits and
                   loss are float32 always

    Raises InputError for values that cannot train.
    """

    lr: float = 2.5e-5
    weight_decay: float = 1e-4
    clip_norm: float = 1.0
    batch_size: int = 16
    iterations: int = 450_000
    milestones: tuple[float, ...] = (7 / 9, 14 / 15)  # 350,000 and 420,000 of 450,000
    decay: float = 0.1
    warmup: int = 1000
    warmup_factor: float = 0.01
    layers: int = 3
    heads: int = 8
    ffn: int = 2048
    dropout: float = 0.1
    precision: Precision = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("iterations", "batch_size", "layers", "heads", "ffn", "lr", "clip_norm"):
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(f"training: {name} is {getattr(self, name)}, expected more than 0 and finite")
        for name in ("weight_decay", "warmup", "dropout", "seed"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"training: {name} is {getattr(self, name)}, expected 0 or more and finite")
        if self.seed >= 2**32:  # a million times as much is still a seed of torch's
            raise InputError(f"training: seed is {self.seed}, expected less than {2**32}")
        if not self.dropout < 1:
            raise InputError(f"training: dropout is {self.dropout}, expected less than 1")
        if any(not 0 < share <= 1 for share in self.milestones) or list(self.milestones) != sorted(self.milestones):
            raise InputError(f"training: milestones are {self.milestones}, expected rising shares of the run, 0 to 1")
        if self.precision not in ("auto", "float32", "bfloat16"):
            raise InputError(f"training: precision is {self.precision!r}, expected auto, float32 or bfloat16")

    @property
    def milestone_steps(self) -> tuple[int, ...]:
        """Steps from which on the rate is lower."""
        return tuple(round(share * self.iterations) for share in self.milestones)

    @property
    def warmup_steps(self) -> int:
        return min(self.warmup, self.iterations // 10)

    def rate(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        rate = self.lr * self.decay ** sum(step >= milestone for milestone in self.milestone_steps)
        if step < self.warmup_steps:
            rate *= self.warmup_factor + (1 - self.warmup_factor) * step / self.warmup_steps
        return rate


TRAIN_PRESETS = {
    "paper": TrainConfig(),
    # A minute or two on two cores. Halved at each milestone, the rate keeps to a cosine within a factor of 1.5.
    "toy": TrainConfig(
        lr=1e-3,
        iterations=1200,
        batch_size=32,
        milestones=(0.36, 0.59, 0.72, 0.81, 0.87, 0.91),
        decay=0.5,
        warmup=100,
        layers=HEADS["toy"].layers,
        heads=HEADS["toy"].heads,
        ffn=HEADS["toy"].ffn,
        dropout=HEADS["toy"].dropout,
    ),
}


def train_config(preset: str, **overrides: Any) -> TrainConfig:
    """The configuration `preset` with those fields replaced that are given and not None.

    Raises InputError for an unknown preset, and for values that cannot train.
    """
    if preset not in TRAIN_PRESETS:
        raise unknown_name("schedule", preset, TRAIN_PRESETS)
    return replace(TRAIN_PRESETS[preset], **{name: value for name, value in overrides.items() if value is not None})
