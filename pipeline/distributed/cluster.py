"""Workers for `extract --scheduler`: dask workers of this machine, one a GPU, or those of a running dask cluster.

none         this process alone
local        a worker on each GPU of this machine, one where there is none
local:8      eight workers on this machine
tcp://...    the workers of a scheduler that runs there, however it and they were started
"""

from __future__ import annotations

import importlib.util
import logging
import math
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from regionspot.cache.errors import CacheError, InputError
from regionspot.cache.machine import processors
from regionspot.pipeline.distributed.worker import PARTS_AT_ONCE, gpus

log = logging.getLogger(__name__)

CONNECT_SECONDS = 10.0
RECONNECT_SECONDS = 30.0
WATCH_SECONDS = 0.5  # between two looks how many workers there are
SAY_SECONDS = 60.0  # between two lines about what is waited for
# A local worker that has not been heard of for so long is killed and started again (`worker-ttl`; dask looks as often
# as that, so it takes up to twice as long). Not less: loading a model may keep a worker's interpreter for seconds.
SILENT_SECONDS = 30.0
_ADDRESS = re.compile(r"(tcp|tls|ucx|ws|wss)://\S+")


def check_scheduler(text: str) -> str:
    """The text itself. Raises InputError where it is none of those above."""
    if text == "none" or _ADDRESS.fullmatch(text) or local_workers(text) is not None:
        return text
    raise InputError(f"scheduler {text!r}: expected none, local, local:8 (eight workers) or tcp://host:8786")


def local_workers(scheduler: str) -> int | None:
    """How many workers of this machine are asked for; None for a scheduler that runs elsewhere."""
    match = re.fullmatch(r"local(?::([1-9]\d*))?", scheduler)
    if match is None:
        return None
    return int(match[1]) if match[1] else max(len(gpus()), 1)


class Connection:
    """A dask client of the scheduler at `address`.

    workers, most_workers   how many it had when last asked, and at most

    A connection may break while the scheduler lives, on a busy machine for instance. Dask's client then forgets all of
    its tasks, and its own attempt to reconnect hangs or fails an assertion about one time in twenty. `renew` makes
    another client instead.
    """

    def __init__(self, address: str) -> None:
        self.address, self.workers, self.most_workers = address, 0, 0
        self._looked = self._said = -math.inf
        self._connect()

    def _connect(self) -> None:
        from distributed import Client

        self.client = Client(self.address, timeout=CONNECT_SECONDS, set_as_default=False)
        self._stream = self.client.scheduler_comm

    @property
    def is_broken(self) -> bool:
        """Whether tasks given to this client may be lost, also where dask has mended the connection since."""
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
            f"{self.address}: the scheduler is gone; the parts that are done stay: start it and its workers again, "
            "then run the same command again to resume"
        )

    def close(self) -> None:
        """Disconnect. The scheduler drops the tasks that no worker has begun."""
        # A client whose connection is broken may fail an assertion in here, or hang.
        with suppress(AssertionError, OSError, TimeoutError):
            self.client.close(timeout=5)

    def watch_workers(self) -> None:
        """Say how many workers there are when that has changed; asks at most every WATCH_SECONDS."""
        if (now := time.monotonic()) - self._looked < WATCH_SECONDS:
            return
        self._looked, before = now, self.workers
        try:
            self.workers = len(self.client.nthreads())
        except (OSError, TimeoutError):  # is_broken soon
            return
        self.most_workers = max(self.most_workers, self.workers)
        if self.workers != before:
            link = self._dashboard()
            log.info("%d workers%s", self.workers, f"; dashboard: {link}" if link else "")
        if not self.workers and now - self._said >= SAY_SECONDS:
            self._said = now
            log.info("%s: no worker is there; parts are given out as soon as one is", self.address)

    def retire(self, worker: str) -> bool:
        """Have a worker end, and its nanny not start it again; False where there is no other one."""
        with suppress(OSError, TimeoutError):
            if not self.client.nthreads().keys() - {worker}:
                return False
            self.client.retire_workers([worker])
        return True

    def _dashboard(self) -> str | None:
        # Where bokeh, which draws the pages, is missing here, it is missing in the scheduler's environment too.
        if importlib.util.find_spec("bokeh") is None:
            return None
        services = self.client.scheduler_info(n_workers=0).get("services", {})
        return str(self.client.dashboard_link) if "dashboard" in services else None


@contextmanager
def connected(scheduler: str) -> Iterator[Connection]:
    """A connection to the workers that `scheduler` names; those of this machine are started, and ended on leaving.

    Raises InputError where no scheduler answers.
    """
    import distributed  # noqa: F401  half a second to import, and it sets its log up

    # What dask says of workers that come and go is said in one line each by on_workers.py.
    for name in [name for name in logging.root.manager.loggerDict if name.split(".")[0] == "distributed"]:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    count = local_workers(scheduler)
    with _running(scheduler) if count is None else _local(count) as connection:
        try:
            yield connection
        finally:
            connection.close()


@contextmanager
def _running(address: str) -> Iterator[Connection]:
    try:
        connection = Connection(address)
    except (OSError, TimeoutError, ValueError) as error:
        raise InputError(
            f"{address}: no scheduler answers ({type(error).__name__}); is `dask scheduler` running there, and may "
            "this machine reach its port?"
        ) from error
    yield connection


@contextmanager
def _local(count: int) -> Iterator[Connection]:
    import dask
    from distributed import LocalCluster

    # Workers take these from the process that starts them, over their environment and configuration files.
    settings = {
        # In place of dask's own, which would have each worker use one thread, and give every freed page back to the
        # system.
        "distributed.nanny.pre-spawn-environ": {"DASK_LOGGING__DISTRIBUTED": "critical"},
        # 64 idle workers would keep two cores busy with looking at themselves: a profile of every thread a hundred
        # times a second, the event loop fifty times, CPU and memory twice.
        "distributed.worker.profile.enabled": False,
        "distributed.admin.tick.interval": "1s",
        "distributed.admin.system-monitor.interval": "5s",
        "distributed.scheduler.worker-ttl": f"{SILENT_SECONDS}s",
        # A worker is given as many parts as it has threads; what waits, waits in the scheduler for whoever is free.
        "distributed.scheduler.worker-saturation": 1.0,
        # A worker that dies is started again by its nanny. Dask looks once more after this time, and if the worker has
        # died anew just then, takes it off for good.
        "distributed.deploy.lost-worker-timeout": "1000 days",
    }
    with (
        dask.config.set(settings),
        LocalCluster(
            n_workers=count,
            threads_per_worker=PARTS_AT_ONCE,
            memory_limit=0,  # no limit: features are large and flow through, nothing piles up in dask
            host="127.0.0.1",
            dashboard_address="127.0.0.1:0",
            env=thread_counts(count),
            preload=["regionspot.pipeline.distributed.worker"],  # its dask_setup
            silence_logs=logging.CRITICAL,
        ) as cluster,
    ):
        yield Connection(cluster.scheduler_address)


def thread_counts(workers: int) -> dict[str, str]:
    """The environment that has each of so many workers of this machine compute with its share of the cores."""
    threads = str(max(processors() // workers, 1))
    return {name: os.environ.get(name, threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
