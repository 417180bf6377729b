"""Prometheus metrics of a run over HTTP: `extract --metrics-port 9400`, `curl localhost:9400/metrics`.

Values are read from the RunMonitor at each request, so the run itself does no extra work. Each run is a process with
its own registry; Prometheus distinguishes runs by their address.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from regionspot.cache.errors import InputError
from regionspot.pipeline.reporting.run_monitor import RunMonitor

log = logging.getLogger(__name__)


class _Collector:
    """The current values, in the client library's form. Metric names say pictures: dashboards query them."""

    def __init__(self, monitor: RunMonitor) -> None:
        self._monitor = monitor

    def collect(self) -> Iterator[Any]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        stats, progress = self._monitor.stats, self._monitor.progress
        for name, description, count in (
            ("pictures", "Images that this run has processed, including unreadable ones", stats.images),
            ("regions", "Regions of these images", stats.regions),
            ("bytes_written", "Bytes of the parts that this run wrote", stats.bytes),
            ("parts", "Parts that this run wrote", stats.parts),
        ):
            yield CounterMetricFamily(f"regionspot_{name}", description, count)
        failures = CounterMetricFamily("regionspot_failures", "Unreadable images by kind of failure", labels=["kind"])
        for failure in stats.failures.kinds():
            failures.add_metric([failure.kind], failure.count)
        yield failures
        stages = CounterMetricFamily("regionspot_stage_seconds", "Seconds spent in each stage", labels=["stage"])
        for stage, seconds in dict(stats.stage_seconds).items():
            stages.add_metric([stage], seconds)
        yield stages
        for name, description, value in (
            ("parts_pending", "Parts that no run has written yet", self._monitor.parts_pending),
            ("pictures_pending", "Images that this run may still process", progress.total - progress.done),
            ("pictures_per_second", "Images per second over the last five minutes", progress.rate),
            ("run_seconds", "Seconds since the run started", progress.seconds),
        ):
            yield GaugeMetricFamily(f"regionspot_{name}", description, value)


@contextmanager
def metrics_server(monitor: RunMonitor, port: int | None) -> Iterator[None]:
    """Serve the run's metrics at http://HOST:port/metrics inside the block; None: do not serve.

    Raises InputError when prometheus_client is not installed or the port is not available.
    """
    if port is None:
        yield
        return
    try:
        from prometheus_client import CollectorRegistry, start_http_server
    except ImportError:
        raise InputError(
            f"--metrics-port {port}: prometheus_client is not installed; pip install 'regionspot[metrics]'"
        ) from None
    registry = CollectorRegistry()
    registry.register(_Collector(monitor))
    try:
        server, thread = start_http_server(port, registry=registry)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"--metrics-port {port}: cannot listen ({reason}); give another port") from None
    log.info("metrics at http://localhost:%d/metrics", server.server_port)
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
