"""Local mirrors of remote caches are never stale and never exceed their limit."""

import contextlib
import logging
import os
import pickle
import resource
import signal
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from makers import fork, make_manifest, was_killed

from regionspot.cache import (
    CacheError,
    CorruptPartError,
    FeatureCache,
    FeatureSet,
    ImageFeatures,
    InputError,
)
from regionspot.cache.storage.local import LocalStorage
from regionspot.cache.storage.local_mirror import parse_bytes, with_local_mirror
from regionspot.cache.storage.lru_folder import LruFolder
from regionspot.cache.storage.open import open_storage
from regionspot.cache.storage.remote import RemoteStorage

MAPS = FeatureSet("clip", "map", (5, 8))
SHARD = "features/clip/feature_map/c.{}.0.0"
PLENTY = 10**9


def map_of(row, seed=0):
    return np.random.default_rng([seed, row]).standard_normal((5, 8)).astype(np.float16)


def write_part(cache, part, seed=0):
    rows = cache.part_rows(part)
    cache.write_part(part, [ImageFeatures(row, {"clip": map_of(row, seed)}) for row in rows])


def require_maps(cache, seeds):
    """Check the features of each part against its seed."""
    for part, seed in enumerate(seeds):
        rows = list(cache.part_rows(part))
        np.testing.assert_array_equal(cache.read(rows).feature_map, [map_of(row, seed) for row in rows])


@pytest.fixture
def address(s3):
    """A remote cache of two parts of two images."""
    cache = FeatureCache.create(f"{s3}/toy.zarr", make_manifest([1] * 4), [MAPS], part_size=2)
    for part in (0, 1):
        write_part(cache, part)
    return cache.path


@pytest.fixture
def bucket(s3):
    """A remote storage with four shards of 1000 bytes each, without a cache."""
    storage = open_storage(f"{s3}/raw.zarr")
    for number in range(4):
        storage.write(SHARD.format(number), bytes([number]) * 1000)
    return storage


@pytest.fixture
def read_counts(monkeypatch):
    """Number of reads from a store by file name."""
    counts = Counter()
    for method in ("read", "read_range"):
        for kind in RemoteStorage.__subclasses__():
            original = getattr(kind, method)

            def counted(self, name, *args, original=original, **options):
                counts[name] += 1
                return original(self, name, *args, **options)

            monkeypatch.setattr(kind, method, counted)
    return counts


def shards_in(folder):
    return sorted(path.name.partition("@")[0] for path in folder.rglob("features/*/*/c.*.0.0@*"))


def opened(address, folder, limit=PLENTY):
    return FeatureCache.open(with_local_mirror(open_storage(address), folder, limit))


def test_a_second_epoch_and_a_reopened_cache_read_nothing_from_the_store(address, tmp_path, read_counts):
    for _ in range(2):
        cache = opened(address, tmp_path)
        assert cache.valid_rows().tolist() == [0, 1, 2, 3]
        require_maps(cache, [0, 0])
        require_maps(cache, [0, 0])
    assert read_counts[SHARD.format(0)] == read_counts[SHARD.format(1)] == 1
    assert read_counts["parts/clip/00000.json"] == read_counts["images/id/c.0"] == read_counts["zarr.json"] == 1


def test_a_file_replaced_in_the_store_is_downloaded_again(address, tmp_path):
    require_maps(opened(address, tmp_path), [0, 0])
    writer = FeatureCache.open(address, "a")
    writer.storage.remove("parts/clip/00001.json")
    again = opened(address, tmp_path)
    assert again.valid_rows().tolist() == [0, 1]
    write_part(writer, 1, seed=7)  # files of the same sizes
    require_maps(opened(address, tmp_path), [0, 7])


def test_a_writer_through_a_local_copy_sees_its_own_writes(address, tmp_path):
    cache = FeatureCache.open(with_local_mirror(open_storage(address), tmp_path, PLENTY), "a")
    require_maps(cache, [0, 0])
    cache.storage.remove("parts/clip/00001.json")
    assert cache.pending_parts() == [1]
    write_part(cache, 1, seed=3)
    require_maps(FeatureCache.open(cache.storage), [0, 3])


