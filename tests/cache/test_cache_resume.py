"""Writers killed by SIGKILL at any moment: committed parts stay, and resuming gives identical bytes."""

import json
import os
import random
import shutil
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from makers import fork, make_features, make_manifest, was_killed

from regionspot.cache import FeatureCache, FeatureSet, ImageFeatures
from regionspot.cache.storage.atomic_files import partial_path
from regionspot.cache.tools.resume import open_or_create

IMAGES, PART_SIZE, FAILED = 16, 4, 6
MAPS = FeatureSet("clip", "map", (5, 8))
TOKENS = FeatureSet("sam", "token", (6,))
MORE = FeatureSet("dino", "map", (2, 2))
SYSTEM_CALLS = ("open", "write", "fsync", "replace", "rename")


@pytest.fixture(scope="module")
def manifest():
    return make_manifest(np.random.default_rng(0).integers(0, 50, IMAGES))


def features_of(manifest, row):
    if row == FAILED:
        return ImageFeatures(row, {}, "truncated JPEG")
    return make_features(manifest, [MAPS, TOKENS, MORE], row)


def extract(path, manifest, sets=(MAPS, TOKENS), at_image=lambda: None):
    """Resume the cache and write its pending parts, like `regionspot extract`."""

    def images(part):
        for row in cache.part_rows(part):
            at_image()
            yield features_of(manifest, row)

    cache = open_or_create(path, manifest, sets, PART_SIZE)
    names = [feature_set.name for feature_set in sets]
    for part in cache.pending_parts(names):
        cache.write_part(part, images(part), names)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, manifest):
    """Folder with an empty cache and one extracted without interruption."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    FeatureCache.create(folder / "empty", manifest, [MAPS, TOKENS], PART_SIZE)
    shutil.copytree(folder / "empty", folder / "full")
    extract(folder / "full", manifest)
    return folder


def killed_at_call(function, call):
    """Run `function` in a process that is killed at its n-th system call; False if it finished before."""

    def run():
        _die_at(call)
        function()

    return was_killed(fork(run))


def killed_after_images(function, images, seconds):
    """Run `function(at_image)` in a process that is killed `seconds` after its n-th image; False if it finished."""
    reader, writer = os.pipe()
    pid = fork(lambda: function(lambda: os.write(writer, b".")))
    os.close(writer)
    for _ in range(images):
        os.read(reader, 1)
    time.sleep(seconds)
    os.kill(pid, signal.SIGKILL)
    os.close(reader)
    return was_killed(pid)


def _die_at(call):
    remaining = [call]

    def counted(real):
        def replacement(*args, **kwargs):
            remaining[0] -= 1
            if not remaining[0]:
                if real is os_write:
                    os_write(args[0], args[1][: len(args[1]) // 2])  # killed in the middle of a write
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        return replacement

    os_write = os.write
    for name in SYSTEM_CALLS:
        setattr(os, name, counted(getattr(os, name)))


def content(folder: Path):
    """The bytes of every file; part records without their duration."""
    files = {}
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if name.startswith("parts/") and path.suffix == ".json":
            record = json.loads(path.read_bytes())
            files[name] = {key: value for key, value in record.items() if key not in ("seconds", "crc32c")}
        elif path.is_file():
            files[name] = path.read_bytes()
    return files


def require_committed_parts_whole(path, manifest):
    """Every committed part has the original features."""
    cache = FeatureCache.open(path, check="always")
    rows = cache.valid_rows()
    committed = {
        row for part in range(cache.n_parts) if part not in cache.pending_parts() for row in cache.part_rows(part)
    }
    assert set(rows.tolist()) == committed - {FAILED}
    batch = cache.read(rows)
    for index, row in enumerate(rows.tolist()):
        features, count = features_of(manifest, row).features, manifest.region_count[row]
        np.testing.assert_array_equal(batch.feature_map[index], features["clip"].astype(np.float16))
        np.testing.assert_array_equal(batch.tokens[index, :count], features["sam"].astype(np.float16))
    return cache


def test_a_part_killed_at_any_system_call_is_complete_or_missing(uninterrupted, manifest, tmp_path):
    expected, path, calls = content(uninterrupted / "full"), tmp_path / "c.zarr", 0
    empty = FeatureCache.open(shutil.copytree(uninterrupted / "empty", path), "a")
    images = [features_of(manifest, row) for row in empty.part_rows(1)]
    while killed_at_call(lambda: empty.write_part(1, images), calls + 1):
        calls += 1
        for name, value in content(path).items():
            assert name.endswith(".partial") or value == expected[name]
        if calls % 5 == 0:
            require_committed_parts_whole(path, manifest)
            if empty.missing_sets(1):
                empty.write_part(1, images)
        for record in (path / "parts").glob("*/00001.json"):
            record.unlink()
    assert calls > 35  # two sets with two files and a record each: opened, written, flushed, renamed


def test_runs_killed_at_random_moments_give_the_bytes_of_an_uninterrupted_run(uninterrupted, manifest, tmp_path):
    rng, kills = random.Random(0), 0
    while kills < 6:  # on a fast machine some runs finish before
        path = tmp_path / f"{kills}.zarr"
        shutil.copytree(uninterrupted / "empty", path)
        for _ in range(100):
            images, seconds = rng.randrange(8), rng.uniform(0, 0.003)  # sometimes enough for a part of four
            kills += killed_after_images(lambda at: extract(path, manifest, at_image=at), images, seconds)  # noqa: B023
            require_committed_parts_whole(path, manifest)
            if not FeatureCache.open(path).pending_parts():
                break
        else:
            raise AssertionError("no run ever finishes a part")
        FeatureCache.open(path, "a")
        assert content(path) == content(uninterrupted / "full")
        shutil.rmtree(path)


def test_a_cache_whose_writers_were_killed_at_random_moments_can_be_finished(uninterrupted, manifest, tmp_path):
    rng, path = random.Random(1), tmp_path / "c.zarr"
    shutil.copytree(uninterrupted / "empty", path)
    cache = FeatureCache.open(path, "a")

    def write(part):
        cache.write_part(part, (time.sleep(0.003) or features_of(manifest, row) for row in cache.part_rows(part)))

    for _ in range(3):
        pids = []
        for part in cache.pending_parts():
            pids.append(fork(lambda part=part: write(part)))
        time.sleep(rng.uniform(0, 0.06))
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
            was_killed(pid)
        require_committed_parts_whole(path, manifest)
    extract(path, manifest)
    assert content(path) == content(uninterrupted / "full")


def test_a_cache_killed_during_creation_is_complete_or_missing(uninterrupted, manifest, tmp_path):
    expected, path, existed = content(uninterrupted / "empty"), tmp_path / "c.zarr", []
    for at_call in (1, 5, 40, 70, 90, 100, 110, 10_000):
        killed_at_call(lambda: FeatureCache.create(path, manifest, [MAPS, TOKENS], PART_SIZE), at_call)
        existed.append(path.exists())
        if path.exists():
            assert content(path) == expected
            shutil.rmtree(path)
    assert existed[0] is False
    assert existed[-1] is True
    FeatureCache.create(path, manifest, [MAPS], PART_SIZE)
    assert [file.name for file in tmp_path.iterdir()] == ["c.zarr"]


def test_a_run_killed_while_adding_a_feature_set_leaves_the_others_unchanged(uninterrupted, manifest, tmp_path):
    path, before = tmp_path / "c.zarr", content(uninterrupted / "full")
    shutil.copytree(uninterrupted / "full", path)
    at_call, seen = 1, set()
    while killed_at_call(lambda: open_or_create(path, manifest, [MORE]), at_call):
        at_call += 3
        cache = require_sets_as_before(path, before)
        seen.add(len(cache.feature_sets))
        if len(cache.feature_sets) == 3:
            shutil.rmtree(path)
            shutil.copytree(uninterrupted / "full", path)
    assert seen == {2, 3}
    extract(path, manifest, (MORE,))
    cache = require_sets_as_before(path, before)
    assert cache.pending_parts() == []
    assert cache.read([3], map_set="dino").feature_map.shape == (1, 2, 2)
    assert not [name for name in content(path) if "partial" in name]


def require_sets_as_before(path, before):
    now = content(path)
    assert {name for name in before if now[name] != before[name]} <= {"zarr.json"}
    cache = FeatureCache.open(path)
    assert cache.pending_parts(["clip", "sam"]) == []
    return cache


def test_only_files_of_dead_writers_are_removed(uninterrupted, tmp_path, monkeypatch):
    path = shutil.copytree(uninterrupted / "full", tmp_path / "c.zarr")
    dead = fork(lambda: None)
    assert not was_killed(dead)
    folder, me = path / MAPS.array, os.getpid()
    own = partial_path(folder / "c.1.0.0").name
    start = own.split("-")[-2]
    old_form = own.rsplit("-", 2)[0] + ".partial"
    kept = {
        "alive": own,
        "alive, long ago": partial_path(folder / "c.3.0.0").name,
        "alive, in the old form": old_form,
        "on another host": f"c.1.0.0.otherhost-{dead}-{start}-00000000.partial",
        "of the user": "notes.partial",
    }
    removed = {
        "dead": own.replace(f"-{me}-", f"-{dead}-"),
        "dead, its id reused": own.replace(f"-{start}-", "-1-"),
        "dead, in the old form": old_form.replace(f"-{me}.", f"-{dead}."),
        "on another host, long ago": "c.2.0.0.otherhost-1-1-00000000.partial",
        "on another host, long ago, in the old form": "c.2.0.0.otherhost-1.partial",
    }
    for case, name in (kept | removed).items():
        (folder / name).write_bytes(b"x")
        if "long ago" in case:
            os.utime(folder / name, (time.time() - 2 * 86_400,) * 2)
    FeatureCache.open(path)
    assert len(list(folder.glob("*.partial"))) == len(kept | removed)
    # A wrong clock on this machine must not matter.
    wrong_time = time.time() + 30 * 86_400
    monkeypatch.setattr(time, "time", lambda: wrong_time)
    FeatureCache.open(path, "a")
    assert {file.name for file in folder.glob("*.partial")} == set(kept.values())


def test_two_threads_that_write_the_same_part_leave_a_complete_one(uninterrupted, manifest, tmp_path):
    path = shutil.copytree(uninterrupted / "empty", tmp_path / "c.zarr")
    cache, barrier = FeatureCache.open(path, "a"), threading.Barrier(2)

    def images():
        for row in cache.part_rows(0):
            barrier.wait(10)  # in lockstep: a shared file would get the records of both
            yield features_of(manifest, row)

    with ThreadPoolExecutor(2) as pool:
        for future in [pool.submit(cache.write_part, 0, images()) for _ in range(2)]:
            future.result()
    extract(path, manifest)
    assert content(path) == content(uninterrupted / "full")


def test_feature_sets_added_by_concurrent_runs_are_all_in_the_cache(uninterrupted, manifest, tmp_path):
    path = shutil.copytree(uninterrupted / "full", tmp_path / "c.zarr")
    sets = [FeatureSet(f"more{number}", "map", (2, 2)) for number in range(4)]
    runs = [fork(lambda added=added: open_or_create(path, manifest, [added])) for added in sets]
    assert [was_killed(run) for run in runs] == [False] * 4
    assert FeatureCache.open(path).feature_sets.keys() == {"clip", "sam", *(added.name for added in sets)}


def test_concurrent_runs_create_one_cache_and_share_it(uninterrupted, manifest, tmp_path):
    path = tmp_path / "c.zarr"
    runs = [fork(lambda: open_or_create(path, manifest, [MAPS, TOKENS], PART_SIZE)) for _ in range(4)]
    assert [was_killed(run) for run in runs] == [False] * 4
    assert content(path) == content(uninterrupted / "empty")
    assert [file.name for file in tmp_path.iterdir()] == ["c.zarr"]
