"""Which images of a cache: by ids from a file, by category, each so many-th, the first ones."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from regionspot.cache.errors import InputError
from regionspot.cache.format.manifest import Manifest
from regionspot.cache.format.manifest_diff import rows_by_id


def select_rows(
    manifest: Manifest,
    *,
    ids: NDArray[np.int64] | None = None,
    categories: Sequence[str] = (),
    every: int = 1,
    first: int | None = None,
) -> NDArray[np.int64]:
    """int64: rows of the images that all of this leaves over, applied in this order.

    ids          images of these ids, in the order of the ids (default: all, in the manifest's)
    categories   of those the ones with a region of one of these names
    every        of those each so many-th one, from the first on
    first        of those at most so many

    Raises InputError for ids and names that the manifest does not hold, and where no image is left over.
    """
    if every < 1 or (first is not None and first < 1):
        name, value = ("every", every) if every < 1 else ("first", first)
        raise InputError(f"{name} is {value}, expected at least 1")
    rows = np.arange(len(manifest)) if ids is None else _of_ids(manifest, ids)
    if categories:
        rows = rows[_holds(manifest, categories)[rows]]
    rows = rows[::every][:first]
    if not len(rows):
        raise InputError(
            f"{manifest.dataset}/{manifest.split}: none of its {len(manifest):,} images is one of the ids and has one "
            "of the categories; give fewer conditions"
        )
    return rows


def read_ids(path: Path) -> NDArray[np.int64]:
    """Scene ids from a text file with one on a line; empty lines are left out.

    Raises InputError for a file that cannot be read, and a line that is no id.
    """
    try:
        lines = path.read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as a list of ids, one a line: {error}") from None
    ids = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                ids.append(np.int64(line.strip()))
            except (ValueError, OverflowError):
                raise InputError(f"{path}: line {number} is {line.strip()[:40]!r}, expected an image's id") from None
    return np.array(ids, np.int64)


def _of_ids(manifest: Manifest, ids: NDArray[np.int64]) -> NDArray[np.int64]:
    rows = rows_by_id(manifest, ids)
    if len(unknown := ids[rows < 0]):
        raise InputError(
            f"{manifest.dataset}/{manifest.split}: holds no image with {len(unknown)} of the {len(ids)} ids, "
            f"the first is {unknown[0]}; leave them out"
        )
    return rows


def _holds(manifest: Manifest, names: Sequence[str]) -> NDArray[np.bool_]:
    """bool (N,): whether an image has a region of one of the categories."""
    index = {category.name: place for place, category in enumerate(manifest.categories)}
    for name in names:
        if name not in index:
            close = difflib.get_close_matches(name, index, 3)
            like = f"like {', '.join(close)}" if close else "as `regionspot cache info` counts them"
            raise InputError(f"{manifest.dataset}/{manifest.split}: has no category {name!r}; take one {like}")
    wanted = np.isin(manifest.category_index, [index[name] for name in names])
    found = np.zeros(len(manifest), dtype=bool)
    found[np.searchsorted(manifest.offsets, np.flatnonzero(wanted), side="right") - 1] = True
    return found
