"""Filling a cache from others that hold features of its images, part by part, with one record in memory a thread.

Images are found by their ids, so it does not matter in which cache, in which order or in how large parts they lie.

    a whole part, in the same order and encoding    its files are linked or copied: whole_parts.py
    the same numbers, another order or compression  stored features are taken as they are
    another encoding                                decoded and encoded again

Each part is written when all of its images are there in the sources; others stay pending, for when they are. So a
run that was killed goes on where it stopped, and so does one that had to wait for its sources to be finished.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from regionspot.cache.errors import ProvenanceMismatchError
from regionspot.cache.format.compatibility import require_same_features
from regionspot.cache.format.encodings import decode
from regionspot.cache.format.manifest import Manifest
from regionspot.cache.format.manifest_diff import first_difference, rows_by_id, same_categories
from regionspot.cache.format.schema import EncodedFeatures, FeatureSet, ImageFeatures
from regionspot.cache.progress import Progress, duration
from regionspot.cache.reading.feature_reader import FeatureReader, open_reader
from regionspot.cache.store import FeatureCache
from regionspot.cache.tools.copy_parts import Place, commit_part
from regionspot.cache.writing.claims import Claims

_THREADS = 8  # at most, however many reads a store may like: each keeps a record and a block of a shard


@dataclass(frozen=True)
class CopySummary:
    """What one run of `copy_features` did, in parts of feature sets.

    whole      taken as files
    rewritten  written record by record
    before     were there already
    pending    wait for images that no source holds yet, or are another run's
    """

    whole: int
    rewritten: int
    before: int
    pending: int
    seconds: float

    def text(self) -> str:
        """One line for people."""
        words = [f"{self.whole:,} parts taken whole, {self.rewritten:,} written, {duration(self.seconds)}"]
        if self.before:
            words.append(f"{self.before:,} were there before")
        if self.pending:
            words.append(f"{self.pending:,} wait: extract their images, then run this again")
        return "; ".join(words)


def copy_features(
    sources: Sequence[FeatureCache], destination: FeatureCache, *, link: bool = True, take_over: bool = False
) -> CopySummary:
    """Write all parts that the destination lacks and whose images the sources hold; failed ones keep their reason.

    link        whether files of both may be one on the disk; otherwise they are copied and checked on the way
    take_over   do also what another run has claimed, which is known to be gone

    Raises ProvenanceMismatchError when a source holds other regions of an image or features of another backbone,
    InputError for features that cannot be stored in the destination's encoding, CorruptPartError for damaged ones.
    """
    copying = _Copying(sources, destination, link)
    lacking = {part: destination.missing_sets(part) for part in destination.pending_parts()}
    ready = {part: names for part, missing in lacking.items() if (names := copying.ready(part, missing))}
    progress = Progress(len(ready), "parts")
    whole = rewritten = 0
    with Claims(destination.storage, take_over=take_over) as claims:
        for done in _in_threads(copying.threads, lambda part: copying.write(part, ready[part], claims), list(ready)):
            whole, rewritten = whole + sum(done), rewritten + len(done) - sum(done)
            progress.step()
    missing = sum(map(len, lacking.values()))
    before = destination.n_parts * len(destination.feature_sets) - missing
    return CopySummary(whole, rewritten, before, missing - whole - rewritten, progress.seconds)


def _in_threads(threads: int, work: Callable[[int], list[bool]], parts: Sequence[int]) -> Iterator[list[bool]]:
    """What `work` gives for each part, in order; nothing more is begun once one has failed."""
    with ThreadPoolExecutor(threads, thread_name_prefix="copy") as pool:
        try:
            yield from pool.map(work, parts)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


class _Copying:
    """Where each image of the destination lies in the sources, and how its features get across.

    source, row   int64 (N,): which source holds the image, -1 for none, and in which row of it
    """

    def __init__(self, sources: Sequence[FeatureCache], destination: FeatureCache, link: bool) -> None:
        self._sources, self._destination, self._link = sources, destination, link
        self._source, self._row = _places(sources, destination)
        self._there = {name: self._extracted(name) for name in destination.feature_sets}
        self.threads = min(_THREADS, max(cache.storage.readers for cache in (*sources, destination)))
        self._reader = lru_cache(maxsize=None)(self._open_reader)
        self._failures = lru_cache(maxsize=64)(self._load_failures)

    def ready(self, part: int, names: Sequence[str]) -> list[str]:
        """Those of the feature sets of which the sources hold every image of a part."""
        rows = self._destination.part_rows(part)
        return [name for name in names if self._there[name][rows.start : rows.stop].all()]

    def write(self, part: int, names: Sequence[str], claims: Claims) -> list[bool]:
        """Write feature sets of a part, unless another run is at it; of each, whether it was taken whole."""
        if not claims.claim(part):
            return []
        try:
            missing = self._destination.missing_sets(part, names)  # again: another run may just have finished it
            return [self._write_set(part, name, claims) for name in missing]
        finally:
            claims.release(part)

    def _write_set(self, part: int, name: str, claims: Claims) -> bool:
        origin = self._whole_part(part, name)
        if origin is not None:
            commit_part(origin, Place(self._destination, name, part), self._link, lambda: claims.require_owned(part))
            return True
        self._destination.write_part(
            part, self._images(part, name), [name], str(claims.process), lambda: claims.require_owned(part)
        )
        return False

    def _whole_part(self, part: int, name: str) -> Place | None:
        """The part of a source that holds just these images in the same order and encoding, if one does."""
        rows = self._destination.part_rows(part)
        source, first = int(self._source[rows.start]), int(self._row[rows.start])
        cache = self._sources[source]
        origin = first // cache.part_size
        if not (
            (self._source[rows.start : rows.stop] == source).all()
            and (self._row[rows.start : rows.stop] == np.arange(first, first + len(rows))).all()
            and cache.part_rows(origin) == range(first, first + len(rows))
        ):
            return None
        ours, theirs = self._destination.feature_sets[name], cache.feature_sets[name]
        alike = _same_numbers(ours, theirs) and ours.compression == theirs.compression
        return Place(cache, name, origin) if alike else None

    def _images(self, part: int, name: str) -> Iterator[ImageFeatures]:
        """The images of a part with the features of one set; what is yielded is good until the next one."""
        for row in self._destination.part_rows(part):
            source, theirs = int(self._source[row]), int(self._row[row])
            failure = self._failures(source, name, theirs // self._sources[source].part_size).get(theirs)
            features = {} if failure is not None else {name: self._features(source, theirs, name)}
            yield ImageFeatures(row, features, failure)

    def _features(self, source: int, row: int, name: str) -> EncodedFeatures | NDArray[np.float32]:
        feature_set = self._sources[source].feature_sets[name]
        stored = read_stored(self._reader(source, name), self._sources[source].manifest, row)
        if _same_numbers(feature_set, self._destination.feature_sets[name]):
            return stored
        return decode(stored.codes, feature_set, stored.scales)

    def _extracted(self, name: str) -> NDArray[np.bool_]:
        """bool (N,): images of which a source holds the features, or knows why there are none."""
        there = np.zeros(len(self._destination), dtype=bool)
        for number, cache in enumerate(self._sources):
            if name not in cache.feature_sets:
                continue
            written = np.ones(len(cache), dtype=bool)
            for part in cache.pending_parts([name]):
                rows = cache.part_rows(part)
                written[rows.start : rows.stop] = False
            ours = self._source == number
            there[ours] = written[self._row[ours]]
        return there

    def _open_reader(self, source: int, name: str) -> FeatureReader:
        cache = self._sources[source]
        return open_reader(cache.storage, cache.feature_sets[name], cache.manifest, cache.geometry, cache.check)

    def _load_failures(self, source: int, name: str, part: int) -> dict[int, str]:
        return {failure.row: failure.reason for failure in self._sources[source].record(part, name).failures}


def _places(sources: Sequence[FeatureCache], destination: FeatureCache) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The source and the row in it of every image of the destination; of several sources the first counts."""
    source, row = np.full(len(destination), -1), np.full(len(destination), -1)
    for number, cache in enumerate(sources):
        _require_same_backbones(cache, destination)
        found = rows_by_id(cache.manifest, destination.manifest.image_ids)
        ours = np.flatnonzero((found >= 0) & (source < 0))
        _require_same_regions(cache, found[ours], destination, ours)
        source[ours], row[ours] = number, found[ours]
    return source, row


