"""How many annotation records or images may be unreadable before a run stops.

A share is a share of all records, not of those seen so far: a few broken images at the start do not stop a good run.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from regionspot.cache.errors import AnnotationError, InputError


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
        """How many of `total` may fail."""
        if self.count is not None:
            return self.count
        # 0.29 * 100 is 28.999999999999996.
        return math.floor((self.share or 0.0) * total + 1e-9)

    def allows(self, failed: int, total: int) -> bool:
        """Whether `failed` of `total` may fail."""
        return failed <= self.of_all(total)


EXTRACTION_LIMIT = FailureLimit(share=0.2)
EVALUATION_LIMIT = FailureLimit(share=0.01)


class SkippedRecords:
    """Counts the unreadable records of one annotation file by kind, and keeps the first reason of each kind.

    report    counts for the manifest's report
    remarks   warnings, one line per kind
    """

    def __init__(self, path: Path, limit: FailureLimit) -> None:
        self._path, self._limit = path, limit
        self._usable: Counter[str] = Counter()
        self._skipped: Counter[str] = Counter()
        self._first_reason: dict[str, str] = {}
        self.report: dict[str, int] = {}
        self.remarks: list[str] = []

    def add(self, kind: str, reason: str, count: int = 1) -> None:
        """Count skipped records of a kind, such as "images". `reason` names the first of them."""
        self._skipped[kind] += count
        self._first_reason.setdefault(kind, reason)

    def add_usable(self, kind: str, count: int) -> None:
        self._usable[kind] += count

    def check(self, kind: str) -> None:
        """Call this after the last record of a kind.

        Raises AnnotationError if all of them are skipped, or more than the limit allows.
        """
        skipped, total = self._skipped[kind], self._skipped[kind] + self._usable[kind]
        if not skipped:
            return
        summary, reason = f"{skipped:,} of {total:,} {kind} cannot be read", self._first_reason[kind]
        if skipped == total or self._limit.count == 0:
            raise AnnotationError(f"{self._path}: {summary}, the first: {reason}")
        if not self._limit.allows(skipped, total):
            raise AnnotationError(
                f"{self._path}: {summary}, more than --max-failures {self._limit} allows; the first: {reason}"
            )
        self.report[f"skipped_{kind}"] = skipped
        self.remarks.append(f"{self._path}: {summary} and are left out; the first: {reason}")
