"""One extraction as a user asks for it: what is checked before the first picture, and in which order."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from regionspot.cache.encodings import Encoding
from regionspot.cache.errors import InputError, ProvenanceMismatchError
from regionspot.cache.manifest import Manifest
from regionspot.cache.schema import Geometry
from regionspot.cache.storage import open_storage
from regionspot.cache.store import FeatureCache
from regionspot.pipeline.dry_run import DryRun, dry_run
from regionspot.pipeline.encoder import warn_of_unknown_names
from regionspot.pipeline.extract import extract, open_for_extraction
from regionspot.pipeline.failure_limit import EXTRACTION_LIMIT, FailureLimit
from regionspot.pipeline.frozen_models import FLOAT16, Backbones
from regionspot.pipeline.outstanding import Outstanding, held_sets, outstanding, require_room
from regionspot.pipeline.part_choice import parse_parts
from regionspot.pipeline.photos import Exif
from regionspot.pipeline.retry import RetrySummary, retry
from regionspot.pipeline.shards import parse_shard
from regionspot.pipeline.summary import ExtractSummary
from regionspot.pipeline.watch import Watch


@dataclass(frozen=True)
class Extraction:
    """What is to become of one dataset split.

    parts        only these of the cache: "3,7-9"
    shard        only this share of the cache's parts: "3/16"
    check_room   refuse a disk that is too small
    take_over    no other run is alive: what dead ones have claimed is free at once
    metrics_port serve Prometheus metrics there while it runs
    """

    cache: str
    manifest: Manifest
    photos: Path
    backbones: Backbones
    exif: Exif = "auto"
    encoding: Encoding = FLOAT16
    token_encoding: Encoding = FLOAT16
    part_size: int = 512
    parts: str | None = None
    shard: str | None = None
    batch_size: int | None = None
    decode_threads: int | None = None
    max_failures: FailureLimit = EXTRACTION_LIMIT
    check_room: bool = True
    take_over: bool = False
    metrics_port: int | None = None

    def plan(self) -> DryRun:
        """What a run would do, measured on a few images. Writes nothing."""
        self._warn_of_unknown_names()
        return dry_run(
            self._outstanding(),
            self.manifest,
            self.photos,
            self.backbones,
            exif=self.exif,
            batch_size=self.batch_size,
            decode_threads=self.decode_threads,
        )

    def run(self) -> ExtractSummary:
        """Extract what is missing, unless the disk is too small for it."""
        cache, backbones = self.prepare()
        return extract(
            cache,
            self.photos,
            backbones,
            exif=self.exif,
            batch_size=self.batch_size,
            decode_threads=self.decode_threads,
            max_failures=self.max_failures,
            take_over=self.take_over,
            parts=self.only(cache.n_parts),
            watch=Watch(metrics_port=self.metrics_port),
        )

    def prepare(self) -> tuple[FeatureCache, Backbones]:
        """The cache, made where there is none, unless the disk is too small for what is missing; and its models.

        These are `backbones`, or the same in another dtype: where that was left to choose, it is the cache's, also when
        another run has made the cache since `backbones` were loaded.
        """
        if self.check_room:
            require_room(self.cache, self._outstanding())
        self._warn_of_unknown_names()
        return self._open()

    def retry(self) -> RetrySummary:
        """Try the pictures again that could not be read. Raises InputError where there is no cache."""
        if not open_storage(self.cache).exists(""):
            raise InputError(
                f"{self.cache}: there is no cache to try failed pictures of; extract without --retry-failed"
            )
        cache, backbones = self._open()
        return retry(
            cache,
            self.photos,
            backbones,
            exif=self.exif,
            batch_size=self.batch_size,
            decode_threads=self.decode_threads,
            take_over=self.take_over,
            parts=self.only(cache.n_parts),
        )

    def _warn_of_unknown_names(self) -> None:
        warn_of_unknown_names(self.backbones.encoders, [category.name for category in self.manifest.categories])

    def _open(self) -> tuple[FeatureCache, Backbones]:
        try:
            return self._opened_for(self.backbones), self.backbones
        except ProvenanceMismatchError:
            following = self.backbones.following(held_sets(self.cache))
            if following is self.backbones:
                raise
        return self._opened_for(following), following

    def _opened_for(self, backbones: Backbones) -> FeatureCache:
        return open_for_extraction(
            self.cache,
            self.manifest,
            self.photos,
            backbones,
            self.exif,
            self.encoding,
            self.token_encoding,
            self.part_size,
        )

    def _outstanding(self) -> Outstanding:
        sets = self.backbones.feature_sets(self.exif, self.encoding, self.token_encoding)
        there = open_storage(self.cache).exists("")
        n_parts = (
            FeatureCache.open(self.cache).n_parts
            if there
            else Geometry.of(self.manifest.offsets, self.part_size).n_parts
        )
        return outstanding(self.cache, self.manifest, sets, self.part_size, self.only(n_parts))

    def only(self, n_parts: int) -> Collection[int] | None:
        """The parts that `parts` or `shard` names, of so many; None: all. Raises InputError for what names none."""
        if self.parts is not None and self.shard is not None:
            raise InputError(f"parts {self.parts!r} and shard {self.shard!r}: give one of the two")
        if self.parts is not None:
            return parse_parts(self.parts, n_parts)
        return None if self.shard is None else parse_shard(self.shard).parts(n_parts)
