"""Writers killed by SIGKILL at any moment: what was committed stays, and the bytes come out equal in the end."""

import faulthandler
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

from regionspot.cache import Category, FeatureCache, FeatureSet, ImageFeatures, Manifest
from regionspot.cache.storage import atomic_files as durable
from regionspot.cache.tools.resume import open_or_create

IMAGES, PART_SIZE = 16, 4
MAPS = FeatureSet("clip", "map", (5, 8))
TOKENS = FeatureSet("sam", "token", (6,))
MORE = FeatureSet("dino", "map", (2, 2))
SYSTEM_CALLS = ("open", "write", "fsync", "replace", "rename")


@pytest.fixture(scope="module")
def manifest():
    counts = np.random.default_rng(0).integers(0, 50, IMAGES)
    regions = int(counts.sum())
    return Manifest(
        dataset="toy",
        split="train",
        image_ids=np.arange(IMAGES) + 100,
        paths=np.array([f"{row}.jpg" for row in range(IMAGES)], dtype=np.dtypes.StringDType()),
        heights=np.full(IMAGES, 480, np.int32),
        widths=np.full(IMAGES, 640, np.int32),
        offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        boxes_xyxy=np.zeros((regions, 4), np.float32),
        category_index=np.zeros(regions, np.int32),
        annotation_ids=np.arange(regions),
        categories=(Category(1, "star"),),
    )


def features_of(manifest, row):
    if row == 6:
        return ImageFeatures(row, {}, "truncated JPEG")
    rng = np.random.default_rng(row)
    tokens = rng.standard_normal((int(manifest.region_count[row]), 6))
    return ImageFeatures(row, {"clip": rng.standard_normal((5, 8)), "sam": tokens, "dino": rng.random((2, 2))})


def extract(path, manifest, sets=(MAPS, TOKENS), at_image=lambda: None):
    """What `regionspot extract` does: go on with the cache, write what is missing."""

    def images(part):
        for row in cache.part_rows(part):
            at_image()
            yield features_of(manifest, row)

    cache = open_or_create(path, manifest, sets, PART_SIZE)
    names = [feature_set.name for feature_set in sets]
    for part in cache.pending_parts(names):
        cache.write_part(part, images(part), names)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, manifest):
    """Folder of an empty cache and of one whose extraction nobody disturbed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    FeatureCache.create(folder / "empty", manifest, [MAPS, TOKENS], PART_SIZE)
    shutil.copytree(folder / "empty", folder / "full")
    extract(folder / "full", manifest)
    return folder


def forked(function):
    """Start `function` in a process of its own, which never comes back into pytest."""
    pid = os.fork()
    if not pid:
        try:
            faulthandler.dump_traceback_later(60, exit=True)  # a child that hangs shall not hang the suite
            function()
            os._exit(0)
        finally:
            os._exit(1)
    return pid


def was_killed(pid):
    """Wait for a process; whether it was killed. It has to have done its work otherwise."""
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "the child failed by itself"
    return os.WIFSIGNALED(status)


def killed_at_call(function, call):
    """Run `function` in a process that is killed at its n-th call to the system; whether it came to that."""

    def dying():
        _die_at(call)
        function()

    return was_killed(forked(dying))


def killed_after_images(function, images, seconds):
    """Run `function(at_image)` in a process that is killed `seconds` after its n-th image; False if it was done."""
    heard, said = os.pipe()
    pid = forked(lambda: function(lambda: os.write(said, b".")))
    os.close(said)
    for _ in range(images):
        os.read(heard, 1)
    time.sleep(seconds)
    os.kill(pid, signal.SIGKILL)
    os.close(heard)
    return was_killed(pid)


def _die_at(call):
    left = [call]

    def counted(real):
        def instead(*args, **kwargs):
            left[0] -= 1
            if not left[0]:
                if real is os_write:
                    os_write(args[0], args[1][: len(args[1]) // 2])  # and in the middle of a write
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        return instead

    os_write = os.write
    for name in SYSTEM_CALLS:
        setattr(os, name, counted(getattr(os, name)))


def content(folder: Path):
    """Every file's bytes; of the part records all but who wrote them and how long that took."""
    found = {}
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if name.startswith("parts/") and path.suffix == ".json":
            record = json.loads(path.read_bytes())
            found[name] = {key: value for key, value in record.items() if key not in ("seconds", "crc32c")}
        elif path.is_file():
            found[name] = path.read_bytes()
    return found


