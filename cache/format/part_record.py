"""The record of a part: a small file whose existence marks the part as written, and which describes its content."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from itertools import accumulate, groupby
from typing import Any

import google_crc32c
import numpy as np

from regionspot.cache.format.compatibility import INFORMATIVE
from regionspot.cache.format.manifest import Manifest
from regionspot.cache.format.schema import Failure, FeatureSet, Geometry, checksum_file, part_files
from regionspot.cache.storage.atomic_files import IMAGES_KEY, from_json, is_sealed_file, rename_key, seal, to_json
from regionspot.cache.storage.base import Storage


@dataclass(frozen=True)
class PartRecord:
    """One part of one feature set, as written.

    first_row, images, regions   the manifest rows it holds, and their number of regions
    files                        bytes of each file, by its path inside the cache
    checksums                    crc32c of the files that hold the checksums of all data in the part
    failures                     images that could not be read; their records are empty, their tokens zero
    worker, seconds              the process that wrote it and how long that took
    account                      additional data of the run that wrote it; may be empty
    identity                     `part_identity`; None in records of earlier versions
    batches                      (batch size, number of batches) in row order: (8, 64) is 64 batches of 8 images.
                                 Rounding depends on it. () if unknown
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
        """The rows of each batch; [] if unknown."""
        sizes = [size for size, count in self.batches for _ in range(count)]
        starts = accumulate(sizes, initial=self.first_row)
        return [range(start, start + size) for start, size in zip(starts, sizes, strict=False)]

    def save(self, storage: Storage, name: str) -> None:
        storage.write(name, self.to_json())

    def to_json(self) -> bytes:
        """The content of the file."""
        return to_json(seal(rename_key(asdict(self), "images", IMAGES_KEY)))


class PartIndex:
    """Checks part records of one feature set against the header and the manifest.

    manifest   None if it is damaged: facts that depend on it are then not checked
    """

    def __init__(self, feature_set: FeatureSet, geometry: Geometry, manifest: Manifest | None) -> None:
        self._feature_set, self._geometry, self._manifest = feature_set, geometry, manifest
        self._set_crc = set_crc(feature_set)

    def misfit(self, part: int, record: PartRecord) -> str | None:
        """What is wrong with a part's record, as text to put after its file name; None if it fits."""
        rows, manifest = self._geometry.rows(part), self._manifest
        failed_rows = [failure.row for failure in record.failures]
        facts: list[tuple[str, Any, Any]] = [
            ("part", record.part, part),
            ("first_row", record.first_row, rows.start),
            ("images", record.images, len(rows)),
            ("files", sorted(record.files), sorted(part_files(self._feature_set, part))),
            ("checksums", sorted(record.checksums), [checksum_file(self._feature_set, part)]),
            ("rows that failed", failed_rows, sorted(set(failed_rows) & set(rows))),
        ]
        if record.batches:
            facts.append(("images in batches", sum(size * count for size, count in record.batches), len(rows)))
        if manifest is not None:
            facts.append(("regions", record.regions, int(manifest.offsets[rows.stop] - manifest.offsets[rows.start])))
            failures = [failure for failure in record.failures if failure.row in rows]
            paths = [str(manifest.paths[failure.row]) for failure in failures]
            facts.append(("images that failed", [failure.path for failure in failures], paths))
        for name, value, expected in facts:
            if value != expected:
                return f"{name}: found {value}, expected {expected}"
        if manifest is not None and record.identity not in (None, part_identity(rows, manifest, self._set_crc)):
            return "was written for other images, boxes or backbones: it belongs to another cache"
        return None


def set_crc(feature_set: FeatureSet) -> int:
    """crc32c of everything that determines a feature set's bytes, except the images."""
    document = feature_set.to_json()
    fields = {name: document[name] for name in ("name", "kind", "shape", "dtype", "compression", "statistics")}
    provenance = {name: value for name, value in feature_set.provenance.items() if name not in INFORMATIVE}
    return int(google_crc32c.value(to_json({**fields, "provenance": provenance})))


def part_identity(rows: range, manifest: Manifest, set_crc: int) -> int:
    """crc32c of everything that determines a part's bytes: its feature set, and its images and boxes in order.

    It detects files of another cache with the same shapes, for example after copying one folder over another was
    interrupted: their own checksums are all correct.
    """
    crc, images = set_crc, slice(rows.start, rows.stop)
    regions = slice(int(manifest.offsets[rows.start]), int(manifest.offsets[rows.stop]))
    counts = np.diff(manifest.offsets[rows.start : rows.stop + 1])
    for column in (manifest.image_ids[images], counts, manifest.boxes_xyxy[regions]):
        crc = google_crc32c.extend(crc, np.ascontiguousarray(column).tobytes())
    return int(crc)


def batches_of_sizes(sizes: Iterable[int | None]) -> tuple[tuple[int, int], ...]:
    """`PartRecord.batches` from the batch size of each row; () if a size is unknown or inconsistent."""
    batches = []
    for size, rows in groupby(sizes):
        count = len(list(rows))
        if size is None or count % size:
            return ()
        batches.append((size, count // size))
    return tuple(batches)


def load_record(storage: Storage, name: str) -> PartRecord:
    """Read a record. Raises ValueError if it is damaged, FileNotFoundError if the part is not written."""
    return parse_record(storage.read(name))


def parse_record(data: bytes) -> PartRecord:
    """Parse `PartRecord.to_json`; unknown fields of later versions are ignored.

    Raises ValueError if it is damaged or lacks a field.
    """
    if not is_sealed_file(data):
        raise ValueError("does not match its own checksum")
    try:
        document = from_json(data)
        failures = tuple(Failure(**_known_fields(Failure, failure)) for failure in document["failures"])
        batches = tuple((size, count) for size, count in document.get("batches", ()))
        return PartRecord(**{**_known_fields(PartRecord, document), "failures": failures, "batches": batches})
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise ValueError(f"is not a part record: {error}") from None


def _known_fields(kind: type[Any], document: dict[str, Any]) -> dict[str, Any]:
    document = rename_key(document, IMAGES_KEY, "images")
    return {field.name: document[field.name] for field in fields(kind) if field.name in document}
