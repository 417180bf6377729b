"""The location tokens that the method's authors published, one file an image, as a feature set of a cache.

    <image_id>.pth = {"mask_tokens": [N, 1, 256], "classes": [N] raw category ids}

They spare a run of SAM over millions of images, where they are of the very regions that the cache holds. The files do
not say which annotations they were made from, and the authors may have kept crowd, fake or tiny ones that a cache
leaves out. So every file is read and compared first, in number and classes. An image whose file differs is recorded as
failed, so that training leaves it out. Where more differ than fit, they are of other annotations altogether, and
nothing is written. Files are read without running what may hide in a pickle.
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
NAMED = 10  # images named when their files differ or are refused; more would bury the rest


@dataclass(frozen=True)
class ImportSummary:
    """What one import did.

    images      whose files were looked for
    missing       of these without a usable file, differing those whose file is of other regions; both are recorded as
                  failed
    parts_before  parts that were there already
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
        """One line for people."""
        if not self.parts:
            return f"nothing to do: the tokens of all {self.parts_before:,} parts are there"
        taken = self.images - self.failed
        words = [f"tokens of {taken:,} of {self.images:,} images in {self.parts:,} parts, {duration(self.seconds)}"]
        if self.missing:
            words.append(f"{self.missing:,} without a usable file")
        if self.differing:
            words.append(f"{self.differing:,} whose file is of other regions")
        if self.failed:
            words.append("these are recorded as failed, and training leaves them out")
        if self.parts_before:
            words.append(f"{self.parts_before:,} parts were there before")
        return "; ".join(words)


def imported_set() -> FeatureSet:
    """The feature set that the files become. The weights behind them are not stated, so none are."""
    provenance = {
        "model": SET_NAME,
        "source": "imported from the authors' token files",
        "token_slot": 0,
        "versions": {"regionspot": version("regionspot")},
    }
    return FeatureSet(SET_NAME, "token", (TOKEN_DIM,), "float16", provenance)