def test_a_damaged_copy_is_downloaded_again_and_a_damaged_original_reported(address, tmp_path):
    require_maps(opened(address, tmp_path), [0, 0])
    for path in [path for path in tmp_path.rglob("*@*") if path.is_file()]:  # all local copies
        data = bytearray(path.read_bytes())
        data[len(data) // 3] ^= 4
        path.write_bytes(data)
    require_maps(opened(address, tmp_path), [0, 0])
    require_maps(opened(address, tmp_path), [0, 0])
    storage = open_storage(address)
    data = bytearray(storage.read(SHARD.format(1)))
    data[7] ^= 4
    storage.write(SHARD.format(1), bytes(data))
    with pytest.raises(CorruptPartError, match="does not match its checksum"):
        require_maps(opened(address, tmp_path), [0, 0])


def test_a_shard_evicted_right_before_its_open_is_downloaded_again(address, tmp_path, monkeypatch):
    cache = opened(address, tmp_path)
    local_path, left = cache.storage.local_path, [2]

    def too_late(name):
        path = local_path(name)
        if left and left.pop():
            path.unlink()
        return path

    monkeypatch.setattr(cache.storage, "local_path", too_late)
    require_maps(cache, [0, 0])


def test_the_least_recently_used_shard_of_all_caches_is_evicted_first(bucket, s3, tmp_path):
    other = open_storage(f"{s3}/other.zarr")
    other.write(SHARD.format(9), b"9" * 1000)
    mine = [tmp_path / name for name in ("image.jpg", "thesis@home/features/x@1", "features/c.0.0.0.partial")]
    for path in mine:  # files of another program in this folder
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_bytes(bytes(3000))
    copy, other_copy = (with_local_mirror(storage, tmp_path, 2500) for storage in (bucket, other))
    for number in (0, 1, 0):
        assert copy.local_path(SHARD.format(number)).read_bytes() == bytes([number]) * 1000
    assert other_copy.local_path(SHARD.format(9)).read_bytes() == b"9" * 1000
    assert shards_in(tmp_path) == ["c.0.0.0", "c.9.0.0"]
    assert copy.read(SHARD.format(2)) == bytes([2]) * 1000
    assert shards_in(tmp_path) == ["c.2.0.0", "c.9.0.0"]
    assert all(path.exists() for path in mine)


def test_many_threads_never_exceed_the_limit(bucket, tmp_path):
    copy, largest = with_local_mirror(bucket, tmp_path, 2500), [0]
    done = threading.Event()

    def watch():
        while not done.wait(0.002):
            sizes = {}  # by file, which may be renamed meanwhile
            with copy._copies._locked_total():  # no evictions meanwhile
                for path in tmp_path.rglob("*@*"):
                    with contextlib.suppress(FileNotFoundError):
                        sizes[path.stat().st_ino] = path.stat().st_size
            largest[0] = max(largest[0], sum(sizes.values()))

    def read(number):
        out = bytearray(10)
        copy.read_into(SHARD.format(number % 4), 500, memoryview(out))
        return bytes(out) == bytes([number % 4]) * 10

    watcher = threading.Thread(target=watch)
    watcher.start()
    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(read, range(60)))
    done.set()
    watcher.join()
    assert 0 < largest[0] <= 2500


def test_a_running_download_is_never_evicted(bucket, tmp_path, monkeypatch):
    copy = with_local_mirror(bucket, tmp_path, 1500)
    download, begun, go_on = type(bucket).download, threading.Event(), threading.Event()

    def slow(self, name, version, fd):
        if name == SHARD.format(0):
            begun.set()
            go_on.wait()
        download(self, name, version, fd)

    monkeypatch.setattr(type(bucket), "download", slow)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(copy.read, SHARD.format(0))
        begun.wait()
        second = pool.submit(copy.read, SHARD.format(1))
        time.sleep(0.3)
        assert not second.done()  # waits for the space of the first
        go_on.set()
        assert first.result() == bytes(1000)
        assert second.result() == b"\1" * 1000


def test_a_limit_below_one_part_is_refused(address, tmp_path):
    cache = opened(address, tmp_path, limit=190)
    with pytest.raises(
        CacheError, match=r"a limit of 190 bytes is less than one part, the 196 of .*/c\.0\.0\.0"
    ) as caught:
        cache.read([0])
    assert "\n" not in str(caught.value)


def test_threads_and_forked_processes_download_a_shard_once(bucket, tmp_path, monkeypatch):
    log = tmp_path / "downloads"
    download = RemoteStorage.download

    def logged(self, name, version, fd):
        with log.open("a") as file:
            file.write(f"{name}\n")
        time.sleep(0.3)  # so that all others arrive during the download
        download(self, name, version, fd)

    monkeypatch.setattr(RemoteStorage, "download", logged)
    copy, expected = with_local_mirror(bucket, tmp_path / "copy", PLENTY), bytes([2]) * 1000

    def read_all():
        with ThreadPoolExecutor(3) as pool:
            assert list(pool.map(copy.read, [SHARD.format(2)] * 3)) == [expected] * 3

    children = [fork(read_all) for _ in range(2)]
    read_all()
    assert [was_killed(child) for child in children] == [False, False]
    assert log.read_text().splitlines() == [SHARD.format(2)]
    assert list((tmp_path / "copy").rglob("*.partial")) == []


