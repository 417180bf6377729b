"""Several runs on one cache at once: which of them is working on what.

    claims/00042.json              the claim of part 42: a claim's id, its run and process
    claims/00042.<claim id>.json   the claim that took over from the one with that id
    claims/run-<run id>.json       a counter that the run moves on every HEARTBEAT_SECONDS for as long as it lives

**One wins.** A claim is written once, under a name that one writer gets (`Storage.write_new`), and never changed. A
part's claims form a chain: the first, the one that took over from it, and so on; the last one holds the part. Who
takes over writes the next link, whose name only one can get. Ids are never used again, so a link that comes late, after
all of its chain was let go, belongs to nobody. Whoever lets go removes the first link first: with it the part is free
at once, and the other links mean nothing any more.

**Dead is who stands still.** Clocks of machines are never compared, nor does a clock that is set back matter: whoever
meets another's claim watches that run's counter by its own monotonic clock, and counts the run as dead when the
counter has stood still for CLAIM_SECONDS. A process of the same machine that is gone is dead at once. The counter is
not in the claims because a run that slept would then write over the claim of the one that took over.

**A run that slept** (SIGSTOP, a laptop closed, a disk that hung) and wakes up after it was taken over finds that out
by `require_owned`, which is asked when a part is complete, right before it is published. What is left is a run that
falls asleep after that question, before the last rename, for longer than CLAIM_SECONDS. It then gives names to files
that it wrote alone, under names of its own: the same bytes as the other run's, where their machines compute alike.
Where these round differently and it dies halfway, a mixture stays behind. The checksums in the part's record tell it
from a part: it is found when it is read or verified, and made again after `cache repair`. A run that sleeps that long
inside `release` removes the claim of whoever took the part over, who therefore gives it up instead of publishing it.
"""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType

from regionspot.cache.errors import CacheError
from regionspot.cache.process import Process, this_process
from regionspot.cache.storage.base import Storage
from regionspot.cache.writing.claim_files import (
    FOLDER,
    Claim,
    What,
    claim_file,
    counter,
    list_claims,
    read_chain,
    read_claim,
    read_if_there,
    run_file,
)

log = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 15.0
# Eight beats. A machine may see another's files as they were up to a minute ago (nfs(5): acregmax, acdirmax).
CLAIM_SECONDS = 120.0


@dataclass(frozen=True)
class _Held:
    """A claim of this run. `chain` holds the ids of its chain from the first to its own, `files` their files."""

    chain: tuple[str, ...]
    files: tuple[str, ...]
    next_file: str


