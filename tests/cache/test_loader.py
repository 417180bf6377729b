"""The loader: order and ranks, prefetching, resuming within an epoch, threads and processes, replaced files."""

import gc
import json
import os
import pickle
import subprocess
import sys
import threading
import time
from dataclasses import fields, replace
from itertools import chain, islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from makers import make_manifest
from torch.utils.data import DataLoader, IterableDataset

from regionspot.cache import (
    CacheError,
    CorruptPartError,
    FeatureCache,
    FeatureSet,
    ImageFeatures,
    InputError,
    NotExtractedError,
)
from regionspot.cache.format.encodings import decode, statistics_of
from regionspot.cache.format.schema import shard_file
from regionspot.cache.machine import available_memory
from regionspot.cache.reading.batch import Batch
from regionspot.cache.reading.sampling import Sampling
from regionspot.cache.storage.local import LocalStorage

IMAGES, PART = 23, 4
FAILED = 9  # row of the image that could not be read
RNG = np.random.default_rng(0)
COUNTS = np.concatenate([[0, 70, 3], RNG.integers(0, 9, IMAGES - 3)])
MAP_VALUES = RNG.standard_normal((IMAGES, 5, 8)).astype(np.float16)
TOKEN_VALUES = [RNG.standard_normal((count, 6)).astype(np.float16) for count in COUNTS]
STATISTICS = {"maps": statistics_of(MAP_VALUES), "tokens": statistics_of(TOKEN_VALUES)}


def feature_sets(dtype="float16", compression=None):
    def statistics(name):
        return STATISTICS[name] if dtype == "int8" else None

    return [
        FeatureSet("maps", "map", (5, 8), dtype, compression=compression, statistics=statistics("maps")),
        FeatureSet("tokens", "token", (6,), dtype, compression=compression, statistics=statistics("tokens")),
    ]


def make_cache(path, **encoding):
    """Part 0 has more regions than one record of tokens; one image of part 2 failed."""
    cache = FeatureCache.create(path, make_manifest(COUNTS), feature_sets(**encoding), part_size=PART)
    for part in range(cache.n_parts):
        cache.write_part(part, (image(row) for row in cache.part_rows(part)))
    return FeatureCache.open(path)


def image(row):
    if row == FAILED:
        return ImageFeatures(row, {}, "broken JPEG")
    return ImageFeatures(row, {"maps": MAP_VALUES[row], "tokens": TOKEN_VALUES[row]})


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return make_cache(tmp_path_factory.mktemp("loader") / "c.zarr")


@pytest.fixture
def own_cache(tmp_path):
    """A cache that a test may damage."""
    return make_cache(tmp_path / "own.zarr")


def require_right(batch):
    """Every value of a float16 batch is the one written for its row."""
    for index, row in enumerate(batch.rows.tolist()):
        count = COUNTS[row]
        np.testing.assert_array_equal(batch.feature_map[index], MAP_VALUES[row])
        np.testing.assert_array_equal(batch.tokens[index, :count], TOKEN_VALUES[row])
        assert not batch.tokens[index, count:].any()
        assert batch.region_mask[index].sum() == count
        assert batch.image_ids[index] == row + 100


def require_equal(one, other):
    for name in (field.name for field in fields(Batch)):
        if isinstance(getattr(one, name), np.ndarray):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)


def rows_of(loader):
    """The rows of each batch of one pass, whose values are checked too."""
    batches = []
    for batch in loader:
        require_right(batch)
        batches.append(batch.rows.tolist())
    return batches


def reading_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("regionspot-read")]


# --- sampling ---

sampling_options = st.fixed_dictionaries(
    {
        "batch_size": st.integers(1, 9),
        "shuffle": st.sampled_from(["full", "block", "none"]),
        "seed": st.integers(0, 2**40),
        "block_parts": st.integers(1, 4),
    }
)


