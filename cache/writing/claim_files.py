"""Names and content of the claim files; claims.py describes the protocol."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import asdict, dataclass

import google_crc32c

from regionspot.cache.process import Process
from regionspot.cache.storage.atomic_files import from_json, is_sealed, seal, to_json
from regionspot.cache.storage.base import Storage

FOLDER = "claims"
_CLAIM = re.compile(r"(?P<key>[a-z0-9]+)(\.[0-9a-f]+)?\.json")
_RUN = re.compile(r"run-(?P<run>[0-9a-f]+)\.json")

ClaimKey = int | str  # a part number, or the name of something else


@dataclass(frozen=True)
class Claim:
    """Content of a claim file: the claim's id, its run's id, and the run's process."""

    id: str
    run: str
    process: Process

    def to_json(self) -> bytes:
        return to_json(seal(asdict(self)))


def claim_file(key: ClaimKey, after: str | None = None) -> str:
    """Path in the cache of the first claim of `key`, or of the one that took over from the claim `after`."""
    name = f"{key:05d}" if isinstance(key, int) else key
    return f"{FOLDER}/{name}.json" if after is None else f"{FOLDER}/{name}.{after}.json"


def heartbeat_file(run: str) -> str:
    """Path in the cache of a run's heartbeat."""
    return f"{FOLDER}/run-{run}.json"


def heartbeat(run: str, beat: int) -> bytes:
    """Content of a run's heartbeat file."""
    return to_json(seal({"run": run, "beat": beat}))


def list_claims(storage: Storage) -> tuple[dict[ClaimKey, set[str]], set[str]]:
    """Claim files by key, and the ids of runs that have a heartbeat file."""
    files: defaultdict[ClaimKey, set[str]] = defaultdict(set)
    runs: set[str] = set()
    for name in storage.list_files(FOLDER):
        if claim := _CLAIM.fullmatch(name):
            key = claim["key"]
            files[int(key) if key.isdigit() else key].add(f"{FOLDER}/{name}")
        elif run := _RUN.fullmatch(name):
            runs.add(run["run"])
    return files, runs


def read_chain(storage: Storage, key: ClaimKey) -> list[Claim]:
    """The chain of claims of `key`; the last one owns it. Empty if it is not claimed."""
    chain: list[Claim] = []
    while (claim := read_claim(storage, claim_file(key, chain[-1].id if chain else None))) is not None:
        chain.append(claim)
    return chain


def read_claim(storage: Storage, file: str) -> Claim | None:
    """Read a claim; None if the file does not exist."""
    data = read_if_exists(storage, file)
    if data is None:
        return None
    try:
        document = from_json(data)
        if is_sealed(document):
            return Claim(document["id"], document["run"], Process(**document["process"]))
    except (ValueError, KeyError, TypeError):
        pass
    # Damaged, or still incomplete on a file system without hard links. Its run has no heartbeat, so the claim times
    # out. The id must be the same for all readers.
    file_id = f"{google_crc32c.value(file.encode() + data):08x}"
    return Claim(file_id, file_id, Process("somebody", "", "", 0, 0))


def read_if_exists(storage: Storage, file: str) -> bytes | None:
    """Read a whole file; None if it does not exist."""
    try:
        return storage.read(file)
    except FileNotFoundError:
        return None
