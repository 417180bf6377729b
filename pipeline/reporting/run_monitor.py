"""RunMonitor: what a user sees of an extraction: the progress line, the run's record in the cache, the summary.

It serves runs in one process and distributed runs. Both count in its `stats`, which the thread that serves metrics
only reads, so a run never waits for a reader.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime

from regionspot.cache.format.manifest import Manifest
from regionspot.cache.format.schema import ImageFeatures
from regionspot.cache.process import this_process
from regionspot.cache.progress import Progress
from regionspot.cache.store import FeatureCache
from regionspot.cache.tools.info import size_text
from regionspot.pipeline.reporting.bottleneck import find_bottleneck
from regionspot.pipeline.reporting.environment import Environment
from regionspot.pipeline.reporting.run_stats import RunStats
from regionspot.pipeline.reporting.run_summary import COMPLETE, ExtractSummary, RunRecord
from regionspot.pipeline.reporting.summary_page import publish


class RunMonitor:
    """Counts and shows the progress of one run.

    images         images to extract
    parts          parts of the run, of which `parts_before` were complete when it started
    stats          what the run has done; given when parts are counted elsewhere, as `PartQueue` does
    """

    def __init__(self, images: int, parts: int, parts_before: int = 0, stats: RunStats | None = None) -> None:
        self.parts, self.parts_before = parts, parts_before
        self.stats = RunStats() if stats is None else stats
        self.progress = Progress(images, "images", detail=self._detail, shares=self.stats.shares)

    @property
    def parts_pending(self) -> int:
        """Parts that no run is known to have written."""
        return self.parts - self.parts_before - self.stats.parts - self.stats.parts_of_others

    @contextmanager
    def recording(self, cache: FeatureCache, environment: Environment) -> Iterator[None]:
        """Write the run's record and summary.md into the cache at the end of the block, also after an error."""
        started, outcome = datetime.now(UTC).isoformat(), COMPLETE
        try:
            yield
        except BaseException as error:
            outcome = f"stopped: {str(error) or type(error).__name__}"
            raise
        finally:
            self.progress.finish()
            if self.stats.images:
                worker, summary = str(this_process()), self.summary(environment)
                machine, versions, models = environment.machine, environment.versions, environment.models
                publish(cache, RunRecord(started, worker, outcome, machine, versions, models, summary))

    def add_image(self, image: ImageFeatures, manifest: Manifest) -> None:
        """Count an image that this process extracted."""
        regions = manifest.regions(image.row)
        self.stats.images += 1
        self.stats.regions += regions.stop - regions.start
        self.stats.seconds = self.progress.seconds
        if image.failure is not None:
            self.stats.failures.add(str(manifest.paths[image.row]), image.failure)
        self.progress.step()

    def add_part(self, stats: RunStats, images: int) -> None:
        """Count a part of `images` images that a worker, or another run, has written."""
        self.stats.merge(stats)
        self.progress.step(images)

    def summary(self, environment: Environment) -> ExtractSummary:
        """The run so far."""
        stats, shares = self.stats, self.stats.shares()
        return ExtractSummary(
            images=stats.images,
            failed=stats.failures.total,
            parts=stats.parts,
            parts_before=self.parts_before,
            parts_of_others=stats.parts_of_others,
            ignored_orientations=stats.ignored_orientations,
            seconds=self.progress.seconds,
            shares=shares,
            regions=stats.regions,
            bytes=stats.bytes,
            bottleneck=find_bottleneck(
                shares,
                device=environment.device,
                regions_per_image=stats.regions / max(stats.images, 1),
                decode_threads=environment.decode_threads,
                cores=int(environment.machine.get("cores", 1)),
                half_is_faster=environment.half_is_faster,
            ),
            failures=stats.failures.kinds(),
        )

    def _detail(self) -> str:
        rate = self.progress.rate * self.stats.regions / max(self.progress.done, 1)
        return f"{rate:.3g} regions/s  {size_text(self.stats.bytes)} written"