@settings(deadline=None, max_examples=200)
@given(options=sampling_options, count=st.integers(0, 90), world_size=st.integers(1, 7), epoch=st.integers(0, 5))
def test_all_ranks_together_give_every_row_once_in_equally_many_batches(options, count, world_size, epoch):
    rows = np.arange(count) * 3
    ranks = [Sampling(**options, rank=rank, world_size=world_size) for rank in range(world_size)]
    batches = [list(rank.batches(rows, 8, epoch)) for rank in ranks]
    rows_given = [row for rank in batches for batch in rank for row in batch.tolist()]
    assert sorted(rows_given) == rows.tolist()
    assert all(1 <= len(batch) <= options["batch_size"] for rank in batches for batch in rank)
    lengths = {len(rank) for rank in batches}
    assert lengths == {rank.count(count) for rank in ranks}
    if options["batch_size"] > 1 and count >= world_size:
        assert len(lengths) == 1
    # All but the last two batches of a rank are full.
    assert all(len(batch) == options["batch_size"] for rank in batches for batch in rank[:-2])


@settings(deadline=None, max_examples=100)
@given(options=sampling_options, count=st.integers(0, 90), world_size=st.integers(1, 7))
def test_with_drop_last_every_batch_is_full_and_less_than_one_per_rank_is_dropped(options, count, world_size):
    size = options["batch_size"]
    ranks = [
        list(Sampling(**options, rank=rank, world_size=world_size, drop_last=True).batches(np.arange(count), 8, 0))
        for rank in range(world_size)
    ]
    rows_given = [row for rank in ranks for batch in rank for row in batch.tolist()]
    assert len(set(rows_given)) == len(rows_given) > count - size * world_size
    assert {len(batch) for rank in ranks for batch in rank} <= {size}
    assert len({len(rank) for rank in ranks}) == 1


@pytest.mark.parametrize("shuffle", ["full", "block"])
def test_ranks_that_share_batches_get_together_the_batches_of_one_process(shuffle):
    one = Sampling(batch_size=5, shuffle=shuffle).batches(np.arange(23), 4, epoch=2)
    ranks = [Sampling(batch_size=5, shuffle=shuffle, rank=rank, world_size=3, share_batches=True) for rank in range(3)]
    batches = [sampling.batches(np.arange(23), 4, epoch=2) for sampling in ranks]
    assert [sampling.count(23) for sampling in ranks] == [len(one)] * 3 == [len(rank) for rank in batches]
    for number in range(len(one)):
        assert np.concatenate([rank[number] for rank in batches]).tolist() == one[number].tolist()


def test_packing_keeps_every_row_and_makes_batches_of_similar_region_counts():
    counts = np.random.default_rng(0).geometric(0.1, 1000)
    padded = {}
    for pack in (False, True):
        batches = Sampling(batch_size=16, pack=pack).batches(np.arange(1000), 100, 1, counts)
        rows = [batches[number] for number in range(len(batches))]
        assert sorted(np.concatenate(rows).tolist()) == list(range(1000))
        padded[pack] = sum(len(batch) * counts[batch].max() for batch in rows) / counts.sum()
    assert padded[False] > 2.5
    assert padded[True] < 1.2
    sizes = [counts[batch].mean() for batch in rows]
    assert sizes != sorted(sizes)


@settings(deadline=None, max_examples=50)
@given(options=sampling_options, rows=st.lists(st.integers(0, 50), max_size=40))
def test_repeated_rows_are_given_repeatedly(options, rows):
    batches = Sampling(**options).batches(np.array(rows, np.int64), 8, 0)
    rows_given = [row for batch in batches for row in batch.tolist()]
    assert sorted(rows_given) == sorted(rows)
    if options["shuffle"] == "none":
        assert rows_given == rows


def order(shuffle, seed=0, epoch=0, count=4096, part_size=64, **options):
    batches = Sampling(batch_size=7, shuffle=shuffle, seed=seed, **options).batches(np.arange(count), part_size, epoch)
    return np.concatenate(list(batches))


@pytest.mark.parametrize("shuffle", ["full", "block"])
def test_the_order_depends_on_seed_and_epoch(shuffle):
    assert order(shuffle, 1, 2).tolist() == order(shuffle, 1, 2).tolist()
    for other in (order(shuffle, 2, 2), order(shuffle, 1, 3)):
        assert (order(shuffle, 1, 2) == other).mean() < 0.02


