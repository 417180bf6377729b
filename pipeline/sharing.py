"""Which parts of a cache this run does, when others may be at work on the same one.

Parts are claimed one by one, just ahead of the decoders, and let go of as soon as their record is written; so any
number of runs divide a cache between them without knowing of each other. What others hold is passed over and looked
at again at the end: by then it is done, or its run is dead and its claims are free.

A part is claimed with all of its feature sets at once. Two runs after different sets only do the parts in another
order for it, and a picture that several sets are wanted of is decoded once.
"""

from __future__ import annotations

import logging
import math
import time
from collections import Counter, deque
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import TypeVar

from regionspot.cache.claims import Claims
from regionspot.cache.errors import CacheError
from regionspot.cache.schema import PictureFeatures
from regionspot.cache.store import FeatureCache
from regionspot.pipeline.decoding import Jobs

log = logging.getLogger(__name__)

SAY_SECONDS = 60.0  # between two lines about what is waited for

T = TypeVar("T")


class SharedParts:
    """The parts of `cache`, or those of them in `only`, that lack one of the feature sets `names`.

    before    parts that were complete at the start
    done      parts that this run wrote, `bytes` are theirs
    pictures  pictures of all parts that this run has done, does or may still have to do
    """

    def __init__(
        self, cache: FeatureCache, names: Sequence[str], claims: Claims, only: Collection[int] | None = None
    ) -> None:
        self._cache, self._names, self._claims = cache, names, claims
        asked = set(range(cache.n_parts) if only is None else only)
        self._open = asked.intersection(cache.pending_parts(names))  # neither done nor claimed by this run
        self._asked = len(asked)
        self._claimed: dict[int, list[str]] = {}
        self._round: Iterator[int] = iter(())
        self.before = self._asked - len(self._open)
        self.done = self.bytes = 0
        self.pictures = sum(len(cache.part_rows(part)) for part in self._open)

    @property
    def lacking_before(self) -> int:
        return self._asked - self.before

    @property
    def pending(self) -> int:
        """Parts that neither this run nor another one is known to have written."""
        return len(self._open) + len(self._claimed)

    def wait(self) -> bool:
        """Claim a part to begin with, waiting as long as others hold all there are; False when none is left.

        To be asked when no part is under way. Pictures that lie decoded while this waits are never committed, and two
        runs would wait for each other.
        """
        for part in self._claimed:  # taken over by another run while this one slept
            self._open.add(part)
            self.pictures += len(self._cache.part_rows(part))
        self._claimed.clear()
        said = -math.inf
        while (first := next(free := self._free(), None)) is None and self._open:
            if time.monotonic() - said >= SAY_SECONDS:
                said = time.monotonic()
                self._say_who_is_waited_for()
            time.sleep(self._claims.beat_every / 5)
        self._round = free if first is None else chain([first], free)
        return first is not None

    def jobs(self) -> Jobs:
        """Rows of the parts that are free, in order, and the feature sets wanted of them; a part is claimed ahead."""
        for part in _one_ahead(self._round):
            names = self._claimed[part]
            for row in self._cache.part_rows(part):
                yield row, names

    def write(self, part: int, pictures: Iterator[PictureFeatures]) -> None:
        """Write a part that this run claimed and let go of it; nothing is written when it was taken over meanwhile.

        Raises CacheError when the disk refuses it.
        """
        try:
            record = self._cache.write_part(
                part,
                pictures,
                self._claimed[part],
                worker=str(self._claims.process),
                before_publish=lambda: self._claims.require_ours(part),
            )
        except CacheError as error:
            if self._claims.still_ours(part):
                raise
            log.warning("%s", error)
            deque(pictures, maxlen=0)  # those of this part that are still to come
        else:
            self.done += 1
            self.bytes += sum(record.files.values())
            del self._claimed[part]
        self._claims.release(part)

    def _free(self) -> Iterator[int]:
        """Claim, one after the other and in order, the parts that nobody holds."""
        for part in sorted(self._open):
            if not self._cache.missing_sets(part, self._names):
                self._left_to_others(part)
            elif self._claims.claim(part):
                # Again: who had it a moment ago may have finished between the two questions.
                if missing := self._cache.missing_sets(part, self._names):
                    self._claimed[part] = missing
                    self._open.remove(part)
                    yield part
                else:
                    self._claims.release(part)
                    self._left_to_others(part)

    def _left_to_others(self, part: int) -> None:
        self._open.remove(part)
        self.pictures -= len(self._cache.part_rows(part))

    def _say_who_is_waited_for(self) -> None:
        holders = Counter(self._claims.holder(part) for part in self._open)
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
