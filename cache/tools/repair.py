"""`regionspot cache repair`: take out of a cache what `verify` found damaged, so that the next extract makes it again.

A part that is dropped loses its data first and its record last. So a reader in another process gets the part as it was,
or is told that it is damaged, or that it is not written, and never anything else; and nobody begins to write the part
anew while its old files are being removed. A repair that is killed is run again.

Nothing is dropped that is not found damaged a second time, right before: the report may be an old one.
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
from regionspot.cache.tools.verify_part import PartCheck
from regionspot.cache.tools.verify_report import Problem, VerifyReport, counted
from regionspot.cache.writing.claims import Claims

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RepairSummary:
    """What a repair did, or would do.

    dropped   problems whose parts were dropped
    remade    files that were made again, equal to the byte
    left      problems that are still there, with what to do
    """

    address: str
    dropped: tuple[Problem, ...]
    remade: tuple[str, ...]
    left: tuple[Problem, ...]
    dry_run: bool

    def text(self) -> str:
        """A line for each thing done or left, and one for the whole."""
        would = "would be " if self.dry_run else ""
        lines = [
            f"{each.path}: {each.reason}: part {each.part} of {each.feature_set} {would}dropped"
            for each in self.dropped
        ]
        lines += [f"{name}: {would}made again" for name in self.remade]
        lines += [str(problem) for problem in self.left]
        parts, files = counted(len(self.dropped), "part"), counted(len(self.remade), "file")
        whole = f"{self.address}: {parts} {would}dropped, {files} {would}made again"
        then = "; run the same `regionspot extract` again, it makes what was dropped" if self.dropped else ""
        return "\n".join([*lines, f"{whole}, {counted(len(self.left), 'problem')} left{then}"])


def repair(cache: FeatureCache | str | Path, report: VerifyReport, *, dry_run: bool = False) -> RepairSummary:
    """Mend what a report of `verify` says can be mended; `dry_run` only says what that would be.

    Raises CacheError where the store refuses, and what opening raises for a cache whose zarr.json cannot be read.
    """
    storage = cache.storage if isinstance(cache, FeatureCache) else open_storage(cache)
    if not dry_run:
        storage.check_writable()
    try:
        return _Repair(storage, load_header(storage), dry_run).run(report)
    except OSError as error:
        raise CacheError(
            f"{storage.address}: could not be repaired: {error.strerror or error}; mend the disk and run this again"
        ) from error


class _Repair:
    """One repair of a cache."""

    def __init__(self, storage: Storage, header: Header, dry_run: bool) -> None:
        self._storage, self._header, self._dry_run = storage, header, dry_run

    def run(self, report: VerifyReport) -> RepairSummary:
        away = {f"{problem.path}/zarr.json" for problem in report.problems if problem.mend == "restore"}
        # Not into an array of which nothing is there: it would look like one that has lost all of its parts.
        remade = self._remake({problem.path for problem in report.problems if problem.mend == "remake"} - away)
        dropped, left = self._drop([problem for problem in report.problems if problem.mend == "drop"])
        left += [problem for problem in report.problems if problem.mend != "drop" and problem.path not in remade]
        return RepairSummary(self._storage.address, tuple(dropped), tuple(sorted(remade)), tuple(left), self._dry_run)

    def _drop(self, bad: list[Problem]) -> tuple[list[Problem], list[Problem]]:
        """Drop the parts that are damaged still; the problems that are gone with them, and those that are left."""
        dropped: list[Problem] = []
        left: list[Problem] = []
        if not bad:
            return dropped, left
        check = PartCheck(self._storage, self._header.geometry, self._manifest())
        with nullcontext() if self._dry_run else Claims(self._storage) as claims:
            for problem, feature_set, part in _parts(bad, self._header):
                if claims and not claims.claim(part):
                    left.append(replace(problem, reason=f"{problem.reason}; not dropped: another run has the part now"))
                    continue
                now = check.problem(feature_set, part)
                if now is None:
                    log.info("%s: part %d of %s is sound by now", self._storage.address, part, feature_set.name)
                elif now.mend != "drop":
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
        self._storage.remove(record_file(feature_set.name, part))  # last: see above

    def _manifest(self) -> Manifest | None:
        from regionspot.cache.format.manifest_arrays import load_manifest  # zarr takes a second to import

        try:
            return load_manifest(self._storage, self._header)
        except NotACacheError:
            return None

    def _remake(self, names: set[str]) -> set[str]:
        """Make metadata again from the header; those of the names for which that gave what was there, to the byte."""
        made: set[str] = set()
        if "zarr.json" in names:
            document = json.loads(self._storage.read("zarr.json"))
            self._write("zarr.json", to_json({**ROOT, "attributes": document["attributes"]}))
            made.add("zarr.json")
        if names - made:
            expected = expected_metadata(self._header)
            for name in (names - made) & expected.keys():
                if file_crc(expected[name]) == self._header.files.get(name):
                    self._write(name, expected[name])
                    made.add(name)
        return made

    def _write(self, name: str, data: bytes) -> None:
        if not self._dry_run:
            self._storage.write(name, data)


def _parts(problems: Iterable[Problem], header: Header) -> Iterator[tuple[Problem, FeatureSet, int]]:
    for problem in problems:
        if problem.part is not None and problem.feature_set in header.feature_sets:
            yield problem, header.feature_sets[problem.feature_set], problem.part