def _require_same_backbones(cache: FeatureCache, destination: FeatureCache) -> None:
    for name in cache.feature_sets.keys() & destination.feature_sets.keys():
        theirs, ours = cache.feature_sets[name], destination.feature_sets[name]
        encoded = replace(ours, dtype=theirs.dtype, compression=theirs.compression, statistics=theirs.statistics)
        require_same_features(str(cache.path), theirs, encoded)


def _require_same_regions(
    cache: FeatureCache, theirs: NDArray[np.int64], destination: FeatureCache, ours: NDArray[np.int64]
) -> None:
    if not same_categories(cache.manifest, destination.manifest):
        difference: str | None = "their categories differ"
    else:
        difference = first_difference(cache.manifest.select(theirs), destination.manifest.select(ours))
    if difference:
        raise ProvenanceMismatchError(
            f"{destination.path}: cannot be filled from {cache.path}: {difference}; its features were made from that"
        )


def _same_numbers(one: FeatureSet, other: FeatureSet) -> bool:
    return one.dtype == other.dtype and one.statistics == other.statistics


def read_stored(reader: FeatureReader, manifest: Manifest, row: int) -> EncodedFeatures:
    """One image's features as they lie on disk."""
    feature_set = reader.feature_set
    regions = () if feature_set.kind == "map" else (int(manifest.region_count[row]),)
    codes = np.empty((*regions, *feature_set.shape), feature_set.stored)
    scales = np.empty(codes.shape[:-1] if feature_set.has_scales else 0, "<f2")
    reader.read([row], [codes.reshape(-1).view(np.uint8)], [scales.reshape(-1).view(np.uint8)])
    return EncodedFeatures(codes, scales if feature_set.has_scales else None)
