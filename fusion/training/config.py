"""The configuration of a training run, the named configurations, and the intervals between checkpoints.

`paper` (stage 1) and `stage2` are the authors' (configs/Base-RegionSpot.yaml and configs/objects365_*.yaml of
Surrey-UP-Lab/RegionSpot): both run 450,000 steps of 16 images, stage 2 on several caches at equal ratios, from the head
of stage 1. `fast` sees the same number of images in batches of 512, with the square root rule for the learning rate of
Adam (Malladi et al. 2022, "On the SDEs and scaling rules for adaptive gradient algorithms").

Milestones are fractions of the run, not steps, so a run of another length keeps the shape of its schedule. A lengthened
run uses the learning rates of the longer run from then on; if it was stopped before its first milestone, its numbers
equal those of a run that had the longer length from the start.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from regionspot.cache.errors import InputError, unknown_name
from regionspot.fusion.head import HEADS
from regionspot.fusion.training.negatives import Unverified

Precision = Literal["auto", "float32", "bfloat16"]
Padding = Literal["mask", "reference"]

# A checkpoint is saved after this many steps, and after this many seconds since the last one (or since the start). A
# killed run loses the steps since its last checkpoint.
CHECKPOINT_STEPS = VALIDATION_STEPS = 2000
VALIDATIONS = 50  # of a long run, by default: each reads the whole validation cache
CHECKPOINT_SECONDS = 600.0
FIRST_CHECKPOINT_SECONDS = 60.0


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides the numbers of a training run; devices, paths and intervals do not.

    clip_norm      maximum norm of all gradients together, of the loss summed over the images of a batch. The authors
                   clip the mean of 8 GPUs at 1, each with the sum over its 2 images (train_net.py, 8 V100 in the
                   paper); that mean is an eighth of the sum over 16 images
    ratio          share of the batches that each cache gives: "size", by its number of usable images, or "equal"
    max_regions    at most so many regions of an image, a random choice in every epoch; 0: all
    views          "flip": half of the batches are of mirrored images, which `extract --views flip` adds to a cache
    pack           batches of images with similar numbers of regions
    padding        "mask": padding is masked; "reference": regions are repeated in its place, as in the authors' batches
    negatives      classes drawn at each step to be negatives besides those of the batch; 0: all classes
    unverified     classes that were not verified in an image, in caches with such lists (LVIS, OpenImages): "ignored"
                   there, or "negative" like all others, as for the authors
    repeat_threshold  images with a class on less than this share of all images are repeated in an epoch (negatives.py);
                   0: none
    milestones     fractions of the run after which the learning rate is multiplied by `decay`
    warmup         steps over which the learning rate rises linearly from `warmup_factor` of itself; at most a tenth of
                   the run
    head           a type of fusion/heads, or the user's own `file.py:Class` or `package.module:Class`
    head_options   arguments of its class
    layers .. dropout  of the fusion and the guided head; its other shapes follow from the features and the vocabulary
    precision      of the head's forward pass: "auto" is bfloat16 on a GPU and float32 elsewhere; weights, logits and
                   loss are always float32

    Raises InputError for invalid values.
    """

    lr: float = 2.5e-5
    weight_decay: float = 1e-4
    clip_norm: float = 8.0
    batch_size: int = 16
    iterations: int = 450_000
    ratio: Literal["size", "equal"] = "size"
    max_regions: int = 0
    views: Literal["flip"] | None = None
    pack: bool = False
    padding: Padding = "mask"
    negatives: int = 0
    unverified: Unverified = "ignored"
    repeat_threshold: float = 0.0
    milestones: tuple[float, ...] = (7 / 9, 14 / 15)  # 350,000 and 420,000 of 450,000
    decay: float = 0.1
    warmup: int = 1000
    warmup_factor: float = 0.01
    head: str = "fusion"
    head_options: Mapping[str, Any] = field(default_factory=dict)
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
        for name in ("weight_decay", "warmup", "dropout", "seed", "max_regions", "negatives", "repeat_threshold"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"training: {name} is {getattr(self, name)}, expected 0 or more and finite")
        if self.seed >= 2**32:  # the seed of a step is a million times larger and must fit into torch's 64 bits
            raise InputError(f"training: seed is {self.seed}, expected less than {2**32}")
        if not self.dropout < 1:
            raise InputError(f"training: dropout is {self.dropout}, expected less than 1")
        milestones = self.milestones
        if any(not 0 < fraction <= 1 for fraction in milestones) or list(milestones) != sorted(milestones):
            raise InputError(f"training: milestones are {milestones}, expected rising fractions of the run, 0 to 1")
        if not self.repeat_threshold < 1:
            raise InputError(f"training: repeat_threshold is {self.repeat_threshold}, expected a share less than 1")
        for name, choices in (("precision", Precision), ("padding", Padding), ("unverified", Unverified)):
            if getattr(self, name) not in get_args(choices):
                expected = " or ".join(get_args(choices))
                raise InputError(f"training: {name} is {getattr(self, name)!r}, expected {expected}")

    @property
    def milestone_steps(self) -> tuple[int, ...]:
        """The first step of each lower learning rate."""
        return tuple(round(fraction * self.iterations) for fraction in self.milestones)

    @property
    def warmup_steps(self) -> int:
        return min(self.warmup, self.iterations // 10)

    def learning_rate(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        lr = self.lr * self.decay ** sum(step >= milestone for milestone in self.milestone_steps)
        if step < self.warmup_steps:
            lr *= self.warmup_factor + (1 - self.warmup_factor) * step / self.warmup_steps
        return lr


FAST_BATCH = 512

TRAIN_PRESETS = {
    "paper": TrainConfig(),
    "stage2": TrainConfig(ratio="equal"),
    "fast": TrainConfig(
        lr=TrainConfig.lr * math.sqrt(FAST_BATCH / TrainConfig.batch_size),
        clip_norm=TrainConfig.clip_norm * FAST_BATCH / TrainConfig.batch_size,
        batch_size=FAST_BATCH,
        iterations=TrainConfig.iterations * TrainConfig.batch_size // FAST_BATCH,
        ratio="equal",
        max_regions=100,
        pack=True,
    ),
    # One or two minutes on two cores. Halved at each milestone, the learning rate approximates a cosine schedule.
    "toy": TrainConfig(
        lr=1e-3,
        clip_norm=1.0,
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
    """The configuration `preset`, with the fields of `overrides` that are not None replaced.

    Raises InputError for an unknown preset and for invalid values.
    """
    if preset not in TRAIN_PRESETS:
        raise unknown_name("schedule", preset, TRAIN_PRESETS)
    return replace(TRAIN_PRESETS[preset], **{name: value for name, value in overrides.items() if value is not None})
