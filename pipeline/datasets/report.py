"""Report what a split contains, what its reader dropped, and which image files are missing."""

from __future__ import annotations

import os
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

import numpy as np

from regionspot.cache.format.manifest import Manifest

FIRST_MISSING = 5  # missing images that are named
_MAX_LISTED = 3  # folder entries that are named
_MAX_SEARCHED = 2000  # other folders that are searched for a missing image


@dataclass(frozen=True)
class DatasetReport:
    """Counts of one split. `missing_images` is None if the disk was not checked."""

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
        """The report as a few lines of text."""
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
        """Where the images are, or which are missing and where they may be."""
        if not self.missing_images:
            return f"images: all in {self.image_folder}"
        more = ", ..." if self.missing_images > len(self.first_missing) else ""
        examples = ", ".join(self.first_missing)
        hint = f"; {self.hint}" if self.hint else ""
        return f"images: {self.missing_images:,} are not in {self.image_folder}: {examples}{more}{hint}"


def describe(manifest: Manifest, image_folder: Path, check_images: bool = True) -> DatasetReport:
    """Report on a manifest and, with `check_images`, on the images that are missing in `image_folder`."""
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
        hint=suggest_location(image_folder, missing[0]) if missing else "",
    )


def missing_images(manifest: Manifest, image_folder: Path) -> list[str]:
    """The manifest's paths that do not exist, in its order. Lists each folder once instead of checking each image."""
    by_folder: defaultdict[str, list[str]] = defaultdict(list)
    for path in manifest.paths.tolist():
        by_folder[path.rpartition("/")[0]].append(path)
    missing: set[str] = set()
    for folder, paths in by_folder.items():
        names = _names(image_folder / folder)
        missing.update(path for path in paths if path.rpartition("/")[2] not in names)
    return [path for path in manifest.paths.tolist() if path in missing]


def suggest_location(image_folder: Path, path: str) -> str:
    """A hint at another name or folder of a missing image; "" if nothing similar is found."""
    if (decoded := unquote(path)) != path and os.path.exists(image_folder / decoded):
        return f"{decoded} exists: the annotations have its name URL-encoded; decode it"
    stated = PurePosixPath(path)
    names = _names(image_folder / stated.parent)
    similar = [name for name in names if PurePosixPath(name).stem.lower() == stated.stem.lower()]
    if similar:
        return f"{min(similar)} exists; change the name in the annotations"
    for folder in _other_folders(image_folder, stated):
        if os.path.exists(folder / stated.name):
            return f"{stated.name} is in {folder}, not in {image_folder / stated.parent}; correct the paths or move it"
    if not names:
        return f"{image_folder / stated.parent} {describe_contents(image_folder / stated.parent)}"
    return ""


def describe_contents(folder: Path) -> str:
    """ "contains a.jpg, b.jpg and 4 more", "is empty" or "does not exist"."""
    if not folder.is_dir():
        return "does not exist"
    names = sorted(f"{entry.name}/" if entry.is_dir() else entry.name for entry in os.scandir(folder))
    names = [name for name in names if not name.startswith(".")]
    more = f" and {len(names) - _MAX_LISTED:,} more" if len(names) > _MAX_LISTED else ""
    return f"contains {', '.join(names[:_MAX_LISTED])}{more}" if names else "is empty"


def _other_folders(image_folder: Path, stated: PurePosixPath) -> list[Path]:
    """Other folders that may contain an image: other patches of Objects365, the image folder, or its parent."""
    folders = [image_folder, image_folder.parent, image_folder / stated.parent / "..", *image_folder.glob("*/")]
    return [folder for folder in folders if folder != image_folder / stated.parent][:_MAX_SEARCHED]


def _names(folder: Path) -> set[str]:
    try:
        with os.scandir(folder) as entries:
            return {entry.name for entry in entries}
    except OSError:
        return set()
