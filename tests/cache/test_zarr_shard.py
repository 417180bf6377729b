"""Shard files follow the Zarr specification, as judged by zarr-python."""

import os
import sys
import tracemalloc

import numpy as np
import pytest
import zarr
from zarr.codecs import ZstdCodec

from regionspot.cache.storage.atomic_files import DurableFile
from regionspot.cache.storage.zarr_shard import (
    ZSTD_LEVEL,
    ShardWriter,
    compress,
    decompress,
    index_bytes,
    parse_index,
    with_crc,
)

SLOTS, SHAPE = 7, (3, 8)
RECORD_BYTES = 3 * 8 * 2


@pytest.fixture
def records():
    return np.random.default_rng(0).standard_normal((SLOTS, *SHAPE)).astype(np.float16)


@pytest.fixture
def array(tmp_path):
    """An empty Zarr array of one shard, and the path of that shard."""
    zarr_array = zarr.create_array(
        tmp_path / "array.zarr",
        shape=(SLOTS, *SHAPE),
        chunks=(1, *SHAPE),
        shards=(SLOTS, *SHAPE),
        dtype="float16",
        compressors=None,
        filters=None,
        fill_value=0,
        chunk_key_encoding={"name": "default", "separator": "."},
    )
    return zarr_array, tmp_path / "array.zarr" / "c.0.0.0"


def write(path, records, slots):
    file = DurableFile(path)
    writer = ShardWriter(file, SLOTS)
    for slot in slots:
        writer.append(slot, records[slot])
    assert writer.finish() == file.partial.stat().st_size
    file.publish()


def offsets_of(path, record_bytes=RECORD_BYTES):
    data = path.read_bytes()
    return parse_index(data[-index_bytes(SLOTS) :], len(data) - index_bytes(SLOTS), record_bytes)[0]


def test_zarr_reads_our_shards(array, records):
    zarr_array, path = array
    write(path, records, range(SLOTS))
    np.testing.assert_array_equal(zarr_array[:], records)


def test_our_shard_equals_the_one_that_zarr_writes(array, records, tmp_path):
    zarr_array, path = array
    zarr_array[:] = records
    write(tmp_path / "ours", records, range(SLOTS))
    theirs, ours = path.read_bytes(), (tmp_path / "ours").read_bytes()
    assert len(ours) == len(theirs)
    assert sorted(offsets_of(path)) == sorted(offsets_of(tmp_path / "ours"))


def test_an_empty_slot_takes_no_bytes_and_reads_as_zeros(array, records):
    zarr_array, path = array
    write(path, records, [5, 1])
    expected = np.zeros_like(records)
    expected[[1, 5]] = records[[1, 5]]
    np.testing.assert_array_equal(zarr_array[:], expected)
    assert path.stat().st_size == 2 * RECORD_BYTES + index_bytes(SLOTS)


def test_our_reader_finds_the_records_of_a_shard_by_zarr(array, records):
    zarr_array, path = array
    zarr_array[2:5] = records[2:5]
    data, offsets = path.read_bytes(), offsets_of(path)
    assert [slot for slot in range(SLOTS) if offsets[slot] >= 0] == [2, 3, 4]
    for slot in (2, 3, 4):
        assert data[offsets[slot] : offsets[slot] + RECORD_BYTES] == records[slot].tobytes()


def test_records_are_adjacent_and_aligned(tmp_path, records):
    write(tmp_path / "shard", records, range(SLOTS))
    assert offsets_of(tmp_path / "shard").tolist() == [slot * RECORD_BYTES for slot in range(SLOTS)]


def test_a_file_appears_when_it_is_published(tmp_path, records):
    file = DurableFile(tmp_path / "shard")
    writer = ShardWriter(file, SLOTS)
    writer.append(0, records[0])
    writer.finish()
    assert [path.suffix for path in tmp_path.iterdir()] == [".partial"]
    file.publish()
    assert [path.name for path in tmp_path.iterdir()] == ["shard"]


def test_the_file_is_flushed_before_the_rename_and_the_folder_after(tmp_path, records, monkeypatch):
    done = []
    for name in ("write", "fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, name=name, real=real: done.append(name) or real(*args))
    write(tmp_path / "shard", records, [0])
    assert done == ["write", "write", "fsync", "replace", "fsync"]  # a record, the index


def test_a_discarded_shard_leaves_nothing(tmp_path, records):
    file = DurableFile(tmp_path / "shard")
    ShardWriter(file, SLOTS).append(0, records[0])
    file.discard()
    assert not list(tmp_path.iterdir())


def test_a_partial_write_is_continued(tmp_path, records, monkeypatch):
    write(tmp_path / "whole", records, range(SLOTS))
    real_write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real_write(fd, data[:13]))
    write(tmp_path / "bit_by_bit", records, range(SLOTS))
    assert (tmp_path / "bit_by_bit").read_bytes() == (tmp_path / "whole").read_bytes()


