"""`regionspot doctor`: whether this machine can extract, each thing looked at by really doing it once.

    doctor_machine.py   Python, torch, GPUs, allocator, decoders, packages, the metrics' port
    doctor_places.py    the cache's disk and its write rate, the dataset
    doctor_models.py    weights, and one image through every stage

Each check gives findings and never stops the others; what it did not foresee is a finding too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

State = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at; `mend` says what to do where it is not ok."""

    check: str
    state: State
    text: str
    mend: str = ""

    def line(self) -> str:
        return f"{self.state:<4}  {self.check:<10}  {self.text}" + (f"; {self.mend}" if self.mend else "")


@dataclass(frozen=True)
class Asked:
    """What to look at beside the machine.

    cache     where features are to be written
    data      folder of the dataset, with its name and split
    annotations   this file instead of the dataset's own
    preset    whose weights must be there and whose models an image goes through; None: the toy's alone
    weights   a folder of the official files, or random:SEED; None: where they are downloaded to
    """

    cache: str | None = None
    data: Path | None = None
    dataset: str = "o365"
    split: str = "train"
    preset: str | None = None
    weights: str | None = None
    device: str | None = None
    metrics_port: int | None = None
    annotations: Path | None = None


def examine(asked: Asked) -> Iterator[Finding]:
    """Everything that was found, as it is found. Raises InputError for a preset that there is not."""
    from regionspot.pipeline.backbones.builders import get_preset
    from regionspot.pipeline.doctor import machine as doctor_machine
    from regionspot.pipeline.doctor import models as doctor_models
    from regionspot.pipeline.doctor import paths as doctor_places

    if asked.preset is not None:
        get_preset(asked.preset)
    checks: list[tuple[str, Callable[[Asked], Iterable[Finding]]]] = [
        ("python", doctor_machine.python),
        ("packages", doctor_machine.packages),
        ("torch", doctor_machine.torch_works),
        ("gpu", doctor_machine.gpus_work),
        ("allocator", doctor_machine.allocator),
        ("decoder", doctor_machine.decoder),
        ("metrics", doctor_machine.metrics_port),
        ("cache", doctor_places.cache_place),
        ("data", doctor_places.dataset),
        ("weights", doctor_models.weights),
        ("stages", doctor_models.stages),
    ]
    for name, check in checks:
        try:
            yield from check(asked)
        except Exception as error:  # a broken library raises anything; the other checks still have something to say
            first = next(iter(str(error).splitlines()), "")
            yield Finding(name, "fail", f"{type(error).__name__}: {first}", "mend that and ask the doctor again")


def as_json(findings: Iterable[Finding]) -> dict[str, Any]:
    """The findings for programs."""
    listed = list(findings)
    return {"ok": is_healthy(listed), "findings": [asdict(each) for each in listed]}


def is_healthy(findings: Iterable[Finding]) -> bool:
    """Whether nothing failed."""
    return all(each.state != "fail" for each in findings)
