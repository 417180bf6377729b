"""What a run has done, served over HTTP for Prometheus: `extract --metrics-port 9400`, `curl localhost:9400/metrics`.

Values are taken from the run's RunMonitor when they are asked for, so nothing is counted twice and no image waits. Each
run is a process with a registry of its own; Prometheus tells runs apart by their address.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from regionspot.cache.errors import InputError

if TYPE_CHECKING:  # it imports this module where metrics are asked for
    from regionspot.pipeline.reporting.run_monitor import RunMonitor

log = logging.getLogger(__name__)


class _Collector:
    """Gives the client library a run's numbers as they are at this moment."""

    def __init__(self, watch: RunMonitor) -> None:
        self._watch = watch

    def collect(self) -> Iterator[Any]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        stats, progress, parts = self._watch.stats, self._watch.progress, self._watch.parts
        now = parts.counts if parts else None
        yield CounterMetricFamily(
            "regionspot_pictures", "Images that this run has done, those that could not be read too", stats.images
        )
        yield CounterMetricFamily("regionspot_regions", "Regions of these images", stats.regions)
        yield CounterMetricFamily(
            "regionspot_bytes_written", "Bytes of the parts that this run wrote", now.bytes if now else 0
        )
        yield CounterMetricFamily("regionspot_parts", "Parts that this run wrote", now.done if now else 0)
        failures = CounterMetricFamily(
            "regionspot_failures", "Images that could not be read, by what is wrong with them", labels=["kind"]
        )
        for each in stats.failures.kinds():
            failures.add_metric([each.kind], each.count)
        yield failures
        stages = CounterMetricFamily(
            "regionspot_stage_seconds", "Seconds that the run waited for each of its stages", labels=["stage"]
        )
        for stage, seconds in dict(stats.stage_seconds).items():
            stages.add_metric([stage], seconds)
        yield stages
        yield GaugeMetricFamily(
            "regionspot_parts_pending",
            "Parts that neither this run nor another has written",
            now.pending if now else 0,
        )
        yield GaugeMetricFamily(
            "regionspot_pictures_pending", "Images that this run may still have to do", progress.total - progress.done
        )
        yield GaugeMetricFamily(
            "regionspot_pictures_per_second", "Images a second, of the last five minutes", progress.rate
        )
        yield GaugeMetricFamily("regionspot_run_seconds", "Seconds since the run began", progress.seconds)


@contextmanager
def served(watch: RunMonitor, port: int) -> Iterator[None]:
    """Serve a run's metrics at http://HOST:port/metrics inside the block.

    Raises InputError where the client library is not installed or the port cannot be had.
    """
    try:
        from prometheus_client import CollectorRegistry, start_http_server
    except ImportError:
        raise InputError(
            f"--metrics-port {port}: needs prometheus_client, which is not installed; pip install 'regionspot[metrics]'"
        ) from None
    registry = CollectorRegistry()
    registry.register(_Collector(watch))
    try:
        server, thread = start_http_server(port, registry=registry)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"--metrics-port {port}: cannot be listened on ({reason}); give another port") from None
    log.info("metrics at http://localhost:%d/metrics", server.server_port)
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
