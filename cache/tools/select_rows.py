"""Selects images of a manifest: by ids from a file, by category, every n-th, the first n."""

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
    """Rows (int64) of the images that pass all filters, applied in this order:

    ids          images with these ids, in this order (default: all, in the manifest's order)
    categories   with a region of one of these categories
    every        every n-th image
    first        at most n images

    Raises InputError for unknown ids and category names, and if no image is left.
    """
    if every < 1 or (first is not None and first < 1):
        name, value = ("every", every) if every < 1 else ("first", first)
        raise InputError(f"{name} is {value}, expected at least 1")
    rows = np.arange(len(manifest)) if ids is None else _rows_of_ids(manifest, ids)
    if categories:
        rows = rows[_has_category(manifest, categories)[rows]]
    rows = rows[::every][:first]
    if not len(rows):
        raise InputError(
            f"{manifest.dataset}/{manifest.split}: no image of {len(manifest):,} has one of the ids and one of the "
            "categories; give fewer conditions"
        )
    return rows


def read_ids(path: Path) -> NDArray[np.int64]:
    """Read image ids from a text file, one per line; empty lines are skipped.

    Raises InputError for an unreadable file and for a line that is not an id.
    """
    try:
        lines = path.read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as a list of ids, one per line: {error}") from None
    ids = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                ids.append(np.int64(line.strip()))
            except (ValueError, OverflowError):
                raise InputError(f"{path}: line {number} is {line.strip()[:40]!r}, expected an image's id") from None
    return np.array(ids, np.int64)


def _rows_of_ids(manifest: Manifest, ids: NDArray[np.int64]) -> NDArray[np.int64]:
    rows = rows_by_id(manifest, ids)
    if len(unknown := ids[rows < 0]):
        raise InputError(
            f"{manifest.dataset}/{manifest.split}: has no image with {len(unknown)} of the {len(ids)} ids, "
            f"the first is {unknown[0]}; remove them"
        )
    return rows


def _has_category(manifest: Manifest, names: Sequence[str]) -> NDArray[np.bool_]:
    """bool (N,): whether an image has a region of one of the categories."""
    index = {category.name: number for number, category in enumerate(manifest.categories)}
    for name in names:
        if name not in index:
            close = difflib.get_close_matches(name, index, 3)
            hint = f"did you mean {', '.join(close)}?" if close else "give the name of one"
            raise InputError(f"{manifest.dataset}/{manifest.split}: has no category {name!r}; {hint}")
    matches = np.isin(manifest.category_index, [index[name] for name in names])
    result = np.zeros(len(manifest), dtype=bool)
    result[np.searchsorted(manifest.offsets, np.flatnonzero(matches), side="right") - 1] = True
    return result
