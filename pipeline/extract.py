"""Photos in, cache out: decode ahead, encode in batches, write behind.

Threads decode and resize the pictures ahead, the calling thread keeps the encoders busy, one thread commits parts.
Between them stand two short queues, so memory does not grow with the dataset and the slowest stage sets the pace;
the summary names it. What is done is known from the cache alone: a run that was killed goes on with the parts that
have no record yet, and several runs at once divide them among themselves.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from regionspot.cache.claims import Claims
from regionspot.cache.encodings import Encoding
from regionspot.cache.manifest import Manifest
from regionspot.cache.progress import Progress, duration
from regionspot.cache.schema import PictureFeatures
from regionspot.cache.store import FeatureCache
from regionspot.pipeline.committing import CommitThread
from regionspot.pipeline.decoding import Decoder, decode_ahead
from regionspot.pipeline.encoding import BatchEncoder, batches_of
from regionspot.pipeline.encoding_sample import ready_to_store
from regionspot.pipeline.failure_limit import FailureLimit
from regionspot.pipeline.frozen_models import FLOAT16, Backbones
from regionspot.pipeline.photos import Exif
from regionspot.pipeline.sharing import SharedParts

DEFAULT_FAILURES = FailureLimit(share=0.2)


@dataclass(frozen=True)
class ExtractSummary:
    """What one run of `extract` did.

    parts                 parts that it wrote
    parts_before          parts that were complete when it started
    parts_of_others       parts that other runs wrote while it was at work
    ignored_orientations  pictures whose EXIF would have turned them, but whose annotations want them as stored
    shares                each stage's share of the time; the largest is the bottleneck
    """

    pictures: int
    failed: int
    parts: int
    parts_before: int
    parts_of_others: int
    ignored_orientations: int
    seconds: float
    shares: dict[str, float]

    def text(self) -> str:
        """One line for people."""
        if not self.parts:
            others = f", {self.parts_of_others:,} of them by other runs meanwhile" if self.parts_of_others else ""
            return f"nothing to do: all {self.parts_before + self.parts_of_others:,} parts are there{others}"
        slowest = max(self.shares, key=self.shares.__getitem__)
        words = [
            f"{self.pictures:,} pictures in {self.parts:,} parts, {duration(self.seconds)}, "
            f"{self.pictures / self.seconds:.3g}/s, bottleneck {slowest} ({self.shares[slowest]:.0%})",
            f"{self.failed:,} could not be read",
        ]
        if self.parts_before:
            words.append(f"{self.parts_before:,} parts were there before")
        if self.parts_of_others:
            words.append(f"other runs did {self.parts_of_others:,} parts meanwhile")
        if self.ignored_orientations:
            words.append(f"EXIF orientation ignored for {self.ignored_orientations:,}, as their stated size asks")
        return "; ".join(words)


def open_for_extraction(
    address: str | Path,
    manifest: Manifest,
    photo_folder: Path,
    backbones: Backbones,
    exif: Exif = "auto",
    encoding: Encoding = FLOAT16,
    token_encoding: Encoding = FLOAT16,
    part_size: int = 512,
) -> FeatureCache:
    """Go on with the cache at `address`, or make it for what the backbones write into it.

    For int8 the backbones run over a few pictures first, unless the cache holds the feature set already. Raises
    InputError when none of these can be read, and what `FeatureCache.open_or_create` raises.
    """

    def features_of(rows: list[int], names: list[str]) -> Iterator[PictureFeatures]:
        decoder = Decoder(manifest, photo_folder, backbones, exif)
        progress = Progress(len(rows), "pictures of the sample")
        encode = BatchEncoder(manifest, backbones, progress)
        with closing(decode_ahead(decoder, ((row, names) for row in rows), None)) as decoded:
            for picture in encode([one] for one in decoded):
                yield picture
                progress.step()

    sets = ready_to_store(address, manifest, backbones.feature_sets(exif, encoding, token_encoding), features_of)
    return FeatureCache.open_or_create(address, manifest, sets, part_size)


def extract(
    cache: FeatureCache,
    photo_folder: Path,
    backbones: Backbones,
    *,
    exif: Exif = "auto",
    batch_size: int | None = None,
    decode_threads: int | None = None,
    max_failures: FailureLimit = DEFAULT_FAILURES,
    take_over: bool = False,
    parts: Collection[int] | None = None,
) -> ExtractSummary:
    """Run the backbones over every part of `cache` that lacks a record of theirs, and only those it lacks.

    Other runs may be at work on the same cache: each does what no other one has claimed, and all end when every part
    is there. `take_over` says that no other run is alive, so that what dead ones have claimed is free at once.
    `parts`: only these.

    A picture that cannot be read is recorded with its reason and skipped. Raises InputError when the first
    pictures all fail, or when more than `max_failures` do (V3Det's copies lack many photos; a mistyped folder lacks
    all); what is committed by then stays.
    """
    names = [feature_set.name for feature_set in backbones.feature_sets(exif)]
    decoder = Decoder(cache.manifest, photo_folder, backbones, exif)
    failed = 0
    with Claims(cache.storage, take_over=take_over) as claims:
        shared = SharedParts(cache, names, claims, parts)
        progress = Progress(shared.pictures, "pictures")
        encode = BatchEncoder(cache.manifest, backbones, progress)
        while shared.wait():
            with (
                CommitThread(cache, shared) as writer,
                closing(decode_ahead(decoder, shared.jobs(), decode_threads)) as decoded,
            ):
                batches = batches_of(decoded, batch_size or backbones.batch_size, cache.part_size, progress)
                for picture in encode(batches):
                    failed += picture.failure is not None
                    with progress.timed("write"):
                        writer.put(picture)
                    progress.total = shared.pictures
                    progress.step()
                    max_failures.check(failed, progress, photo_folder, picture.failure)
    return ExtractSummary(
        pictures=progress.done,
        failed=failed,
        parts=shared.done,
        parts_before=shared.before,
        parts_of_others=shared.lacking_before - shared.done,
        ignored_orientations=encode.ignored_orientations,
        seconds=progress.seconds,
        shares=progress.shares(),
    )
