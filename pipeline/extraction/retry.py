"""`regionspot extract --retry-failed`: the images that could not be read, tried again.

Only they are decoded. Each is computed in the place that it has in its part's batches, whose shape the part's record
states; all other places stay blank. It so gets the bytes that it would have had, and what the part holds of the others
is copied as it is stored.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regionspot.cache.format.schema import ImageFeatures
from regionspot.cache.progress import Progress, duration
from regionspot.cache.store import FeatureCache
from regionspot.cache.tools.rewrite_part import rewrite_part
from regionspot.cache.writing.claims import Claims
from regionspot.pipeline.backbones.bundle import Backbones
from regionspot.pipeline.extraction.batch_encoder import BatchEncoder
from regionspot.pipeline.extraction.config import ExtractConfig
from regionspot.pipeline.extraction.decode_ahead import DecodedImage, Decoder, decode_ahead
from regionspot.pipeline.reporting.run_stats import RunStats
from regionspot.pipeline.reporting.summary_page import write_page


@dataclass(frozen=True)
class RetrySummary:
    """What became of the images that had failed.

    read      images that are there now
    failed    that still cannot be read; `reason` is the last one's
    elsewhere that other runs are at work on
    """

    read: int
    failed: int
    elsewhere: int
    seconds: float
    reason: str | None

    def text(self) -> str:
        """One line for people."""
        if not self.read + self.failed + self.elsewhere:
            return "nothing to try again: no image has failed"
        words = [f"{self.read:,} images read that had failed, {duration(self.seconds)}"]
        if self.failed:
            words.append(f"{self.failed:,} still cannot be read (the last: {self.reason})")
        if self.elsewhere:
            words.append(f"{self.elsewhere:,} are in parts that another run has; run this again when it is done")
        return "; ".join(words)


def retry(cache: FeatureCache, image_folder: Path, backbones: Backbones, config: ExtractConfig) -> RetrySummary:
    """Run the backbones over the images that failed and write the parts anew in which some can be read now.

    The config's batch size is that of parts whose records do not state how they were computed: those of earlier
    versions, or put together from several parts by `cache merge`.

    Parts that are not written at all are left to `extract`. Killed at any moment, it can be run again; a part that
    was being replaced just then is made by the next `extract`.
    """
    names, parts = [each.name for each in config.feature_sets(backbones)], config.chosen_parts(cache.geometry)
    missing = _missing(cache, names, parts, lambda: config.batch_size or backbones.batch_size)
    counts = {part: len({row for some in sets for row in some.rows}) for part, sets in missing.items()}
    decoder = Decoder(cache.manifest, image_folder, backbones, config.exif)
    stats = RunStats()
    progress = Progress(sum(counts.values()), "failed images", shares=stats.shares)
    encode = BatchEncoder(cache.manifest, backbones, stats)
    read = elsewhere = 0
    reason: str | None = None
    with Claims(cache.storage, take_over=config.take_over) as claims:
        for part, sets in missing.items():
            if not claims.claim(part):
                elsewhere += counts[part]
                continue
            there: set[int] = set()
            for some in sets:
                images = _computed(some, decoder, encode, config.decode_threads)
                good = {image.row: image for image in images if image.failure is None}
                reason = next((image.failure for image in reversed(images) if image.failure), reason)
                if good:
                    _replace(cache, part, some.names, good, claims)
                there.update(good)
            claims.release(part)
            read += len(there)
            stats.seconds = progress.seconds
            progress.step(counts[part])
    if read:
        write_page(cache)  # its list of failures is an older one
    return RetrySummary(read, progress.done - read, elsewhere, progress.seconds, reason)


@dataclass(frozen=True)
class _Missing:
    """Images of one part that feature sets lack, and how the part's images are computed together.

    rows      of the images, rising
    batches   the rows of each batch of the part, in order
    names     of the feature sets
    """

    rows: tuple[int, ...]
    batches: tuple[range, ...]
    names: list[str]


def _missing(
    cache: FeatureCache, names: Sequence[str], parts: Collection[int], batch_size: Callable[[], int]
) -> dict[int, list[_Missing]]:
    """By part, what failed; feature sets that lack the same images and were computed alike together."""
    found: defaultdict[int, dict[Any, _Missing]] = defaultdict(dict)
    for name in names:
        written = set(range(cache.n_parts)) - set(cache.pending_parts([name]))
        for part in sorted(written.intersection(parts)):
            record = cache.record(part, name)
            if not record.failures:
                continue
            rows = tuple(failure.row for failure in record.failures)
            batches = record.batch_rows() or _in_batches_of(batch_size(), cache.part_rows(part))
            alike = _Missing(rows, tuple(batches), [])
            found[part].setdefault((alike.rows, alike.batches), alike).names.append(name)
    return {part: list(sets.values()) for part, sets in sorted(found.items())}


def _in_batches_of(size: int, rows: range) -> list[range]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def _computed(
    missing: _Missing, decoder: Decoder, encode: BatchEncoder, decode_threads: int | None
) -> list[ImageFeatures]:
    """The images that are missing, each computed in its own place of its batch, or the reason why it is still not."""
    wanted = set(missing.rows)
    jobs = ((row, missing.names) for row in missing.rows)
    with closing(decode_ahead(decoder, jobs, decode_threads)) as decoded:
        batches = (
            [next(decoded) if row in wanted else DecodedImage(row) for row in rows]
            for rows in missing.batches
            if not wanted.isdisjoint(rows)
        )
        return [image for image in encode(batches) if image.row in wanted]


def _replace(
    cache: FeatureCache, part: int, names: Sequence[str], good: Mapping[int, ImageFeatures], claims: Claims
) -> None:
    for name in names:
        rewrite_part(cache, part, name, good, str(claims.process), lambda: claims.require_owned(part))