class Claims:
    """What this run claims of a cache. Use it in a `with`: leaving it lets go of everything.

    take_over    count every claim that is there now as dead: for when the other run is known to be gone. If it
                 is not, the two do the same parts at the same time, until it finds out and leaves them
    dead_after   seconds without a beat after which another run counts as dead
    heartbeat_seconds   seconds between this run's own beats

    Safe to use from several threads: what one of them has claimed, no other one gets before it is released, which is
    for whoever got it alone. What is claimed is a part, or anything by its name (lower-case letters). Methods raise
    CacheError where the store refuses.
    """

    def __init__(
        self,
        storage: Storage,
        *,
        take_over: bool = False,
        dead_after: float = CLAIM_SECONDS,
        heartbeat_seconds: float = HEARTBEAT_SECONDS,
    ) -> None:
        self.dead_after, self.heartbeat_seconds = dead_after, heartbeat_seconds
        self.process, self.run = this_process(), uuid.uuid4().hex
        self._storage, self._take_over = storage, take_over
        self._lock = threading.Lock()
        self._claiming: set[What] = set()  # what a thread of this run is reaching for
        self._held: dict[What, _Held] = {}
        self._watched: dict[str, tuple[bytes | None, float]] = {}
        self._stop = threading.Event()
        self._heart = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def __enter__(self) -> Claims:
        with self._store_errors():
            self._storage.remove_abandoned(FOLDER)
            self._sweep(self._take_over)
        self._heart.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._heart.join()
        for what in list(self._held):
            self.release(what)
        try:
            self._sweep()
            self._storage.remove(run_file(self.run))
        except OSError as failure:
            log.warning("%s: %s/ could not be tidied up: %s", self._storage.address, FOLDER, failure)

    def claim(self, what: What) -> bool:
        """Make something this run's own; False when a run that is alive has it, also when it is this one.

        Ask afterwards whether it still needs to be done: who had it before may just have finished it.
        """
        with self._store_errors():
            return self._claim(what)

    def wait_for(self, what: What) -> None:
        """`claim` it as soon as nobody has it."""
        while not self.claim(what):
            holder = self.holder(what) or "another run"
            log.info("%s: waiting until %s lets go of %s", self._storage.address, holder, in_words(what))
            time.sleep(self.heartbeat_seconds / 5)

    def require_owned(self, what: What) -> None:
        """Raises CacheError when another run has taken over what this one claimed."""
        if not self.is_owned(what):
            holder = self.holder(what)
            raise CacheError(
                f"{self._storage.address}: {in_words(what)} was taken over by {holder or 'another run'} while this run "
                "stood still; it is left to that run"
            )

    def is_owned(self, what: What) -> bool:
        """Whether what this run claimed has not been taken over by another."""
        with self._store_errors():
            held = self._held.get(what)
            return held is not None and self._holds(held)

    def holder(self, what: What) -> Process | None:
        """Who has it now; None when nobody has."""
        with self._store_errors():
            chain = read_chain(self._storage, what)
            return chain[-1].process if chain else None

    def claims_of_others(self) -> dict[What, Process]:
        """What other runs hold now, and who. Of a run that died elsewhere nobody knows yet that it is dead."""
        with self._store_errors():
            found, _ = list_claims(self._storage)
        held = {what: self.holder(what) for what in found}
        return {what: process for what, process in held.items() if process and what not in self._held}

    def release(self, what: What) -> None:
        """Let go of it; does nothing where another run has taken it over, or it never was this run's.

        A store that refuses is only said in the log: what was done is done, and the claim ends with the run.
        """
        held = self._held.get(what)
        if held is None:
            return
        try:
            if self._holds(held):
                for file in held.files:  # the first link first: without it nobody takes the others for a chain
                    self._storage.remove(file)
            else:
                self._remove_stray(held)
        except OSError as failure:
            log.warning("%s: the claim of %s stays until this run ends: %s", self._storage.address, what, failure)
        finally:
            del self._held[what]

    def _claim(self, what: What, by_force: bool = False) -> bool:
        with self._lock:
            if what in self._claiming or what in self._held:
                return False
            self._claiming.add(what)
        try:
            return self._write_claim(what, by_force)
        finally:
            self._claiming.remove(what)

    def _write_claim(self, what: What, by_force: bool) -> bool:
        chain = read_chain(self._storage, what)
        if chain and not (by_force or self._is_dead(chain[-1])):
            return False
        mine = Claim(uuid.uuid4().hex, self.run, self.process)
        ids = tuple(claim.id for claim in (*chain, mine))
        files = tuple(claim_file(what, after) for after in (None, *ids[:-1]))
        held = self._held[what] = _Held(ids, files, claim_file(what, mine.id))
        self._storage.write_new(files[-1], mine.to_json())
        # Asked whatever write_new said: its answer may have been lost on the way and the question repeated.
        if not self._holds(held):
            self.release(what)
            return False
        if chain:
            log.warning("%s: took over %s from %s", self._storage.address, in_words(what), chain[-1].process)
        return True

    def _holds(self, held: _Held) -> bool:
        """Whether a claim of this run is the last link of a chain that nobody has let go of.

        The next link is asked for before the first: the first is removed before any other, so if it is still there
        afterwards, the next link was not merely gone already.
        """
        if self._storage.exists(held.next_file):
            return False
        return self._id_in(held.files[-1]) == held.chain[-1] and self._id_in(held.files[0]) == held.chain[0]

    def _remove_stray(self, held: _Held) -> None:
        """Remove a link that this run wrote after the rest of its chain was let go of."""
        if self._id_in(held.files[-1]) == held.chain[-1] and self._id_in(held.files[0]) != held.chain[0]:
            self._storage.remove(held.files[-1])

    def _id_in(self, file: str) -> str | None:
        claim = read_claim(self._storage, file)
        return None if claim is None else claim.id

    def _is_dead(self, claim: Claim) -> bool:
        if claim.process.is_gone():
            return True
        # The clock before the counter: if this run slept between the two, it would hold its own sleep against others.
        now = time.monotonic()
        beat = read_if_there(self._storage, run_file(claim.run))
        seen, since = self._watched.setdefault(claim.run, (beat, now))
        # A counter that is not there has not moved: runs remove the files of others that hold nothing.
        if beat is not None and beat != seen:
            self._watched[claim.run] = (beat, now)
            return False
        return now - since >= self.dead_after

    def _beat(self) -> None:
        beat = 0
        while True:
            try:
                self._storage.write(run_file(self.run), counter(self.run, beat))
            except OSError as error:  # the next beat may succeed; if none does, require_owned will say so
                log.warning("%s: could not show that this run lives: %s", self._storage.address, error)
            beat += 1
            if self._stop.wait(self.heartbeat_seconds):
                return

    def _sweep(self, by_force: bool = False) -> None:
        """Remove what dead runs left: claims, links that belong to no chain, counters of runs that claim nothing."""
        found, runs = list_claims(self._storage)
        at_work = {self.run}
        for what, files in found.items():
            chain = read_chain(self._storage, what)
            for file in files - {claim_file(what, after) for after in (None, *(claim.id for claim in chain))}:
                self._storage.remove(file)
            if chain and what not in self._held and self._claim(what, by_force):
                self.release(what)
            else:
                at_work |= {claim.run for claim in chain}
        for run in runs - at_work:  # one that lives writes its counter again with the next beat
            self._storage.remove(run_file(run))

    @contextmanager
    def _store_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise CacheError(
                f"{self._storage.address}: {FOLDER}/ cannot be used: {error.strerror or error}; "
                "mend the disk or its permissions and run the same command again"
            ) from error


def in_words(what: What) -> str:
    """What is claimed, as messages call it."""
    return f"part {what}" if isinstance(what, int) else what
