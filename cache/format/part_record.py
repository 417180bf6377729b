"""The record of a part: the small file that says a part of a feature set is written, and what is in it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from itertools import accumulate, groupby
from typing import Any

import google_crc32c
import numpy as np

from regionspot.cache.format.compatibility import UNDECISIVE
from regionspot.cache.format.manifest import Manifest
from regionspot.cache.format.schema import Failure, FeatureSet, Geometry, checksum_file, part_files
from regionspot.cache.storage.atomic_files import IMAGES_KEY, from_json, is_sealed, rename_key, seal, to_json
from regionspot.cache.storage.base import Storage


@dataclass(frozen=True)
class PartRecord:
    """What was written of one part.

    first_row, images, regions   which rows of the manifest it holds, and how many regions these have
    files                          bytes of each file, by its path inside the cache
    checksums                      crc32c of the files that hold the records' checksums: through them, of all the part
    failures                       images that could not be read; their records are empty, their tokens zero
    worker, seconds                who wrote it and how long that took
    account                        what else the run that wrote it keeps for its own accounting; may be empty
    identity                       `part_identity` of what it was written for; None in records of earlier versions
    batches                        how its images were computed together, in row order: (8, 64) is 64 batches of 8.
                                   Rounding depends on it. () where it is not known
    """

    part: int
    first_row: int
    images: int
    regions: int
    files: dict[str, int]
    checksums: dict[str, int]
    failures: tuple[Failure, ...]
    worker: str
    seconds: float
    account: dict[str, Any] = field(default_factory=dict)
    identity: int | None = None
    batches: tuple[tuple[int, int], ...] = ()

    def batch_rows(self) -> list[range]:
        """The rows of each batch; [] where they are not known."""
        sizes = [size for size, count in self.batches for _ in range(count)]
        starts = accumulate(sizes, initial=self.first_row)
        return [range(start, start + size) for start, size in zip(starts, sizes, strict=False)]

    def save(self, storage: Storage, name: str) -> None:
        storage.write(name, self.to_json())

    def to_json(self) -> bytes:
        """The record as it lies on disk."""
        return to_json(seal(rename_key(asdict(self), "images", IMAGES_KEY)))


class PartIndex:
    """What the header and the manifest say of the parts of one feature set, for their records to be held against.

    manifest   None where it is damaged: what a record says of it is then taken as it is
    """

    def __init__(self, feature_set: FeatureSet, geometry: Geometry, manifest: Manifest | None) -> None:
        self._feature_set, self._geometry, self._manifest = feature_set, geometry, manifest
        self._set_crc = set_crc(feature_set)

    def misfit(self, part: int, record: PartRecord) -> str | None:
        """What is wrong with the record of a part, in words that follow on its file's name; None where it fits."""
        rows, manifest = self._geometry.rows(part), self._manifest
        failed = [failure.row for failure in record.failures]
        facts: list[tuple[str, Any, Any]] = [
            ("part", record.part, part),
            ("first_row", record.first_row, rows.start),
            (IMAGES_KEY, record.images, len(rows)),
            ("files", sorted(record.files), sorted(part_files(self._feature_set, part))),
            ("checksums", sorted(record.checksums), [checksum_file(self._feature_set, part)]),
            ("rows that failed", failed, sorted(set(failed) & set(rows))),
        ]
        if record.batches:
            facts.append(("images in batches", sum(size * count for size, count in record.batches), len(rows)))
        if manifest is not None:
            facts.append(("regions", record.regions, int(manifest.offsets[rows.stop] - manifest.offsets[rows.start])))
            there = [failure for failure in record.failures if failure.row in rows]
            paths = [str(manifest.paths[failure.row]) for failure in there]
            facts.append(("images that failed", [failure.path for failure in there], paths))
        for name, found, expected in facts:
            if found != expected:
                return f"{name}: found {found}, expected {expected}"
        if manifest is not None and record.identity not in (None, part_identity(rows, manifest, self._set_crc)):
            return "was written for other images, boxes or backbones than this cache is of: a part of another cache"
        return None


def set_crc(feature_set: FeatureSet) -> int:
    """crc32c of all that decides a feature set's bytes but the images."""
    words = feature_set.to_json()
    decides = {name: words[name] for name in ("name", "kind", "shape", "dtype", "compression", "statistics")}
    provenance = {name: value for name, value in feature_set.provenance.items() if name not in UNDECISIVE}
    return int(google_crc32c.value(to_json({**decides, "provenance": provenance})))


def part_identity(rows: range, manifest: Manifest, set_crc: int) -> int:
    """crc32c of all that decides a part's bytes: its feature set, and its images and boxes in their order.

    A part's files that came from another cache of the same shapes, as an interrupted copy of one folder over another
    leaves them, are told by it: every checksum in them is right.
    """
    crc, some = set_crc, slice(rows.start, rows.stop)
    regions = slice(int(manifest.offsets[rows.start]), int(manifest.offsets[rows.stop]))
    for column in (manifest.image_ids[some], manifest.region_count[some], manifest.boxes_xyxy[regions]):
        crc = google_crc32c.extend(crc, np.ascontiguousarray(column).tobytes())
    return int(crc)


def batches_of_sizes(sizes: Iterable[int | None]) -> tuple[tuple[int, int], ...]:
    """`PartRecord.batches`, from how many images each row was computed together with; () where that cannot be told."""
    batches = []
    for size, rows in groupby(sizes):
        count = len(list(rows))
        if size is None or count % size:
            return ()
        batches.append((size, count // size))
    return tuple(batches)


def load_record(storage: Storage, name: str) -> PartRecord:
    """Read a record. Raises ValueError when it is damaged, FileNotFoundError when the part is not written."""
    return parse_record(storage.read(name))


def parse_record(data: bytes) -> PartRecord:
    """The record that `to_json` wrote, here or in a later version, whose further fields are left out.

    Raises ValueError when it is damaged or lacks a field.
    """
    try:
        words = from_json(data)
    except ValueError:
        words = None
    if not is_sealed(words) or to_json(words) != data:
        raise ValueError("does not match its own checksum")
    try:
        failures = tuple(Failure(**_known(Failure, failure)) for failure in words["failures"])
        batches = tuple((size, count) for size, count in words.get("batches", ()))
        return PartRecord(**{**_known(PartRecord, words), "failures": failures, "batches": batches})
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise ValueError(f"is no record of a part: {error}") from None


def _known(kind: type[Any], words: dict[str, Any]) -> dict[str, Any]:
    words = rename_key(words, IMAGES_KEY, "images")
    return {each.name: words[each.name] for each in fields(kind) if each.name in words}
