"""How many pictures may be broken before a run stops: some always are, but a mistyped folder breaks all of them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from regionspot.cache.errors import InputError
from regionspot.cache.progress import Progress

# A wrong photo folder shows in the first pictures: stop before a part of nothing but failures is committed.
FIRST_PICTURES = 10


@dataclass(frozen=True)
class FailureLimit:
    """At most this share of the pictures seen so far, or this many of all; a share lets the first ten pass."""

    share: float | None = None
    count: int | None = None

    @classmethod
    def parse(cls, text: str) -> FailureLimit:
        """ "1%" and "0.01" are shares, "200" is a count. Raises InputError for anything else."""
        words = re.fullmatch(r"(\d+(?:\.\d+)?)(%?)", text.strip())
        if words:
            number, percent = float(words[1]), bool(words[2])
            if percent and number <= 100:
                return cls(share=number / 100)
            if not percent and "." in text and number <= 1:
                return cls(share=number)
            if not percent and "." not in text:
                return cls(count=int(words[1]))
        raise InputError(f'max failures {text!r}: expected a share like "1%" or "0.01", or a number like "200"')

    def allows(self, failed: int, seen: int) -> bool:
        """Whether so many of so many may be broken."""
        if self.count is not None:
            return failed <= self.count
        return failed <= max(FIRST_PICTURES, (self.share or 0.0) * seen)

    def of_all(self, total: int) -> float:
        """How many of `total` pictures may be broken, where all of them are known."""
        return self.count if self.count is not None else (self.share or 0.0) * total

    def check(self, failed: int, progress: Progress, photo_folder: Path, reason: str | None) -> None:
        """Raises InputError when the picture just done, broken for `reason`, is one too many or all of the first are.

        reason   None for a picture that is not broken
        """
        if reason is None:
            return
        seen, first = progress.done, min(FIRST_PICTURES, progress.total)
        if failed == seen == first or not self.allows(failed, seen):
            raise InputError(
                f"{photo_folder}: {failed} of the first {seen} pictures could not be read (the last: {reason}); "
                "check --data, or allow more with --max-failures"
            )


ONE_PERCENT = FailureLimit(share=0.01)
