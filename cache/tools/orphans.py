"""Files in a cache's folders that belong to no written part: what killed writers left, and what is none of ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from regionspot.cache.format.header import Header
from regionspot.cache.format.schema import part_files, record_file
from regionspot.cache.storage.atomic_files import is_partial
from regionspot.cache.storage.base import Storage

# What runs of `extract` tell of themselves. Nobody reads features by it, so no checksum covers it.
SUMMARY = "summary.md"
RUNS = "runs"  # folder of a file for each run


@dataclass(frozen=True)
class Orphans:
    """unfinished   of writers that were killed or are at work: the next extract writes them again or removes them
    unknown      none of the cache's
    """

    unfinished: tuple[str, ...]
    unknown: tuple[str, ...]


def find_orphans(storage: Storage, header: Header, written: Mapping[str, Sequence[int]]) -> Orphans:
    """Look through a cache's own folders; `written` are the parts with a record, by feature set.

    Raises OSError where a folder cannot be listed.
    """
    known = {"zarr.json", SUMMARY, *header.files}
    coming: set[str] = set()
    for name, feature_set in header.feature_sets.items():
        known.update(record_file(name, part) for part in written[name])
        for part in range(header.geometry.n_parts):
            coming.update(part_files(feature_set, part))
        known.update(file for part in written[name] for file in part_files(feature_set, part))
    unfinished: list[str] = []
    unknown: list[str] = []
    for folder in sorted({name.rpartition("/")[0] for name in known}):
        found = (f"{folder}/{base}".removeprefix("/") for base in storage.names(folder))
        for name in sorted(name for name in found if name not in known):
            (unfinished if name in coming or is_partial(name) else unknown).append(name)
    return Orphans(tuple(unfinished), tuple(unknown))
