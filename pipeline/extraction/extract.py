"""Extraction in one process: decode ahead, encode in batches, write in the background.

    Extraction.load(config)    read the annotations and load the models
        .prepare()             check the disk space; open or create the cache
        .run()                 prepare, then `extract`
        .dry_run()             estimate bytes and time
        .retry()               try failed images again

Threads decode and resize images ahead, the calling thread keeps the encoders busy, one thread writes parts. Two short
queues connect them, so memory use does not grow with the dataset. The cache alone says what is done: a killed run is
resumed with the parts that have no record yet, and several runs can share a cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from regionspot.cache.errors import InputError, ProvenanceMismatchError
from regionspot.cache.format.manifest import Manifest
from regionspot.cache.format.schema import ImageFeatures
from regionspot.cache.progress import Progress
from regionspot.cache.storage.open import open_storage
from regionspot.cache.store import FeatureCache
from regionspot.cache.tools.resume import open_or_create
from regionspot.cache.writing.claims import Claims
from regionspot.pipeline.backbones.bundle import Backbones
from regionspot.pipeline.backbones.clip import warn_of_unknown_names
from regionspot.pipeline.extraction.batch_encoder import BatchEncoder, choose_batch_size, encode_images
from regionspot.pipeline.extraction.config import ExtractConfig
from regionspot.pipeline.extraction.decode_ahead import Decoder, default_threads
from regionspot.pipeline.extraction.dry_run import DryRun, dry_run
from regionspot.pipeline.extraction.failure_check import FailureCheck
from regionspot.pipeline.extraction.int8_statistics import add_int8_statistics
from regionspot.pipeline.extraction.malloc import keep_memory
from regionspot.pipeline.extraction.part_queue import PartQueue
from regionspot.pipeline.extraction.plan import (
    ExtractionPlan,
    plan_extraction,
    require_disk_space,
    stored_feature_sets,
)
from regionspot.pipeline.extraction.retry import RetrySummary, retry
from regionspot.pipeline.extraction.writer_thread import WriterThread
from regionspot.pipeline.reporting.environment import Environment
from regionspot.pipeline.reporting.prometheus import metrics_server
from regionspot.pipeline.reporting.run_monitor import RunMonitor
from regionspot.pipeline.reporting.run_stats import RunStats
from regionspot.pipeline.reporting.run_summary import ExtractSummary

DEFAULTS = ExtractConfig()


@dataclass(frozen=True)
class Extraction:
    """An extraction whose annotations are read and whose models are loaded."""

    config: ExtractConfig
    manifest: Manifest
    image_folder: Path
    backbones: Backbones

    @classmethod
    def load(cls, config: ExtractConfig, backbones: Backbones | None = None) -> Extraction:
        """Read the annotations and load the models, unless given.

        Raises what reading a dataset, loading models and opening a cache raise.
        """
        manifest = config.read_manifest()
        backbones = backbones or config.load_backbones(stored_feature_sets(config.cache))
        return cls(config, manifest, config.image_folder(manifest), backbones)

    def dry_run(self) -> DryRun:
        """What `run` would do, measured on a few images; writes nothing."""
        self._warn_of_unknown_names()
        return dry_run(self._plan(), self.manifest, self.image_folder, self.backbones, self.config)

    def run(self) -> ExtractSummary:
        """Extract what is missing. Raises what `prepare` and `extract` raise."""
        cache, backbones = self.prepare()
        return extract(cache, self.image_folder, backbones, self.config)

    def prepare(self) -> tuple[FeatureCache, Backbones]:
        """Open or create the cache and return it with the models to use.

        The models are `backbones`, or the same models in the cache's dtype: with dtype "auto", when another run has
        created the cache since `backbones` were loaded. Raises InputError when the disk is too small.
        """
        if self.config.check_disk_space:
            require_disk_space(self.config.cache, self._plan())
        self._warn_of_unknown_names()
        return self._open()

    def retry(self) -> RetrySummary:
        """Try failed images again. Raises InputError when the cache does not exist."""
        address = self.config.cache
        if not open_storage(address).exists(""):
            raise InputError(f"{address}: no such cache, so there are no failed images; run without --retry-failed")
        cache, backbones = self._open(may_grow=False)  # only images that the cache holds can have failed
        return retry(cache, self.image_folder, backbones, self.config)

    def _warn_of_unknown_names(self) -> None:
        warn_of_unknown_names(self.backbones.encoders, [category.name for category in self.manifest.categories])

    def _plan(self) -> ExtractionPlan:
        config = self.config
        sets = config.feature_sets(self.backbones)
        return plan_extraction(config.cache, self.manifest, sets, config.part_size, config.selected_parts)

    def _open(self, may_grow: bool = True) -> tuple[FeatureCache, Backbones]:
        address, backbones = self.config.cache, self.backbones
        try:
            cache = open_for_extraction(address, self.manifest, self.image_folder, backbones, self.config, may_grow)
        except ProvenanceMismatchError:
            backbones = self.backbones.with_stored_dtypes(stored_feature_sets(address))
            if backbones is self.backbones:
                raise
            cache = open_for_extraction(address, self.manifest, self.image_folder, backbones, self.config, may_grow)
        return cache, backbones


def open_for_extraction(
    address: str | Path,
    manifest: Manifest,
    image_folder: Path,
    backbones: Backbones,
    config: ExtractConfig = DEFAULTS,
    may_grow: bool = True,
) -> FeatureCache:
    """Open or create the cache at `address` for the feature sets that the backbones write.

    may_grow   a cache that was made with a smaller limit is extended by the other images of `manifest`

    For a new int8 feature set, the backbones run over a sample of images first. Raises InputError when no image of the
    sample can be read, and what `open_or_create` raises.
    """

    def encode_sample(rows: list[int], names: list[str]) -> Iterator[ImageFeatures]:
        decoder = Decoder(manifest, image_folder, backbones, config.exif)
        progress = Progress(len(rows), "images of the sample")
        encode, requests = BatchEncoder(manifest, backbones, RunStats()), ((row, names) for row in rows)
        for image in encode_images(requests, decoder, encode, 1, 1, config.decode_threads or default_threads()):
            yield image
            progress.step()

    sets = add_int8_statistics(address, manifest, config.feature_sets(backbones), encode_sample)
    return open_or_create(address, manifest, sets, config.part_size, may_grow)


def extract(
    cache: FeatureCache, image_folder: Path, backbones: Backbones, config: ExtractConfig = DEFAULTS
) -> ExtractSummary:
    """Extract the missing features of an open cache, and write the run's record and summary.md into it.

    Other runs may work on the same cache: each extracts the parts that no other run has claimed, and all end when
    every part is written. Of `config`, only the fields about how to extract count, not the source.

    An unreadable image is recorded with the reason and skipped. Raises InputError when none of the first images can be
    read, or more than `max_failures` of all; what is written by then stays.
    """
    keep_memory()
    names = [feature_set.name for feature_set in config.feature_sets(backbones)]
    batch_size = choose_batch_size(config.batch_size, cache, names, backbones)
    decoder = Decoder(cache.manifest, image_folder, backbones, config.exif)
    parts, threads = config.selected_parts(cache.geometry), config.decode_threads or default_threads()
    environment = Environment.of_process(cache, backbones, threads)
    check = FailureCheck(cache, parts, config.max_failures, image_folder)
    with Claims(cache.storage, take_over=config.take_over) as claims:
        queue = PartQueue(cache, names, claims, parts)
        stats = queue.stats
        encode = BatchEncoder(cache.manifest, backbones, stats)
        monitor = RunMonitor(queue.images, len(parts), queue.parts_before, stats)
        with metrics_server(monitor, config.metrics_port), monitor.recording(cache, environment):
            try:
                while _wait(queue, stats):
                    with (
                        WriterThread(cache, queue, stats) as writer,
                        closing(
                            encode_images(queue.requests(), decoder, encode, batch_size, cache.part_size, threads)
                        ) as images,
                    ):
                        for image in images:
                            with stats.timed("write"):
                                writer.put(image)
                            monitor.progress.total = queue.images
                            monitor.add_image(image, cache.manifest)
                            check(image.row, image.failure)
            finally:
                stats.seconds = monitor.progress.seconds  # of the last stage, too
    return monitor.summary(environment)


def _wait(queue: PartQueue, stats: RunStats) -> bool:
    with stats.timed("wait"):
        return queue.wait()
