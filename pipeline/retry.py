"""Just the pictures that could not be read, tried again: photos were restored, or fetched from another mirror.

Only they are decoded and encoded; what a part holds of the others is copied as it lies.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from regionspot.cache.claims import Claims
from regionspot.cache.progress import Progress, duration
from regionspot.cache.rewriting import rewrite_part
from regionspot.cache.schema import PictureFeatures
from regionspot.cache.store import FeatureCache
from regionspot.pipeline.decoding import Decoder, decode_ahead
from regionspot.pipeline.encoding import BatchEncoder
from regionspot.pipeline.frozen_models import Backbones
from regionspot.pipeline.photos import Exif
from regionspot.pipeline.summary_page import write_page

Wanted = dict[int, list[str]]  # feature sets that lack a picture, by its row


@dataclass(frozen=True)
class RetrySummary:
    """What became of the pictures that had failed.

    read      pictures that are there now
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
            return "nothing to try again: no picture has failed"
        words = [f"{self.read:,} pictures read that had failed, {duration(self.seconds)}"]
        if self.failed:
            words.append(f"{self.failed:,} still cannot be read (the last: {self.reason})")
        if self.elsewhere:
            words.append(f"{self.elsewhere:,} are in parts that another run has; run this again when it is done")
        return "; ".join(words)


def retry(
    cache: FeatureCache,
    photo_folder: Path,
    backbones: Backbones,
    *,
    exif: Exif = "auto",
    decode_threads: int | None = None,
    take_over: bool = False,
    parts: Collection[int] | None = None,
) -> RetrySummary:
    """Run the backbones over the pictures that failed and write the parts anew in which some can be read now.

    Parts that are not written at all are left to `extract`. Killed at any moment, it can be run again; a part that
    was being replaced just then is made by the next `extract`.
    """
    wanted = _failed(cache, [each.name for each in backbones.feature_sets(exif)], parts)
    decoder = Decoder(cache.manifest, photo_folder, backbones, exif)
    progress = Progress(sum(map(len, wanted.values())), "failed pictures")
    encode = BatchEncoder(cache.manifest, backbones, progress)
    read = elsewhere = 0
    reason: str | None = None
    with Claims(cache.storage, take_over=take_over) as claims:
        for part, rows in wanted.items():
            if not claims.claim(part):
                elsewhere += len(rows)
                continue
            jobs = ((row, names) for row, names in sorted(rows.items()))
            with closing(decode_ahead(decoder, jobs, decode_threads)) as decoded:
                found = {picture.row: picture for picture in encode([one] for one in decoded)}
            good = {row: picture for row, picture in found.items() if picture.failure is None}
            reason = next((each.failure for each in reversed(found.values()) if each.failure), reason)
            _replace(cache, part, {row: rows[row] for row in good}, found, claims)
            claims.release(part)
            read += len(good)
            progress.step(len(rows))
    if read:
        write_page(cache)  # its list of failures is an older one
    return RetrySummary(read, progress.done - read, elsewhere, progress.seconds, reason)


def _failed(cache: FeatureCache, names: Sequence[str], parts: Collection[int] | None) -> dict[int, Wanted]:
    """By part, the rows that failed and the feature sets that lack them."""
    found: defaultdict[int, Wanted] = defaultdict(dict)
    for name in names:
        written = set(range(cache.n_parts)) - set(cache.pending_parts([name]))
        for part in sorted(written if parts is None else written.intersection(parts)):
            for failure in cache.record(part, name).failures:
                found[part].setdefault(failure.row, []).append(name)
    return dict(sorted(found.items()))


def _replace(cache: FeatureCache, part: int, good: Wanted, found: dict[int, PictureFeatures], claims: Claims) -> None:
    """Write each feature set of the part anew that one of the pictures was read for."""
    for name in sorted({name for names in good.values() for name in names}):
        changes = {row: found[row] for row, names in good.items() if name in names}
        rewrite_part(cache, part, name, changes, str(claims.process), lambda: claims.require_ours(part))
