"""Runs in one process divide the parts of a cache: their threads lose count of nothing, whenever they take turns."""

import importlib
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from regionspot.cache import FeatureCache, ImageFeatures, InputError
from regionspot.cache.tools.verify import verify
from regionspot.cache.writing.claims import Claims
from regionspot.pipeline.extraction.part_queue import PartCounts, PartQueue
from regionspot.pipeline.extraction.writer_thread import WriterThread
from regionspot.pipeline.reporting.run_stats import RunStats

PARTS = 40


@pytest.fixture
def address(small, tmp_path, monkeypatch):
    """A cache of 40 parts of one image each, with nothing in it, on a disk that needs no flushing."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    sys.path.append(str(Path(__file__).resolve().parents[2]))
    importlib.import_module("benchmarks.simulated").make_cache(tmp_path / "c.zarr", PARTS, 1)
    return tmp_path / "c.zarr"


@pytest.fixture
def _often_switching():
    """Threads take turns as often as they can, so that what is not safe between them shows."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(usual)


def features(cache, row, names):

    regions = int(cache.manifest.region_count[row])
    shapes = {
        each.name: each.shape if each.kind == "map" else (regions, *each.shape) for each in cache.feature_sets.values()
    }
    return ImageFeatures(row, {name: np.full(shapes[name], row, np.float32) for name in names})


def opened(address, claims, only=None):
    cache = FeatureCache.open(address, "a")
    return cache, PartQueue(cache, list(cache.feature_sets), claims, only)


def run(cache, parts):
    while parts.wait():
        with WriterThread(cache, parts, RunStats()) as writer:
            for row, names in parts.jobs():
                writer.put(features(cache, row, names))


@pytest.mark.usefixtures("_often_switching")
def test_runs_at_once_do_every_part_once_and_their_counts_add_up_at_every_moment(address):
    storage, wrong, ended = FeatureCache.open(address).storage, [], threading.Event()
    with Claims(storage, heartbeat_seconds=0.05) as one, Claims(storage, heartbeat_seconds=0.05) as other:
        runs = [opened(address, one), opened(address, other)]

        def look():
            while not ended.is_set():
                for _, parts in runs:
                    now = parts.counts
                    if now.before + now.done + now.others + now.pending != PARTS or now.images < now.done:
                        wrong.append(now)

        with ThreadPoolExecutor(3) as pool:
            looking = pool.submit(look)
            for each in [pool.submit(run, *each) for each in runs]:
                each.result()
            ended.set()
            looking.result()
    ours, theirs = (parts.counts for _, parts in runs)
    assert wrong == []
    assert (ours.done + theirs.done, ours.pending, theirs.pending) == (PARTS, 0, 0)
    assert (ours.others, theirs.others) == (theirs.done, ours.done)
    assert (ours.images, theirs.images) == (ours.done, theirs.done)
    report = verify(address)
    assert (report.sound, report.pending) == (True, 0)
    assert ours.bytes + theirs.bytes == sum(path.stat().st_size for path in address.glob("features/*/*/c.*"))


class Instantly:
    """A cache and claims that take no time, so that threads meet as often as they can: others do every other part."""

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


@pytest.mark.usefixtures("_often_switching")
def test_threads_that_claim_and_write_at_the_same_time_lose_no_part_from_the_counts():
    instantly = Instantly()
    parts = PartQueue(instantly, ["clip"], instantly)
    with ThreadPoolExecutor(4) as pool:
        assert parts.wait()
        for written in [pool.submit(parts.write, row, iter(())) for row, _ in parts.jobs()]:
            written.result()
    assert not parts.wait()
    half = instantly.n_parts // 2
    assert parts.counts == PartCounts(before=0, done=half, others=half, pending=0, images=half, bytes=half)


def test_a_part_that_was_taken_over_is_looked_at_again_and_done_once_it_is_free(address, monkeypatch):
    storage = FeatureCache.open(address).storage
    with Claims(storage, heartbeat_seconds=0.01) as one, Claims(storage, heartbeat_seconds=0.01) as other:
        cache, parts = opened(address, one, only=[0, 1])
        assert parts.wait()
        for row, names in parts.jobs():
            if row == 0:
                # As when this run had slept, and the other one had counted it as dead.
                monkeypatch.setattr(Claims, "_is_dead", lambda *_: True)
                assert other.claim(0)
                monkeypatch.undo()
            parts.write(row, iter([features(cache, row, names)]))
        assert (parts.counts.done, parts.counts.pending, parts.counts.images) == (1, 1, 3)
        other.release(0)
        run(cache, parts)
        assert (parts.counts.done, parts.counts.pending) == (2, 0)


def test_a_part_whose_images_end_early_is_an_error_and_not_a_run_that_waits_for_ever(small, tmp_path):
    cache = small.create(tmp_path / "c.zarr")
    with Claims(cache.storage) as claims:
        parts = PartQueue(cache, small.names, claims)
        assert parts.wait()
        writer = WriterThread(cache, parts, RunStats())

        def one_image_of_four():
            with writer:
                assert next(parts.jobs())[0] == 0
                writer.put(small.features(0))

        with pytest.raises(InputError, match="part 0 has 4 images, got only 1"):
            one_image_of_four()
