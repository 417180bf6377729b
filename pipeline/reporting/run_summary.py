"""ExtractSummary: the result of one run of `extract`. RunRecord: the file in the cache's `runs/` that keeps it.

Each run writes its own file, so runs that end at the same moment do not conflict. summary.md is generated from all
of these files (`summary_page.py`).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from regionspot.cache.progress import duration
from regionspot.cache.storage.atomic_files import IMAGES_KEY, from_json, rename_key, to_json
from regionspot.cache.tools.info import size_text
from regionspot.pipeline.reporting.bottleneck import Bottleneck
from regionspot.pipeline.reporting.failure_kinds import FailureKind

FORMAT_VERSION = 1  # of a run record
COMPLETE = "complete"


@dataclass(frozen=True)
class ExtractSummary:
    """The result of one run of `extract`.

    images, regions, bytes  processed and written by this run
    parts                   parts that this run wrote
    parts_before            parts that were complete when it started
    parts_of_others         parts that other runs wrote meanwhile
    ignored_orientations    images whose EXIF orientation was ignored because the annotations use the stored one
    shares                  each stage's share of the time
    bottleneck              the slowest stage with advice; None if no stage stands out
    failures                unreadable images, by kind
    """

    images: int
    failed: int
    parts: int
    parts_before: int
    parts_of_others: int
    ignored_orientations: int
    seconds: float
    shares: dict[str, float]
    regions: int = 0
    bytes: int = 0
    bottleneck: Bottleneck | None = None
    failures: list[FailureKind] = field(default_factory=list)

    def text(self) -> str:
        """The summary in one line, and a second line about the bottleneck if there is one."""
        if not self.parts:
            others = (
                f", {self.parts_of_others:,} of them written by other runs meanwhile" if self.parts_of_others else ""
            )
            return f"nothing to do: all {self.parts_before + self.parts_of_others:,} parts are complete{others}"
        fields = [
            f"{self.images:,} images with {self.regions:,} regions in {self.parts:,} parts",
            f"{size_text(self.bytes)} in {duration(self.seconds)}, {self.images / self.seconds:.3g} images/s",
            f"{self.failed:,} could not be read",
            f"{self.parts_before:,} parts were complete before" * bool(self.parts_before),
            f"other runs wrote {self.parts_of_others:,} parts meanwhile" * bool(self.parts_of_others),
            f"EXIF orientation ignored for {self.ignored_orientations:,}, to match their annotations"
            * bool(self.ignored_orientations),
        ]
        lines = ["; ".join(filter(None, fields))]
        if self.bottleneck is not None:
            lines.append(f"bottleneck {self.bottleneck.stage} ({self.bottleneck.share:.0%}): {self.bottleneck.advice}")
        return "\n".join(lines)


@dataclass(frozen=True)
class RunRecord:
    """The content of a file in `runs/`.

    started    UTC, ISO 8601
    worker     host:pid
    outcome    "complete", or why the run stopped
    machine, versions, models   as in `Environment`
    """

    started: str
    worker: str
    outcome: str
    machine: dict[str, str | int]
    versions: dict[str, str]
    models: dict[str, str]
    summary: ExtractSummary

    def to_json(self) -> bytes:
        """The record as stored in the cache."""
        document = {"form": FORMAT_VERSION, **asdict(self)}
        return to_json({**document, "summary": rename_key(document["summary"], "images", IMAGES_KEY)})


def parse_run(data: bytes) -> RunRecord:
    """The inverse of `RunRecord.to_json`. Raises ValueError for anything else."""
    document: Any = from_json(data)
    try:
        if document.pop("form") != FORMAT_VERSION:
            raise ValueError("is a run record of another version")
        summary = rename_key(document.pop("summary"), IMAGES_KEY, "images")
        failures = [FailureKind(**failure) for failure in summary.pop("failures")]
        bottleneck = Bottleneck(**stage) if (stage := summary.pop("bottleneck")) else None
        return RunRecord(**document, summary=ExtractSummary(**summary, bottleneck=bottleneck, failures=failures))
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"is not a run record ({error})") from None
