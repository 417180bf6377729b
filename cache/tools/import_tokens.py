"""Imports the location tokens that the method's authors published, one file per image, as a feature set.

    <image_id>.pth = {"mask_tokens": [N, 1, 256], "classes": [N] raw category ids}

This saves running SAM on millions of images, if the tokens belong to the regions of the cache. The files do not say
which annotations they were made from, and the authors may have kept crowd, fake or tiny ones that a cache drops. So all
files are first compared with the manifest, by number and classes. An image whose file differs is recorded as failed,
and training skips it. If more files differ than match, they belong to other annotations, and nothing is written. Files
are read without executing pickled code.
"""

from __future__ import annotations

import logging
import os
import socket
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import chain, combinations
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from regionspot.cache.errors import InputError
from regionspot.cache.format.compatibility import require_same_features
from regionspot.cache.format.manifest import NO_CATEGORY, Manifest
from regionspot.cache.format.schema import FeatureSet, ImageFeatures
from regionspot.cache.progress import Progress, duration
from regionspot.cache.store import FeatureCache
from regionspot.cache.tools.resume import open_or_create

log = logging.getLogger(__name__)

SET_NAME = "sam_vit_b"  # the authors' localizer
TOKEN_DIM = 256  # width of SAM's mask decoder (segment_anything/build_sam.py)
MAX_LISTED = 10  # differing or refused files that are logged; the rest are counted


@dataclass(frozen=True)
class ImportSummary:
    """Result of `import_tokens`.

    images        images of the imported parts
    missing       of these, without a usable file; recorded as failed
    differing     of these, with a file for other regions; recorded as failed
    parts_before  parts that were already present
    """

    images: int
    missing: int
    differing: int
    parts: int
    parts_before: int
    seconds: float

    @property
    def failed(self) -> int:
        return self.missing + self.differing

    def text(self) -> str:
        """A one-line summary."""
        if not self.parts:
            return f"nothing to do: all {self.parts_before:,} parts have tokens"
        imported = self.images - self.failed
        phrases = [
            f"tokens of {imported:,} of {self.images:,} images in {self.parts:,} parts, {duration(self.seconds)}"
        ]
        if self.missing:
            phrases.append(f"{self.missing:,} without a usable file")
        if self.differing:
            phrases.append(f"{self.differing:,} whose file has other regions")
        if self.failed:
            phrases.append("these are recorded as failed, and training skips them")
        if self.parts_before:
            phrases.append(f"{self.parts_before:,} parts were already present")
        return "; ".join(phrases)


def imported_set() -> FeatureSet:
    """The feature set of imported tokens. Its weights are unknown, so its provenance has none."""
    provenance = {
        "model": SET_NAME,
        "source": "imported from the authors' token files",
        "token_slot": 0,
        "versions": {"regionspot": version("regionspot")},
    }
    return FeatureSet(SET_NAME, "token", (TOKEN_DIM,), "float16", provenance)


def import_tokens(folder: Path, address: str | Path, allow_missing: bool = False) -> ImportSummary:
    """Import the token files of `folder` as a feature set of the cache at `address`, part by part; resumable.

    A file is named like the image's id or file. An image whose file has other regions is recorded as failed, and with
    `allow_missing` also one whose file is missing or unusable. The first such files are logged.

    Raises InputError, with the cache unchanged, if files are missing or unusable, or if more files differ from the
    regions of their image, in number or class, than match. Raises ProvenanceMismatchError if the cache has tokens of
    another origin under that name.
    """
    feature_set, cache = imported_set(), FeatureCache.open(address)
    pending = list(range(cache.n_parts))
    if SET_NAME in cache.feature_sets:
        require_same_features(str(address), cache.feature_sets[SET_NAME], feature_set)
        pending = cache.pending_parts([SET_NAME])
    files = TokenFolder(folder, cache.manifest)
    rows = [row for part in pending for row in cache.part_rows(part)]
    comparison = _compare(files, rows)
    comparison.check(allow_missing)
    cache = open_or_create(address, cache.manifest, [feature_set])
    progress = Progress(len(rows), "images")
    for part in pending:
        images = _images(files, cache.part_rows(part), comparison.failures, progress)
        cache.write_part(part, images, [SET_NAME], f"{socket.gethostname()}:{os.getpid()}")
    return ImportSummary(
        images=len(rows),
        missing=len(comparison.missing),
        differing=len(comparison.differing),
        parts=len(pending),
        parts_before=cache.n_parts - len(pending),
        seconds=progress.seconds,
    )


