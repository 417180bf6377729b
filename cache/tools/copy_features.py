"""Fills a cache with features of its images from other caches, part by part, one record in memory per thread.

Images are matched by id, so the caches may differ in order and part size.

    whole part in the same order and encoding       its files are linked or copied (copy_parts.py)
    same dtype, other order or compression          encoded features are copied
    other encoding                                  decoded and encoded again

A part is written when the sources have all of its images; the others stay pending. A killed run is resumable, and so is
one whose sources were incomplete.
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
from regionspot.cache.tools.copy_parts import PartRef, copy_part
from regionspot.cache.writing.claims import Claims

_MAX_THREADS = 8  # each holds a record and a block of a shard in memory


@dataclass(frozen=True)
class CopySummary:
    """Result of `copy_features`, in parts of feature sets.

    whole      copied or linked as files
    rewritten  written record by record
    before     already present
    pending    some images are in no source yet, or another run has claimed them
    """

    whole: int
    rewritten: int
    before: int
    pending: int
    seconds: float

    def text(self) -> str:
        """A one-line summary."""
        phrases = [f"{self.whole:,} parts copied whole, {self.rewritten:,} rewritten, {duration(self.seconds)}"]
        if self.before:
            phrases.append(f"{self.before:,} already present")
        if self.pending:
            phrases.append(f"{self.pending:,} pending: extract their images, then run this again")
        return "; ".join(phrases)


def copy_features(
    sources: Sequence[FeatureCache], destination: FeatureCache, *, link: bool = True, take_over: bool = False
) -> CopySummary:
    """Write all pending parts of the destination whose images the sources have; failed images keep their reason.

    link        hard-link files where possible; otherwise they are copied and verified
    take_over   also write parts claimed by another run that is known to be gone

    Raises ProvenanceMismatchError if a source has other regions of an image or features of another backbone, InputError
    for features that the destination's encoding cannot represent, CorruptPartError for damaged ones.
    """
    copier = _Copier(sources, destination, link)
    pending = {part: destination.missing_sets(part) for part in destination.pending_parts()}
    ready = {part: names for part, missing in pending.items() if (names := copier.ready(part, missing))}
    progress = Progress(len(ready), "parts")
    whole = rewritten = 0
    with Claims(destination.storage, take_over=take_over) as claims:
        for results in _in_threads(copier.threads, lambda part: copier.write(part, ready[part], claims), list(ready)):
            whole, rewritten = whole + sum(results), rewritten + len(results) - sum(results)
            progress.step()
    missing = sum(map(len, pending.values()))
    before = destination.n_parts * len(destination.feature_sets) - missing
    return CopySummary(whole, rewritten, before, missing - whole - rewritten, progress.seconds)


def _in_threads(threads: int, work: Callable[[int], list[bool]], parts: Sequence[int]) -> Iterator[list[bool]]:
    """Results of `work` for each part, in order; after an error no further part is started."""
    with ThreadPoolExecutor(threads, thread_name_prefix="copy") as pool:
        try:
            yield from pool.map(work, parts)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


class _Copier:
    """Finds each image of the destination in the sources and copies its features.

    _source, _row   int64 (N,): index of the source that has the image (-1: none), and its row there
    """

    def __init__(self, sources: Sequence[FeatureCache], destination: FeatureCache, link: bool) -> None:
        self._sources, self._destination, self._link = sources, destination, link
        self._source, self._row = _locate_images(sources, destination)
        self._available = {name: self._extracted(name) for name in destination.feature_sets}
        self.threads = min(_MAX_THREADS, max(cache.storage.readers for cache in (*sources, destination)))
        self._reader = lru_cache(maxsize=None)(self._open_reader)
        self._failures = lru_cache(maxsize=64)(self._load_failures)

    def ready(self, part: int, names: Sequence[str]) -> list[str]:
        """The feature sets for which the sources have every image of a part."""
        rows = self._destination.part_rows(part)
        return [name for name in names if self._available[name][rows.start : rows.stop].all()]

    def write(self, part: int, names: Sequence[str], claims: Claims) -> list[bool]:
        """Write feature sets of a part, unless another run has claimed it; True for each one copied whole."""
        if not claims.claim(part):
            return []
        try:
            missing = self._destination.missing_sets(
                part, names
            )  # again, because another run may just have finished it
            return [self._write_set(part, name, claims) for name in missing]
        finally:
            claims.release(part)

    def _write_set(self, part: int, name: str, claims: Claims) -> bool:
        origin = self._whole_part(part, name)
        if origin is not None:
            copy_part(origin, PartRef(self._destination, name, part), self._link, lambda: claims.require_owned(part))
            return True
        self._destination.write_part(
            part, self._images(part, name), [name], str(claims.process), lambda: claims.require_owned(part)
        )
        return False

    def _whole_part(self, part: int, name: str) -> PartRef | None:
        """The source part with the same images, order and encoding, if any."""
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
        same = _same_dtype(ours, theirs) and ours.compression == theirs.compression
        return PartRef(cache, name, origin) if same else None

    def _images(self, part: int, name: str) -> Iterator[ImageFeatures]:
        """The images of a part with the features of one set."""
        for row in self._destination.part_rows(part):
            source, source_row = int(self._source[row]), int(self._row[row])
            failure = self._failures(source, name, source_row // self._sources[source].part_size).get(source_row)
            features = {} if failure is not None else {name: self._features(source, source_row, name)}
            yield ImageFeatures(row, features, failure)

    def _features(self, source: int, row: int, name: str) -> EncodedFeatures | NDArray[np.float32]:
        feature_set = self._sources[source].feature_sets[name]
        encoded = read_encoded(self._reader(source, name), self._sources[source].manifest, row)
        if _same_dtype(feature_set, self._destination.feature_sets[name]):
            return encoded
        return decode(encoded.codes, feature_set, encoded.scales)

    def _extracted(self, name: str) -> NDArray[np.bool_]:
        """bool (N,): images of which a source has the features, or the reason of failure."""
        available = np.zeros(len(self._destination), dtype=bool)
        for number, cache in enumerate(self._sources):
            if name not in cache.feature_sets:
                continue
            written = np.ones(len(cache), dtype=bool)
            for part in cache.pending_parts([name]):
                rows = cache.part_rows(part)
                written[rows.start : rows.stop] = False
            ours = self._source == number
            available[ours] = written[self._row[ours]]
        return available

    def _open_reader(self, source: int, name: str) -> FeatureReader:
        cache = self._sources[source]
        return open_reader(cache.storage, cache.feature_sets[name], cache.manifest, cache.geometry, cache.check)

    def _load_failures(self, source: int, name: str, part: int) -> dict[int, str]:
        return {failure.row: failure.reason for failure in self._sources[source].record(part, name).failures}


def _locate_images(
    sources: Sequence[FeatureCache], destination: FeatureCache
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Source and row of every image of the destination; the first source that has it."""
    source, row = np.full(len(destination), -1), np.full(len(destination), -1)
    for number, cache in enumerate(sources):
        _require_same_backbones(cache, destination)
        rows = rows_by_id(cache.manifest, destination.manifest.image_ids)
        ours = np.flatnonzero((rows >= 0) & (source < 0))
        _require_same_regions(cache, rows[ours], destination, ours)
        source[ours], row[ours] = number, rows[ours]
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
        raise ProvenanceMismatchError(f"{destination.path}: cannot copy features from {cache.path}: {difference}")


def _same_dtype(one: FeatureSet, other: FeatureSet) -> bool:
    return one.dtype == other.dtype and one.statistics == other.statistics


def read_encoded(reader: FeatureReader, manifest: Manifest, row: int) -> EncodedFeatures:
    """Read one image's features without decoding them."""
    feature_set = reader.feature_set
    regions = () if feature_set.kind == "map" else (int(manifest.region_count[row]),)
    codes = np.empty((*regions, *feature_set.shape), feature_set.stored)
    scales = np.empty(codes.shape[:-1] if feature_set.has_scales else 0, "<f2")
    reader.read([row], [codes.reshape(-1).view(np.uint8)], [scales.reshape(-1).view(np.uint8)])
    return EncodedFeatures(codes, scales if feature_set.has_scales else None)
