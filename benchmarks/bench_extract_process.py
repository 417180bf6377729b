"""A side of the extraction benchmark in a process of its own: one thread of math, and an allocator set from outside."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any

from regionspot.pipeline.extraction.malloc import ENVIRONMENT

DEFAULT_MALLOC: dict[str, str] = {}
# What spares the authors' code its page faults, without a change of it.
TUNED_MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": "4000000000",
    "MALLOC_TRIM_THRESHOLD_": "16000000000",
    "MALLOC_TOP_PAD_": "268435456",
}

_side: Any = None  # of this process, if it is one of a Contender's


class Contender:
    """Makes a side by `make(*arguments)` in a process of its own, while others are made, and runs its steps there."""

    def __init__(self, environment: Mapping[str, str], make: Callable[..., Any], *arguments: Any) -> None:
        self._pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        with _environment(environment):  # glibc reads it when a process starts
            self._made = self._pool.submit(_prepare, make, *arguments)
        self.results: dict[str, Any] = {}

    def __call__(self, step: str, *arguments: Any) -> float:
        """CPU seconds of all threads of the process for the step; what it returned is kept in `results`."""
        self._made.result()
        taken, self.results[step] = self._pool.submit(_timed, step, *arguments).result()
        return taken

    def close(self) -> None:
        self._pool.shutdown()


def _prepare(make: Callable[..., Any], *arguments: Any) -> None:
    global _side
    _side = make(*arguments)


def _timed(step: str, *arguments: Any) -> tuple[float, Any]:
    started = time.process_time()
    result = getattr(_side, step)(*arguments)
    return time.process_time() - started, result


@contextmanager
def _environment(changes: Mapping[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    for name in ENVIRONMENT:
        os.environ.pop(name, None)
    os.environ.update(changes, OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