def test_the_order_of_a_seed_never_changes():
    assert order("full", 7, 1, count=12).tolist() == [2, 5, 8, 0, 9, 3, 11, 1, 6, 7, 4, 10]
    blocks = order("block", 7, 1, count=12, part_size=3, block_parts=2)
    assert blocks.tolist() == [0, 2, 1, 10, 9, 7, 11, 6, 8, 3, 4, 5]


def test_a_full_shuffle_is_uniform():
    first = np.array([order("full", seed, count=8)[0] for seed in range(800)])
    assert np.bincount(first, minlength=8).min() > 60  # expected 100; 60 is four standard deviations below


def test_a_block_shuffle_mixes_a_few_parts_at_a_time():
    parts = order("block", block_parts=4) // 64
    windows = [len(set(parts[start : start + 64].tolist())) for start in range(0, 4096 - 64, 16)]
    assert max(windows) <= 4 + 2
    assert np.median(windows) >= 4
    first_seen = [int(np.argmax(parts == part)) for part in range(64)]
    assert first_seen != sorted(first_seen)
    spans = [int(np.ptp(np.flatnonzero(parts == part))) for part in range(64)]
    assert max(spans) < 6 * 64


def test_ranks_of_a_block_shuffle_read_different_parts():
    ranks = [order("block", rank=rank, world_size=4, block_parts=2) // 64 for rank in range(4)]
    assert sum(len(set(parts.tolist())) for parts in ranks) <= 64 + 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shuffle": "half"}, "shuffle is 'half', expected full, block or none"),
        ({"batch_size": 0}, "batch_size is 0, expected at least 1"),
        ({"seed": -1}, "seed is -1, expected at least 0"),
        ({"rank": 2, "world_size": 2}, "rank is 2, expected 0 to 1"),
        ({"epoch": -1}, "epoch is -1"),
        ({"threads": 0}, "threads is 0"),
        ({"ahead": 0}, "ahead is 0"),
        ({"rows": [23]}, "there is no row 23"),
        ({"rows": []}, "there is no image to load"),
        ({"pin_memory": True}, "torch finds none here"),
    ],
)
def test_invalid_options_are_refused(cache, options, message):
    if options.get("pin_memory") and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(InputError, match=message):
        cache.loader(**{"batch_size": 4, **options})


# --- values of a batch ---


@pytest.mark.parametrize("shuffle", ["full", "block", "none"])
def test_a_pass_gives_every_valid_image_with_its_features(cache, shuffle):
    loader = cache.loader(5, shuffle=shuffle, block_parts=2)
    passes = [rows_of(loader), rows_of(loader)]
    for batches in passes:
        assert len(batches) == len(loader) == 5
        assert sorted(chain(*batches)) == [row for row in range(IMAGES) if row != FAILED]
    assert (passes[0] == passes[1]) == (shuffle == "none")
    assert loader.epoch == 2


@pytest.mark.parametrize("threads", [1, 3])
def test_batches_do_not_depend_on_the_number_of_threads(cache, threads):
    expected = [batch.copy() for batch in cache.loader(6, threads=1, ahead=1)]
    for batch, single in zip(cache.loader(6, threads=threads, ahead=3), expected, strict=True):
        require_equal(batch, single)


