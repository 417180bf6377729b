"""The record of a part: the small file that says a part of a feature set is written, and what is in it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from regionspot.cache.durable import is_sealed, seal, to_json, write_file
from regionspot.cache.schema import Failure


@dataclass(frozen=True)
class PartRecord:
    """What was written of one part.

    first_row, pictures, regions   which rows of the manifest it holds, and how many regions these have
    files                          bytes of each file, by its path inside the cache
    failures                       pictures that could not be read; their records are empty, their tokens zero
    worker, seconds                who wrote it and how long that took, for the run's own accounting
    """

    part: int
    first_row: int
    pictures: int
    regions: int
    files: dict[str, int]
    failures: tuple[Failure, ...]
    worker: str
    seconds: float

    def save(self, path: Path) -> None:
        write_file(path, to_json(seal(asdict(self))))


def load_record(path: Path) -> PartRecord:
    """Read a record. Raises ValueError when it is damaged, FileNotFoundError when the part is not written."""
    words = json.loads(path.read_bytes())
    if not is_sealed(words):
        raise ValueError("does not match its own checksum")
    del words["crc32c"]
    return PartRecord(**{**words, "failures": tuple(Failure(**failure) for failure in words["failures"])})
