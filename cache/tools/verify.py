"""`regionspot cache verify`: compares every byte of a cache with its checksum and every count with the manifest.

    zarr.json                 its own checksum; it holds the checksums of
      every other zarr.json,
      images/ and regions/    also compared with the manifest's digest
    parts/<set>/00042.json    its own checksum, and the manifest's counts; it holds the checksums of
      features/<set>/         sizes, indexes, records, scales, padding   (verify_part.py)

Damage is reported, never raised. Other processes may write meanwhile: a part counts once its part record exists.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
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
from regionspot.cache.tools.verify_part import PartChecker
from regionspot.cache.tools.verify_report import Fix, Problem, VerifyReport, plural

_REWRITTEN = "was rewritten by another program; its content is correct"
_MAX_LISTED = 20  # unknown files that are listed; the rest are counted


def verify(cache: FeatureCache | str | Path, *, quick: bool = False, threads: int | None = None) -> VerifyReport:
    """Verify all of a cache.

    quick     skip the bytes of records, which are nearly all bytes
    threads   parts in parallel (default: the storage's best number of concurrent reads)

    Raises NotACacheError or SchemaVersionError if zarr.json cannot be read.
    """
    storage = cache.storage if isinstance(cache, FeatureCache) else open_storage(cache)
    if threads is not None and threads < 1:
        raise InputError(f"{storage.address}: threads is {threads}, expected at least 1")
    return _Verification(storage, load_header(storage), quick, threads or storage.readers).run()


class _Verification:
    """One run of `verify` and its findings so far."""

    def __init__(self, storage: Storage, header: Header, quick: bool, threads: int) -> None:
        self._storage, self._header, self._quick, self._threads = storage, header, quick, threads
        self._problems: list[Problem] = []
        self._warnings: list[str] = []
        self._unfinished = self._bytes = 0

    def run(self) -> VerifyReport:
        started = time.perf_counter()
        damaged = self._check_root() | self._check_metadata_files()
        readable = not any(name.startswith(("zarr.json", "images/", "regions/")) for name in damaged)
        manifest = self._manifest() if readable else None
        written = {name: self._written_parts(name) for name in self._header.feature_sets}
        self._find_orphans(written)
        present = {name: parts for name, parts in written.items() if not self._is_missing(name, parts)}
        self._check_parts(present, manifest)
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
        """Check zarr.json except the header: its Zarr metadata, and additions of other programs."""
        before = len(self._problems)
        with self._readable("zarr.json"):
            stored = self._storage.read("zarr.json")
            document = json.loads(stored)
            if difference := document_difference(document, ROOT):
                self._problems.append(Problem("zarr.json", None, None, difference, "regenerate"))
            elif (consolidated := document.get("consolidated_metadata")) is not None:
                self._warnings.append(self._consolidated_warning(consolidated))
            elif to_json(document) != stored:
                self._warnings.append(f"zarr.json: {_REWRITTEN}")
        return {problem.path for problem in self._problems[before:]}

    def _consolidated_warning(self, consolidated: object) -> str:
        """A warning about consolidated metadata, which only other programs use."""
        names = [name for name in self._header.files if name.endswith("/zarr.json")]
        with ThreadPoolExecutor(self._threads) as pool:
            documents = list(pool.map(self._document, names))
        actual = {name.removesuffix("/zarr.json"): document for name, document in zip(names, documents, strict=True)}
        if wrong := outdated_entries(consolidated, actual):
            return (
                f"zarr.json: its consolidated metadata is out of date for {plural(len(wrong), 'array')}, the first is "
                f"{wrong[0]}: other Zarr programs may use it; renew it with zarr.consolidate_metadata"
            )
        return "zarr.json: has consolidated metadata, which is correct and not needed"

    def _document(self, name: str) -> object:
        try:
            return from_json(self._storage.read(name))
        except (OSError, ValueError):
            return None  # reported by its own check

    def _check_metadata_files(self) -> set[str]:
        """Check the files written when the cache was created; the names of the damaged ones."""
        damaged, rewritten = damaged_files(self._storage, self._header, self._threads)
        self._warnings += [f"{name}: {_REWRITTEN}" for name in rewritten]
        for name, damage in damaged.items():
            fix: Fix = "regenerate" if name.endswith("zarr.json") else "restore"
            problem = (
                _unreadable(name, damage) if isinstance(damage, OSError) else Problem(name, None, None, damage, fix)
            )
            self._problems.append(problem)
        return set(damaged)

    def _manifest(self) -> Manifest | None:
        from regionspot.cache.format.manifest_arrays import load_manifest  # importing zarr takes a second

        try:
            manifest = load_manifest(self._storage, self._header)
            if replace(manifest).digest() == self._header.digest:  # a copy, whose digest is computed
                return manifest
            problem = "do not match, with regions/, the digest in zarr.json"
        except NotACacheError as error:
            problem = str(error)
        self._problems.append(Problem("images", None, None, problem, "restore"))
        return None

    def _written_parts(self, name: str) -> list[int]:
        """Parts of a feature set that have a part record."""
        with self._readable(f"parts/{name}"):
            files = {f"parts/{name}/{base}" for base in self._storage.list_files(f"parts/{name}")}
            return [part for part in range(self._header.geometry.n_parts) if record_file(name, part) in files]
        return []

    def _find_orphans(self, written: dict[str, list[int]]) -> None:
        """Count files of unfinished parts and warn about unknown files in the cache's folders."""
        known = {"zarr.json", SUMMARY, *self._header.files}
        expected: set[str] = set()
        for name, feature_set in self._header.feature_sets.items():
            known.update(record_file(name, part) for part in written[name])
            known.update(file for part in written[name] for file in part_files(feature_set, part))
            for part in range(self._header.geometry.n_parts):
                expected.update(part_files(feature_set, part))
        unknown: list[str] = []
        with self._readable("features"):
            for folder in sorted({name.rpartition("/")[0] for name in known}):
                files = (f"{folder}/{base}".removeprefix("/") for base in self._storage.list_files(folder))
                for name in sorted(name for name in files if name not in known):
                    if name in expected or is_partial(name):
                        self._unfinished += 1
                    else:
                        unknown.append(name)
        self._warnings += [f"{name}: is not a file of this cache" for name in unknown[:_MAX_LISTED]]
        if len(unknown) > _MAX_LISTED:
            self._warnings.append(f"{len(unknown) - _MAX_LISTED:,} more are not files of this cache")

    def _is_missing(self, name: str, parts: list[int]) -> bool:
        """Whether a whole array of a feature set is missing. Its parts are not dropped: a disk may be unmounted."""
        feature_set = self._header.feature_sets[name]
        arrays = [feature_set.array, feature_set.checksums, *([feature_set.scales] if feature_set.has_scales else [])]
        before = len(self._problems)
        for array in arrays:
            with self._readable(array):
                if parts and not self._storage.list_files(array):
                    reason = f"has no file, but {len(parts)} parts are recorded: a disk may not be mounted"
                    self._problems.append(Problem(array, None, name, reason, "restore"))
        return len(self._problems) > before

    def _check_parts(self, written: dict[str, list[int]], manifest: Manifest | None) -> None:
        """Check all parts; the sets of a part follow each other, so that the estimated time left is accurate."""
        jobs = sorted((part, name) for name, parts in written.items() for part in parts)
        progress = Progress(len(jobs), "parts")
        checks = [
            PartChecker(self._storage, self._header.geometry, manifest, self._quick) for _ in range(self._threads)
        ]
        idle: SimpleQueue[PartChecker] = SimpleQueue()
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
            pool.shutdown(cancel_futures=True)  # an interrupt must not wait for the rest
        self._bytes = sum(check.bytes_read for check in checks)

    @contextmanager
    def _readable(self, name: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._problems.append(_unreadable(name, error))


def _unreadable(name: str, error: OSError) -> Problem:
    return Problem(name, None, None, f"cannot be read: {error.strerror or error}", "access")
