"""The record of a part: the small file that says a part of a feature set is written, and what is in it."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from regionspot.cache.durable import from_json, is_sealed, seal, to_json
from regionspot.cache.schema import Failure
from regionspot.cache.storage import Storage


@dataclass(frozen=True)
class PartRecord:
    """What was written of one part.

    first_row, pictures, regions   which rows of the manifest it holds, and how many regions these have
    files                          bytes of each file, by its path inside the cache
    checksums                      crc32c of the files that hold the records' checksums: through them, of all the part
    failures                       pictures that could not be read; their records are empty, their tokens zero
    worker, seconds                who wrote it and how long that took, for the run's own accounting
    """

    part: int
    first_row: int
    pictures: int
    regions: int
    files: dict[str, int]
    checksums: dict[str, int]
    failures: tuple[Failure, ...]
    worker: str
    seconds: float

    def save(self, storage: Storage, name: str) -> None:
        storage.write(name, self.to_json())

    def to_json(self) -> bytes:
        """The record as it lies on disk."""
        return to_json(seal(asdict(self)))


def load_record(storage: Storage, name: str) -> PartRecord:
    """Read a record. Raises ValueError when it is damaged, FileNotFoundError when the part is not written."""
    return parse_record(storage.read(name))


def parse_record(data: bytes) -> PartRecord:
    """The record that `to_json` wrote. Raises ValueError when it is damaged."""
    words = from_json(data)
    if not is_sealed(words):
        raise ValueError("does not match its own checksum")
    del words["crc32c"]
    return PartRecord(**{**words, "failures": tuple(Failure(**failure) for failure in words["failures"])})
