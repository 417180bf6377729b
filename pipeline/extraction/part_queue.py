"""Which parts of a cache this run does, when others may be at work on the same one.

Parts are claimed one by one, just ahead of the decoders, and released as soon as their record is written; so any number
of runs divide a cache between them without knowing of each other. What others hold is passed over and looked at again
at the end: by then it is done, or its run is dead and its claims are free.

A part is claimed with all of its feature sets at once. Two runs after different sets only do the parts in another
order for it, and an image that several sets are wanted of is decoded once.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import Counter, deque
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING, TypeVar

from regionspot.cache.errors import CacheError
from regionspot.cache.format.schema import ImageFeatures
from regionspot.cache.store import FeatureCache
from regionspot.cache.writing.claims import Claims

if TYPE_CHECKING:
    from regionspot.pipeline.extraction.decode_ahead import Jobs  # imports torch

log = logging.getLogger(__name__)

SAY_SECONDS = 60.0  # between two lines about what is waited for

T = TypeVar("T")


@dataclass(frozen=True)
class PartCounts:
    """How the parts of a run stand at one moment: before + done + others + pending are all that it was asked for.

    before    were complete at the start
    done      this run has written, `bytes` are theirs
    others    other runs have written since the start
    pending   neither this run nor another one is known to have written
    images  of the parts that this run has done, does or may still have to do
    """

    before: int
    done: int
    others: int
    pending: int
    images: int
    bytes: int


class PartQueue:
    """Those of the parts `asked` for (default: all) of `cache` that lack one of the feature sets `names`.

    counts   how they stand; replaced as a whole at every change, so any thread may read it

    Three threads use it: the run's own, which waits for parts, the one that claims ahead of the decoders (it runs
    `jobs`), and the one that writes. They change what is open and what is claimed under one lock, under which no file
    is touched: claims and caches are safe to use from several threads themselves.
    """

    def __init__(
        self, cache: FeatureCache, names: Sequence[str], claims: Claims, asked: Collection[int] | None = None
    ) -> None:
        self._cache, self._names, self._claims = cache, names, claims
        asked = range(cache.n_parts) if asked is None else asked
        self._lock = threading.Lock()
        self._open = set(asked).intersection(cache.pending_parts(names))  # neither done nor claimed by this run
        self._claimed: dict[int, list[str]] = {}
        self._round: Iterator[int] = iter(())
        images = sum(len(cache.part_rows(part)) for part in self._open)
        self.counts = PartCounts(len(asked) - len(self._open), 0, 0, len(self._open), images, 0)

    def wait(self) -> bool:
        """Claim a part to begin with, waiting as long as others hold all there are; False when none is left.

        To be asked when no part is under way. Images that lie decoded while this waits are never committed, and two
        runs would wait for each other.
        """
        said = -math.inf
        while (first := next(free := self._free(), None)) is None and self._open:
            if time.monotonic() - said >= SAY_SECONDS:
                said = time.monotonic()
                self._say_who_is_waited_for()
            time.sleep(self._claims.heartbeat_seconds / 5)
        self._round = free if first is None else chain([first], free)
        return first is not None

    def jobs(self) -> Jobs:
        """Rows of the parts that are free, in order, and the feature sets wanted of them; a part is claimed ahead."""
        for part in _one_ahead(self._round):
            names = self._claimed[part]
            for row in self._cache.part_rows(part):
                yield row, names

    def write(self, part: int, images: Iterator[ImageFeatures]) -> None:
        """Write a part that this run claimed and release it; nothing is written when it was taken over meanwhile.

        Raises CacheError when the disk refuses it.
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
            deque(images, maxlen=0)  # those of this part that are still to come
            self._claims.release(part)
            self._taken_over(part)
        else:
            self._claims.release(part)
            self._done(part, sum(record.files.values()))

    def _free(self) -> Iterator[int]:
        """Claim, one after the other and in order, the parts that nobody holds."""
        with self._lock:
            found = sorted(self._open)
        for part in found:
            if not self._cache.missing_sets(part, self._names):
                self._left_to_others(part)
            elif self._claims.claim(part):
                # Again: who had it a moment ago may have finished between the two questions.
                if missing := self._cache.missing_sets(part, self._names):
                    self._is_ours(part, missing)
                    yield part
                else:
                    self._claims.release(part)
                    self._left_to_others(part)

    def _is_ours(self, part: int, missing: list[str]) -> None:
        with self._lock:
            self._open.remove(part)
            self._claimed[part] = missing

    def _left_to_others(self, part: int) -> None:
        with self._lock:
            self._open.remove(part)
            now = self.counts
            self.counts = replace(
                now,
                pending=now.pending - 1,
                others=now.others + 1,
                images=now.images - len(self._cache.part_rows(part)),
            )

    def _taken_over(self, part: int) -> None:
        """Another run has it now; whether that one completes it is seen later."""
        with self._lock:
            del self._claimed[part]
            self._open.add(part)
            images = self.counts.images + len(self._cache.part_rows(part))  # made once in vain
            self.counts = replace(self.counts, images=images)

    def _done(self, part: int, size: int) -> None:
        with self._lock:
            del self._claimed[part]
            now = self.counts
            self.counts = replace(now, pending=now.pending - 1, done=now.done + 1, bytes=now.bytes + size)

    def _say_who_is_waited_for(self) -> None:
        with self._lock:
            waited_for = set(self._open)
        holders = Counter(self._claims.holder(part) for part in waited_for)
        for holder, count in holders.items():
            if holder is None:  # let go of since
                continue
            log.info(
                "waiting for %d parts of %s; they are done here when it shows no life for %.0f seconds "
                "(if you know that it is gone: run this again with --take-over)",
                count,
                holder,
                self._claims.dead_after,
            )


def _one_ahead(items: Iterator[T]) -> Iterator[T]:
    """The same items, each asked for by a thread while the one before it is in use."""
    with ThreadPoolExecutor(1, thread_name_prefix="claim") as pool:
        coming = pool.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = pool.submit(next, items, None)
            yield item
