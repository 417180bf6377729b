"""A function that is to run on one worker, whichever that is."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import CancelledError
from typing import TYPE_CHECKING, Any

from regionspot.cache.errors import CacheError
from regionspot.pipeline.clusters import address_of, trouble_of, worker_threads
from regionspot.pipeline.dealing import DEATHS

if TYPE_CHECKING:
    from distributed import Client

log = logging.getLogger(__name__)

POLL_SECONDS = 0.5  # between two looks whether the worker is still there


def on_one_worker(client: Client, what: str, function: Callable[..., Any], *args: Any) -> Any:
    """What a function returns on the first worker that is there, or on another one when that one dies.

    what    what it does, for people: "prepares the cache"
    Raises CacheError when workers die of it, cannot begin it, or the scheduler is gone.
    """
    for _ in range(DEATHS):
        worker = _first_worker(client)
        log.info("worker %s %s", worker, what)
        future = client.submit(function, *args, workers=[worker], allow_other_workers=False, pure=False)
        while worker in worker_threads(client):
            try:
                return future.result(timeout=POLL_SECONDS)
            except TimeoutError:
                continue
            except CancelledError:
                break
            except Exception as error:
                if (trouble := trouble_of(future)) is None:
                    break
                raise CacheError(f"worker {worker}: {trouble}") from error
        client.cancel([future], force=True)
    raise CacheError(
        f"{DEATHS} workers died in turn where one {what}; look at their logs, then run the same command again"
    )


def _first_worker(client: Client) -> str:
    said = False
    while not (found := worker_threads(client)):
        if not said:
            log.info("%s: no worker is there yet; waiting for the first one", address_of(client))
        said = True
        time.sleep(POLL_SECONDS)
    return next(iter(found))
