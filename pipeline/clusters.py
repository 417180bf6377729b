"""Workers to give parts to: those of this machine, one a GPU, or those of a running dask cluster.

none         this process alone
local        a worker a GPU of this machine, one where there is none
local:8      eight workers on this machine
tcp://...    the workers of a scheduler that runs there, however it and they were started
"""

from __future__ import annotations

import importlib.util
import logging
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, Any

from regionspot.cache.errors import CacheError, InputError
from regionspot.cache.machine import processors
from regionspot.pipeline.dealing import HANDS

if TYPE_CHECKING:
    from distributed import Client, Future

log = logging.getLogger(__name__)

CONNECT_SECONDS = 10
RECONNECT_SECONDS = 30.0  # for a connection that broke
_ADDRESS = re.compile(r"(tcp|tls|ucx|ws|wss)://\S+")


def check_scheduler(text: str) -> str:
    """The text itself. Raises InputError where it is none of those above."""
    if text == "none" or _ADDRESS.fullmatch(text) or local_workers(text) is not None:
        return text
    raise InputError(f"scheduler {text!r}: expected none, local, local:8 (eight workers) or tcp://host:8786")


def gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES may be set to for one GPU each; from the driver, for torch takes seconds to import."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name.strip() for name in visible.split(",") if name.strip() not in ("", "-1")]
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    asked = subprocess.run([tool, "--query-gpu=index", "--format=csv,noheader"], capture_output=True, text=True)
    return asked.stdout.split() if asked.returncode == 0 else []


@contextmanager
def connected(scheduler: str) -> Iterator[Client]:
    """A client of the workers that `scheduler` names; those of this machine are started, and ended on leaving.

    Raises InputError where no scheduler answers.
    """
    import distributed  # noqa: F401  half a second to import, and it sets its log up

    # Dask's own words about workers that come and go are said in one line each by schedule.py.
    for name in [name for name in logging.root.manager.loggerDict if name.split(".")[0] == "distributed"]:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    count = local_workers(scheduler)
    with _running(scheduler) if count is None else _local(count) as client:
        yield client


@contextmanager
def client_of(address: str) -> Iterator[Client]:
    """A client of the scheduler that runs there. Raises OSError or TimeoutError where none answers."""
    from distributed import Client  # half a second to import

    client = Client(address, timeout=CONNECT_SECONDS, set_as_default=False)
    try:
        yield client
    finally:
        # Dask's own attempt to mend a connection that broke fails an assertion at times, which comes out here.
        with suppress(AssertionError, OSError, TimeoutError):
            client.close()


def dashboard(client: Client) -> str | None:
    """Address of the cluster's dashboard, None where it has none."""
    info = client.scheduler_info(n_workers=0)
    # Where the library that draws its pages is missing here, it is so in the environment of the scheduler.
    if "dashboard" not in info.get("services", {}) or importlib.util.find_spec("bokeh") is None:
        return None
    return str(client.dashboard_link)


def worker_threads(client: Client) -> dict[str, int]:
    """The workers that the scheduler knows of, and how many threads each has. Raises CacheError when it is gone."""
    if client.status == "running":
        try:
            return dict(client.nthreads())
        except (OSError, TimeoutError):
            pass
    raise gone(address_of(client))


def gone(address: str) -> CacheError:
    """What there is to say when a scheduler does not answer any more."""
    return CacheError(
        f"{address}: the scheduler is gone; the parts that are done stay: start it and its workers "
        "again, then the same command goes on"
    )


def address_of(client: Client) -> str:
    """Where the scheduler of a client is, or was."""
    return str(getattr(client.scheduler, "address", "the scheduler"))


def trouble_of(future: Future[Any]) -> str | None:
    """Why a worker could not even begin a task; None where it died while at work on it."""
    error = future.exception() if future.status == "error" else None
    if error is None or type(error).__name__ == "KilledWorker":
        return None
    last = (str(error).strip().splitlines() or [""])[-1]
    return (
        f"could not begin: {type(error).__name__}: {last}; the scheduler and its workers need the same regionspot, "
        "dask and Python as this machine"
    )


def local_workers(text: str) -> int | None:
    """How many workers of this machine a scheduler's words ask for; None for other words."""
    words = re.fullmatch(r"local(?::([1-9]\d*))?", text)
    if words is None:
        return None
    return int(words[1]) if words[1] else max(len(gpus()), 1)


@contextmanager
def _running(address: str) -> Iterator[Client]:
    with ExitStack() as stack:
        try:
            client = stack.enter_context(client_of(address))
        except (OSError, TimeoutError, ValueError) as error:
            raise InputError(
                f"{address}: no scheduler answers ({type(error).__name__}); is `dask scheduler` running there, and may "
                "this machine reach its port?"
            ) from error
        yield client


@contextmanager
def _local(count: int) -> Iterator[Client]:
    import dask
    from distributed import Nanny, Scheduler, SpecCluster  # half a second to import

    settings = {
        # In place of dask's own, which would have each worker use one thread, and give every freed page back to the
        # system.
        "distributed.nanny.pre-spawn-environ": {"DASK_LOGGING__DISTRIBUTED": "critical"},
        # Workers and their nannies look at themselves seldom: a profile of every thread a hundred times a second, the
        # event loop fifty times, CPU and memory twice, and 64 idle workers would keep two cores busy with it.
        "distributed.worker.profile.enabled": False,
        "distributed.admin.tick.interval": "1s",
        "distributed.admin.system-monitor.interval": "5s",
        # A worker that dies is started again by its nanny. Dask looks once more after this time, and if the worker has
        # died anew just then, takes it off for good.
        "distributed.deploy.lost-worker-timeout": "1000 days",
    }
    with dask.config.set(settings):
        workers = {
            number: {
                "cls": Nanny,
                "options": {
                    "nthreads": HANDS,
                    "memory_limit": 0,  # no limit: features are large and flow through, nothing piles up in dask
                    "env": worker_environment(number, count),
                    "host": "127.0.0.1",
                    "dashboard": False,
                    "preload": ["regionspot.pipeline.part_worker"],  # its dask_setup
                },
            }
            for number in range(count)
        }
        scheduler = {"cls": Scheduler, "options": {"host": "127.0.0.1", "port": 0, "dashboard_address": "127.0.0.1:0"}}
        with (
            SpecCluster(workers=workers, scheduler=scheduler, silence_logs=logging.CRITICAL) as cluster,
            client_of(cluster.scheduler_address) as client,
        ):
            yield client


def worker_environment(number: int, count: int) -> dict[str, str]:
    """What worker `number` of `count` finds set: a GPU, in turn where there are fewer, and its share of the cores."""
    found, threads = gpus(), str(max(processors() // count, 1))
    environment = {name: os.environ.get(name, threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    if found:
        environment["CUDA_VISIBLE_DEVICES"] = found[number % len(found)]
    return environment
