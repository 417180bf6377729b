"""What a split holds, what reading it dropped and which of its images are not on the disk."""

from __future__ import annotations

import os
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

import numpy as np

from regionspot.cache.format.manifest import Manifest

FIRST_MISSING = 5  # missing images that are named
_LISTED = 3  # entries of a folder that are named
_SEARCHED = 2000  # folders beside the right one that are looked into for a missing image


@dataclass(frozen=True)
class DatasetReport:
    """Counts of one split. `missing_images` is None where the disk was not looked at."""

    dataset: str
    split: str
    images: int
    regions: int
    categories: int
    median_regions: float
    max_regions: int
    images_without_regions: int
    counts: dict[str, int]
    remarks: tuple[str, ...]
    image_folder: Path
    missing_images: int | None
    first_missing: tuple[str, ...]
    hint: str

    def text(self) -> str:
        """A few lines for people."""
        lines = [
            f"{self.dataset} {self.split}: {self.images:,} images, {self.regions:,} regions, "
            f"{self.categories:,} categories",
            f"regions an image: median {self.median_regions:g}, at most {self.max_regions:,}; "
            f"{self.images_without_regions:,} images have none",
            *(f"{name.replace('_', ' ')}: {count:,}" for name, count in sorted(self.counts.items())),
            *self.remarks,
        ]
        if self.missing_images is not None:
            lines.append(self.images_text())
        return "\n".join(lines)

    def images_text(self) -> str:
        """Where the images are, or which are not, and where they may be."""
        if not self.missing_images:
            return f"images: all in {self.image_folder}"
        more = ", ..." if self.missing_images > len(self.first_missing) else ""
        named = ", ".join(self.first_missing)
        hint = f"; {self.hint}" if self.hint else ""
        return f"images: {self.missing_images:,} are not in {self.image_folder}: {named}{more}{hint}"


def describe(manifest: Manifest, image_folder: Path, check_images: bool = True) -> DatasetReport:
    """Count what the manifest holds and, with `check_images`, which of its images `image_folder` lacks."""
    counts = manifest.region_count
    missing = missing_images(manifest, image_folder) if check_images else None
    return DatasetReport(
        dataset=manifest.dataset,
        split=manifest.split,
        images=len(manifest),
        regions=len(manifest.boxes_xyxy),
        categories=len(manifest.categories),
        median_regions=float(np.median(counts)) if len(counts) else 0.0,
        max_regions=int(counts.max(initial=0)),
        images_without_regions=int((counts == 0).sum()),
        counts=dict(manifest.report),
        remarks=manifest.remarks,
        image_folder=image_folder,
        missing_images=None if missing is None else len(missing),
        first_missing=tuple((missing or [])[:FIRST_MISSING]),
        hint=where_it_may_be(image_folder, missing[0]) if missing else "",
    )


def missing_images(manifest: Manifest, image_folder: Path) -> list[str]:
    """Paths of the manifest that are not on the disk, in its order. One listing a folder, not a look-up an image."""
    wanted: defaultdict[str, list[str]] = defaultdict(list)
    for path in manifest.paths.tolist():
        wanted[path.rpartition("/")[0]].append(path)
    absent: set[str] = set()
    for folder, paths in wanted.items():
        names = _names(image_folder / folder)
        absent.update(path for path in paths if path.rpartition("/")[2] not in names)
    return [path for path in manifest.paths.tolist() if path in absent]


def where_it_may_be(image_folder: Path, path: str) -> str:
    """What a missing image is called or where it lies instead, in words; "" where nothing like it is found."""
    if (decoded := unquote(path)) != path and os.path.exists(image_folder / decoded):
        return f"{decoded} is there: the annotations have its name URL-encoded; decode it"
    stated = PurePosixPath(path)
    here = _names(image_folder / stated.parent)
    alike = [name for name in here if PurePosixPath(name).stem.lower() == stated.stem.lower()]
    if alike:
        return f"{min(alike)} is there; write the name as the disk has it"
    for folder in _folders_around(image_folder, stated):
        if os.path.exists(folder / stated.name):
            return f"{stated.name} lies in {folder}, not in {image_folder / stated.parent}; mend the paths or move it"
    if not here:
        return f"{image_folder / stated.parent} {contents(image_folder / stated.parent)}"
    return ""


def contents(folder: Path) -> str:
    """What is in a folder, in words: "holds a.jpg, b.jpg and 4 more"."""
    if not folder.is_dir():
        return "does not exist"
    names = sorted(f"{entry.name}/" if entry.is_dir() else entry.name for entry in os.scandir(folder))
    names = [name for name in names if not name.startswith(".")]
    more = f" and {len(names) - _LISTED:,} more" if len(names) > _LISTED else ""
    return f"holds {', '.join(names[:_LISTED])}{more}" if names else "is empty"


def _folders_around(image_folder: Path, stated: PurePosixPath) -> list[Path]:
    """Where an image may lie instead: the other patches of Objects365, the folder itself or one further up."""
    around = [image_folder, image_folder.parent, image_folder / stated.parent / "..", *image_folder.glob("*/")]
    return [folder for folder in around if folder != image_folder / stated.parent][:_SEARCHED]


def _names(folder: Path) -> set[str]:
    try:
        with os.scandir(folder) as entries:
            return {entry.name for entry in entries}
    except OSError:
        return set()