@pytest.mark.parametrize("compression", [None, "zstd"])
@pytest.mark.parametrize("dtype", ["float16", "float32", "bfloat16", "int8"])
def test_map_and_pread_give_the_same_values_in_every_encoding(tmp_path, dtype, compression):
    encoded = make_cache(tmp_path / "c.zarr", dtype=dtype, compression=compression)
    rows, batches = encoded.valid_rows(), []
    for access in ("map", "pread"):
        for check in ("first", "always", "never"):
            reader = FeatureCache.open(encoded.path, access=access, check=check)
            batches += [reader.read(rows), reader.read(rows)]
    for batch in batches:
        require_equal(batch, batches[0])
    maps = decode(batches[0].feature_map, encoded.feature_sets["maps"], batches[0].map_scale)
    tokens = decode(batches[0].tokens, encoded.feature_sets["tokens"], batches[0].token_scale)
    tolerance = {"float16": 0, "float32": 0, "bfloat16": 0.02, "int8": 0.05}[dtype]
    np.testing.assert_allclose(maps, MAP_VALUES[rows].astype(np.float32), atol=tolerance)
    for index, row in enumerate(rows):
        np.testing.assert_allclose(tokens[index, : COUNTS[row]], TOKEN_VALUES[row].astype(np.float32), atol=tolerance)
    assert batches[0].map_scale.shape[1:] == ((5,) if dtype == "int8" else (0,))


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_tokens_kept_in_memory_equal_those_on_disk(tmp_path, dtype):
    encoded = make_cache(tmp_path / "c.zarr", dtype=dtype)
    options = {"rows": [1, 20, 2, 0, 1, 22, 3]}
    from_disk = [batch.copy() for batch in encoded.loader(4, **options)]
    from_memory = encoded.loader(4, **options, tokens_in_memory=True)
    for shard in encoded.path.glob("features/tokens/*/c.*"):
        os.truncate(shard, 0)
    for batch, expected in zip(from_memory, from_disk, strict=True):
        require_equal(batch, expected)


def test_a_remote_storage_is_read_with_several_concurrent_range_reads(cache, monkeypatch):
    local = LocalStorage(cache.path)

    class RemoteStorage:
        address, readers, on_disk = "far://away", 5, False

        def __getattr__(self, name):
            return getattr(local, name)

        def local_path(self, name):
            return None

        def read_into(self, name, offset, out):
            threads.add(threading.get_ident())
            time.sleep(0.01)
            local.read_into(name, offset, out)

    monkeypatch.setattr("regionspot.cache.store.open_storage", lambda path: RemoteStorage())
    threads, remote = set(), FeatureCache.open("far://away")
    rows = cache.valid_rows()
    require_equal(remote.read(rows), cache.read(rows))
    assert len(threads) >= 3
    threads.clear()
    assert sorted(chain(*rows_of(remote.loader(11)))) == rows.tolist()
    assert len(threads) >= 3


# --- resuming within an epoch ---


@pytest.mark.parametrize("shuffle", ["full", "block", "none"])
@pytest.mark.parametrize("after", [0, 1, 3, 5])
def test_a_resumed_loader_continues_with_the_same_batches(cache, shuffle, after):
    def loader():
        return cache.loader(4, shuffle=shuffle, seed=3, epoch=2, rank=0, world_size=1, ahead=3)

    uninterrupted = loader()
    expected = [[batch.copy() for batch in uninterrupted] for _ in range(2)]
    stopped = loader()
    for _ in islice(stopped, after):
        pass
    resumed = loader()
    resumed.load_state_dict(json.loads(json.dumps(stopped.state_dict())))
    for batches in (expected[0][after:], expected[1]):
        for batch, other in zip(resumed, batches, strict=True):
            require_equal(batch, other)


def test_a_state_saved_after_the_last_batch_resumes_with_the_next_epoch(cache):
    uninterrupted = cache.loader(4)
    first, second = rows_of(uninterrupted), rows_of(uninterrupted)
    loader = cache.loader(4)
    for _ in zip(range(len(loader)), loader, strict=False):
        pass
    resumed = cache.loader(4)
    resumed.load_state_dict(loader.state_dict())
    assert len(first) == len(loader)
    assert (rows_of(resumed), rows_of(resumed)) == ([], second)


def test_an_abandoned_pass_starts_again(cache):
    loader = cache.loader(4)
    first = [batch.rows.tolist() for batch in islice(loader, 2)]
    assert rows_of(loader)[:2] == first


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"seed": 1}, "its seed is 0, here it is 1"),
        ({"batch_size": 5}, "its batch_size is 4, here it is 5"),
        ({"rows": [1, 2, 3]}, "its images is 22, here it is 3"),
        ({"rows": [*range(9), *range(10, 22), 21]}, "its crc32c of their rows"),
        ({"shuffle": "none"}, "its shuffle is full, here it is none"),
        ({"shuffle": "block"}, "its shuffle is full, here it is block"),
        ({"rank": 1, "world_size": 2}, "its rank is 0, here it is 1"),
        ({"drop_last": True}, "its drop_last is False, here it is True"),
    ],
)
def test_a_state_of_another_loader_is_refused_with_the_difference(cache, other, message):
    state = cache.loader(4).state_dict()
    with pytest.raises(InputError, match=message) as error:
        cache.loader(**{"batch_size": 4, **other}).load_state_dict(state)
    assert "\n" not in str(error.value)