def require_committed_parts_whole(path, manifest):
    """Every part that says it is written reads equal to what the backbones said."""
    cache = FeatureCache.open(path, check="always")
    rows = cache.valid_rows()
    committed = {
        row for part in range(cache.n_parts) if part not in cache.pending_parts() for row in cache.part_rows(part)
    }
    assert set(rows.tolist()) == committed - {6}
    batch = cache.read(rows)
    for place, row in enumerate(rows.tolist()):
        features, count = features_of(manifest, row).features, manifest.region_count[row]
        np.testing.assert_array_equal(batch.feature_map[place], features["clip"].astype(np.float16))
        np.testing.assert_array_equal(batch.tokens[place, :count], features["sam"].astype(np.float16))
    return cache


def test_a_part_killed_at_any_call_to_the_system_is_whole_or_missing(undisturbed, manifest, tmp_path):
    expected, path, calls = content(undisturbed / "full"), tmp_path / "c.zarr", 0
    empty = FeatureCache.open(shutil.copytree(undisturbed / "empty", path), "a")
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
    assert calls > 35  # of a part: two sets, two files and a record each, all opened, written, flushed and renamed


def test_runs_killed_at_random_moments_end_with_the_bytes_of_an_undisturbed_run(undisturbed, manifest, tmp_path):
    rng, kills = random.Random(0), 0
    while kills < 6:  # a machine may be too fast for some of them
        path = tmp_path / f"{kills}.zarr"
        shutil.copytree(undisturbed / "empty", path)
        for _ in range(100):
            images, seconds = rng.randrange(8), rng.uniform(0, 0.003)  # so now and then a part of four is finished
            kills += killed_after_images(lambda at: extract(path, manifest, at_image=at), images, seconds)  # noqa: B023
            require_committed_parts_whole(path, manifest)
            if not FeatureCache.open(path).pending_parts():
                break
        else:
            raise AssertionError("no run ever finishes a part")
        FeatureCache.open(path, "a")
        assert content(path) == content(undisturbed / "full")
        shutil.rmtree(path)


def test_several_writers_killed_at_random_moments_leave_a_cache_that_can_be_finished(undisturbed, manifest, tmp_path):
    rng, path = random.Random(1), tmp_path / "c.zarr"
    shutil.copytree(undisturbed / "empty", path)
    cache = FeatureCache.open(path, "a")

    def write(part):
        cache.write_part(part, (time.sleep(0.003) or features_of(manifest, row) for row in cache.part_rows(part)))

    for _ in range(3):
        pids = []
        for part in cache.pending_parts():
            pids.append(forked(lambda part=part: write(part)))
        time.sleep(rng.uniform(0, 0.06))
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
            was_killed(pid)
        require_committed_parts_whole(path, manifest)
    extract(path, manifest)
    assert content(path) == content(undisturbed / "full")


def test_a_cache_killed_while_it_is_made_is_whole_or_not_there(undisturbed, manifest, tmp_path):
    expected, path, made = content(undisturbed / "empty"), tmp_path / "c.zarr", []
    for at_call in (1, 5, 40, 70, 90, 100, 110, 10_000):
        killed_at_call(lambda: FeatureCache.create(path, manifest, [MAPS, TOKENS], PART_SIZE), at_call)
        made.append(path.exists())
        if path.exists():
            assert content(path) == expected
            shutil.rmtree(path)
    assert made[0] is False
    assert made[-1] is True
    FeatureCache.create(path, manifest, [MAPS], PART_SIZE)
    assert [left.name for left in tmp_path.iterdir()] == ["c.zarr"]


def test_a_run_killed_while_it_adds_a_feature_set_leaves_the_others_as_they_are(undisturbed, manifest, tmp_path):
    path, before = tmp_path / "c.zarr", content(undisturbed / "full")
    shutil.copytree(undisturbed / "full", path)
    at_call, seen = 1, set()
    while killed_at_call(lambda: open_or_create(path, manifest, [MORE]), at_call):
        at_call += 3
        cache = require_sets_as_before(path, before)
        seen.add(len(cache.feature_sets))
        if len(cache.feature_sets) == 3:
            shutil.rmtree(path)
            shutil.copytree(undisturbed / "full", path)
    assert seen == {2, 3}
    extract(path, manifest, (MORE,))
    cache = require_sets_as_before(path, before)
    assert cache.pending_parts() == []
    assert cache.read([3], map_set="dino").feature_map.shape == (1, 2, 2)
    assert not [left for left in content(path) if "partial" in left]


