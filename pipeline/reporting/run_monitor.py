"""A run of `extract` as it is seen from outside: a line while it works, metrics, summary.md and the summary at its end.

It serves runs in one process and runs by workers. Both count in its `stats`; the thread that serves the metrics only
reads numbers, so the run never waits for whoever looks at it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING

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

if TYPE_CHECKING:
    from regionspot.pipeline.extraction.part_queue import PartQueue  # imports torch


class RunMonitor:
    """Watches one run at a time.

    metrics_port   serve Prometheus metrics there while a run is at work
    publish        write the run and summary.md into the cache

    stats          what the run has done
    progress       of its images
    parts          of a run in one process, what it has of the cache; None before it began
    parts_before   parts that were complete when it started
    """

    def __init__(self, metrics_port: int | None = None, *, publish: bool = True) -> None:
        self.metrics_port, self.publish = metrics_port, publish
        self._reset(0)

    def _reset(self, images: int) -> None:
        self.stats, self.parts_before = RunStats(), 0
        self.parts: PartQueue | None = None
        self.progress = Progress(images, "images", detail=self._detail, shares=self.stats.shares)

    @contextmanager
    def over(self, cache: FeatureCache, environment: Environment) -> Iterator[None]:
        """Watch the run inside the block; at its end it is recorded in the cache, however it ends.

        Raises InputError where metrics cannot be served.
        """
        self._reset(0)
        self._cache, self._environment = cache, environment
        started, outcome = datetime.now(UTC).isoformat(), COMPLETE
        with self._metrics():
            try:
                yield
            except BaseException as error:
                outcome = f"stopped: {str(error) or type(error).__name__}"
                raise
            finally:
                self.progress.finish()
                if self.publish and self.stats.images:
                    where, by = self._environment, str(this_process())
                    publish(
                        cache,
                        RunRecord(started, by, outcome, where.machine, where.versions, where.models, self.summary()),
                    )

    def begin(self, parts: PartQueue) -> RunStats:
        """A run in one process knows its parts now; what it is to count and time in."""
        self._reset(parts.counts.images)
        self.parts, self.parts_before = parts, parts.counts.before
        return self.stats

    def begin_by_workers(self, images: int, parts_before: int) -> RunStats:
        """A run by workers knows how much there is to do; what it is to count in."""
        self._reset(images)
        self.parts_before = parts_before
        return self.stats

    def wait(self) -> bool:
        """As the parts' own, and the time that it takes."""
        with self.stats.timed("wait"):
            return self.parts is not None and self.parts.wait()

    def image(self, image: ImageFeatures) -> None:
        """An image of a run in one process went to the writer."""
        stats, manifest = self.stats, self._cache.manifest
        stats.images += 1
        rows = manifest.regions(image.row)
        stats.regions += rows.stop - rows.start
        stats.seconds = self.progress.seconds
        if image.failure is not None:
            stats.failures.add(str(manifest.paths[image.row]), image.failure)
        self._take_in_parts()
        self.progress.step()

    def part(self, stats: RunStats, images: int) -> None:
        """A worker, or another run, has written a part of so many images."""
        self.stats.merge(stats)
        self.progress.step(images)

    def _take_in_parts(self) -> None:
        if self.parts is not None:
            now = self.parts.counts
            self.stats.parts, self.stats.parts_of_others, self.stats.bytes = now.done, now.others, now.bytes
            self.progress.total = now.images  # others may have done some of them meanwhile

    def summary(self) -> ExtractSummary:
        """The run as it stands now."""
        stats, where, seconds = self.stats, self._environment, self.progress.seconds
        if self.parts is not None:
            self._take_in_parts()
            stats.seconds = seconds
        shares = stats.shares()
        return ExtractSummary(
            images=stats.images,
            failed=stats.failures.total,
            parts=stats.parts,
            parts_before=self.parts_before,
            parts_of_others=stats.parts_of_others,
            ignored_orientations=stats.ignored_orientations,
            seconds=seconds,
            shares=shares,
            regions=stats.regions,
            bytes=stats.bytes,
            bottleneck=find_bottleneck(
                shares,
                device=where.device,
                regions_per_image=stats.regions / max(stats.images, 1),
                decode_threads=where.decode_threads,
                cores=int(where.machine.get("cores", 1)),
                half_is_faster=where.half_is_faster,
            ),
            failures=stats.failures.kinds(),
        )

    def _detail(self) -> str:
        rate = self.progress.rate * self.stats.regions / max(self.progress.done, 1)
        return f"{rate:.3g} regions/s  {size_text(self.stats.bytes)} written"

    @contextmanager
    def _metrics(self) -> Iterator[None]:
        if self.metrics_port is None:
            yield
            return
        from regionspot.pipeline.reporting.prometheus import served  # its library is there where metrics are wanted

        with served(self, self.metrics_port):
            yield