def test_a_state_of_another_cache_is_refused(cache, tmp_path):
    other = FeatureCache.create(tmp_path / "o.zarr", replace(cache.manifest, split="val"), feature_sets())
    with pytest.raises(InputError, match="its cache is toy/train, here it is toy/val"):
        other.loader(4, rows=cache.valid_rows()).load_state_dict(cache.loader(4).state_dict())
    ids = replace(cache.manifest, image_ids=np.arange(IMAGES) + 7)
    other = FeatureCache.create(tmp_path / "ids.zarr", ids, feature_sets())
    with pytest.raises(InputError, match="its crc32c of their ids"):
        other.loader(4, rows=cache.valid_rows()).load_state_dict(cache.loader(4).state_dict())


def test_an_invalid_state_is_refused(cache):
    with pytest.raises(InputError, match="not the state_dict"):
        cache.loader(4).load_state_dict({"epoch": 1})


# --- reused memory ---


def test_a_batch_is_valid_until_the_next_and_its_memory_is_reused(cache):
    loader, memory = cache.loader(2, ahead=2), set()
    for batch in loader:
        time.sleep(0.005)  # time for the threads to prefetch
        require_right(batch)
        memory.add(batch.feature_map.ctypes.data)
    assert len(memory) == 3
    assert len(loader) == 11


def test_the_next_pass_reuses_memory_and_concurrent_passes_share_none(cache):
    loader = cache.loader(2, ahead=1)
    first = {batch.feature_map.ctypes.data for batch in loader}
    assert {batch.feature_map.ctypes.data for batch in loader} == first
    for one, other in zip(loader, loader, strict=True):
        require_right(one)
        require_right(other)
        assert one.feature_map.ctypes.data != other.feature_map.ctypes.data


def test_only_a_copy_of_a_loaders_batch_can_be_pickled(cache):
    batch = next(iter(cache.loader(4)))
    with pytest.raises(CacheError, match=r"send batch\.copy\(\)"):
        pickle.dumps(batch)
    require_right(pickle.loads(pickle.dumps(batch.copy())))
    require_right(pickle.loads(pickle.dumps(cache.read([1, 2]))))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="pinned memory needs a GPU")
def test_pinned_batches_are_page_locked(cache):
    for batch in cache.loader(4, pin_memory=True):
        require_right(batch)
        assert torch.from_numpy(batch.feature_map).is_pinned()


# --- threads ---


def test_threads_start_with_the_first_batch_and_end_with_the_pass(cache):
    before = reading_threads()
    loader = cache.loader(4, threads=3)
    batches = iter(loader)
    assert reading_threads() == before
    next(batches)
    assert 1 <= len(reading_threads()) - len(before) <= 3  # an idle thread is reused
    for _ in batches:
        pass
    assert reading_threads() == before


def raise_at_first_batch(batches):
    for _ in batches:
        raise ZeroDivisionError


def test_a_consumer_that_stops_early_leaves_no_thread(cache):
    for batch in cache.loader(2, threads=3):
        require_right(batch)
        break
    batches = iter(cache.loader(2))
    next(batches)
    del batches
    with pytest.raises(ZeroDivisionError):
        raise_at_first_batch(cache.loader(2))
    gc.collect()
    assert not reading_threads()


def test_a_process_can_exit_within_a_pass(cache):
    code = (
        "import sys; from regionspot.cache import FeatureCache\n"
        "batches = iter(FeatureCache.open(sys.argv[1]).loader(2, threads=4)); next(batches); raise SystemExit(3)"
    )
    done = subprocess.run([sys.executable, "-c", code, cache.path], timeout=100, capture_output=True)
    assert (done.returncode, done.stderr) == (3, b"")


