"""The images of a cache, one line each, streamed part by part: a cache of millions lists at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Literal

from regionspot.cache.errors import InputError
from regionspot.cache.store import FeatureCache
from regionspot.cache.tools.info import cause

State = Literal["done", "failed", "pending"]
STATES: tuple[State, ...] = ("done", "failed", "pending")

_PATH_WIDTH = 60  # longer paths push the state to the right, rather than all lines of millions


def list_images(cache: FeatureCache, states: Sequence[State] = STATES, limit: int | None = None) -> Iterator[str]:
    """A line an image: row, id, width x height, regions, path, and its state.

    done      all feature sets hold it
    failed    it could not be read, and why
    pending   its part is not written yet in the feature sets named

    Raises InputError for another state and for a limit below 1, CorruptPartError where a part's record is damaged.
    """
    unknown = [state for state in states if state not in STATES]
    if unknown or not states:
        raise InputError(f"{cache.path}: images are {', '.join(STATES)}; asked for {', '.join(unknown) or 'none'}")
    if limit is not None and limit < 1:
        raise InputError(f"{cache.path}: {limit} images were asked for, expected at least 1")
    return islice(_lines(cache, states), limit and min(limit, len(cache.manifest)))


def _lines(cache: FeatureCache, states: Sequence[State]) -> Iterator[str]:
    manifest = cache.manifest
    row_width = len(str(len(manifest) - 1))
    id_width = max(len(str(manifest.image_ids.min())), len(str(manifest.image_ids.max())))
    path_width = min(_PATH_WIDTH, max(map(len, manifest.paths[:10_000].tolist())))
    regions_width = len(str(manifest.region_count.max()))
    for row, state, why in _states(cache):
        if state in states:
            size = f"{manifest.widths[row]} x {manifest.heights[row]}"
            yield (
                f"{row:>{row_width}}  {manifest.image_ids[row]:>{id_width}}  {size:>11}  "
                f"{manifest.region_count[row]:>{regions_width}} regions  {manifest.paths[row]:<{path_width}}  "
                f"{state}{f': {why}' if why else ''}"
            )


def _states(cache: FeatureCache) -> Iterator[tuple[int, State, str]]:
    """Row, state and what is to be said of it, of every image."""
    for part in range(cache.n_parts):
        missing = cache.missing_sets(part)
        written = [name for name in cache.feature_sets if name not in missing]
        failed = {failure.row: cause(failure) for name in written for failure in cache.record(part, name).failures}
        for row in cache.part_rows(part):
            if row in failed:
                yield row, "failed", failed[row]
            elif missing or not written:
                yield row, "pending", ", ".join(missing)
            else:
                yield row, "done", ""