def test_a_killed_download_is_repeated(bucket, tmp_path, monkeypatch):
    copy = with_local_mirror(bucket, tmp_path, 2500)

    def die(self, name, version, fd):
        os.pwrite(fd, b"half", 0)
        os.kill(os.getpid(), signal.SIGKILL)

    with monkeypatch.context() as patch:
        patch.setattr(RemoteStorage, "download", die)
        children = [fork(lambda number=number: copy.read(SHARD.format(number))) for number in (0, 1)]
        assert [was_killed(child) for child in children] == [True, True]
    assert len(list(tmp_path.rglob("*.partial"))) == 2
    assert copy.read(SHARD.format(0)) == bytes(1000)  # replaces the partial file
    assert copy.read(SHARD.format(3)) == bytes([3]) * 1000  # the other partial file is evicted
    assert list(tmp_path.rglob("*.partial")) == []


def test_a_fork_during_a_download_blocks_neither_child_nor_parent(bucket, tmp_path, monkeypatch):
    download, begun, go_on = RemoteStorage.download, threading.Event(), threading.Event()
    copy, parent = with_local_mirror(bucket, tmp_path, PLENTY), os.getpid()

    def slow(self, name, version, fd):
        if os.getpid() == parent:
            begun.set()
            go_on.wait()
        download(self, name, version, fd)

    def read_two():
        assert copy.read(SHARD.format(0)) + copy.read(SHARD.format(1)) == bytes(1000) + b"\1" * 1000

    monkeypatch.setattr(RemoteStorage, "download", slow)
    with ThreadPoolExecutor(1) as pool:
        fetching = pool.submit(copy.read, SHARD.format(0))
        begun.wait()
        child = fork(read_two)
        time.sleep(0.5)  # the child waits for the file or is still connecting
        go_on.set()
        assert fetching.result() == bytes(1000)
    assert not was_killed(child)


def test_a_full_disk_warns_once_and_the_rest_is_read_from_the_store(address, tmp_path, caplog):
    cache = opened(address, tmp_path)
    require_maps(cache, [0])
    allowed = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, allowed[1]))  # the kernel refuses longer files
    try:
        with caplog.at_level(logging.WARNING):
            require_maps(cache, [0, 0])
            assert cache.storage.read("features/clip/crc32c/c.1")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, allowed)
    messages = [record.getMessage() for record in caplog.records if record.name.endswith("local_mirror")]
    assert len(messages) == 1
    assert "no more local copies: File too large; the rest is read from s3://" in messages[0]
    assert shards_in(tmp_path) == ["c.0.0.0"]
    assert list(tmp_path.rglob("*.partial")) == []


def test_a_pickled_storage_uses_the_same_folder(address, tmp_path, read_counts):
    cache = opened(address, tmp_path)
    require_maps(cache, [0, 0])
    storage = pickle.loads(pickle.dumps(cache.storage))
    require_maps(FeatureCache.open(storage), [0, 0])
    assert read_counts[SHARD.format(0)] == 1


def test_claims_are_never_copied(bucket, tmp_path):
    copy = with_local_mirror(bucket, tmp_path, PLENTY)
    assert copy.write_new("claims/00001.json", b"mine")
    assert not copy.write_new("claims/00001.json", b"yours")
    bucket.write("claims/00001.json", b"taken over")
    assert copy.read("claims/00001.json") == b"taken over"
    assert copy.list_files("claims") == ["00001.json"]
    assert [path for path in tmp_path.rglob("*") if "claims" in path.parts] == []


def test_a_failed_download_leaves_the_folder_unchanged(bucket, tmp_path):
    folder = LruFolder(tmp_path, PLENTY)

    def fail(fd):
        os.write(fd, b"half")
        raise OSError("the line is cut")

    with pytest.raises(OSError, match="the line is cut"):
        folder.fetch("toy/b@0123456789abcdef", 4, fail, True)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == [".room"]
    assert folder.fetch("toy/b@0123456789abcdef", 4, lambda fd: os.write(fd, b"full"), True).read_bytes() == b"full"


def test_a_local_copy_of_a_local_cache_is_ignored_with_a_warning(tmp_path, caplog):
    storage = LocalStorage(tmp_path)
    assert with_local_mirror(storage, tmp_path / "copy", 10) is storage
    assert [record.message for record in caplog.records] == [
        f"{tmp_path}: is a local cache; --local-copy {tmp_path / 'copy'} is ignored"
    ]


def test_an_unusable_folder_is_refused_in_one_line(bucket, tmp_path):
    Path(tmp_path, "file").write_text("in the way")
    with pytest.raises(InputError, match=r"cannot hold a local copy: .*; give a writable folder"):
        with_local_mirror(bucket, tmp_path / "file", PLENTY)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("500GB", 500 * 10**9),
        ("1.5 TB", 1500 * 10**9),
        ("64GiB", 64 << 30),
        ("12", 12),
        ("2e9", 2 * 10**9),
    ],
)
def test_sizes_are_parsed(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "-5GB", "0", "1.2.3GB", "5iB"])
def test_invalid_sizes_are_refused(text):
    with pytest.raises(InputError, match="write it as 500GB"):
        parse_bytes(text)
