"""Parts that are replaced while they are read, and parts of another cache: no image gets the features of another."""

import shutil
import uuid
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from makers import fill, make_features

from regionspot.cache import CorruptPartError, FeatureCache, NotExtractedError
from regionspot.cache.format.part_record import load_record
from regionspot.cache.reading.feature_reader import PartOpener
from regionspot.cache.storage.atomic_files import from_json, seal, to_json
from regionspot.cache.storage.local import LocalStorage
from regionspot.cache.tools.copy_features import copy_features
from regionspot.cache.tools.repair import repair
from regionspot.cache.tools.rewrite_part import rewrite_part
from regionspot.cache.tools.verify import verify

SETS = {"map_set": "clip", "token_set": "sam"}


@pytest.fixture
def full(small_folder, tmp_path):
    return shutil.copytree(small_folder / "full", tmp_path / "c.zarr")


@pytest.fixture
def opened_parts(monkeypatch):
    """The number of times each part was opened."""
    counts, real = Counter(), PartOpener.__call__

    def counted(self, part):
        counts[part] += 1
        return real(self, part)

    monkeypatch.setattr(PartOpener, "__call__", counted)
    return counts


def retried(small, address):
    """Rewrite the part of the failed image, like `extract --retry-failed`."""
    cache, row = FeatureCache.open(address, "a"), small.failing
    image = make_features(small.manifest, small.sets, row)
    for name in cache.feature_sets:
        rewrite_part(cache, row // small.part_size, name, {row: image})


@pytest.mark.parametrize("where", ["map", "pread", "memory"])
def test_a_part_rewritten_while_it_is_read_mixes_no_features(small, full, where, monkeypatch):
    monkeypatch.setattr("regionspot.cache.storage.shard_files.max_open_files", lambda: 1)
    address = full
    if where == "memory":
        address = f"memory://{uuid.uuid4().hex}/c.zarr"
        small.extract(address)
    reader = FeatureCache.open(address, access="auto" if where == "memory" else where)
    rows = reader.valid_rows()
    before = reader.read(rows, **SETS)
    retried(small, address)
    after = reader.read(rows, **SETS)
    np.testing.assert_array_equal(after.feature_map, before.feature_map)
    np.testing.assert_array_equal(after.tokens, before.tokens)


def test_only_the_replaced_part_is_reopened_and_only_once(small, full, opened_parts, monkeypatch):
    monkeypatch.setattr("regionspot.cache.storage.shard_files.max_open_files", lambda: 1)
    reader = FeatureCache.open(full, access="pread")
    rows = [4, 5, 7]  # of part 1
    reader.read([0, *rows, 8], map_set="clip", token_set="sam")
    retried(small, full)
    opened_parts.clear()
    for _ in range(3):
        reader.read([*rows, *rows, *rows], map_set="clip", token_set="sam")
    assert opened_parts == {1: 2}, "once for each of the two sets"


def test_a_part_replaced_while_it_is_opened_is_opened_again(small, full, monkeypatch):
    real, replaced = LocalStorage.read, []

    def read_then_replace(self, name):
        data = real(self, name)
        if name == "parts/clip/00001.json" and not replaced:
            replaced.append(name)
            retried(small, full)
        return data

    expected = FeatureCache.open(full).read([4, 5, 7], **SETS)
    reader = FeatureCache.open(full)
    monkeypatch.setattr(LocalStorage, "read", read_then_replace)
    np.testing.assert_array_equal(reader.read([4, 5, 7], **SETS).feature_map, expected.feature_map)
    assert replaced


def test_a_part_being_replaced_is_not_reported_as_damaged(full, monkeypatch):
    real = LocalStorage.read

    def read_then_remove(self, name):
        data = real(self, name)
        if name == "parts/clip/00001.json":
            (full / name).unlink()
            shutil.copyfile(full / "features/clip/crc32c/c.0", full / "features/clip/crc32c/c.1")
        return data

    reader = FeatureCache.open(full)
    monkeypatch.setattr(LocalStorage, "read", read_then_remove)
    with pytest.raises(NotExtractedError, match="is not written yet"):
        reader.read([4], **SETS)


def copy_part(origin, target, name, part):
    """Copy the files of one part and its record, as an interrupted `rsync` of one cache over another does."""
    for file in (*origin.glob(f"features/{name}/*/c.{part}*"), origin / f"parts/{name}/{part:05d}.json"):
        shutil.copyfile(file, target / file.relative_to(origin))


def of_another_backbone(small, path):
    """A cache of the same images and shapes by another backbone."""
    sets = [replace(each, provenance={**each.provenance, "model": "ViT-B-32"}) for each in small.sets]
    fill(FeatureCache.create(path, small.manifest, sets, small.part_size), seed=1)


def of_other_boxes(small, path):
    """A cache of the same images with as many other boxes, as by a detector trained a little longer."""
    manifest = replace(small.manifest, boxes_xyxy=small.manifest.boxes_xyxy + 1)
    fill(FeatureCache.create(path, manifest, small.sets, small.part_size), seed=1)


@pytest.mark.parametrize("make", [of_another_backbone, of_other_boxes])
def test_a_part_of_another_cache_is_refused_and_extracted_again(small, full, tmp_path, make, small_folder):
    make(small, tmp_path / "other.zarr")
    for name in small.names:
        copy_part(tmp_path / "other.zarr", full, name, 0)
    with pytest.raises(CorruptPartError, match=r"parts/clip/00000.json: was written for other images, boxes"):
        FeatureCache.open(full).read([0], **SETS)
    report = verify(full)
    assert [(problem.part, problem.fix) for problem in report.problems] == [(0, "drop")] * len(small.names)
    repair(full, report)
    small.extract(full)
    assert small.content(full) == small.content(small_folder / "full")


def test_a_record_of_other_rows_is_refused_despite_its_valid_checksum(full):
    storage, name = LocalStorage(full), "parts/clip/00001.json"
    original = load_record(storage, name)
    for field, value in (("first_row", 5), ("images", 3), ("regions", 71)):
        replace(original, **{field: value}).save(storage, name)
        expected = getattr(original, field)
        with pytest.raises(CorruptPartError, match=rf"00001.json: {field}: found {value}, expected {expected}"):
            FeatureCache.open(full).read([4], **SETS)


def test_records_without_an_identity_are_read_and_copied(small, full, tmp_path):
    storage = LocalStorage(full)
    for file in full.glob("parts/*/*.json"):
        name = file.relative_to(full).as_posix()
        replace(load_record(storage, name), identity=None).save(storage, name)
    assert verify(full).sound
    cache = FeatureCache.open(full)
    expected = cache.read(cache.valid_rows(), **SETS)
    copy = FeatureCache.create(tmp_path / "copy.zarr", small.manifest, small.sets, small.part_size)
    copy_features([cache], copy)
    assert verify(tmp_path / "copy.zarr").sound
    np.testing.assert_array_equal(copy.read(copy.valid_rows(), **SETS).tokens, expected.tokens)


def test_a_record_with_fields_of_a_later_version_is_read(full):
    for file in full.glob("parts/*/*.json"):
        document = {key: value for key, value in from_json(file.read_bytes()).items() if key != "crc32c"}
        document["failures"] = [{**failure, "kind": "decode"} for failure in document["failures"]]
        file.write_bytes(to_json(seal({**document, "gpu": "H100"})))
    report = verify(full)
    assert report.sound, report.text()
    cache = FeatureCache.open(full)
    assert [failure.row for failure in cache.failures()] == [6]
    assert len(cache.read(cache.valid_rows(), **SETS)) == 9
