"""Images in, cache out: decode ahead, encode in batches, write behind.

Threads decode and resize the images ahead, the calling thread keeps the encoders busy, one thread commits parts.
Between them stand two short queues, so memory does not grow with the dataset and the slowest stage sets the pace;
the summary names it. What is done is known from the cache alone: a run that was killed goes on with the parts that
have no record yet, and several runs at once divide them among themselves.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from regionspot.cache.format.manifest import Manifest
from regionspot.cache.format.schema import ImageFeatures
from regionspot.cache.progress import Progress
from regionspot.cache.store import FeatureCache
from regionspot.cache.tools.resume import open_or_create
from regionspot.cache.writing.claims import Claims
from regionspot.pipeline.backbones.bundle import Backbones
from regionspot.pipeline.extraction.batch_encoder import BatchEncoder, features_of, images_at_a_time
from regionspot.pipeline.extraction.config import ExtractConfig
from regionspot.pipeline.extraction.decode_ahead import Decoder
from regionspot.pipeline.extraction.int8_statistics import ready_to_store
from regionspot.pipeline.extraction.malloc import keep_memory
from regionspot.pipeline.extraction.part_queue import PartQueue
from regionspot.pipeline.extraction.writer_thread import WriterThread
from regionspot.pipeline.reporting.environment import Environment
from regionspot.pipeline.reporting.failures import FailureCheck
from regionspot.pipeline.reporting.run_monitor import RunMonitor
from regionspot.pipeline.reporting.run_stats import RunStats
from regionspot.pipeline.reporting.run_summary import ExtractSummary

DEFAULTS = ExtractConfig()


def open_for_extraction(
    address: str | Path,
    manifest: Manifest,
    image_folder: Path,
    backbones: Backbones,
    config: ExtractConfig = DEFAULTS,
    may_grow: bool = True,
) -> FeatureCache:
    """Open the cache at `address`, or make it, for what the backbones write into it.

    may_grow   a cache that was made with a smaller limit takes in the other images of `manifest`

    For int8 the backbones run over a few images first, unless the cache holds the feature set already. Raises
    InputError when none of these can be read, and what `open_or_create` raises.
    """

    def features_of_sample(rows: list[int], names: list[str]) -> Iterator[ImageFeatures]:
        decoder = Decoder(manifest, image_folder, backbones, config.exif)
        progress = Progress(len(rows), "images of the sample")
        encode = BatchEncoder(manifest, backbones, RunStats())
        jobs = ((row, names) for row in rows)
        for image in features_of(jobs, decoder, encode, 1, 1, config.decode_threads):
            yield image
            progress.step()

    sets = ready_to_store(address, manifest, config.feature_sets(backbones), features_of_sample)
    return open_or_create(address, manifest, sets, config.part_size, may_grow)


def extract(
    cache: FeatureCache,
    image_folder: Path,
    backbones: Backbones,
    config: ExtractConfig = DEFAULTS,
    watch: RunMonitor | None = None,
) -> ExtractSummary:
    """Run the backbones over every part of `cache` that lacks a record of theirs, and only those it lacks.

    Other runs may be at work on the same cache: each does what no other one has claimed, and all end when every part
    is there. Of `config` only counts how it is done, not from where. `watch` tells of the run while it is at work; the
    one by default writes summary.md into the cache.

    An image that cannot be read is recorded with its reason and skipped. Raises InputError when none of the first
    images can be read, or when more than `max_failures` of all cannot (V3Det's copies lack many images; a mistyped
    folder lacks all); what is committed by then stays.
    """
    keep_memory()
    names = [feature_set.name for feature_set in config.feature_sets(backbones)]
    size = images_at_a_time(config.batch_size, cache, names, backbones)
    decoder = Decoder(cache.manifest, image_folder, backbones, config.exif)
    parts, threads = config.chosen_parts(cache.geometry), config.decode_threads
    watch, environment = watch or RunMonitor(config.metrics_port), Environment.here(cache, backbones, threads)
    with watch.over(cache, environment), Claims(cache.storage, take_over=config.take_over) as claims:
        shared = PartQueue(cache, names, claims, parts)
        stats = watch.begin(shared)
        encode = BatchEncoder(cache.manifest, backbones, stats)
        check = FailureCheck(cache, parts, config.max_failures, image_folder)
        while watch.wait():
            with (
                WriterThread(cache, shared, stats) as writer,
                closing(features_of(shared.jobs(), decoder, encode, size, cache.part_size, threads)) as images,
            ):
                for image in images:
                    with stats.timed("write"):
                        writer.put(image)
                    watch.image(image)
                    check(image.row, image.failure)
    return watch.summary()
