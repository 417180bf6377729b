"""FailureCheck: stop a run that cannot read too many of its images, as with a wrong image folder."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from regionspot.cache.errors import InputError
from regionspot.cache.store import FeatureCache
from regionspot.pipeline.datasets.failure_limit import FailureLimit

# With a wrong image folder the first images fail: stop before a part of failures only is written.
FIRST_IMAGES = 10


class FailureCheck:
    """Compares the failures in a run's `parts`, including those of earlier runs, with a limit."""

    def __init__(self, cache: FeatureCache, parts: Collection[int], limit: FailureLimit, image_folder: Path) -> None:
        self._cache, self._limit, self._folder, self._parts = cache, limit, image_folder, parts
        self._failed: set[int] = set()  # rows
        self._first_in_a_row = 0
        self._any_read = False

    def __call__(self, row: int, failure: str | None) -> None:
        """Call this with each image that the run has finished.

        Raises InputError if more images failed than the limit allows, or if all of the first FIRST_IMAGES did (unless
        the limit is 100%).
        """
        if failure is None:
            self._any_read = True
            return
        if not self._failed:  # on the first failure only: reading all records of an object store takes a while
            parts, part_size = set(self._parts), self._cache.part_size
            self._failed = {item.row for item in self._cache.failures() if item.row // part_size in parts}
        self._failed.add(row)
        self._first_in_a_row += not self._any_read
        failed, total = len(self._failed), sum(len(self._cache.part_rows(part)) for part in self._parts)
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
