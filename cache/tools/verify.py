"""`regionspot cache verify`: every byte of a cache held against its checksum, every count against the manifest.

    zarr.json                 sealed; through the checksums in it
      every other zarr.json,
      images/ and regions/    as they were made; through the manifest's digest its columns
    parts/<set>/00042.json    sealed, and what the manifest says of the part's rows; through it and the checksums' file
      features/<set>/         sizes, indexes, records, scales, padding   (check_part.py)

Damage is reported, never raised. It may run while others write: a part counts once its record is there.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

from regionspot.cache.errors import InputError, NotACacheError
from regionspot.cache.format.header import Header, load_header
from regionspot.cache.format.manifest import Manifest
from regionspot.cache.format.schema import part_files, record_file
from regionspot.cache.format.zarr_metadata import ROOT, damaged_files, document_difference, outdated_entries
from regionspot.cache.progress import Progress
from regionspot.cache.storage.atomic_files import from_json, is_partial, to_json
from regionspot.cache.storage.base import Storage
from regionspot.cache.storage.open import open_storage
from regionspot.cache.store import FeatureCache
from regionspot.cache.tools.info import SUMMARY
from regionspot.cache.tools.verify_part import PartCheck
from regionspot.cache.tools.verify_report import Mend, Problem, VerifyReport, counted

_WRITTEN_AGAIN = "was written again by another program; what it says of the data is right"
_NAMED_STRAYS = 20  # files that are none of the cache's: so many are named, the rest counted


def verify(cache: FeatureCache | str | Path, *, quick: bool = False, threads: int | None = None) -> VerifyReport:
    """Look at all of a cache and say what is wrong with it.

    quick     leave out the records' own bytes, which are nearly all: everything else is still looked at
    threads   how many parts at once (default: as many reads as the store is fastest with)

    Raises what opening raises where the cache's own zarr.json cannot be read: NotACacheError, SchemaVersionError.
    """
    storage = cache.storage if isinstance(cache, FeatureCache) else open_storage(cache)
    if threads is not None and threads < 1:
        raise InputError(f"{storage.address}: {threads} threads were asked for, expected at least 1")
    return _Verification(storage, load_header(storage), quick, threads or storage.readers).run()


class _Verification:
    """One look at a cache, and what it found so far."""

    def __init__(self, storage: Storage, header: Header, quick: bool, threads: int) -> None:
        self._storage, self._header, self._quick, self._threads = storage, header, quick, threads
        self._problems: list[Problem] = []
        self._warnings: list[str] = []
        self._unfinished = self._bytes = 0

    def run(self) -> VerifyReport:
        started = time.perf_counter()
        damaged = self._check_root() | self._check_made_files()
        readable = not any(name.startswith(("zarr.json", "images/", "regions/")) for name in damaged)
        manifest = self._manifest() if readable else None
        written = {name: self._written(name) for name in self._header.feature_sets}
        self._look_for_strays(written)
        self._check_parts({name: parts for name, parts in written.items() if not self._is_away(name, parts)}, manifest)
        parts = sum(map(len, written.values()))
        return VerifyReport(
            address=self._storage.address,
            problems=tuple(self._problems),
            warnings=tuple(self._warnings),
            parts=parts,
            pending=len(written) * self._header.geometry.n_parts - parts,
            unfinished=self._unfinished,
            bytes=self._bytes,
            seconds=time.perf_counter() - started,
        )

    def _check_root(self) -> set[str]:
        """The rest of the document that holds the header: what it says, and what others have added."""
        before = len(self._problems)
        with self._readable("zarr.json"):
            stored = self._storage.read("zarr.json")
            document = json.loads(stored)
            if difference := document_difference(document, ROOT):
                self._problems.append(Problem("zarr.json", None, None, difference, "remake"))
            elif (consolidated := document.get("consolidated_metadata")) is not None:
                self._warnings.append(self._told_of(consolidated))
            elif to_json(document) != stored:
                self._warnings.append(f"zarr.json: {_WRITTEN_AGAIN}")
        return {problem.path for problem in self._problems[before:]}

    def _told_of(self, consolidated: object) -> str:
        """What there is to say of consolidated metadata in the root, by which only other programs read."""
        names = [name for name in self._header.files if name.endswith("/zarr.json")]
        with ThreadPoolExecutor(self._threads) as pool:
            documents = list(pool.map(self._document, names))
        there = {name.removesuffix("/zarr.json"): each for name, each in zip(names, documents, strict=True)}
        if wrong := outdated_entries(consolidated, there):
            return (
                f"zarr.json: its consolidated metadata is out of date for {counted(len(wrong), 'array')}, the first is "
                f"{wrong[0]}: other Zarr programs may read by it; make it anew with zarr.consolidate_metadata"
            )
        return "zarr.json: holds consolidated metadata, which is right and not needed"

    def _document(self, name: str) -> object:
        try:
            return from_json(self._storage.read(name))
        except (OSError, ValueError):
            return None  # looked at by itself

    def _check_made_files(self) -> set[str]:
        """Look at the files that were made with the cache; the names of those that are not as they were."""
        damaged, written_again = damaged_files(self._storage, self._header, self._threads)
        self._warnings += [f"{name}: {_WRITTEN_AGAIN}" for name in written_again]
        for name, damage in damaged.items():
            mend: Mend = "remake" if name.endswith("zarr.json") else "restore"
            problem = (
                _unreadable(name, damage) if isinstance(damage, OSError) else Problem(name, None, None, damage, mend)
            )
            self._problems.append(problem)
        return set(damaged)

    def _manifest(self) -> Manifest | None:
        from regionspot.cache.format.manifest_arrays import load_manifest  # zarr takes a second to import

        try:
            return load_manifest(self._storage, self._header)
        except NotACacheError as error:
            self._problems.append(Problem("images", None, None, str(error), "restore"))
            return None

    def _written(self, name: str) -> list[int]:
        """Parts of a feature set that have a record."""
        with self._readable(f"parts/{name}"):
            files = {f"parts/{name}/{base}" for base in self._storage.list_files(f"parts/{name}")}
            return [part for part in range(self._header.geometry.n_parts) if record_file(name, part) in files]
        return []

    def _look_for_strays(self, written: dict[str, list[int]]) -> None:
        with self._readable("features"):
            strays = _find_orphans(self._storage, self._header, written)
            self._unfinished = len(strays.unfinished)
            self._warnings += [f"{name}: is no file of this cache" for name in strays.unknown[:_NAMED_STRAYS]]
            if len(strays.unknown) > _NAMED_STRAYS:
                self._warnings.append(f"{len(strays.unknown) - _NAMED_STRAYS:,} more are no files of this cache")

    def _is_away(self, name: str, parts: list[int]) -> bool:
        """Whether a whole array of a feature set is not there: no reason to drop parts, a disk may be away."""
        feature_set = self._header.feature_sets[name]
        arrays = [feature_set.array, feature_set.checksums, *([feature_set.scales] if feature_set.has_scales else [])]
        before = len(self._problems)
        for array in arrays:
            with self._readable(array):
                if parts and not self._storage.list_files(array):
                    reason = f"holds no file, though {len(parts)} parts are recorded: a disk may not be mounted"
                    self._problems.append(Problem(array, None, name, reason, "restore"))
        return len(self._problems) > before

    def _check_parts(self, written: dict[str, list[int]], manifest: Manifest | None) -> None:
        """A part's feature sets one after another, so that parts take equally long and the time left is told well."""
        jobs = sorted((part, name) for name, parts in written.items() for part in parts)
        progress = Progress(len(jobs), "parts")
        checks = [PartCheck(self._storage, self._header.geometry, manifest, self._quick) for _ in range(self._threads)]
        idle: SimpleQueue[PartCheck] = SimpleQueue()
        for check in checks:
            idle.put(check)

        def problem_of(job: tuple[int, str]) -> Problem | None:
            check = idle.get()
            try:
                return check.problem(self._header.feature_sets[job[1]], job[0])
            finally:
                idle.put(check)

        pool = ThreadPoolExecutor(self._threads)
        try:
            for problem in pool.map(problem_of, jobs):
                self._problems += [problem] if problem else []
                progress.step()
        finally:
            pool.shutdown(cancel_futures=True)  # an interrupt shall not wait for all that is left
        self._bytes = sum(check.bytes_read for check in checks)

    @contextmanager
    def _readable(self, name: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._problems.append(_unreadable(name, error))


def _unreadable(name: str, error: OSError) -> Problem:
    return Problem(name, None, None, f"cannot be read: {error.strerror or error}", "access")


@dataclass(frozen=True)
class _Orphans:
    """unfinished   of writers that were killed or are at work: the next extract writes them again or removes them
    unknown      none of the cache's
    """

    unfinished: tuple[str, ...]
    unknown: tuple[str, ...]


def _find_orphans(storage: Storage, header: Header, written: Mapping[str, Sequence[int]]) -> _Orphans:
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
        found = (f"{folder}/{base}".removeprefix("/") for base in storage.list_files(folder))
        for name in sorted(name for name in found if name not in known):
            (unfinished if name in coming or is_partial(name) else unknown).append(name)
    return _Orphans(tuple(unfinished), tuple(unknown))