def _images(
    files: TokenFolder, rows: Iterable[int], failures: Mapping[int, str], progress: Progress
) -> Iterator[ImageFeatures]:
    for row in rows:
        if row in failures:
            yield ImageFeatures(row, {}, failures[row])
        else:
            yield ImageFeatures(row, {SET_NAME: files.tokens(row)})
        progress.step()


@dataclass
class _Comparison:
    """Token files compared with the regions in the manifest.

    matching             number of files that match the regions of their image
    missing, differing   reason why an image has no tokens, by row
    more, fewer          total surplus and shortage of tokens in differing files
    """

    files: TokenFolder
    matching: int = 0
    missing: dict[int, str] = field(default_factory=dict)
    differing: dict[int, str] = field(default_factory=dict)
    more: int = 0
    fewer: int = 0

    @property
    def failures(self) -> dict[int, str]:
        return {**self.missing, **self.differing}

    def check(self, allow_missing: bool) -> None:
        """Log missing and differing files, with examples. Raises InputError if they are not allowed."""
        errors = []
        if self.missing:
            self._log(logging.WARNING if allow_missing else logging.ERROR, self.missing)
            if not allow_missing:
                errors.append(
                    f"{len(self.missing):,} are missing or unusable: complete the folder, or record their images as "
                    "failed with --allow-missing"
                )
        if self.differing:
            too_many = len(self.differing) > self.matching
            self._log(logging.ERROR if too_many else logging.WARNING, self.differing)
            log.warning("%s: %s", self.files.folder, self._guess_kept_annotations())
            if too_many:
                errors.append(
                    f"{len(self.differing):,} have other regions than their images and only {self.matching:,} "
                    "match: give files made from this cache's annotations, or run `regionspot extract`"
                )
        if errors:
            raise InputError(f"{self.files.folder}: of the token files {'; '.join(errors)}; nothing was written")

    def _log(self, level: int, reasons: dict[int, str]) -> None:
        for row in sorted(reasons)[:MAX_LISTED]:
            log.log(level, "%s", reasons[row])
        if len(reasons) > MAX_LISTED:
            log.log(level, "... and %s others", f"{len(reasons) - MAX_LISTED:,}")

    def _guess_kept_annotations(self) -> str:
        """Which annotations the authors kept that the cache drops, guessed from their numbers."""
        dropped = {
            name.removeprefix("dropped_").replace("_", " "): count
            for name, count in self.files.report.items()
            if name.startswith("dropped_") and count
        }
        message = f"{len(self.differing):,} files differ: {self.more:,} tokens more than regions, {self.fewer:,} fewer"
        if not dropped:
            return f"{message}; the cache dropped no annotation, so they were made from another annotation file"
        left_out = ", ".join(f"{count:,} {name}" for name, count in dropped.items())
        message += f"; the cache dropped these annotations: {left_out}"
        subsets = chain.from_iterable(combinations(dropped, size) for size in range(1, len(dropped) + 1))
        candidates = [names for names in subsets if sum(dropped[name] for name in names) == self.more]
        if len(candidates) == 1 and not self.fewer:
            return f"{message}: the authors kept those that are {' or '.join(candidates[0])}, {self.more:,} in total"
        return f"{message}: these numbers do not show which of them the authors kept"


def _compare(files: TokenFolder, rows: Sequence[int]) -> _Comparison:
    comparison = _Comparison(files)
    progress = Progress(len(rows), "token files compared")
    for row in rows:
        try:
            comparison.matching += bool(len(files.tokens(row)))
        except RegionMismatchError as error:
            comparison.differing[row] = str(error)
            comparison.more += max(error.more, 0)
            comparison.fewer += max(-error.more, 0)
        except InputError as error:
            comparison.missing[row] = str(error)
        progress.step()
    return comparison