def test_a_flipped_bit_of_the_index_is_found(tmp_path, records):
    path = tmp_path / "shard"
    write(path, records, [0, 1, 3, 4, 5, 6])
    sound = path.read_bytes()
    for bit in range(0, index_bytes(SLOTS) * 8, 7):
        damaged = bytearray(sound)
        damaged[len(sound) - 1 - bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="checksum of its index"):
            offsets_of(path)


@pytest.mark.parametrize("length", [0, 3, index_bytes(SLOTS) - 1, RECORD_BYTES * 3])
def test_a_truncated_shard_is_refused(tmp_path, records, length):
    write(tmp_path / "shard", records, range(SLOTS))
    os.truncate(tmp_path / "shard", length)
    with pytest.raises(ValueError, match=r"too short|checksum"):
        offsets_of(tmp_path / "shard")


def test_a_shard_with_records_of_another_size_is_refused(tmp_path, records):
    write(tmp_path / "shard", records, range(SLOTS))
    with pytest.raises(ValueError, match="points outside"):
        offsets_of(tmp_path / "shard", record_bytes=RECORD_BYTES - 2)


def test_memory_does_not_grow_with_the_shard(tmp_path):
    record = np.zeros((64, 1024), np.float16)

    def peak(slots):
        tracemalloc.start()
        file = DurableFile(tmp_path / "shard")
        writer = ShardWriter(file, slots)
        for slot in range(slots):
            writer.append(slot, record)
        writer.finish()
        file.discard()
        bytes_at_most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return bytes_at_most

    assert peak(64) < peak(4) + 64 * 100  # the index: 16 bytes per record, a few copies


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the flush at the end does it all")
def test_write_back_starts_before_the_flush_once_per_byte(tmp_path, monkeypatch):
    calls, real = [], os.posix_fadvise
    monkeypatch.setattr(os, "posix_fadvise", lambda fd, *what: calls.append(what) or real(fd, *what))
    record = np.zeros(3 << 20, np.uint8)
    file = DurableFile(tmp_path / "shard")
    for _ in range(7):
        file.write(record)
    file.finish()
    assert calls == [(0, 9 << 20, os.POSIX_FADV_DONTNEED), (9 << 20, 9 << 20, os.POSIX_FADV_DONTNEED)]
    assert file.partial.stat().st_size == 21 << 20


# --- compressed records ---


@pytest.fixture
def compressed_array(tmp_path):
    """An empty Zarr array of one shard with compressed inner chunks, and the path of that shard."""
    zarr_array = zarr.create_array(
        tmp_path / "zstd.zarr",
        shape=(SLOTS, *SHAPE),
        chunks=(1, *SHAPE),
        shards=(SLOTS, *SHAPE),
        dtype="float16",
        compressors=[ZstdCodec(level=ZSTD_LEVEL)],
        filters=None,
        fill_value=0,
        chunk_key_encoding={"name": "default", "separator": "."},
    )
    return zarr_array, tmp_path / "zstd.zarr" / "c.0.0.0"


def test_compressed_records_are_exchanged_with_zarr(compressed_array, records):
    zarr_array, path = compressed_array
    zarr_array[1:] = records[1:]
    theirs = path.read_bytes()
    write(path, [compress(record) for record in records], [6, 2, 3])
    expected = np.zeros_like(records)
    expected[[2, 3, 6]] = records[[2, 3, 6]]
    np.testing.assert_array_equal(zarr_array[:], expected)
    offsets, sizes = parse_index(theirs[-index_bytes(SLOTS) :], len(theirs) - index_bytes(SLOTS), None)
    assert (offsets[0], sizes[0]) == (-1, 0)
    for slot in range(1, SLOTS):
        out = np.empty(SHAPE, np.float16)
        decompress(theirs[offsets[slot] : offsets[slot] + sizes[slot]], out)
        np.testing.assert_array_equal(out, records[slot])


def test_damaged_compressed_records_are_refused(records):
    stored = compress(records[0])
    for damaged in (b"", stored[:-1], b"\x00" * len(stored), compress(records[0][:2]), compress(records)):
        with pytest.raises(ValueError, match=r"cannot be decompressed|expected 48"):
            decompress(damaged, np.empty(SHAPE, np.float16))


@pytest.mark.parametrize(
    "entry",
    [
        (0, 0),
        (0, 101),
        (100, 1),
        (101, 1),
        (2**63, 1),
        (1, 2**63),
        (1, 2**63 - 1),
        (2**64 - 2, 4),
        (2**63 - 1, 2**63 - 1),
    ],
)
def test_an_index_that_points_outside_its_compressed_records_is_refused(entry):
    sound = with_crc(np.array([(0, 40), (40, 60)], "<u8").tobytes())
    assert [each.tolist() for each in parse_index(sound, 100, None)] == [[0, 40], [40, 60]]
    with pytest.raises(ValueError, match="points outside its 100 bytes of compressed records"):
        parse_index(with_crc(np.array([(0, 40), entry], "<u8").tobytes()), 100, None)
