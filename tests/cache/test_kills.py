"""Several writers on one cache, killed by SIGKILL at any moment: nothing committed is lost, the bytes end up equal.

Each writer dies at a random system call, in the middle of it if it is a write, or at a random time, or lives and
finishes what the others left. They start without a cache, so creation is covered, too.
"""

import os
import random
import signal
import time
from collections import Counter

import pytest
from makers import fork

from regionspot.cache.tools.verify import verify

WRITERS = 3
SYSTEM_CALLS = ("open", "write", "fsync", "replace", "rename", "link", "unlink")
LAST_CALL = 700  # system calls of one writer that writes all of the cache
LAST_SECOND = 0.4


def die_at(call):
    """Kill this process at its system call number `call`."""
    left, os_write = [call], os.write

    def counted(real):
        def instead(*args, **kwargs):
            left[0] -= 1
            if not left[0]:
                if real is os_write:
                    os_write(args[0], args[1][: len(args[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        return instead

    for name in SYSTEM_CALLS:
        setattr(os, name, counted(getattr(os, name)))


def writer(small, path, call, pause):
    """A run of `extract` that dies at its n-th system call; 0: never."""

    def run():
        if call:
            die_at(call)
        small.extract(path, at_image=lambda: time.sleep(pause))

    return run


def one_round(small, path, rng):
    """Run writers concurrently on a cache; how many were killed, and whether one finished it."""
    plans = [(rng.choice(("call", "time", "time", "lives")), rng.randrange(1, LAST_CALL)) for _ in range(WRITERS)]
    pids = [fork(writer(small, path, call if how == "call" else 0, rng.choice((0, 0, 0.003)))) for how, call in plans]
    begun = time.monotonic()
    moments = sorted(
        (rng.uniform(0, LAST_SECOND), pid) for pid, (how, _) in zip(pids, plans, strict=True) if how == "time"
    )
    for moment, pid in moments:
        time.sleep(max(begun + moment - time.monotonic(), 0))
        os.kill(pid, signal.SIGKILL)  # not waited for yet, so the id is not reused
    statuses = [os.waitpid(pid, 0)[1] for pid in pids]
    assert all(os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0 for status in statuses), (
        "a writer failed by itself"
    )
    return sum(map(os.WIFSIGNALED, statuses)), any(map(os.WIFEXITED, statuses))


def stress(small, small_folder, tmp_path, seed, kills):
    """Write caches until this many writers were killed; counts of events."""
    rng, counts, right = random.Random(seed), Counter(), small.content(small_folder / "full")
    while counts["kills"] < kills:
        path = tmp_path / f"{counts['caches']}.zarr"
        finished = False
        while not finished:
            killed, finished = one_round(small, path, rng)
            counts["kills"] += killed
            if path.exists():
                report = verify(path)
                assert report.sound, report.text()
                counts["committed parts verified"] += report.parts
                assert not (finished and report.pending)
            counts["rounds"] += 1
        small.extract(path)  # nothing is pending; cleans up
        assert small.content(path) == right
        counts["caches"] += 1
    return counts


def test_writers_killed_at_any_moment_lose_nothing_and_end_with_the_same_bytes(small, small_folder, tmp_path):
    assert stress(small, small_folder, tmp_path, 0, 8)["caches"] >= 1


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", range(1, 9))
def test_writers_killed_at_any_moment_in_full(small, small_folder, tmp_path, seed, stress_result, stress_size):
    started = time.monotonic()
    counts = stress(small, small_folder, tmp_path, seed, stress_size(125))
    stress_result(seeds=[seed], seconds=time.monotonic() - started, lost=0, **counts)