def import_tokens(folder: Path, address: str | Path, allow_missing: bool = False) -> ImportSummary:
    """Make the token files of `folder` a feature set of the cache at `address`, part by part.

    A file is named by the image's id or as the image. A run that was killed is resumed with the parts that are left.
    An image whose file is of other regions is recorded as failed; with `allow_missing` so is one whose file is missing
    or unusable, which is refused otherwise. What differs is told in the log, with examples.

    Raises InputError, after a line for each of the first, when files are missing or unusable, or when more differ from
    the regions of their image, in number or class, than fit; the cache is then as it was. Raises
    ProvenanceMismatchError when it has tokens of another origin under that name.
    """
    feature_set, cache = imported_set(), FeatureCache.open(address)
    pending = list(range(cache.n_parts))
    if SET_NAME in cache.feature_sets:
        require_same_features(str(address), cache.feature_sets[SET_NAME], feature_set)
        pending = cache.pending_parts([SET_NAME])
    files = TokenFolder(folder, cache.manifest)
    rows = [row for part in pending for row in cache.part_rows(part)]
    compared = _compare(files, rows)
    compared.check(allow_missing)
    cache = open_or_create(address, cache.manifest, [feature_set])
    progress = Progress(len(rows), "images")
    for part in pending:
        images = _images(files, cache.part_rows(part), compared.failures, progress)
        cache.write_part(part, images, [SET_NAME], f"{socket.gethostname()}:{os.getpid()}")
    return ImportSummary(
        images=len(rows),
        missing=len(compared.missing),
        differing=len(compared.differing),
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
class _Compared:
    """How the token files of some images compare with the regions that the cache has of them.

    fitting              files that are of the regions of their image
    missing, differing   why an image has no tokens, by row
    more, fewer          tokens that differing files have more, and fewer, than their images have regions
    """

    files: TokenFolder
    fitting: int = 0
    missing: dict[int, str] = field(default_factory=dict)
    differing: dict[int, str] = field(default_factory=dict)
    more: int = 0
    fewer: int = 0

    @property
    def failures(self) -> dict[int, str]:
        return {**self.missing, **self.differing}

    def check(self, allow_missing: bool) -> None:
        """Log what differs or is missing, with examples. Raises InputError where that is not allowed."""
        refused = []
        if self.missing:
            self._log(logging.WARNING if allow_missing else logging.ERROR, self.missing)
            if not allow_missing:
                refused.append(
                    f"{len(self.missing):,} are missing or unusable: complete the folder, or record their images as "
                    "failed with --allow-missing"
                )
        if self.differing:
            too_many = len(self.differing) > self.fitting
            self._log(logging.ERROR if too_many else logging.WARNING, self.differing)
            log.warning("%s: %s", self.files.folder, self._what_was_kept())
            if too_many:
                refused.append(
                    f"{len(self.differing):,} are of other regions than their images have and only {self.fitting:,} "
                    "fit: give those made from the annotations of this cache, or make tokens by `regionspot extract`"
                )
        if refused:
            raise InputError(f"{self.files.folder}: of the token files {'; '.join(refused)}; nothing was written")

    def _log(self, level: int, reasons: dict[int, str]) -> None:
        for row in sorted(reasons)[:NAMED]:
            log.log(level, "%s", reasons[row])
        if len(reasons) > NAMED:
            log.log(level, "... and %s others", f"{len(reasons) - NAMED:,}")

    def _what_was_kept(self) -> str:
        """Which annotations the authors kept that the cache leaves out, as far as their numbers tell."""
        dropped = {
            name.removeprefix("dropped_").replace("_", " "): count
            for name, count in self.files.report.items()
            if name.startswith("dropped_") and count
        }
        told = f"{len(self.differing):,} files differ: {self.more:,} tokens more than regions, {self.fewer:,} fewer"
        if not dropped:
            return f"{told}; the cache leaves out no annotation of its file, so they were made from another one"
        left_out = ", ".join(f"{count:,} {name}" for name, count in dropped.items())
        told += f"; of its annotations the cache leaves out {left_out}"
        subsets = chain.from_iterable(combinations(dropped, size) for size in range(1, len(dropped) + 1))
        fitting = [names for names in subsets if sum(dropped[name] for name in names) == self.more]
        if len(fitting) == 1 and not self.fewer:
            return f"{told}: the authors kept those that are {' or '.join(fitting[0])}, {self.more:,} in all"
        return f"{told}: these numbers do not tell which of them the authors kept"


def _compare(files: TokenFolder, rows: Sequence[int]) -> _Compared:
    compared = _Compared(files)
    progress = Progress(len(rows), "token files compared")
    for row in rows:
        try:
            compared.fitting += bool(len(files.tokens(row)))
        except DifferingError as error:
            compared.differing[row] = str(error)
            compared.more += max(error.more, 0)
            compared.fewer += max(-error.more, 0)
        except InputError as error:
            compared.missing[row] = str(error)
        progress.step()
    return compared


class DifferingError(InputError):
    """A token file is of other regions than its image has; `more` tokens than these, below 0 for fewer."""

    def __init__(self, message: str, more: int) -> None:
        super().__init__(message)
        self.more = more


class TokenFolder:
    """The token files of a manifest's images.

    report   what reading its annotations left out, by reason
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.report, self._manifest = folder, manifest.report, manifest
        self._ids = np.array([category.id for category in manifest.categories], np.int64)
        self._names = {category.id: category.name for category in manifest.categories}

    def tokens(self, row: int) -> NDArray[np.float32]:
        """float32 (N, 256): an image's tokens, one a region in the manifest's order; no file is needed for none.

        Raises DifferingError when the file is of other regions than the image's, InputError when it is missing, cannot
        be read, or holds something else or tokens that cannot be stored.
        """
        path = self._path(row)
        if path is None:
            path = self.folder / f"{self._manifest.image_ids[row]}.pth"
            if self._manifest.region_count[row]:
                raise InputError(f"{path}: is not there")
            return np.empty((0, TOKEN_DIM), np.float32)
        tokens, classes = read_token_file(path)
        self._require_same_regions(path, row, classes)
        with np.errstate(over="ignore"):
            if not np.isfinite(tokens.astype(np.float16)).all():
                raise InputError(f"{path}: holds tokens that are not finite, or too large for float16")
        return tokens

    def _path(self, row: int) -> Path | None:
        # OpenImages' ids are hexadecimal in its files' names, but numbers in a manifest.
        names = (str(self._manifest.image_ids[row]), Path(str(self._manifest.paths[row])).stem)
        return next((path for name in names if (path := self.folder / f"{name}.pth").exists()), None)

    def _require_same_regions(self, path: Path, row: int, classes: NDArray[np.int64]) -> None:
        indices = self._manifest.category_index[self._manifest.regions(row)]
        image = f"image {self._manifest.image_ids[row]} (row {row})"
        if len(classes) != len(indices):
            found = f"{path}: has {len(classes)} tokens, {image} has {len(indices)} regions"
            raise DifferingError(found + self._surplus(classes, indices), len(classes) - len(indices))
        known = np.flatnonzero(indices != NO_CATEGORY)
        differing = known[self._ids[indices[known]] != classes[known]]
        if len(differing):
            first = int(differing[0])
            raise DifferingError(
                f"{path}: {len(differing)} of {len(indices)} classes are not those of {image}; the first, of region "
                f"{first}, is {classes[first]}, expected {self._ids[indices[first]]}",
                0,
            )

    def _surplus(self, classes: NDArray[np.int64], indices: NDArray[np.int32]) -> str:
        """The classes that only one of the two has, in words; nothing where regions have no class."""
        if (indices == NO_CATEGORY).any():
            return ""
        theirs, ours = Counter(classes.tolist()), Counter(self._ids[indices].tolist())
        words = [
            f"{count} {self._names.get(category, f'of class {category}')} {word}"
            for counts, word in ((theirs - ours, "more"), (ours - theirs, "fewer"))
            for category, count in counts.items()
        ]
        return f": {', '.join(words)}"


def read_token_file(path: Path) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Tokens float32 (N, 256) and raw category ids int64 (N,) of one file, read without running anything in it.

    Raises InputError when it cannot be read or holds something else.
    """
    import torch  # needed for the files' format alone, and a second to import

    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # torch passes on whatever the bytes trip over: pickle, zip, end of file, unicode, ...
        raise InputError(f"{path}: is damaged, or holds more than tensors (code in it is never run)") from None
    try:
        tokens = torch.as_tensor(content["mask_tokens"]).float().numpy()
        classes = torch.as_tensor(content["classes"]).numpy().astype(np.int64).reshape(-1)
    except (KeyError, TypeError, ValueError, IndexError, RuntimeError):
        raise InputError(f"{path}: holds no mask_tokens and classes; expected a token file of the authors") from None
    if tokens.ndim != 3 or tokens.shape[1:] != (1, TOKEN_DIM) or len(tokens) != len(classes):
        raise InputError(
            f"{path}: mask_tokens are {tokens.shape} for {len(classes)} classes, expected (N, 1, {TOKEN_DIM}) for N"
        )
    return tokens[:, 0], classes
