"""What `verify` found: each thing that is wrong, and how it is mended."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from regionspot.cache.progress import duration
from regionspot.cache.tools.info import size_text

Mend = Literal["drop", "remake", "restore", "access"]

_MENDS: dict[Mend, str] = {
    "drop": "`regionspot cache repair` drops the part, then the same `regionspot extract` makes it again",
    "remake": "`regionspot cache repair` makes the file again where it can; otherwise put it back from a copy",
    "restore": "put it back from a copy of the cache, or extract into another folder",
    # Not dropped: a server that is away for a minute must not cost a terabyte.
    "access": "mend the disk or its permissions and verify again; what cannot be read is not dropped",
}


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong.

    path               the file, as it is called inside the cache
    part, feature_set  what it is of, where it is of a part
    reason             what was found and what was expected
    mend               drop     the part can be made again
                       remake   the file can be made again from the header
                       restore  nothing here can make it again
                       access   it cannot be read at the moment
    """

    path: str
    part: int | None
    feature_set: str | None
    reason: str
    mend: Mend

    def __str__(self) -> str:
        of_part = "" if self.part is None else f"part {self.part} of {self.feature_set}: "
        return f"{self.path}: {of_part}{self.reason}; {_MENDS[self.mend]}"


@dataclass(frozen=True)
class VerifyReport:
    """All of a cache, looked at once.

    problems    what is wrong; empty for a cache that is sound
    warnings    what does no harm but was not expected: files that are none of the cache's
    parts       written parts that were looked at, pending those not written yet; one a feature set each
    unfinished  files of writers that were killed or are at work, to be written again or removed by the next extract
    bytes       of the parts that were read
    """

    address: str
    problems: tuple[Problem, ...]
    warnings: tuple[str, ...]
    parts: int
    pending: int
    unfinished: int
    bytes: int
    seconds: float

    @property
    def sound(self) -> bool:
        return not self.problems

    def text(self) -> str:
        """A line for each finding and one for the whole."""
        rate = size_text(self.bytes / max(self.seconds, 1e-9))
        found = "no problem" if self.sound else counted(len(self.problems), "problem")
        words = [
            f"{counted(self.parts, 'part')}, {size_text(self.bytes)} in {duration(self.seconds)}, {rate}/s",
            f"{counted(self.pending, 'part')} not written yet" * bool(self.pending),
            f"{counted(self.unfinished, 'file')} of unfinished parts" * bool(self.unfinished),
        ]
        lines = [str(problem) for problem in self.problems]
        lines += [f"{warning} (a warning only)" for warning in self.warnings]
        return "\n".join([*lines, f"{self.address}: {found}: {'; '.join(filter(None, words))}"])


def counted(number: int, thing: str) -> str:
    """1 part, 2 parts."""
    return f"{number:,} {thing}{'s' * (number != 1)}"
