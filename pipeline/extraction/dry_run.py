"""`extract --dry-run`: what an extraction would do and how long it would take, estimated from a sample of images."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from regionspot.cache.format.manifest import Manifest
from regionspot.cache.progress import duration
from regionspot.cache.tools.info import size_text
from regionspot.pipeline.backbones.bundle import Backbones
from regionspot.pipeline.extraction.batch_encoder import BatchEncoder, batches_of
from regionspot.pipeline.extraction.config import ExtractConfig
from regionspot.pipeline.extraction.decode_ahead import DecodedImage, Decoder, decode_ahead, default_threads
from regionspot.pipeline.extraction.plan import ExtractionPlan
from regionspot.pipeline.reporting.run_stats import RunStats

SAMPLE_SECONDS = 20.0
SAMPLE_BATCHES = 8


@dataclass(frozen=True)
class DryRun:
    """The result of a dry run.

    rate      images per second in the sample; None if no sampled image could be read
    sample    number of sampled images, of which `failed` could not be read
    reason    why the last of these could not be read
    """

    plan: ExtractionPlan
    rate: float | None
    sample: int
    failed: int
    reason: str | None

    def text(self) -> str:
        """A few lines for people."""
        plan = self.plan
        sizes = ", ".join(f"{name} {size_text(size)}" for name, size in plan.bytes.items())
        lines = [
            f"{plan.images:,} images with {plan.regions:,} regions in {len(plan.parts):,} parts",
            f"{size_text(plan.total_bytes)} to write ({sizes})",
        ]
        if self.rate:
            hours = duration(plan.images / self.rate)
            lines.append(f"about {hours} at {self.rate:.3g} images/s, measured on {self.sample} images")
        if self.failed:
            lines.append(f"{self.failed} of {self.sample} sampled images could not be read: {self.reason}")
        return "\n".join([*lines, "nothing was written"])


def dry_run(
    plan: ExtractionPlan, manifest: Manifest, image_folder: Path, backbones: Backbones, config: ExtractConfig
) -> DryRun:
    """Run the backbones over a sample of images spread evenly over the manifest; writes nothing.

    The first batch, which includes loading libraries, is not timed if there are more.
    """
    size = config.batch_size or backbones.batch_size
    count = min(plan.images, SAMPLE_BATCHES * size)
    rows = np.linspace(0, len(manifest) - 1, count).round().astype(int).tolist() if count else []
    names = [feature_set.name for feature_set in config.feature_sets(backbones)]
    decoder = Decoder(manifest, image_folder, backbones, config.exif)
    encode = BatchEncoder(manifest, backbones, RunStats())
    ends, failures = [time.perf_counter()], []
    threads = config.decode_threads or default_threads()
    with closing(decode_ahead(decoder, ((row, names) for row in rows), threads)) as decoded:
        for image in encode(_until_timeout(batches_of(decoded, size, len(manifest) + 1, encode.stats))):
            ends.append(time.perf_counter())
            failures += [image.failure] if image.failure is not None else []
    sample, start = len(ends) - 1, size if len(ends) - 1 > size else 0
    readable = sample - len(failures)
    rate = (sample - start) / (ends[-1] - ends[start]) if readable else None
    return DryRun(plan, rate, sample, len(failures), failures[-1] if failures else None)


def _until_timeout(batches: Iterator[list[DecodedImage]]) -> Iterator[list[DecodedImage]]:
    """The batches that begin within SAMPLE_SECONDS, and at least two."""
    begin = time.perf_counter()
    for number, batch in enumerate(batches):
        yield batch
        if number and time.perf_counter() - begin > SAMPLE_SECONDS:
            return