class RegionMismatchError(InputError):
    """A token file has other regions than its image; `more` tokens, negative for fewer."""

    def __init__(self, message: str, more: int) -> None:
        super().__init__(message)
        self.more = more


class TokenFolder:
    """The token files of a manifest's images.

    report   number of dropped annotations by reason, from the manifest
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.report, self._manifest = folder, manifest.report, manifest
        self._ids = np.array([category.id for category in manifest.categories], np.int64)
        self._names = {category.id: category.name for category in manifest.categories}

    def tokens(self, row: int) -> NDArray[np.float32]:
        """float32 (N, 256): an image's tokens, in the order of its regions. An image without regions needs no file.

        Raises RegionMismatchError if the file has other regions, InputError if it is missing, unreadable, has another
        content, or tokens that overflow float16.
        """
        path = self._path(row)
        if path is None:
            path = self.folder / f"{self._manifest.image_ids[row]}.pth"
            if self._manifest.region_count[row]:
                raise InputError(f"{path}: is missing")
            return np.empty((0, TOKEN_DIM), np.float32)
        tokens, classes = read_token_file(path)
        self._require_same_regions(path, row, classes)
        with np.errstate(over="ignore"):
            if not np.isfinite(tokens.astype(np.float16)).all():
                raise InputError(f"{path}: has tokens that are not finite, or too large for float16")
        return tokens

    def _path(self, row: int) -> Path | None:
        # OpenImages uses hexadecimal ids in file names, a manifest has integers.
        names = (str(self._manifest.image_ids[row]), Path(str(self._manifest.paths[row])).stem)
        return next((path for name in names if (path := self.folder / f"{name}.pth").exists()), None)

    def _require_same_regions(self, path: Path, row: int, classes: NDArray[np.int64]) -> None:
        indices = self._manifest.category_index[self._manifest.regions(row)]
        image = f"image {self._manifest.image_ids[row]} (row {row})"
        if len(classes) != len(indices):
            message = f"{path}: has {len(classes)} tokens, {image} has {len(indices)} regions"
            raise RegionMismatchError(message + self._surplus(classes, indices), len(classes) - len(indices))
        known = np.flatnonzero(indices != NO_CATEGORY)
        differing = known[self._ids[indices[known]] != classes[known]]
        if len(differing):
            first = int(differing[0])
            raise RegionMismatchError(
                f"{path}: {len(differing)} of {len(indices)} classes are not those of {image}; the first, of region "
                f"{first}, is {classes[first]}, expected {self._ids[indices[first]]}",
                0,
            )

    def _surplus(self, classes: NDArray[np.int64], indices: NDArray[np.int32]) -> str:
        """The classes that only one of the two has; empty if regions have no class."""
        if (indices == NO_CATEGORY).any():
            return ""
        theirs, ours = Counter(classes.tolist()), Counter(self._ids[indices].tolist())
        phrases = [
            f"{count} {self._names.get(category, f'of class {category}')} {kind}"
            for counts, kind in ((theirs - ours, "more"), (ours - theirs, "fewer"))
            for category, count in counts.items()
        ]
        return f": {', '.join(phrases)}"


def read_token_file(path: Path) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Read tokens float32 (N, 256) and raw category ids int64 (N,) of one file, without executing pickled code.

    Raises InputError if it is unreadable or has another content.
    """
    import torch  # imported on demand: takes a second, and only this file format needs it

    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # errors of pickle, zip, unicode, ...
        raise InputError(f"{path}: is damaged, or has more than tensors (its code is never executed)") from None
    try:
        tokens = torch.as_tensor(content["mask_tokens"]).float().numpy()
        classes = torch.as_tensor(content["classes"]).numpy().astype(np.int64).reshape(-1)
    except (KeyError, TypeError, ValueError, IndexError, RuntimeError):
        raise InputError(f"{path}: has no mask_tokens and classes; expected a token file of the authors") from None
    if tokens.ndim != 3 or tokens.shape[1:] != (1, TOKEN_DIM) or len(tokens) != len(classes):
        raise InputError(
            f"{path}: mask_tokens are {tokens.shape} for {len(classes)} classes, expected (N, 1, {TOKEN_DIM}) for N"
        )
    return tokens[:, 0], classes
