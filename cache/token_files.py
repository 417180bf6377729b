"""The location tokens that the method's authors published, one file a picture, as a feature set of a cache.

    <image_id>.pth = {"mask_tokens": [N, 1, 256], "classes": [N] raw category ids}

They spare a run of SAM over millions of photos, if they are those of the very regions that the cache holds. So every
file is read and compared first, and nothing is written unless all fit. Files are read without running what may hide
in a pickle.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from regionspot.cache.compatibility import require_same_features
from regionspot.cache.errors import InputError
from regionspot.cache.manifest import NO_CATEGORY, Manifest
from regionspot.cache.progress import Progress, duration
from regionspot.cache.schema import FeatureSet, PictureFeatures
from regionspot.cache.store import FeatureCache

log = logging.getLogger(__name__)

SET_NAME = "sam_vit_b"  # the authors' localizer
TOKEN_DIM = 256  # width of SAM's mask decoder (segment_anything/build_sam.py)
NAMED = 10  # pictures named when files are refused; more would bury them


@dataclass(frozen=True)
class ImportSummary:
    """What one import did. `failed` pictures had no file that could be read; `parts_before` were there already."""

    pictures: int
    failed: int
    parts: int
    parts_before: int
    seconds: float

    def text(self) -> str:
        """One line for people."""
        if not self.parts:
            return f"nothing to do: the tokens of all {self.parts_before:,} parts are there"
        before = f"; {self.parts_before:,} parts were there before" if self.parts_before else ""
        failed = f"; {self.failed:,} without a file that can be read" if self.failed else ""
        return f"tokens of {self.pictures:,} pictures in {self.parts:,} parts, {duration(self.seconds)}{failed}{before}"


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

    A file is named by the picture's id or as its photo. A run that was killed goes on with the parts that are left.
    With `allow_missing` a picture whose file is missing or unreadable is recorded as failed; else it is refused.

    Raises InputError, after a line for each of the first, when files are missing, unreadable or do not fit the
    regions of their picture in number or class; the cache is then as it was. Raises ProvenanceMismatchError when it
    has tokens of another origin under that name.
    """
    feature_set, cache = imported_set(), FeatureCache.open(address)
    pending = list(range(cache.n_parts))
    if SET_NAME in cache.feature_sets:
        require_same_features(str(address), cache.feature_sets[SET_NAME], feature_set)
        pending = cache.pending_parts([SET_NAME])
    files = TokenFolder(folder, cache.manifest)
    rows = [row for part in pending for row in cache.part_rows(part)]
    failures = _checked(files, rows, allow_missing)
    cache = FeatureCache.open_or_create(address, cache.manifest, [feature_set])
    progress = Progress(len(rows), "pictures")
    for part in pending:
        pictures = _pictures(files, cache.part_rows(part), failures, progress)
        cache.write_part(part, pictures, [SET_NAME], f"{socket.gethostname()}:{os.getpid()}")
    return ImportSummary(len(rows), len(failures), len(pending), cache.n_parts - len(pending), progress.seconds)


def _pictures(
    files: TokenFolder, rows: Iterable[int], failures: dict[int, str], progress: Progress
) -> Iterator[PictureFeatures]:
    for row in rows:
        if row in failures:
            yield PictureFeatures(row, {}, failures[row])
        else:
            yield PictureFeatures(row, {SET_NAME: files.tokens(row)})
        progress.step()


def _checked(files: TokenFolder, rows: Sequence[int], allow_missing: bool) -> dict[int, str]:
    """Why pictures have no tokens, by row. Raises InputError where that was not allowed or a file does not fit."""
    absent: dict[int, str] = {}
    unfit: dict[int, str] = {}
    progress = Progress(len(rows), "token files checked")
    for row in rows:
        try:
            files.tokens(row)
        except AbsentError as error:
            absent[row] = str(error)
        except InputError as error:
            unfit[row] = str(error)
        progress.step()
    refused = {**unfit, **({} if allow_missing else absent)}
    for row in sorted(refused)[:NAMED]:
        log.error("%s", refused[row])
    if len(refused) > NAMED:
        log.error("... and %s others", f"{len(refused) - NAMED:,}")
    if refused:
        raise InputError(_refusal(files.folder, len(rows), 0 if allow_missing else len(absent), len(unfit)))
    return absent


def _refusal(folder: Path, files: int, absent: int, unfit: int) -> str:
    told = []
    if unfit:
        told.append(f"{unfit:,} do not fit the regions of their picture: give those made from the same annotations")
    if absent:
        told.append(f"{absent:,} are missing or unreadable: complete the folder, or record them with --allow-missing")
    return f"{folder}: of {files:,} token files {'; '.join(told)}; nothing was written"


class AbsentError(InputError):
    """A picture's token file is missing or cannot be read."""


class TokenFolder:
    """The token files of a manifest's pictures."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self._manifest = folder, manifest
        self._ids = np.array([category.id for category in manifest.categories], np.int64)

    def tokens(self, row: int) -> NDArray[np.float32]:
        """float32 (N, 256): a picture's tokens, one a region in the manifest's order; no file is needed for none.

        Raises AbsentError when the file cannot be read, InputError when it holds something else, or tokens of other
        regions than the picture's, or such as cannot be stored.
        """
        path = self._path(row)
        if path is None:
            path = self.folder / f"{self._manifest.image_ids[row]}.pth"
            if self._manifest.region_count[row]:
                raise AbsentError(f"{path}: is not there")
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
        picture = f"picture {self._manifest.image_ids[row]} (row {row})"
        if len(classes) != len(indices):
            raise InputError(f"{path}: has {len(classes)} tokens, {picture} has {len(indices)} regions")
        known = np.flatnonzero(indices != NO_CATEGORY)
        differing = known[self._ids[indices[known]] != classes[known]]
        if len(differing):
            first = int(differing[0])
            raise InputError(
                f"{path}: {len(differing)} of {len(indices)} classes are not those of {picture}; the first, of region "
                f"{first}, is {classes[first]}, expected {self._ids[indices[first]]}"
            )


def read_token_file(path: Path) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Tokens float32 (N, 256) and raw category ids int64 (N,) of one file, read without running anything in it.

    Raises AbsentError when it cannot be read, InputError when it holds something else.
    """
    import torch  # needed for the files' format alone, and a second to import

    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # torch passes on whatever the bytes trip over: pickle, zip, end of file, unicode, ...
        raise AbsentError(f"{path}: is damaged, or holds more than tensors (code in it is never run)") from None
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
