"""Connect to the workers of `extract --scheduler`.

none         no workers: this process alone
local        one dask worker per GPU of this machine, one without a GPU
local:8      eight dask workers on this machine
tcp://...    the workers of a running dask scheduler
"""

from __future__ import annotations

import importlib.util
import logging
import math
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress

from regionspot.cache.errors import CacheError, InputError
from regionspot.cache.machine import processors
from regionspot.pipeline.distributed.worker import PARTS_AT_ONCE, visible_gpus

log = logging.getLogger(__name__)

CONNECT_SECONDS = 10.0
RECONNECT_SECONDS = 30.0
POLL_SECONDS = 0.5  # between two requests for the number of workers
LOG_SECONDS = 60.0  # between two messages about waiting
# A local worker without a heartbeat for so long is killed and restarted (dask's `worker-ttl`, which dask checks at this
# interval, so it takes up to twice as long). Not less: loading a model can block a worker's interpreter for seconds.
WORKER_TTL_SECONDS = 30.0
_ADDRESS = re.compile(r"(tcp|tls|ucx|ws|wss)://\S+")


def check_scheduler(text: str) -> str:
    """Return `text`. Raises InputError if it is none of the above."""
    if text == "none" or _ADDRESS.fullmatch(text) or local_workers(text) is not None:
        return text
    raise InputError(f"scheduler {text!r}: expected none, local, local:8 (eight workers) or tcp://host:8786")


def local_workers(scheduler: str) -> int | None:
    """The number of local workers; None for a running scheduler."""
    match = re.fullmatch(r"local(?::([1-9]\d*))?", scheduler)
    if match is None:
        return None
    return int(match[1]) if match[1] else max(len(visible_gpus()), 1)


class Connection:
    """A dask client that can be replaced when its connection breaks.

    workers, most_workers   number of workers at the last poll, and at most

    A connection can break while the scheduler runs, for instance on a busy machine. Dask's client then forgets its
    tasks, and about one time in twenty its own reconnect hangs or fails an assertion. So `renew` creates a new client.
    """

    def __init__(self, address: str) -> None:
        self.address, self.workers, self.most_workers = address, 0, 0
        self._polled = self._logged = -math.inf
        self._connect()

    def _connect(self) -> None:
        from distributed import Client

        self.client = Client(self.address, timeout=CONNECT_SECONDS, set_as_default=False)
        self._stream = self.client.scheduler_comm

    @property
    def is_broken(self) -> bool:
        """Whether tasks of this client may be lost, also if dask has reconnected since."""
        return self.client.status != "running" or self.client.scheduler_comm is not self._stream

    def renew(self) -> None:
        """Connect again. Raises CacheError when no scheduler answers within RECONNECT_SECONDS."""
        log.warning("%s: the connection to the scheduler broke; connecting again", self.address)
        self.close()
        deadline = time.monotonic() + RECONNECT_SECONDS
        while time.monotonic() < deadline:
            with suppress(OSError, TimeoutError):
                return self._connect()
            time.sleep(0.1)
        raise CacheError(
            f"{self.address}: the scheduler is gone; written parts are kept: start it and its workers again, then run "
            "the same command again to resume"
        )

    def close(self) -> None:
        """Disconnect. The scheduler drops the tasks that no worker has started."""
        with suppress(AssertionError, OSError, TimeoutError):  # with a broken connection it fails or hangs
            self.client.close(timeout=5)

    def poll_workers(self) -> None:
        """Log the number of workers when it changes; polls at most every POLL_SECONDS."""
        if (now := time.monotonic()) - self._polled < POLL_SECONDS:
            return
        self._polled, before = now, self.workers
        try:
            self.workers = len(self.client.nthreads())
        except (OSError, TimeoutError):  # is_broken soon
            return
        self.most_workers = max(self.most_workers, self.workers)
        if self.workers != before:
            log.info("%d workers%s", self.workers, self._dashboard())
        if not self.workers and now - self._logged >= LOG_SECONDS:
            self._logged = now
            log.info("%s: waiting for a worker to join", self.address)

    def retire(self, worker: str) -> bool:
        """Stop a worker for good, so that its nanny does not restart it; False if it is the only one."""
        with suppress(OSError, TimeoutError):
            if not self.client.nthreads().keys() - {worker}:
                return False
            self.client.retire_workers([worker])
        return True

    def _dashboard(self) -> str:
        # The dashboard needs bokeh. If it is missing here, it is missing in the scheduler's environment, too.
        if importlib.util.find_spec("bokeh") is None:
            return ""
        services = self.client.scheduler_info(n_workers=0).get("services", {})
        return f"; dashboard: {self.client.dashboard_link}" if "dashboard" in services else ""


@contextmanager
def connected(scheduler: str) -> Iterator[Connection]:
    """Connect to the workers of `scheduler`; local ones are started, and stopped on leaving the block.

    Raises InputError when no scheduler answers.
    """
    import distributed  # noqa: F401  takes half a second, and configures its loggers

    # Our own messages report workers that join and leave, in one line each.
    for name in [name for name in logging.root.manager.loggerDict if name.split(".")[0] == "distributed"]:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    count = local_workers(scheduler)
    with nullcontext(scheduler) if count is None else _local_cluster(count) as address:
        try:
            connection = Connection(address)
        except (OSError, TimeoutError, ValueError) as error:
            raise InputError(
                f"{address}: no scheduler answers ({type(error).__name__}); is `dask scheduler` running there, and can "
                "this machine reach its port?"
            ) from error
        try:
            yield connection
        finally:
            connection.close()


@contextmanager
def _local_cluster(count: int) -> Iterator[str]:
    """The address of a scheduler with `count` workers on this machine."""
    import dask
    from distributed import LocalCluster

    # Workers inherit these settings from this process.
    settings = {
        # Replaces dask's default, which sets one thread per worker and makes malloc return every freed page.
        "distributed.nanny.pre-spawn-environ": {"DASK_LOGGING__DISTRIBUTED": "critical"},
        # With the defaults, 64 idle workers keep two cores busy with profiling and monitoring themselves.
        "distributed.worker.profile.enabled": False,
        "distributed.admin.tick.interval": "1s",
        "distributed.admin.system-monitor.interval": "5s",
        "distributed.scheduler.worker-ttl": f"{WORKER_TTL_SECONDS}s",
        # A worker gets only as many parts as it has threads; the others wait in the scheduler for any free worker.
        "distributed.scheduler.worker-saturation": 1.0,
        # Nannies restart dead workers. After this timeout dask would remove a worker that has just died again.
        "distributed.deploy.lost-worker-timeout": "1000 days",
    }
    with (
        dask.config.set(settings),
        LocalCluster(
            n_workers=count,
            threads_per_worker=PARTS_AT_ONCE,
            memory_limit=0,  # no limit: features are large, but dask does not hold them
            host="127.0.0.1",
            dashboard_address="127.0.0.1:0",
            env=thread_counts(count),
            preload=["regionspot.pipeline.distributed.worker"],  # its dask_setup
            silence_logs=logging.CRITICAL,
        ) as cluster,
    ):
        yield cluster.scheduler_address


def thread_counts(workers: int) -> dict[str, str]:
    """Environment variables that limit each local worker to its share of the cores, unless the user has set them.

    MKL follows OMP_NUM_THREADS by itself, so it must not get more threads than the user has set there: features round
    differently with another number of threads.
    """
    threads = os.environ.get("OMP_NUM_THREADS", str(max(processors() // workers, 1)))
    return {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": os.environ.get("MKL_NUM_THREADS", threads)}
