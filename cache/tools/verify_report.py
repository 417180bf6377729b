"""The report of `verify`: problems and how to fix them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from regionspot.cache.progress import duration
from regionspot.cache.tools.info import size_text

Fix = Literal["drop", "regenerate", "restore", "access"]

_INSTRUCTIONS: dict[Fix, str] = {
    "drop": "`regionspot cache repair` drops the part, then the same `regionspot extract` writes it again",
    "regenerate": "`regionspot cache repair` writes the file again if possible; otherwise restore it from a copy",
    "restore": "restore it from a copy of the cache, or extract into another folder",
    # Not dropped: a server that is unreachable for a minute must not cost a terabyte.
    "access": "fix the disk or its permissions and verify again; unreadable files are not dropped",
}


@dataclass(frozen=True)
class Problem:
    """One problem.

    path               name of the file in the cache
    part, feature_set  its part, None for other files
    reason             what was found and what was expected
    fix                drop        `extract` can write the part again
                       regenerate  the file can be written again from the header
                       restore     only a copy of the cache has it
                       access      it cannot be read at the moment
    """

    path: str
    part: int | None
    feature_set: str | None
    reason: str
    fix: Fix

    def __str__(self) -> str:
        of_part = "" if self.part is None else f"part {self.part} of {self.feature_set}: "
        return f"{self.path}: {of_part}{self.reason}; {_INSTRUCTIONS[self.fix]}"


@dataclass(frozen=True)
class VerifyReport:
    """Result of one `verify`.

    problems    empty for a sound cache
    warnings    harmless oddities, such as files of other programs
    parts       number of verified parts, pending: not written yet; counted per feature set
    unfinished  number of files of killed or running writers; the next `extract` rewrites or removes them
    bytes       bytes read from parts
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
        """A line per problem and warning, and a summary line."""
        rate = size_text(self.bytes / max(self.seconds, 1e-9))
        problems = "no problem" if self.sound else plural(len(self.problems), "problem")
        details = [
            f"{plural(self.parts, 'part')}, {size_text(self.bytes)} in {duration(self.seconds)}, {rate}/s",
            f"{plural(self.pending, 'part')} not written yet" * bool(self.pending),
            f"{plural(self.unfinished, 'file')} of unfinished parts" * bool(self.unfinished),
        ]
        lines = [str(problem) for problem in self.problems]
        lines += [f"{warning} (a warning only)" for warning in self.warnings]
        return "\n".join([*lines, f"{self.address}: {problems}: {'; '.join(filter(None, details))}"])


def plural(number: int, thing: str) -> str:
    """1 part, 2 parts."""
    return f"{number:,} {thing}{'s' * (number != 1)}"