def test_an_error_is_raised_at_its_batch(own_cache):
    path = own_cache.path / shard_file(own_cache.feature_sets["maps"], 3)
    data = bytearray(path.read_bytes())
    data[5 * 8 * 2 + 3] ^= 1  # in the record of row 13
    path.write_bytes(data)
    batches = iter(FeatureCache.open(own_cache.path).loader(2, shuffle="none", ahead=4, threads=3))
    rows = [batch.rows.tolist() for batch in islice(batches, 6)]
    with pytest.raises(CorruptPartError, match=r"c\.3\.0\.0: the record of image 113 \(row 13, 13\.jpg\) does not"):
        next(batches)
    assert list(chain(*rows)) == [row for row in range(13) if row != FAILED]
    assert list(batches) == []
    assert not reading_threads()


def test_a_failed_row_raises_an_error(cache):
    with pytest.raises(NotExtractedError, match="could not be read when it was extracted: broken JPEG"):
        rows_of(cache.loader(4, rows=[1, FAILED, 2]))


# --- other processes ---


class Images(IterableDataset):
    """A typical use of a loader in DataLoader workers."""

    def __init__(self, loader, as_tensors):
        self.loader, self.as_tensors = loader, as_tensors

    def __iter__(self):
        for batch in self.loader:
            arrays = batch.rows, batch.feature_map, batch.tokens, batch.region_mask, batch.image_ids
            yield tuple(map(torch.from_numpy, arrays)) if self.as_tensors else batch


@pytest.mark.parametrize(("method", "as_tensors"), [("fork", True), ("fork", False), ("spawn", True)])
def test_data_loader_workers_share_the_images_and_send_correct_values(cache, method, as_tensors):
    loader = cache.loader(3, seed=5)
    next(iter(loader))  # so that a fork inherits open files
    data = DataLoader(
        Images(loader, as_tensors), batch_size=None, num_workers=2, multiprocessing_context=method, prefetch_factor=4
    )
    batches = list(data)
    if as_tensors:
        names = ("rows", "feature_map", "tokens", "region_mask", "image_ids")
        batches = [
            Batch(**{name: tensor.numpy() for name, tensor in zip(names, sent, strict=True)}) for sent in batches
        ]
    for batch in batches:  # checked after all were received: a worker must not have reused their memory
        require_right(batch)
    assert sorted(np.concatenate([batch.rows for batch in batches]).tolist()) == cache.valid_rows().tolist()


class ReadsInto(torch.utils.data.Dataset):
    def __init__(self, cache):
        self.cache, self.batch = cache, Batch()

    def __len__(self):
        return 4

    def __getitem__(self, index):
        try:
            return self.cache.read([index], out=self.batch).rows
        except InputError as error:
            return str(error)


def test_reusing_a_batch_is_refused_in_a_worker(cache):
    data = DataLoader(ReadsInto(cache), batch_size=None, num_workers=1, multiprocessing_context="fork")
    assert all("omit `out` there" in message for message in data)


