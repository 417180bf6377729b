"""A run of `extract` as it is seen from outside: counted while it works, told by a line, by metrics and by a summary.

`extract` tells it of each picture; what has been written it reads from the run's parts. The thread that serves the
metrics only reads numbers, so the run never waits for whoever looks at it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime

from regionspot.cache.info import size_text
from regionspot.cache.machine import processors
from regionspot.cache.process import this_process
from regionspot.cache.progress import Progress
from regionspot.cache.schema import FeatureSet, PictureFeatures
from regionspot.cache.store import FeatureCache
from regionspot.pipeline.bottleneck import find_bottleneck
from regionspot.pipeline.decoding import default_threads
from regionspot.pipeline.failure_kinds import FailureCount
from regionspot.pipeline.frozen_models import Backbones
from regionspot.pipeline.sharing import SharedParts
from regionspot.pipeline.summary import COMPLETE, ExtractSummary, RunRecord
from regionspot.pipeline.summary_page import publish
from regionspot.pipeline.surroundings import machine, versions


class Watch:
    """Counts one run at a time.

    metrics_port   serve Prometheus metrics there while a run is at work
    publish        write the run and summary.md into the cache; a worker that does one part of many leaves it to whoever
                   sees all

    progress       of the run's pictures, with the time in each stage
    parts          what this run has of the cache; None before it began
    regions        of the pictures done
    failures       by kind
    """

    def __init__(self, *, metrics_port: int | None = None, publish: bool = True) -> None:
        self.metrics_port, self.publish = metrics_port, publish
        self._reset()

    def _reset(self) -> None:
        self.progress = Progress(0, "pictures", detail=self._detail)
        self.parts: SharedParts | None = None
        self.regions = self.ignored_orientations = 0
        self.failures = FailureCount()

    @contextmanager
    def over(self, cache: FeatureCache, backbones: Backbones, decode_threads: int | None) -> Iterator[None]:
        """Watch the run inside the block; at its end it is told of, however it ends.

        Raises InputError where metrics cannot be served.
        """
        self._reset()
        self._cache, self._device, self._half_is_faster = cache, str(backbones.device), backbones.half_is_faster
        self._decode_threads = decode_threads
        started, outcome = datetime.now(UTC).isoformat(), COMPLETE
        with self._metrics():
            try:
                yield
            except BaseException as error:
                outcome = f"stopped: {str(error) or type(error).__name__}"
                raise
            finally:
                self.progress.finish()
                if self.publish and self.progress.done:
                    models = {name: weights_of(each) for name, each in cache.feature_sets.items()}
                    found = str(this_process()), outcome, machine(), versions(), models, self.summary()
                    publish(cache, RunRecord(started, *found))

    def begin(self, parts: SharedParts) -> Progress:
        """The run knows its parts now; the progress that it is to time its stages with."""
        self.parts = parts
        self.progress = Progress(parts.counts.pictures, "pictures", detail=self._detail)
        return self.progress

    def wait(self) -> bool:
        """As the parts' own, and the time that it takes."""
        with self.progress.timed("wait"):
            return self.parts is not None and self.parts.wait()

    def picture(self, picture: PictureFeatures, ignored_orientations: int) -> None:
        """A picture went to the writer; of all so far, so many had an EXIF orientation that was ignored."""
        manifest, parts = self._cache.manifest, self.parts
        self.ignored_orientations = ignored_orientations
        rows = manifest.regions(picture.row)
        self.regions += rows.stop - rows.start
        if picture.failure is not None:
            self.failures.add(str(manifest.paths[picture.row]), picture.failure)
        if parts is not None:
            self.progress.total = parts.counts.pictures  # others may have done some of them meanwhile
        self.progress.step()

    @property
    def bytes(self) -> int:
        """Written by this run so far, in whole parts."""
        return self.parts.counts.bytes if self.parts else 0

    def summary(self) -> ExtractSummary:
        """The run as it stands now."""
        progress, shares = self.progress, self.progress.shares()
        parts = self.parts.counts if self.parts else None
        bottleneck = find_bottleneck(
            shares,
            device=self._device,
            regions_per_picture=self.regions / max(progress.done, 1),
            decode_threads=self._decode_threads or default_threads(),
            cores=processors(),
            half_is_faster=self._half_is_faster,
        )
        return ExtractSummary(
            pictures=progress.done,
            failed=self.failures.total,
            parts=parts.done if parts else 0,
            parts_before=parts.before if parts else 0,
            parts_of_others=parts.others if parts else 0,
            ignored_orientations=self.ignored_orientations,
            seconds=progress.seconds,
            shares=shares,
            regions=self.regions,
            bytes=parts.bytes if parts else 0,
            bottleneck=bottleneck,
            failures=self.failures.kinds(),
        )

    def _detail(self) -> str:
        rate = self.progress.rate * self.regions / max(self.progress.done, 1)
        return f"{rate:.3g} regions/s  {size_text(self.bytes)} written"

    @contextmanager
    def _metrics(self) -> Iterator[None]:
        if self.metrics_port is None:
            yield
            return
        from regionspot.pipeline.metrics import served  # its library is there where metrics are wanted

        with served(self, self.metrics_port):
            yield


def weights_of(feature_set: FeatureSet) -> str:
    """Where a model's weights are from and which they are, as its provenance says."""
    said = feature_set.provenance
    return f"{said.get('weights_origin')}, SHA-256 {str(said.get('weights_sha256'))[:12]}"
