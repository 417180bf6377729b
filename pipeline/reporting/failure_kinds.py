"""Unreadable images, counted by kind of failure."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

EXAMPLES = 3  # paths kept per kind
# A reason quotes sizes and error texts of libraries; its kind is the rest.
_DETAILS = re.compile(r"\s*\([^()]*\)|'[^']*'|\"[^\"]*\"")
_MAX_KINDS = 30  # further kinds are counted as "other": a monitoring system keeps one time series per kind
OTHER = "other"


@dataclass
class FailureKind:
    """One kind of failure: how many images, and the paths of the first few."""

    kind: str
    count: int
    examples: list[str]


class FailureCount:
    """Counts failures, given as (path, reason), by kind."""

    def __init__(self, failures: Iterable[tuple[str, str]] = ()) -> None:
        self._kinds: dict[str, FailureKind] = {}
        for path, reason in failures:
            self.add(path, reason)

    def add(self, path: str, reason: str) -> None:
        """Count one image; `path` is relative to the image folder."""
        self._add(FailureKind(kind_of(path, reason), 1, [path]))

    def merge(self, other: FailureCount) -> None:
        for failure in other.kinds():
            self._add(failure)

    def _add(self, new: FailureKind) -> None:
        kind = new.kind if new.kind in self._kinds or len(self._kinds) < _MAX_KINDS else OTHER
        # One dictionary operation, because the metrics thread may be iterating.
        known = self._kinds.setdefault(kind, FailureKind(kind, 0, []))
        known.count += new.count
        known.examples += new.examples[: EXAMPLES - len(known.examples)]

    @property
    def total(self) -> int:
        return sum(failure.count for failure in self.kinds())

    def kinds(self) -> list[FailureKind]:
        """The kinds, most frequent first."""
        return sorted(self._kinds.values(), key=lambda failure: -failure.count)


def kind_of(path: str, reason: str) -> str:
    """The reason without path, numbers, quoted text and advice."""
    message = reason.rpartition(f"{path}: ")[2].partition(";")[0]
    return " ".join(re.sub(r"\d[\d,.]*", "N", _DETAILS.sub("", message)).split()) or OTHER
