"""The files in which runs say what they are working on: their names and their words. What they mean is in claims.py."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import asdict, dataclass

import google_crc32c

from regionspot.cache.process import Process
from regionspot.cache.storage.atomic_files import from_json, is_sealed, seal, to_json
from regionspot.cache.storage.base import Storage

FOLDER = "claims"
_CLAIM = re.compile(r"(?P<what>[a-z0-9]+)(\.[0-9a-f]+)?\.json")
_RUN = re.compile(r"run-(?P<run>[0-9a-f]+)\.json")

What = int | str  # what is claimed: a part, or anything by its name


@dataclass(frozen=True)
class Claim:
    """A claim as it lies in its file: its own id, that of its run, and the run's process."""

    id: str
    run: str
    process: Process

    def to_json(self) -> bytes:
        return to_json(seal(asdict(self)))


def claim_file(what: What, after: str | None = None) -> str:
    """Path inside the cache of the first claim of something, or of the one that took over from the claim `after`."""
    name = f"{what:05d}" if isinstance(what, int) else what
    return f"{FOLDER}/{name}.json" if after is None else f"{FOLDER}/{name}.{after}.json"


def run_file(run: str) -> str:
    """Path inside the cache of a run's counter."""
    return f"{FOLDER}/run-{run}.json"


def counter(run: str, beat: int) -> bytes:
    """The words of a run's counter."""
    return to_json(seal({"run": run, "beat": beat}))


def list_claims(storage: Storage) -> tuple[dict[What, set[str]], set[str]]:
    """The claims' files by what they claim, and the runs that have a counter."""
    found: defaultdict[What, set[str]] = defaultdict(set)
    runs: set[str] = set()
    for name in storage.list_files(FOLDER):
        if claim := _CLAIM.fullmatch(name):
            word = claim["what"]
            found[int(word) if word.isdigit() else word].add(f"{FOLDER}/{name}")
        elif run := _RUN.fullmatch(name):
            runs.add(run["run"])
    return found, runs


def read_chain(storage: Storage, what: What) -> list[Claim]:
    """The claims of something, from the first to the one that holds it; none where nobody does."""
    chain: list[Claim] = []
    while (claim := read_claim(storage, claim_file(what, chain[-1].id if chain else None))) is not None:
        chain.append(claim)
    return chain


def read_claim(storage: Storage, file: str) -> Claim | None:
    """The claim in a file; None where there is no such file."""
    data = read_if_there(storage, file)
    if data is None:
        return None
    try:
        words = from_json(data)
        if is_sealed(words):
            return Claim(words["id"], words["run"], Process(**words["process"]))
    except (ValueError, KeyError, TypeError):
        pass
    # Damaged, or not whole yet where the file system has no links: of a run that shows no beat, so it is dead after a
    # while. Any id will do that all runs agree on.
    mark = f"{google_crc32c.value(file.encode() + data):08x}"
    return Claim(mark, mark, Process("somebody", "", "", 0, 0))


def read_if_there(storage: Storage, file: str) -> bytes | None:
    """A whole file; None where there is none."""
    try:
        return storage.read(file)
    except FileNotFoundError:
        return None
