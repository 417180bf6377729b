"""What the doctor checks (DoctorOptions) and what it reports (Finding)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

State = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Finding:
    """The result of one check; `mend` says how to fix it."""

    check: str
    state: State
    text: str
    mend: str = ""

    def line(self) -> str:
        return f"{self.state:<4}  {self.check:<10}  {self.text}" + (f"; {self.mend}" if self.mend else "")


@dataclass(frozen=True)
class DoctorOptions:
    """What to check besides the machine.

    cache     where features will be written
    data      folder of the dataset, with its name and split
    annotations   this file instead of the dataset's own
    preset    check its weights, and send an image through its models; None: only the toy models
    weights   a folder of the official files, or random:SEED; None: the download folder
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


def as_json(findings: Iterable[Finding]) -> dict[str, Any]:
    """The findings for programs."""
    findings = list(findings)
    return {"ok": is_healthy(findings), "findings": [asdict(finding) for finding in findings]}


def is_healthy(findings: Iterable[Finding]) -> bool:
    """Whether nothing failed."""
    return all(finding.state != "fail" for finding in findings)
