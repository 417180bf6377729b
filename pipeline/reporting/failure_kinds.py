"""Images that could not be read, counted by what is wrong with them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

EXAMPLES = 3  # paths that are kept of each kind
# Reasons quote sizes and libraries' own words; a kind is what stays when these are taken out.
_PARTICULARS = re.compile(r"\s*\([^()]*\)|'[^']*'|\"[^\"]*\"")
_MOST_KINDS = 30  # behind that all are one: a monitoring system keeps a series for each, for ever
OTHER = "other"


@dataclass
class FailureKind:
    """One thing that is wrong with images: how many of them, and the first few by path."""

    kind: str
    count: int
    examples: list[str]


class FailureCount:
    """Failures by kind, in the order in which they were met first."""

    def __init__(self, failures: Iterable[tuple[str, str]] = ()) -> None:
        self._kinds: dict[str, FailureKind] = {}
        for path, reason in failures:
            self.add(path, reason)

    def add(self, path: str, reason: str) -> None:
        """Count an image by its path in the image folder and the reason why it could not be read."""
        self._add(FailureKind(kind_of(path, reason), 1, [path]))

    def merge(self, other: FailureCount) -> None:
        """Count what another one has counted as well."""
        for each in other.kinds():
            self._add(each)

    def _add(self, new: FailureKind) -> None:
        kind = new.kind if new.kind in self._kinds or len(self._kinds) < _MOST_KINDS else OTHER
        # One dictionary operation: the metrics' thread may be looking at it.
        known = self._kinds.setdefault(kind, FailureKind(kind, 0, []))
        known.count += new.count
        known.examples += new.examples[: EXAMPLES - len(known.examples)]

    @property
    def total(self) -> int:
        return sum(each.count for each in self.kinds())

    def kinds(self) -> list[FailureKind]:
        """Each kind, the most frequent first."""
        return sorted(self._kinds.values(), key=lambda each: -each.count)


def kind_of(path: str, reason: str) -> str:
    """What is wrong in general: the reason without its path, numbers and quoted words, and without the advice."""
    found = reason.rpartition(f"{path}: ")[2].partition(";")[0]
    return " ".join(re.sub(r"\d[\d,.]*", "N", _PARTICULARS.sub("", found)).split()) or OTHER