def test_a_pass_started_before_a_fork_is_refused_in_the_child(cache):
    batches = iter(cache.loader(2))
    next(batches)
    reader, writer = os.pipe()
    if not os.fork():
        try:
            next(batches)
        except CacheError as error:
            os.write(writer, str(error).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as message:
        assert "was started in another process; start one here" in message.read()
    assert len(list(batches)) == 10


# --- files that change while open ---


@pytest.mark.parametrize("access", ["map", "pread"])
@pytest.mark.parametrize("name", ["maps", "tokens"])
def test_a_file_truncated_while_open_raises_an_error_and_does_not_kill_the_process(own_cache, access, name):
    reader = FeatureCache.open(own_cache.path, access=access, check="never")
    require_right(reader.read([4, 5, 6, 7]))
    path = own_cache.path / shard_file(own_cache.feature_sets[name], 1)
    os.truncate(path, 20)
    with pytest.raises(CorruptPartError, match=r"is truncated: the file"):
        reader.read([7])
    require_right(reader.read([0, 1]))


@pytest.mark.parametrize("access", ["map", "pread"])
def test_a_removed_or_replaced_file_does_not_break_a_reader(own_cache, access, monkeypatch):
    monkeypatch.setattr("regionspot.cache.storage.shard_files.max_open_files", lambda: 1)
    reader = FeatureCache.open(own_cache.path, access=access)
    rows = own_cache.valid_rows()
    require_right(reader.read(rows))
    for number in range(own_cache.n_parts):
        path = own_cache.path / shard_file(own_cache.feature_sets["maps"], number)
        content = path.read_bytes()
        path.unlink()
        path.write_bytes(content)
    require_right(reader.read(rows))
    for file in own_cache.path.glob("features/*/*/c.*"):
        file.unlink()
    if access == "map":
        require_right(reader.read(rows))
    else:
        with pytest.raises(CorruptPartError, match="is missing"):
            reader.read(rows)


def test_a_replaced_part_is_read_with_its_own_index_and_checksums(own_cache, monkeypatch, tmp_path):
    monkeypatch.setattr("regionspot.cache.storage.shard_files.max_open_files", lambda: 1)
    reader = FeatureCache.open(own_cache.path, access="pread", check="always")
    reader.read(own_cache.valid_rows())
    (own_cache.path / "parts/maps/00001.json").unlink()
    again = FeatureCache.open(own_cache.path, "a")
    again.write_part(1, (ImageFeatures(row, {"maps": MAP_VALUES[row] + 1}) for row in again.part_rows(1)), ["maps"])
    np.testing.assert_array_equal(reader.read([5]).feature_map[0], MAP_VALUES[5] + np.float16(1))


def test_a_read_error_is_not_reported_as_damage(own_cache, monkeypatch):
    reader = FeatureCache.open(own_cache.path, access="pread")
    reader.read([0])

    def refuse(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", refuse)
    with pytest.raises(CacheError, match=r"row 0, .* could not be read from maps: Input/output error; fix") as error:
        reader.read([0])
    assert not isinstance(error.value, CorruptPartError)


# --- memory and open files ---


def test_the_number_of_open_parts_is_bounded(own_cache, monkeypatch):
    monkeypatch.setattr("regionspot.cache.reading.feature_reader._OPEN_PARTS_BYTES", 0)
    monkeypatch.setattr("regionspot.cache.reading.feature_reader._MIN_OPEN_PARTS", 2)
    reader = FeatureCache.open(own_cache.path, access="map")
    for _ in range(2):
        require_right(reader.read(own_cache.valid_rows()))
    maps = Path("/proc/self/maps").read_text()
    assert [maps.count(f"{own_cache.path}/features/{name}") for name in ("maps", "tokens")] == [2, 2]


def test_maps_hold_no_file_descriptors_and_are_released(own_cache):
    def state():
        maps = Path("/proc/self/maps").read_text()
        return len(os.listdir("/proc/self/fd")), maps.count(str(own_cache.path))

    before = state()
    reader = FeatureCache.open(own_cache.path, access="map")
    reader.read(own_cache.valid_rows())
    assert state() == (before[0], before[1] + 2 * own_cache.n_parts)
    del reader
    assert state() == before


def test_a_set_that_does_not_fit_into_memory_is_not_mapped(cache, monkeypatch):
    assert available_memory() > 0

    def mapped(memory):
        monkeypatch.setattr("regionspot.cache.reading.feature_reader.available_memory", lambda: memory)
        return FeatureCache.open(cache.path).reader("maps")._mapped

    stored = IMAGES * 5 * 8 * 2
    assert (mapped(2 * stored), mapped(2 * stored - 2)) == (True, False)


def test_a_control_group_limits_the_available_memory(tmp_path, monkeypatch):
    group = tmp_path / "groups/a/b"
    group.mkdir(parents=True)
    (group / "memory.max").write_text("max\n")
    (group.parent / "memory.max").write_text("1048576\n")
    (tmp_path / "own").write_text("9:name=systemd:/x\n0::/a/b\n")
    monkeypatch.setattr("regionspot.cache.machine._CGROUPS", tmp_path / "groups")
    monkeypatch.setattr("regionspot.cache.machine._OWN_CGROUPS", tmp_path / "own")
    assert available_memory() == 1048576
