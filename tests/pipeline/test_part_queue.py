"""PartQueue: runs share the parts of a cache, and the counts are right whenever threads switch."""

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
from makers import make_features, make_manifest

from regionspot.cache import FeatureCache, FeatureSet, InputError
from regionspot.cache.tools.verify import verify
from regionspot.cache.writing.claims import Claims
from regionspot.pipeline.extraction.part_queue import PartQueue
from regionspot.pipeline.extraction.writer_thread import WriterThread
from regionspot.pipeline.reporting.run_stats import RunStats

PARTS = 40


@pytest.fixture
def address(tmp_path, monkeypatch):
    """An empty cache of 40 parts of one image each; fsync does nothing."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    sets = (FeatureSet("clip", "map", (5, 8)), FeatureSet("sam", "token", (6,)))
    return FeatureCache.create(tmp_path / "c.zarr", make_manifest([row % 7 for row in range(PARTS)]), sets, 1).path


@pytest.fixture
def _fast_thread_switching():
    """Threads switch as often as possible, to provoke race conditions."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def features(cache, row, names):
    return make_features(cache.manifest, [cache.feature_sets[name] for name in names], row)


def open_queue(address, claims, parts=None):
    cache = FeatureCache.open(address, "a")
    return cache, PartQueue(cache, list(cache.feature_sets), claims, parts)


def run(cache, queue):
    while queue.wait():
        with WriterThread(cache, queue, RunStats()) as writer:
            for row, names in queue.requests():
                writer.put(features(cache, row, names))


@pytest.mark.usefixtures("_fast_thread_switching")
def test_concurrent_runs_write_every_part_once_and_count_all_of_them(address):
    storage = FeatureCache.open(address).storage
    with Claims(storage, heartbeat_seconds=0.05) as one, Claims(storage, heartbeat_seconds=0.05) as other:
        runs = [open_queue(address, one), open_queue(address, other)]
        with ThreadPoolExecutor(2) as pool:
            for future in [pool.submit(run, *one) for one in runs]:
                future.result()
    ours, theirs = (queue for _, queue in runs)
    assert ours.stats.parts + theirs.stats.parts == PARTS
    assert (ours.stats.parts_of_others, theirs.stats.parts_of_others) == (theirs.stats.parts, ours.stats.parts)
    assert (ours.images, theirs.images) == (ours.stats.parts, theirs.stats.parts)
    report = verify(address)
    assert (report.sound, report.pending) == (True, 0)
    written = sum(path.stat().st_size for path in address.glob("features/*/*/c.*"))
    assert ours.stats.bytes + theirs.stats.bytes == written


class Instant:
    """A cache and claims that take no time, to provoke race conditions; other runs write every second part."""

    n_parts, process = 3000, "here:1"

    def part_rows(self, part):
        return range(part, part + 1)

    def pending_parts(self, names):
        return list(range(self.n_parts))

    def missing_sets(self, part, names):
        return names if part % 2 else []

    def write_part(self, part, images, names, worker, before_publish):
        return SimpleNamespace(files={"a": 1})

    def claim(self, part):
        return True

    def release(self, part):
        pass


@pytest.mark.usefixtures("_fast_thread_switching")
def test_concurrent_claims_and_writes_lose_no_part_from_the_counts():
    instant = Instant()
    queue = PartQueue(instant, ["clip"], instant)
    with ThreadPoolExecutor(4) as pool:
        assert queue.wait()
        for future in [pool.submit(queue.write, row, iter(())) for row, _ in queue.requests()]:
            future.result()
    assert not queue.wait()
    half, stats = instant.n_parts // 2, queue.stats
    assert (queue.parts_before, stats.parts, stats.parts_of_others, queue.images, stats.bytes) == (0, *[half] * 4)


def test_a_part_that_was_taken_over_is_written_when_it_is_free_again(address, monkeypatch):
    storage = FeatureCache.open(address).storage
    with Claims(storage, heartbeat_seconds=0.01) as one, Claims(storage, heartbeat_seconds=0.01) as other:
        cache, queue = open_queue(address, one, parts=[0, 1])
        assert queue.wait()
        for row, names in queue.requests():
            if row == 0:
                # As if this run had been suspended and the other one considered it dead.
                monkeypatch.setattr(Claims, "_is_dead", lambda *_: True)
                assert other.claim(0)
                monkeypatch.undo()
            queue.write(row, iter([features(cache, row, names)]))
        assert (queue.stats.parts, queue.images) == (1, 3)
        other.release(0)
        run(cache, queue)
        assert queue.stats.parts == 2


def test_a_part_with_too_few_images_is_an_error_and_the_run_does_not_hang(small, tmp_path):
    cache = small.create(tmp_path / "c.zarr")
    with Claims(cache.storage) as claims:
        queue = PartQueue(cache, small.names, claims)
        assert queue.wait()
        writer = WriterThread(cache, queue, RunStats())

        def one_image_of_four():
            with writer:
                assert next(queue.requests())[0] == 0
                writer.put(small.features(0))

        with pytest.raises(InputError, match="part 0 has 4 images, got only 1"):
            one_image_of_four()
