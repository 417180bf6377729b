"""PartQueue: the parts that this run extracts, while other runs may work on the same cache.

Parts are claimed one by one, just ahead of the decoders, and released as soon as their record is written. So any number
of runs share a cache without knowing each other. Parts claimed by others are skipped and checked again at the end: by
then they are written, or their run is dead and the claim is free.

A part is claimed with all of its feature sets at once, so an image is decoded once for all of them.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import Counter, deque
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import TYPE_CHECKING, TypeVar

from regionspot.cache.errors import CacheError
from regionspot.cache.format.schema import ImageFeatures
from regionspot.cache.store import FeatureCache
from regionspot.cache.writing.claims import Claims
from regionspot.pipeline.reporting.run_stats import RunStats

if TYPE_CHECKING:
    from regionspot.pipeline.extraction.decode_ahead import Requests  # imports torch

log = logging.getLogger(__name__)

LOG_SECONDS = 60.0  # between two messages about parts of other runs

T = TypeVar("T")


class PartQueue:
    """Those of `parts` (default: all of `cache`) that lack one of the feature sets `names`.

    parts_before   parts that were complete at the start
    images         images that this run has extracted or may still have to; fewer when other runs write parts
    stats          parts and bytes written, and parts written by others

    Three threads use it: the main thread, which calls `wait`, the one that claims ahead of the decoders (it runs
    `requests`), and the writer. One lock protects the sets of open and claimed parts and the counts; it is not held
    during file access.
    """

    def __init__(
        self, cache: FeatureCache, names: Sequence[str], claims: Claims, parts: Collection[int] | None = None
    ) -> None:
        self._cache, self._names, self._claims = cache, names, claims
        self._lock = threading.Lock()
        parts = range(cache.n_parts) if parts is None else parts
        self._open = set(parts).intersection(cache.pending_parts(names))  # neither written nor claimed by this run
        self._claimed: dict[int, list[str]] = {}
        self._round: Iterator[int] = iter(())
        self.parts_before = len(parts) - len(self._open)
        self.images = sum(len(cache.part_rows(part)) for part in self._open)
        self.stats = RunStats()

    def wait(self) -> bool:
        """Claim a first part, waiting while other runs hold all open parts; False if no part is left.

        Call it only when this run holds no part: two runs that wait while holding parts would deadlock.
        """
        last_logged = -math.inf
        while (first := next(free := self._claim_free(), None)) is None and self._open:
            if time.monotonic() - last_logged >= LOG_SECONDS:
                last_logged = time.monotonic()
                self._log_holders()
            time.sleep(self._claims.heartbeat_seconds / 5)
        self._round = free if first is None else chain([first], free)
        return first is not None

    def requests(self) -> Requests:
        """Rows of the free parts in order, with the feature sets that they lack; claims one part ahead."""
        for part in _one_ahead(self._round):
            names = self._claimed[part]
            for row in self._cache.part_rows(part):
                yield row, names

    def write(self, part: int, images: Iterator[ImageFeatures]) -> None:
        """Write and release a part that this run claimed; if another run took it over, write nothing.

        Raises CacheError when it cannot be written.
        """
        try:
            record = self._cache.write_part(
                part,
                images,
                self._claimed[part],
                worker=str(self._claims.process),
                before_publish=lambda: self._claims.require_owned(part),
            )
        except CacheError as error:
            if self._claims.is_owned(part):
                raise
            log.warning("%s", error)
            deque(images, maxlen=0)  # discard the rest of this part
            self._claims.release(part)
            self._reopen(part)
        else:
            self._claims.release(part)
            with self._lock:
                del self._claimed[part]
                self.stats.parts += 1
                self.stats.bytes += sum(record.files.values())

    def _claim_free(self) -> Iterator[int]:
        """Claim the open parts that no other run holds, one after the other in order."""
        with self._lock:
            open_parts = sorted(self._open)
        for part in open_parts:
            if not self._cache.missing_sets(part, self._names):
                self._count_as_of_others(part)
            elif self._claims.claim(part):
                # Check again: another run may have finished the part between the check and the claim.
                if missing := self._cache.missing_sets(part, self._names):
                    with self._lock:
                        self._open.remove(part)
                        self._claimed[part] = missing
                    yield part
                else:
                    self._claims.release(part)
                    self._count_as_of_others(part)

    def _count_as_of_others(self, part: int) -> None:
        with self._lock:
            self._open.remove(part)
            self.stats.parts_of_others += 1
            self.images -= len(self._cache.part_rows(part))

    def _reopen(self, part: int) -> None:
        """Another run took the part over; `wait` checks later whether it completes it."""
        with self._lock:
            del self._claimed[part]
            self._open.add(part)
            self.images += len(self._cache.part_rows(part))  # extracted once in vain

    def _log_holders(self) -> None:
        with self._lock:
            open_parts = set(self._open)
        for holder, count in Counter(self._claims.owner(part) for part in open_parts).items():
            if holder is not None:  # None: released since
                log.info(
                    "waiting for %d parts of %s; this run takes them over when its heartbeat stops for %.0f seconds "
                    "(if that run is dead: run this command again with --take-over)",
                    count,
                    holder,
                    self._claims.dead_after,
                )


def _one_ahead(items: Iterator[T]) -> Iterator[T]:
    """The same items, each computed in a thread while the item before it is in use."""
    with ThreadPoolExecutor(1, thread_name_prefix="claim") as pool:
        future = pool.submit(next, items, None)
        while (item := future.result()) is not None:
            future = pool.submit(next, items, None)
            yield item
