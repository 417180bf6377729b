"""The made-up features that every reader and writer of the cache's benchmark handles, and how they get checked.

Each record is its own: normal numbers, and in its first row the digits of its number. Those survive int8 to the bit,
because the largest number of that row, and so its scale, is given. So a peer that mixes records up, or returns one
twice, is found by its checksums.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from regionspot.cache import Category, FeatureCache, FeatureSet, ImageFeatures, Manifest
from regionspot.cache.format.encodings import encode
from regionspot.cache.format.feature_dtypes import Statistics

PART = 512  # images, the cache's own default
BATCH = 64
REGIONS = 8  # an image
MAPS = "map"

_PATTERNS = 64  # distinct records, but for their first rows
_LARGEST_CODE = 127


@dataclass(frozen=True)
class Features:
    """A data set of `records` feature maps of `tokens` rows and `width` channels."""

    tokens: int
    width: int
    dtype: str
    records: int

    @property
    def name(self) -> str:
        return f"{self.tokens}x{self.width} {self.dtype}"

    @property
    def shape(self) -> tuple[int, int]:
        return self.tokens, self.width

    @property
    def stored(self) -> np.dtype[Any]:
        return self.feature_set.stored

    @property
    def gigabytes(self) -> float:
        """Of all records, as they are stored; the scales of int8, 0.2 % more, are not counted."""
        return self.records * self.tokens * self.width * self.stored.itemsize / 1e9

    @cached_property
    def feature_set(self) -> FeatureSet:
        statistics = (
            Statistics(np.zeros(self.width, np.float32), np.ones(self.width, np.float32))
            if self.dtype == "int8"
            else None
        )
        return FeatureSet(MAPS, "map", self.shape, self.dtype, statistics=statistics)

    @cached_property
    def _values(self) -> NDArray[np.float16]:
        rng = np.random.default_rng(0)
        return rng.standard_normal((_PATTERNS, *self.shape), dtype=np.float32).astype(np.float16)

    @cached_property
    def _patterns(self) -> NDArray[Any]:
        return np.stack([encode(values, self.feature_set)[0].copy() for values in self._values])

    def values(self, row: int) -> NDArray[np.float16]:
        """The features of an image, as a backbone would hand them to the cache."""
        return _numbered(self._values[row % _PATTERNS], row)

    def record(self, row: int) -> NDArray[Any]:
        """The same as they are stored, for the peers to store: they have no encodings of their own."""
        return _numbered(self._patterns[row % _PATTERNS], row)

    def all_records(self) -> Iterator[NDArray[Any]]:
        return (self.record(row) for row in range(self.records))

    @cached_property
    def checksums(self) -> list[int]:
        return sorted(google_crc32c.value(record) for record in self.all_records())


def _numbered(pattern: NDArray[Any], row: int) -> NDArray[Any]:
    record = pattern.copy()
    record[0] = 0
    record[0, :4] = row % 100, row // 100 % 100, row // 10_000, _LARGEST_CODE
    return record


def manifest_of(images: int, regions: int = REGIONS) -> Manifest:
    """A split of that many images with as many regions each."""
    total = images * regions
    return Manifest(
        dataset="made up",
        split="train",
        image_ids=np.arange(images, dtype=np.int64),
        paths=np.array([f"{row:08d}.jpg" for row in range(images)], dtype=np.dtypes.StringDType()),
        heights=np.full(images, 480, np.int32),
        widths=np.full(images, 640, np.int32),
        offsets=np.arange(images + 1, dtype=np.int64) * regions,
        boxes_xyxy=np.tile(np.array([10, 20, 110, 220], np.float32), (total, 1)),
        category_index=np.zeros(total, np.int32),
        annotation_ids=np.arange(total, dtype=np.int64),
        categories=(Category(1, "thing"),),
    )


def write_cache(path: Path, features: Features) -> FeatureCache:
    """The features as a cache of ours."""
    cache = FeatureCache.create(path, manifest_of(features.records), [features.feature_set], PART)
    for part in range(cache.n_parts):
        cache.write_part(part, (ImageFeatures(row, {MAPS: features.values(row)}) for row in cache.part_rows(part)))
    return cache


def write_raw(path: Path, features: Features) -> None:
    """The features as one file of records and nothing else."""
    with path.open("wb") as file:
        for record in features.all_records():
            file.write(record.data)


def files_under(path: Path) -> list[Path]:
    """The file itself, or every file below a folder."""
    return [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]


def warm(path: Path) -> None:
    """Bring files into the page cache: a kernel may have dropped what was not read for a minute or two."""
    buffer = memoryview(bytearray(8 << 20))
    for file_path in files_under(path):
        with file_path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def drop(path: Path) -> None:
    """Drop files from the page cache, once they are on disk. No process may hold a map of them."""
    for file_path in files_under(path):
        fd = os.open(file_path, os.O_RDONLY)
        try:
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def bytes_from_disk() -> int:
    """What the whole machine has read from its disks: workers count too, and so do other programs."""
    lines = Path("/proc/vmstat").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("pgpgin "))


def require_all(batches: Iterator[NDArray[Any]], features: Features, reader: str) -> None:
    """Raises ValueError unless the batches of an epoch hold every record exactly once, to the bit."""
    seen = sorted(google_crc32c.value(record) for batch in batches for record in np.ascontiguousarray(batch))
    if seen != features.checksums:
        common = len(set(seen) & set(features.checksums))
        raise ValueError(f"{reader}: {common} of {features.records} records came back whole, in {len(seen)} read")
