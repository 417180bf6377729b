"""What a split holds, what reading it dropped and which of its photos are not on the disk."""

from __future__ import annotations

import os
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from regionspot.cache.manifest import Manifest

FIRST_MISSING = 5  # missing photos that are named


@dataclass(frozen=True)
class DatasetReport:
    """Counts of one split. `missing_photos` is None where the disk was not looked at."""

    dataset: str
    split: str
    pictures: int
    regions: int
    categories: int
    median_regions: float
    max_regions: int
    pictures_without_regions: int
    counts: dict[str, int]
    photo_folder: Path
    missing_photos: int | None
    first_missing: tuple[str, ...]

    def text(self) -> str:
        """A few lines for people."""
        lines = [
            f"{self.dataset} {self.split}: {self.pictures:,} pictures, {self.regions:,} regions, "
            f"{self.categories:,} categories",
            f"regions a picture: median {self.median_regions:g}, at most {self.max_regions:,}; "
            f"{self.pictures_without_regions:,} pictures have none",
            *(f"{name.replace('_', ' ')}: {count:,}" for name, count in sorted(self.counts.items())),
        ]
        if self.missing_photos is not None:
            lines.append(self._photos_text())
        return "\n".join(lines)

    def _photos_text(self) -> str:
        if not self.missing_photos:
            return f"photos: all in {self.photo_folder}"
        more = ", ..." if self.missing_photos > len(self.first_missing) else ""
        named = ", ".join(self.first_missing)
        return f"photos: {self.missing_photos:,} are not in {self.photo_folder}: {named}{more}"


def describe(manifest: Manifest, photo_folder: Path, check_photos: bool = True) -> DatasetReport:
    """Count what the manifest holds and, with `check_photos`, which of its photos `photo_folder` lacks."""
    counts = manifest.region_count
    missing = missing_photos(manifest, photo_folder) if check_photos else None
    return DatasetReport(
        dataset=manifest.dataset,
        split=manifest.split,
        pictures=len(manifest),
        regions=len(manifest.boxes_xyxy),
        categories=len(manifest.categories),
        median_regions=float(np.median(counts)) if len(counts) else 0.0,
        max_regions=int(counts.max(initial=0)),
        pictures_without_regions=int((counts == 0).sum()),
        counts=dict(manifest.report),
        photo_folder=photo_folder,
        missing_photos=None if missing is None else len(missing),
        first_missing=tuple((missing or [])[:FIRST_MISSING]),
    )


def missing_photos(manifest: Manifest, photo_folder: Path) -> list[str]:
    """Paths of the manifest that are not on the disk, in its order. One listing a folder, not a look-up a photo."""
    wanted: defaultdict[str, list[str]] = defaultdict(list)
    for path in manifest.paths.tolist():
        wanted[path.rpartition("/")[0]].append(path)
    absent: set[str] = set()
    for folder, paths in wanted.items():
        names = _names(photo_folder / folder)
        absent.update(path for path in paths if path.rpartition("/")[2] not in names)
    return [path for path in manifest.paths.tolist() if path in absent]


def _names(folder: Path) -> set[str]:
    try:
        with os.scandir(folder) as entries:
            return {entry.name for entry in entries}
    except (FileNotFoundError, NotADirectoryError):
        return set()