def require_sets_as_before(path, before):
    now = content(path)
    assert {name for name in before if now[name] != before[name]} <= {"zarr.json"}
    cache = FeatureCache.open(path)
    assert cache.pending_parts(["clip", "sam"]) == []
    return cache


def test_only_what_dead_writers_left_is_removed(undisturbed, tmp_path, monkeypatch):
    path = shutil.copytree(undisturbed / "full", tmp_path / "c.zarr")
    dead = forked(lambda: None)
    assert not was_killed(dead)
    folder, me = path / MAPS.array, os.getpid()
    ours = durable.partial_path(folder / "c.1.0.0").name
    start = ours.split("-")[-2]
    earlier_form = ours.rsplit("-", 2)[0] + ".partial"
    kept = {
        "living": ours,
        "living, long ago": durable.partial_path(folder / "c.3.0.0").name,
        "living, in the earlier form": earlier_form,
        "elsewhere": f"c.1.0.0.otherhost-{dead}-{start}-00000000.partial",
        "somebody's own": "notes.partial",
    }
    removed = {
        "dead": ours.replace(f"-{me}-", f"-{dead}-"),
        "dead, its id in use again": ours.replace(f"-{start}-", "-1-"),
        "dead, in the earlier form": earlier_form.replace(f"-{me}.", f"-{dead}."),
        "elsewhere, long ago": "c.2.0.0.otherhost-1-1-00000000.partial",
        "elsewhere, long ago, in the earlier form": "c.2.0.0.otherhost-1.partial",
    }
    for what, name in (kept | removed).items():
        (folder / name).write_bytes(b"x")
        if "long ago" in what:
            os.utime(folder / name, (time.time() - 2 * 86_400,) * 2)
    FeatureCache.open(path)
    assert len(list(folder.glob("*.partial"))) == len(kept | removed)
    # A machine whose own clock is wrong removes nothing that another one is writing, and leaves nothing for it.
    wrong = time.time() + 30 * 86_400
    monkeypatch.setattr(time, "time", lambda: wrong)
    FeatureCache.open(path, "a")
    assert {left.name for left in folder.glob("*.partial")} == set(kept.values())


def test_two_threads_that_write_the_same_part_leave_a_whole_one(undisturbed, manifest, tmp_path):
    path = shutil.copytree(undisturbed / "empty", tmp_path / "c.zarr")
    cache, together = FeatureCache.open(path, "a"), threading.Barrier(2)

    def images():
        for row in cache.part_rows(0):
            together.wait(10)  # in step, so that a file that both write gets the records of both
            yield features_of(manifest, row)

    with ThreadPoolExecutor(2) as pool:
        for written in [pool.submit(cache.write_part, 0, images()) for _ in range(2)]:
            written.result()
    extract(path, manifest)
    assert content(path) == content(undisturbed / "full")


def test_runs_that_add_feature_sets_at_once_all_find_theirs_in_the_cache(undisturbed, manifest, tmp_path):
    path = shutil.copytree(undisturbed / "full", tmp_path / "c.zarr")
    added = [FeatureSet(f"more{number}", "map", (2, 2)) for number in range(4)]
    runs = [forked(lambda one=one: open_or_create(path, manifest, [one])) for one in added]
    assert [was_killed(run) for run in runs] == [False] * 4
    assert FeatureCache.open(path).feature_sets.keys() == {"clip", "sam", *(one.name for one in added)}


def test_runs_that_start_at_once_where_no_cache_is_make_one_and_share_it(undisturbed, manifest, tmp_path):
    path = tmp_path / "c.zarr"
    runs = [forked(lambda: open_or_create(path, manifest, [MAPS, TOKENS], PART_SIZE)) for _ in range(4)]
    assert [was_killed(run) for run in runs] == [False] * 4
    assert content(path) == content(undisturbed / "empty")
    assert [left.name for left in tmp_path.iterdir()] == ["c.zarr"]
