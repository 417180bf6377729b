"""Stops a run that cannot read too many of its images: a wrong image folder fails for all of them."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from regionspot.cache.errors import InputError
from regionspot.cache.store import FeatureCache
from regionspot.pipeline.datasets.failure_limit import FailureLimit

# A wrong image folder shows in the first images: stop before a part of nothing but failures is committed.
FIRST_IMAGES = 10


class FailureCheck:
    """Counts the failures of a run's `parts`, those that earlier runs recorded included, against a limit."""

    def __init__(self, cache: FeatureCache, parts: Collection[int], limit: FailureLimit, folder: Path) -> None:
        self._cache, self._limit, self._folder, self._parts = cache, limit, folder, parts
        self._broken: set[int] = set()  # rows
        self._first_in_a_row = 0
        self._one_was_read = False

    def __call__(self, row: int, failure: str | None) -> None:
        """Call this with each image that the run has finished.

        Raises InputError if more images failed than the limit allows, or if all of the first FIRST_IMAGES did (unless
        the limit is 100%).
        """
        if failure is None:
            self._one_was_read = True
            return
        if not self._broken:  # reading all records takes an object store a while: only when it matters
            parts = set(self._parts)
            part_size = self._cache.part_size
            self._broken = {item.row for item in self._cache.failures() if item.row // part_size in parts}
        self._broken.add(row)
        self._first_in_a_row += not self._one_was_read
        failed, total = len(self._broken), sum(len(self._cache.part_rows(part)) for part in self._parts)
        if not self._limit.allows(failed, total):
            raise InputError(
                f"{self._folder}: {failed:,} of {total:,} images could not be read, more than --max-failures "
                f"{self._limit} allows (the last: {failure}); check --data, or allow more"
            )
        if self._first_in_a_row >= FIRST_IMAGES and self._limit.share != 1:
            raise InputError(
                f"{self._folder}: none of the first {self._first_in_a_row} images could be read (the last: {failure}); "
                "check --data, or let all images fail with --max-failures 100%"
            )
