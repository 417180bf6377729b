"""Photos in, cache out: decode ahead, encode in batches, write behind.

Threads decode and resize the pictures ahead, the calling thread keeps the encoders busy, one thread commits parts.
Between them stand two short queues, so memory does not grow with the dataset and the slowest stage sets the pace;
the summary names it. What is done is known from the cache alone: a run that was killed goes on with the parts that
have no record yet, and several runs at once divide them among themselves.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import closing
from pathlib import Path

from regionspot.cache.claims import Claims
from regionspot.cache.manifest import Manifest
from regionspot.cache.progress import Progress
from regionspot.cache.schema import PictureFeatures
from regionspot.cache.store import FeatureCache
from regionspot.pipeline.allocator import keep_memory
from regionspot.pipeline.committing import CommitThread
from regionspot.pipeline.decoding import Decoder
from regionspot.pipeline.encoding import BatchEncoder, features_of, images_at_a_time
from regionspot.pipeline.encoding_sample import ready_to_store
from regionspot.pipeline.extract_config import ExtractConfig
from regionspot.pipeline.failure_limit import FailureLimit
from regionspot.pipeline.frozen_models import Backbones
from regionspot.pipeline.sharing import SharedParts
from regionspot.pipeline.summary import ExtractSummary
from regionspot.pipeline.watch import Watch

DEFAULTS = ExtractConfig()


def open_for_extraction(
    address: str | Path, manifest: Manifest, photo_folder: Path, backbones: Backbones, config: ExtractConfig = DEFAULTS
) -> FeatureCache:
    """Open the cache at `address`, or make it, for what the backbones write into it.

    For int8 the backbones run over a few images first, unless the cache holds the feature set already. Raises
    InputError when none of these can be read, and what `FeatureCache.open_or_create` raises.
    """

    def features_of_sample(rows: list[int], names: list[str]) -> Iterator[PictureFeatures]:
        decoder = Decoder(manifest, photo_folder, backbones, config.exif)
        progress = Progress(len(rows), "pictures of the sample")
        encode = BatchEncoder(manifest, backbones, progress)
        jobs = ((row, names) for row in rows)
        for image in features_of(jobs, decoder, encode, 1, 1, config.decode_threads):
            yield image
            progress.step()

    sets = ready_to_store(address, manifest, config.feature_sets(backbones), features_of_sample)
    return FeatureCache.open_or_create(address, manifest, sets, config.part_size)


def extract(
    cache: FeatureCache,
    photo_folder: Path,
    backbones: Backbones,
    config: ExtractConfig = DEFAULTS,
    watch: Watch | None = None,
) -> ExtractSummary:
    """Run the backbones over every part of `cache` that lacks a record of theirs, and only those it lacks.

    Other runs may be at work on the same cache: each does what no other one has claimed, and all end when every part
    is there. Of `config` only counts how it is done, not from where. `watch` tells of the run while it is at work; the
    one by default writes summary.md into the cache.

    An image that cannot be read is recorded with its reason and skipped. Raises InputError when none of the first
    images can be read, or when more than `max_failures` of all cannot (V3Det's copies lack many photos; a mistyped
    folder lacks all); what is committed by then stays.
    """
    keep_memory()
    names = [feature_set.name for feature_set in config.feature_sets(backbones)]
    size = images_at_a_time(config.batch_size, cache, names, backbones)
    decoder = Decoder(cache.manifest, photo_folder, backbones, config.exif)
    parts, threads = config.chosen_parts(cache.n_parts), config.decode_threads
    watch = watch or Watch(metrics_port=config.metrics_port)
    with watch.over(cache, backbones, threads), Claims(cache.storage, take_over=config.take_over) as claims:
        shared = SharedParts(cache, names, claims, parts)
        progress = watch.begin(shared)
        encode = BatchEncoder(cache.manifest, backbones, progress)
        check = _FailureCheck(cache, parts, config.max_failures, photo_folder)
        while watch.wait():
            with (
                CommitThread(cache, shared, progress) as writer,
                closing(features_of(shared.jobs(), decoder, encode, size, cache.part_size, threads)) as images,
            ):
                for image in images:
                    with progress.timed("write"):
                        writer.put(image)
                    watch.picture(image, encode.ignored_orientations)
                    check(image)
    return watch.summary()


class _FailureCheck:
    """Stops a run when too many of all images that it was asked for are broken, whichever run found them."""

    def __init__(self, cache: FeatureCache, parts: Collection[int], limit: FailureLimit, folder: Path) -> None:
        self._cache, self._limit, self._folder, self._parts = cache, limit, folder, parts
        self._broken: set[int] = set()  # rows
        self._first_in_a_row = 0
        self._one_was_read = False

    def __call__(self, image: PictureFeatures) -> None:
        if image.failure is None:
            self._one_was_read = True
            return
        if not self._broken:  # reading all records takes an object store a while: only when it matters
            asked = set(self._parts)
            earlier = (failure.row for failure in self._cache.failures())
            self._broken = {row for row in earlier if row // self._cache.part_size in asked}
        self._broken.add(image.row)
        self._first_in_a_row += not self._one_was_read
        total = sum(len(self._cache.part_rows(part)) for part in self._parts)
        self._limit.check(
            len(self._broken), total, in_a_row=self._first_in_a_row, folder=self._folder, reason=image.failure
        )
