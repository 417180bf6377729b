"""Who does which part next, when there are many workers: decided here, without network, clock or thread.

Every worker holds at most a few parts; the others wait here, so a worker that dies, freezes or is slow holds nothing up
but these. When no part is left to begin with, those that take much longer than parts usually do are offered once more,
to a worker that has nothing to do: whoever is done first wins, the other one finds that out and leaves it.

A worker that fails a part (its disk is full, it lacks the photos) gets no more, and the part goes to another one. That
it fails there too is the part's or everybody's trouble, and ends the run.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import median

from regionspot.cache.errors import CacheError

# A part is slow when it takes this many times as long as the median of the latest: batches and pictures differ by less.
SLOW = 2.0
LATEST = 101
LEAST_SLOW_SECONDS = 1.0  # nothing is gained by doing less than that twice
HANDS = 2  # parts a worker holds: one is decoded, or its files flushed, while the other one keeps the GPU busy
# Parts that outlived so many workers are what killed them. Two may be chance: a machine dies with all of its workers.
DEATHS = 4
HELD_SECONDS = 5.0  # until a part that another run holds is asked for again


@dataclass(frozen=True)
class Offer:
    """A part that a worker was given. `again`: others may be at work on it and it is done all the same."""

    number: int
    part: int
    worker: str
    since: float
    again: bool


class Dealer:
    """Deals `parts` out to workers and learns what became of each. Times are seconds of any one monotonic clock.

    done     parts that are finished, by whomever
    in_hand  offers that were given and not answered, by their number
    asides   workers that get no more, and why
    """

    def __init__(self, parts: Iterable[int]) -> None:
        self._waiting = deque(parts)
        self._total = len(self._waiting)
        self._later: deque[tuple[float, int]] = deque()
        self._hands: dict[str, int] = {}
        self._given = 0
        self._latest: deque[float] = deque(maxlen=LATEST)
        self._deaths: Counter[int] = Counter()
        self._failed_on: defaultdict[int, dict[str, str]] = defaultdict(dict)
        self._again: set[int] = set()
        self.done: set[int] = set()
        self.in_hand: dict[int, Offer] = {}
        self.asides: dict[str, str] = {}

    @property
    def finished(self) -> bool:
        """Whether every part is done; slower runs of some may still be under way."""
        return len(self.done) == self._total

    @property
    def workers(self) -> int:
        """Workers that are there and get parts."""
        return len(self._hands.keys() - self.asides.keys())

    def workers_are(self, threads: Mapping[str, int]) -> list[Offer]:
        """Say which workers there are, with the number of their threads; the offers of those that are gone.

        Raises CacheError for a part that was under way in too many workers that died.
        """
        self._hands = {worker: min(HANDS, count) for worker, count in threads.items()}
        gone = [offer for offer in self.in_hand.values() if offer.worker not in self._hands]
        for offer in gone:
            self._deaths[offer.part] += 1
            if self._deaths[offer.part] >= DEATHS:
                raise CacheError(
                    f"part {offer.part}: {DEATHS} workers died in turn while at work on it, the last {offer.worker}; "
                    "look at their logs (memory?), then run the same command again"
                )
            self._again.add(offer.part)  # its claim may stand for a while: the worker is dead for the scheduler alone
            self._give_back(offer)
        return gone

    def next_offer(self, now: float) -> Offer | None:
        """The next part for the worker with most room; None where none is to be given now."""
        while self._later and self._later[0][0] <= now:
            self._waiting.append(self._later.popleft()[1])
        held = Counter(offer.worker for offer in self.in_hand.values())
        room = {worker: held[worker] for worker, hands in self._hands.items() if held[worker] < hands}
        for worker in sorted(room, key=room.__getitem__):
            if worker in self.asides:
                continue
            part = self._fresh_part() if self._waiting else self._slow_part(worker, now)
            if part is not None:
                return self._give(part, worker, now)
        return None

    def is_done(self, offer: Offer, now: float) -> None:
        """The part is finished, by this worker or another run."""
        self.in_hand.pop(offer.number, None)
        self.done.add(offer.part)
        self._latest.append(now - offer.since)

    def is_left(self, offer: Offer) -> None:
        """The worker found that another one took the part over."""
        self._give_back(offer)

    def is_held(self, offer: Offer, now: float) -> None:
        """Another run has the part: it is asked for again a little later."""
        self.in_hand.pop(offer.number, None)
        if not self._is_cared_for(offer.part):
            self._later.append((now + HELD_SECONDS, offer.part))

    def has_failed(self, offer: Offer, message: str) -> None:
        """The worker could not do it. Raises CacheError, with `message`, when there is nobody else to try."""
        self.asides[offer.worker] = message
        failures = self._failed_on[offer.part]
        failures[offer.worker] = message
        if offer.part in self.done:
            self.in_hand.pop(offer.number, None)
        elif len(failures) > 1:
            raise CacheError(f"{message} (likewise on {len(failures) - 1} other worker)")
        elif not self.workers and len(self._hands) > 1:
            raise CacheError(f"{message} (no worker is left that has not failed)")
        elif not self.workers:
            raise CacheError(message)
        else:
            self._give_back(offer)

    def _give(self, part: int, worker: str, now: float) -> Offer:
        self._given += 1
        again = part in self._again or bool(self._holders(part))
        offer = Offer(self._given, part, worker, now, again)
        self.in_hand[offer.number] = offer
        return offer

    def _give_back(self, offer: Offer) -> None:
        self.in_hand.pop(offer.number, None)
        if not self._is_cared_for(offer.part):
            self._waiting.appendleft(offer.part)

    def _is_cared_for(self, part: int) -> bool:
        waiting = part in self._waiting or any(part == later for _, later in self._later)
        return part in self.done or waiting or bool(self._holders(part))

    def _holders(self, part: int) -> list[Offer]:
        return [offer for offer in self.in_hand.values() if offer.part == part]

    def _fresh_part(self) -> int | None:
        return self._waiting.popleft()

    def _slow_part(self, worker: str, now: float) -> int | None:
        """The part that has been under way for longest without an end in sight, if this worker is not at it itself."""
        if not self._latest:
            return None
        patience = max(SLOW * median(self._latest), LEAST_SLOW_SECONDS)
        newest: dict[int, float] = {}
        for offer in self.in_hand.values():
            if offer.part not in self.done:
                newest[offer.part] = max(offer.since, newest.get(offer.part, offer.since))
        mine = {offer.part for offer in self.in_hand.values() if offer.worker == worker}
        slow = [part for part, since in newest.items() if part not in mine and now - since > patience]
        return min(slow, key=newest.__getitem__, default=None)
