"""How many images (or annotation records) may be broken before a run stops: some always are, a wrong folder breaks all.

A share is a share of ALL that there is to do, not of what was seen so far: a run stops as soon as more are broken than
may be broken in the end. So a few broken images at the start do not stop a good run, and in a small set, too, no more
than the share is let through.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from regionspot.cache.errors import InputError
from regionspot.cache.store import FeatureCache

# A wrong image folder shows in the first images: stop before a part of nothing but failures is committed.
FIRST_IMAGES = 10


@dataclass(frozen=True)
class FailureLimit:
    """At most this share of all (0 to 1), or at most this count."""

    share: float | None = None
    count: int | None = None

    @classmethod
    def parse(cls, text: str) -> FailureLimit:
        """ "1%" and "0.01" are shares, "200" is a count. Raises InputError for anything else."""
        if match := re.fullmatch(r"(\d{1,15}(?:\.\d{1,15})?)(%?)", text.strip(), re.ASCII):
            number, percent = float(match[1]), bool(match[2])
            if percent and number <= 100:
                return cls(share=number / 100)
            if not percent and "." in text and number <= 1:
                return cls(share=number)
            if not percent and "." not in text:
                return cls(count=int(match[1]))
        raise InputError(f'max failures {text!r}: expected a share like "1%" or "0.01", or a count like "200"')

    def __str__(self) -> str:
        return f"{100 * self.share:g}%" if self.share is not None else str(self.count)

    def of_all(self, total: int) -> int:
        """How many of `total` may be broken."""
        if self.count is not None:
            return self.count
        # 0.29 * 100 is 28.999999999999996.
        return math.floor((self.share or 0.0) * total + 1e-9)

    def allows(self, failed: int, total: int) -> bool:
        """Whether `failed` of `total` may be broken."""
        return failed <= self.of_all(total)

    def check(self, failed: int, total: int, *, in_a_row: int, folder: Path, reason: str) -> None:
        """To be called after each broken image.

        failed    broken images so far, those that earlier runs recorded included
        total     images there are to do, those that earlier runs did included
        in_a_row  broken images with which this run began
        reason    why the last one is broken

        Raises InputError when `failed` is more than the limit, or when all of the first FIRST_IMAGES are broken (unless
        100% may be).
        """
        if not self.allows(failed, total):
            raise InputError(
                f"{folder}: {failed:,} of {total:,} images could not be read, more than --max-failures {self} allows "
                f"(the last: {reason}); check --data, or allow more"
            )
        if in_a_row >= FIRST_IMAGES and self.share != 1:
            raise InputError(
                f"{folder}: none of the first {in_a_row} images could be read (the last: {reason}); check --data, or "
                "let all images fail with --max-failures 100%"
            )


class FailureCheck:
    """Stops a run when too many of all images of its `parts` are broken, whichever run found them."""

    def __init__(self, cache: FeatureCache, parts: Collection[int], limit: FailureLimit, folder: Path) -> None:
        self._cache, self._limit, self._folder, self._parts = cache, limit, folder, parts
        self._broken: set[int] = set()  # rows
        self._first_in_a_row = 0
        self._one_was_read = False

    def __call__(self, row: int, failure: str | None) -> None:
        """To be called with each image that the run has done. Raises InputError, as `FailureLimit.check`."""
        if failure is None:
            self._one_was_read = True
            return
        if not self._broken:  # reading all records takes an object store a while: only when it matters
            asked = set(self._parts)
            earlier = (each.row for each in self._cache.failures())
            self._broken = {each for each in earlier if each // self._cache.part_size in asked}
        self._broken.add(row)
        self._first_in_a_row += not self._one_was_read
        total = sum(len(self._cache.part_rows(part)) for part in self._parts)
        self._limit.check(len(self._broken), total, in_a_row=self._first_in_a_row, folder=self._folder, reason=failure)


EXTRACTION_LIMIT = FailureLimit(share=0.2)
EVALUATION_LIMIT = FailureLimit(share=0.01)
