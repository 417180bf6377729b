"""`regionspot cache repair`: drops the damaged parts that `verify` reported, so that the next `extract` rewrites them.

A dropped part loses its data first and its part record last. So a reader in another process gets the part unchanged, or
an error that it is damaged or not extracted; and no run starts to rewrite the part while its files are being removed. A
killed repair is simply run again.

Each part is verified again right before it is dropped, because the report may be old.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from regionspot.cache.errors import CacheError, NotACacheError
from regionspot.cache.format.header import Header, load_header
from regionspot.cache.format.manifest import Manifest
from regionspot.cache.format.schema import FeatureSet, part_files, record_file
from regionspot.cache.format.zarr_metadata import ROOT, expected_metadata
from regionspot.cache.storage.atomic_files import file_crc, to_json
from regionspot.cache.storage.base import Storage
from regionspot.cache.storage.open import open_storage
from regionspot.cache.store import FeatureCache
from regionspot.cache.tools.verify_part import PartChecker
from regionspot.cache.tools.verify_report import Problem, VerifyReport, plural
from regionspot.cache.writing.claims import Claims

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RepairSummary:
    """What a repair did, or would do.

    dropped      problems whose parts were dropped
    regenerated  files that were written again, byte-identical
    left         remaining problems
    """

    address: str
    dropped: tuple[Problem, ...]
    regenerated: tuple[str, ...]
    left: tuple[Problem, ...]
    dry_run: bool

    def text(self) -> str:
        """A line per action and remaining problem, and a summary line."""
        would = "would be " if self.dry_run else ""
        lines = [
            f"{problem.path}: {problem.reason}: part {problem.part} of {problem.feature_set} {would}dropped"
            for problem in self.dropped
        ]
        lines += [f"{name}: {would}regenerated" for name in self.regenerated]
        lines += [str(problem) for problem in self.left]
        parts, files = plural(len(self.dropped), "part"), plural(len(self.regenerated), "file")
        summary = f"{self.address}: {parts} {would}dropped, {files} {would}regenerated"
        hint = "; run the same `regionspot extract` again to rewrite them" if self.dropped else ""
        return "\n".join([*lines, f"{summary}, {plural(len(self.left), 'problem')} left{hint}"])


def repair(cache: FeatureCache | str | Path, report: VerifyReport, *, dry_run: bool = False) -> RepairSummary:
    """Repair what a report of `verify` says can be repaired; with `dry_run` only report it.

    Raises CacheError when the storage fails, NotACacheError or SchemaVersionError if zarr.json cannot be read.
    """
    storage = cache.storage if isinstance(cache, FeatureCache) else open_storage(cache)
    if not dry_run:
        storage.check_writable()
    try:
        return _Repair(storage, load_header(storage), dry_run).run(report)
    except OSError as error:
        raise CacheError(
            f"{storage.address}: could not be repaired: {error.strerror or error}; fix the disk and run this again"
        ) from error


class _Repair:
    """One repair of a cache."""

    def __init__(self, storage: Storage, header: Header, dry_run: bool) -> None:
        self._storage, self._header, self._dry_run = storage, header, dry_run

    def run(self, report: VerifyReport) -> RepairSummary:
        missing = {f"{problem.path}/zarr.json" for problem in report.problems if problem.fix == "restore"}
        # Not in a missing array: with metadata it would look like one that has lost all of its parts.
        names = {problem.path for problem in report.problems if problem.fix == "regenerate"} - missing
        regenerated = self._regenerate(names)
        dropped, left = self._drop([problem for problem in report.problems if problem.fix == "drop"])
        left += [problem for problem in report.problems if problem.fix != "drop" and problem.path not in regenerated]
        address, files = self._storage.address, tuple(sorted(regenerated))
        return RepairSummary(address, tuple(dropped), files, tuple(left), self._dry_run)

    def _drop(self, problems: list[Problem]) -> tuple[list[Problem], list[Problem]]:
        """Drop the parts that are still damaged; the fixed and the remaining problems."""
        dropped: list[Problem] = []
        left: list[Problem] = []
        if not problems:
            return dropped, left
        check = PartChecker(self._storage, self._header.geometry, self._manifest())
        with nullcontext() if self._dry_run else Claims(self._storage) as claims:
            for problem, feature_set, part in _parts(problems, self._header):
                if claims and not claims.claim(part):
                    left.append(
                        replace(problem, reason=f"{problem.reason}; not dropped: another run has claimed the part")
                    )
                    continue
                now = check.problem(feature_set, part)
                if now is None:
                    log.info("%s: part %d of %s is sound now", self._storage.address, part, feature_set.name)
                elif now.fix != "drop":
                    left.append(now)
                else:
                    dropped.append(now)
                    if claims:
                        self._remove(feature_set, part)
                if claims:
                    claims.release(part)
        return dropped, left

    def _remove(self, feature_set: FeatureSet, part: int) -> None:
        for name in part_files(feature_set, part):
            self._storage.remove(name)
        self._storage.remove(record_file(feature_set.name, part))  # last: see the module's docstring

    def _manifest(self) -> Manifest | None:
        from regionspot.cache.format.manifest_arrays import load_manifest  # importing zarr takes a second

        try:
            return load_manifest(self._storage, self._header)
        except NotACacheError:
            return None

    def _regenerate(self, names: set[str]) -> set[str]:
        """Rewrite metadata files from the header; the names of those that match their recorded checksum."""
        done: set[str] = set()
        if "zarr.json" in names:
            document = json.loads(self._storage.read("zarr.json"))
            self._write("zarr.json", to_json({**ROOT, "attributes": document["attributes"]}))
            done.add("zarr.json")
        if names - done:
            expected = expected_metadata(self._header)
            for name in (names - done) & expected.keys():
                if file_crc(expected[name]) == self._header.files.get(name):
                    self._write(name, expected[name])
                    done.add(name)
        return done

    def _write(self, name: str, data: bytes) -> None:
        if not self._dry_run:
            self._storage.write(name, data)


def _parts(problems: Iterable[Problem], header: Header) -> Iterator[tuple[Problem, FeatureSet, int]]:
    for problem in problems:
        if problem.part is not None and problem.feature_set in header.feature_sets:
            yield problem, header.feature_sets[problem.feature_set], problem.part
