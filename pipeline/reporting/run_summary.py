"""What one run of `extract` did: a line for people, and the record that stays in the cache under `runs/`.

Every run writes a file of its own, once, so runs that end at the same moment lose nothing of each other; the page for
people, summary.md, is made of all of them and can be made again at any time (`summary_page.py`).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from regionspot.cache.progress import duration
from regionspot.cache.storage.atomic_files import IMAGES_KEY, from_json, rename_key, to_json
from regionspot.cache.tools.info import size_text
from regionspot.pipeline.reporting.bottleneck import Bottleneck
from regionspot.pipeline.reporting.failure_kinds import FailureKind

FORM = 1  # of a run's record
COMPLETE = "complete"


@dataclass(frozen=True)
class ExtractSummary:
    """What one run of `extract` did.

    regions, bytes        of the images done, and of the parts written
    parts                 parts that it wrote
    parts_before          parts that were complete when it started
    parts_of_others       parts that other runs wrote while it was at work
    ignored_orientations  images whose EXIF would have turned them, but whose annotations want them as stored
    shares                each stage's share of the time
    bottleneck            the largest share and what to change; None where none stands out
    failures              images that could not be read, by kind
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
        """One line for people, and a second one where something can be done about the pace."""
        if not self.parts:
            others = f", {self.parts_of_others:,} of them by other runs meanwhile" if self.parts_of_others else ""
            return f"nothing to do: all {self.parts_before + self.parts_of_others:,} parts are there{others}"
        words = [
            f"{self.images:,} images with {self.regions:,} regions in {self.parts:,} parts",
            f"{size_text(self.bytes)} in {duration(self.seconds)}, {self.images / self.seconds:.3g} images/s",
            f"{self.failed:,} could not be read",
            f"{self.parts_before:,} parts were there before" * bool(self.parts_before),
            f"other runs did {self.parts_of_others:,} parts meanwhile" * bool(self.parts_of_others),
            f"EXIF orientation ignored for {self.ignored_orientations:,}, as their stated size asks"
            * bool(self.ignored_orientations),
        ]
        lines = ["; ".join(filter(None, words))]
        if self.bottleneck is not None:
            lines.append(f"bottleneck {self.bottleneck.stage} ({self.bottleneck.share:.0%}): {self.bottleneck.advice}")
        return "\n".join(lines)


@dataclass(frozen=True)
class RunRecord:
    """One run as its file under `runs/` tells it.

    started    UTC, ISO 8601
    worker     host:process
    outcome    "complete", or why it stopped
    machine, versions   of `surroundings.py`
    models     name and origin of the weights of each model
    """

    started: str
    worker: str
    outcome: str
    machine: dict[str, str | int]
    versions: dict[str, str]
    models: dict[str, str]
    summary: ExtractSummary

    def to_json(self) -> bytes:
        """The record as it lies in the cache."""
        document = {"form": FORM, **asdict(self)}
        return to_json({**document, "summary": rename_key(document["summary"], "images", IMAGES_KEY)})


def parse_run(data: bytes) -> RunRecord:
    """The run that `to_json` wrote. Raises ValueError for anything else."""
    words: Any = from_json(data)
    try:
        if words.pop("form") != FORM:
            raise ValueError("is of another version")
        of_run = rename_key(words.pop("summary"), IMAGES_KEY, "images")
        failures = [FailureKind(**each) for each in of_run.pop("failures")]
        bottleneck = Bottleneck(**found) if (found := of_run.pop("bottleneck")) else None
        return RunRecord(**words, summary=ExtractSummary(**of_run, bottleneck=bottleneck, failures=failures))
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"is no record of a run ({error})") from None
