"""Claims: several runs can extract into one cache at once, each part by one of them.

    claims/00042.json              claim of part 42: id of the claim, its run and process
    claims/00042.<claim id>.json   claim that took over from the one with that id
    claims/run-<run id>.json       heartbeat: a counter that its run increments every HEARTBEAT_SECONDS

**One winner.** A claim file is created exclusively (`Storage.write_new`) and never changed. The claims of a part form a
chain: the first one, the one that took over from it, and so on; the last one owns the part. Taking over means creating
the next link, which only one run can do. Ids are never reused, so a link created after its chain was released belongs
to nobody. A release removes the first link first: that frees the part at once and makes the other links invalid.

**A run is dead when its heartbeat stops for CLAIM_SECONDS.** A waiting run watches the other run's counter with its own
monotonic clock; clocks of different machines are never compared. A process of the same machine that no longer exists is
dead at once. The heartbeat is not in the claim file, because a run that was suspended would overwrite the claim of the
run that took over.

**A run that was suspended** (SIGSTOP, a closed laptop, a hanging disk) and was taken over detects that by
`require_owned` right before it publishes a part. What remains is a run that is suspended between that check and its
last rename for longer than CLAIM_SECONDS. It then publishes files that it wrote alone: the same bytes as those of the
other run if their machines compute alike. If they round differently and the run dies halfway, the part's files are
mixed; they do not match the checksums in the part's record, so reading or `verify` reports it, and `cache repair` drops
it. A run that is suspended that long inside `release` removes the claim of the run that took over, which then gives the
part up instead of publishing it.
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
    ClaimKey,
    claim_file,
    heartbeat,
    heartbeat_file,
    list_claims,
    read_chain,
    read_claim,
    read_if_exists,
)

log = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 15.0
# Eight heartbeats. NFS may show another machine's files as they were a minute ago (nfs(5): acregmax, acdirmax).
CLAIM_SECONDS = 120.0


@dataclass(frozen=True)
class _OwnClaim:
    """A claim of this run: ids and files of its chain up to its own, and the file that would take over from it."""

    chain: tuple[str, ...]
    files: tuple[str, ...]
    next_file: str


class Claims:
    """Claims of this run in a cache. A context manager: leaving it releases all of them.

    take_over           treat all existing claims as dead, for when the other run is known to be gone. If it is alive,
                        both do the same parts until it notices and gives them up
    dead_after          seconds without a heartbeat after which another run is dead
    heartbeat_seconds   interval of this run's heartbeat

    Thread-safe: a key claimed by one thread is refused to the others until it releases it. A key is a part number or a
    name in lower-case letters. Methods raise CacheError if the storage fails.
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
        self._claiming: set[ClaimKey] = set()  # keys that threads of this run are claiming
        self._own: dict[ClaimKey, _OwnClaim] = {}
        self._heartbeats: dict[str, tuple[bytes | None, float]] = {}  # last change seen, by run
        self._stop = threading.Event()
        self._heartbeat = threading.Thread(target=self._write_heartbeats, name="heartbeat", daemon=True)

    def __enter__(self) -> Claims:
        with self._storage_errors():
            self._storage.remove_abandoned(FOLDER)
            self._sweep(self._take_over)
        self._heartbeat.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._heartbeat.join()
        for key in list(self._own):
            self.release(key)
        try:
            self._sweep()
            self._storage.remove(heartbeat_file(self.run))
        except OSError as failure:
            log.warning("%s: %s/ could not be cleaned up: %s", self._storage.address, FOLDER, failure)

    def claim(self, key: ClaimKey) -> bool:
        """Claim a key; False if a live run owns it, including this one.

        Check afterwards whether the work is still pending: the previous owner may just have finished it.
        """
        with self._storage_errors():
            return self._claim(key)

    def wait_for(self, key: ClaimKey) -> None:
        """Claim a key, waiting until it is free."""
        while not self.claim(key):
            owner = self.owner(key) or "another run"
            log.info("%s: waiting for %s to release %s", self._storage.address, owner, _describe(key))
            time.sleep(self.heartbeat_seconds / 5)

    def require_owned(self, key: ClaimKey) -> None:
        """Raises CacheError if another run has taken over this run's claim."""
        if not self.is_owned(key):
            owner = self.owner(key) or "another run"
            raise CacheError(
                f"{self._storage.address}: {_describe(key)} was taken over by {owner} while this run was suspended; "
                "that run finishes it"
            )

    def is_owned(self, key: ClaimKey) -> bool:
        """Whether this run still owns a key that it claimed."""
        with self._storage_errors():
            claim = self._own.get(key)
            return claim is not None and self._is_last(claim)

    def owner(self, key: ClaimKey) -> Process | None:
        """The process that owns a key; None if it is free."""
        with self._storage_errors():
            chain = read_chain(self._storage, key)
            return chain[-1].process if chain else None

    def claims_of_others(self) -> dict[ClaimKey, Process]:
        """Claimed keys of other runs and their owners, including runs that died on other machines."""
        with self._storage_errors():
            files, _ = list_claims(self._storage)
        owners = {key: self.owner(key) for key in files}
        return {key: process for key, process in owners.items() if process and key not in self._own}

    def release(self, key: ClaimKey) -> None:
        """Release a key, if this run owns it.

        A failure of the storage is only logged: the work is done, and the claim ends with the run.
        """
        claim = self._own.get(key)
        if claim is None:
            return
        try:
            if self._is_last(claim):
                for file in claim.files:  # the first link first: without it the others are not a chain
                    self._storage.remove(file)
            else:
                self._remove_orphan(claim)
        except OSError as failure:
            log.warning("%s: the claim of %s stays until this run ends: %s", self._storage.address, key, failure)
        finally:
            with self._lock:  # another thread may have released it meanwhile, and claimed it again
                if self._own.get(key) is claim:
                    del self._own[key]

    def _claim(self, key: ClaimKey, by_force: bool = False) -> bool:
        with self._lock:
            if key in self._claiming or key in self._own:
                return False
            self._claiming.add(key)
        try:
            return self._write_claim(key, by_force)
        finally:
            self._claiming.remove(key)

    def _write_claim(self, key: ClaimKey, by_force: bool) -> bool:
        chain = read_chain(self._storage, key)
        # A claim of this run that it does not hold: releasing it failed.
        if chain and not (by_force or chain[-1].run == self.run or self._is_dead(chain[-1])):
            return False
        mine = Claim(uuid.uuid4().hex, self.run, self.process)
        ids = tuple(claim.id for claim in (*chain, mine))
        files = tuple(claim_file(key, after) for after in (None, *ids[:-1]))
        claim = self._own[key] = _OwnClaim(ids, files, claim_file(key, mine.id))
        written = False
        try:
            self._storage.write_new(files[-1], mine.to_json())
            # Checked whatever write_new returned: its response may have been lost and the request repeated.
            written = self._is_last(claim)
        finally:  # also when the storage failed: a key that stays in `_own` is refused to this run until it ends
            if not written:
                self.release(key)
        if not written:
            return False
        if chain and chain[-1].run != self.run:
            log.warning("%s: took over %s from %s", self._storage.address, _describe(key), chain[-1].process)
        return True

    def _is_last(self, claim: _OwnClaim) -> bool:
        """Whether a claim of this run is the last link of a chain that was not released.

        Reads the next link before the first: a release removes the first link first, so if that still exists, the next
        link did not exist either, rather than being removed already.
        """
        if self._storage.exists(claim.next_file):
            return False
        return self._id_in(claim.files[-1]) == claim.chain[-1] and self._id_in(claim.files[0]) == claim.chain[0]

    def _remove_orphan(self, claim: _OwnClaim) -> None:
        """Remove a link that this run wrote after the rest of its chain was released."""
        if self._id_in(claim.files[-1]) == claim.chain[-1] and self._id_in(claim.files[0]) != claim.chain[0]:
            self._storage.remove(claim.files[-1])

    def _id_in(self, file: str) -> str | None:
        claim = read_claim(self._storage, file)
        return None if claim is None else claim.id

    def _is_dead(self, claim: Claim) -> bool:
        if claim.process.is_gone():
            return True
        # Read the clock first: otherwise a suspension of this run in between would count against the other run.
        now = time.monotonic()
        beat = read_if_exists(self._storage, heartbeat_file(claim.run))
        seen, since = self._heartbeats.setdefault(claim.run, (beat, now))
        # A missing file is no heartbeat: runs remove the files of runs without claims.
        if beat is not None and beat != seen:
            self._heartbeats[claim.run] = (beat, now)
            return False
        return now - since >= self.dead_after

    def _write_heartbeats(self) -> None:
        beat = 0
        while True:
            try:
                self._storage.write(heartbeat_file(self.run), heartbeat(self.run, beat))
            except OSError as error:  # the next one may succeed; if none does, require_owned raises
                log.warning("%s: could not write the heartbeat: %s", self._storage.address, error)
            beat += 1
            if self._stop.wait(self.heartbeat_seconds):
                return

    def _sweep(self, by_force: bool = False) -> None:
        """Remove files of dead runs: claims, links without a chain, heartbeats of runs without claims."""
        files_of, runs = list_claims(self._storage)
        alive = {self.run}
        for key, files in files_of.items():
            chain = read_chain(self._storage, key)
            for file in files - {claim_file(key, after) for after in (None, *(claim.id for claim in chain))}:
                self._storage.remove(file)
            if chain and key not in self._own and self._claim(key, by_force):
                self.release(key)
            else:
                alive |= {claim.run for claim in chain}
        for run in runs - alive:  # a live one writes its file again
            self._storage.remove(heartbeat_file(run))

    @contextmanager
    def _storage_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise CacheError(
                f"{self._storage.address}: {FOLDER}/ cannot be used: {error.strerror or error}; "
                "fix the disk or its permissions and run the same command again"
            ) from error


def _describe(key: ClaimKey) -> str:
    return f"part {key}" if isinstance(key, int) else key
