"""`extract --retry-failed`: extract the images that could not be read before.

Only these images are decoded. Each is computed in its own slot of its part's batches, whose shapes the part record
states; all other slots stay blank. It so gets the bytes that it would have had, and the stored bytes of the other
images are copied.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
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
from regionspot.pipeline.extraction.decode_ahead import DecodedImage, Decoder, decode_ahead, default_threads
from regionspot.pipeline.reporting.run_stats import RunStats
from regionspot.pipeline.reporting.summary_page import write_page


@dataclass(frozen=True)
class RetrySummary:
    """The result of a retry, in images.

    read      extracted now
    failed    failed again; `reason` is the last one's
    skipped   in parts that other runs hold
    """

    read: int
    failed: int
    skipped: int
    seconds: float
    reason: str | None

    def text(self) -> str:
        """One line for people."""
        if not self.read + self.failed + self.skipped:
            return "nothing to retry: no image has failed"
        fields = [f"{self.read:,} failed images extracted, {duration(self.seconds)}"]
        if self.failed:
            fields.append(f"{self.failed:,} still cannot be read (the last: {self.reason})")
        if self.skipped:
            fields.append(f"{self.skipped:,} are in parts that another run holds; retry when it has finished")
        return "; ".join(fields)


def retry(cache: FeatureCache, image_folder: Path, backbones: Backbones, config: ExtractConfig) -> RetrySummary:
    """Extract the failed images of written parts, and rewrite the parts in which some can be read now.

    The config's batch size applies to parts whose records state no batches: parts of earlier versions, or composed of
    several parts by `cache merge`. Parts that are not written are left to `extract`.

    A killed retry can be run again; a part that was being replaced at that moment is written by the next `extract`.
    """
    names = [feature_set.name for feature_set in config.feature_sets(backbones)]
    parts = config.selected_parts(cache.geometry)
    groups_by_part = _failed_groups(cache, names, parts, lambda: config.batch_size or backbones.batch_size)
    counts = {part: len({row for group in groups for row in group.rows}) for part, groups in groups_by_part.items()}
    decoder = Decoder(cache.manifest, image_folder, backbones, config.exif)
    threads = config.decode_threads or default_threads()
    stats = RunStats()
    progress = Progress(sum(counts.values()), "failed images", shares=stats.shares)
    encode = BatchEncoder(cache.manifest, backbones, stats)
    read = skipped = 0
    reason: str | None = None
    with Claims(cache.storage, take_over=config.take_over) as claims:
        for part, groups in groups_by_part.items():
            if not claims.claim(part):
                skipped += counts[part]
                continue
            rows_read: set[int] = set()
            for group in groups:
                images = _extract_group(group, decoder, encode, threads)
                readable = {image.row: image for image in images if image.failure is None}
                reason = next((image.failure for image in reversed(images) if image.failure), reason)
                for name in group.names if readable else ():
                    rewrite_part(cache, part, name, readable, str(claims.process), partial(claims.require_owned, part))
                rows_read.update(readable)
            claims.release(part)
            read += len(rows_read)
            stats.seconds = progress.seconds
            progress.step(counts[part])
    if read:
        write_page(cache)  # update its list of failures
    return RetrySummary(read, progress.done - read, skipped, progress.seconds, reason)


@dataclass(frozen=True)
class _FailedGroup:
    """Failed images of one part, for the feature sets that lack the same images and were computed in equal batches.

    rows      of the failed images, ascending
    batches   the rows of each batch of the part, in order
    names     of the feature sets
    """

    rows: tuple[int, ...]
    batches: tuple[range, ...]
    names: list[str]


def _failed_groups(
    cache: FeatureCache, names: Sequence[str], parts: Collection[int], batch_size: Callable[[], int]
) -> dict[int, list[_FailedGroup]]:
    """The failed images by part."""
    groups: defaultdict[int, dict[Any, _FailedGroup]] = defaultdict(dict)
    for name in names:
        written = set(range(cache.n_parts)) - set(cache.pending_parts([name]))
        for part in sorted(written.intersection(parts)):
            record = cache.record(part, name)
            if not record.failures:
                continue
            rows = tuple(failure.row for failure in record.failures)
            batches = tuple(record.batch_rows() or _split(cache.part_rows(part), batch_size()))
            groups[part].setdefault((rows, batches), _FailedGroup(rows, batches, [])).names.append(name)
    return {part: list(by_key.values()) for part, by_key in sorted(groups.items())}


def _split(rows: range, size: int) -> list[range]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def _extract_group(
    group: _FailedGroup, decoder: Decoder, encode: BatchEncoder, decode_threads: int
) -> list[ImageFeatures]:
    """The images of the group, each computed in its own slot, or with the reason why it still fails."""
    failed_rows = set(group.rows)
    requests = ((row, group.names) for row in group.rows)
    with closing(decode_ahead(decoder, requests, decode_threads)) as decoded:
        batches = (
            [next(decoded) if row in failed_rows else DecodedImage(row) for row in rows]
            for rows in group.batches
            if not failed_rows.isdisjoint(rows)
        )
        return [image for image in encode(batches) if image.row in failed_rows]
