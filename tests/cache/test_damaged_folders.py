"""Folders that are not a cache, damaged caches and other schemas are refused in one line; reading writes nothing."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import zarr

from regionspot.cache import CacheError, FeatureCache, NotACacheError, SchemaVersionError
from regionspot.cache.storage.atomic_files import seal, to_json
from regionspot.cache.tools.info import describe_cache
from regionspot.cache.tools.verify import verify


@pytest.fixture
def full(small_folder, tmp_path) -> Path:
    return shutil.copytree(small_folder / "full", tmp_path / "c.zarr")


def edited(full, **attributes):
    document = json.loads((full / "zarr.json").read_bytes())
    document["attributes"] |= attributes
    (full / "zarr.json").write_bytes(to_json(document))


def root(content):
    return lambda full: (full / "zarr.json").write_bytes(content)


def empty(full):
    shutil.rmtree(full)
    full.mkdir()


def replaced_by(make):
    def damage(full):
        shutil.rmtree(full)
        make(full)

    return damage


def without(name):
    return lambda full: shutil.rmtree(full / name) if (full / name).is_dir() else (full / name).unlink()


def a_folder_instead_of(name):
    def damage(full):
        (full / name).unlink()
        (full / name).mkdir()

    return damage


REFUSED = {
    "nothing": (shutil.rmtree, "no such cache"),
    "an empty folder": (empty, "holds no zarr.json"),
    "photos": (replaced_by(lambda full: (full.mkdir(), (full / "a.jpg").touch())), "holds no zarr.json"),
    "a file": (replaced_by(lambda full: full.write_bytes(b"x")), "is a file"),
    "a dangling link": (replaced_by(lambda full: full.symlink_to("nowhere")), "no such cache"),
    "a Zarr group of format 2": (
        replaced_by(lambda full: zarr.create_group(full, zarr_format=2)),
        "holds no zarr.json",
    ),
    "another Zarr group": (
        replaced_by(lambda full: zarr.create_group(full)),
        "is a Zarr group, but not a feature cache",
    ),
    "a Zarr array": (
        replaced_by(lambda full: zarr.create_array(full, shape=3, dtype="i4")),
        "is a Zarr group, but not a feature cache",
    ),
    "an empty zarr.json": (root(b""), "is not a Zarr v3 group's metadata"),
    "zeros, as after a power failure": (root(bytes(4096)), "is not a Zarr v3 group's metadata"),
    "a zarr.json of something else": (root(b"[1, 2]"), "is not a Zarr v3 group's metadata"),
    "an endlessly nested zarr.json": (root(b"[" * 100_000), "is not a Zarr v3 group's metadata"),
    "a zarr.json that is a folder": (a_folder_instead_of("zarr.json"), "cannot be read: Is a directory"),
    "attributes that are a number": (root(b'{"attributes": 3}'), "is a Zarr group, but not a feature cache"),
    "a header edited by hand": (
        lambda full: edited(full, regionspot={"dataset": "coco"}),
        "does not match its own checksum",
    ),
    "a header of another program": (
        lambda full: edited(full, regionspot=seal({"dataset": "coco"})),
        "lacks fields of a header",
    ),
    "no images": (without("images"), "images/"),
    "a column missing": (without("images/id/c.0"), "images/id/c.0: is missing"),
    "a column's metadata missing": (without("images/negative_count/zarr.json"), "is missing"),
    "no regions": (without("regions"), "regions/"),
    "a feature set missing": (without("features/clip"), "features/clip"),
    "an array missing": (without("features/sam/crc32c/zarr.json"), "features/sam/crc32c/zarr.json is missing"),
}


@pytest.mark.parametrize(("damage", "message"), REFUSED.values(), ids=REFUSED)
def test_a_folder_that_is_not_a_cache_is_refused_in_one_line(full, damage, message):
    damage(full)
    for mode in ("r", "a"):
        with pytest.raises(NotACacheError) as error:
            FeatureCache.open(full, mode)
        assert message in str(error.value)
        assert "\n" not in str(error.value)
        assert str(full) in str(error.value)


@pytest.mark.parametrize("version", [2, "1", None, [1]])
def test_another_schema_version_is_refused_with_both_versions(full, version):
    edited(full, regionspot_schema=version)
    with pytest.raises(CacheError) as error:
        FeatureCache.open(full)
    if version is not None:
        assert isinstance(error.value, SchemaVersionError)
        assert f"has schema version {version}, this regionspot reads version 1; use the version" in str(error.value)
    with pytest.raises(type(error.value)):
        verify(full)


DAMAGED_PARTS = {
    "a record of zeros": lambda part: part["record"].write_bytes(bytes(300)),
    "a record of something else": lambda part: part["record"].write_bytes(b'{"part": 1}'),
    "an endlessly nested record": lambda part: part["record"].write_bytes(b"[" * 100_000),
    "a record of another part": lambda part: shutil.copyfile(part["other record"], part["record"]),
    "a shard missing": lambda part: part["shard"].unlink(),
    "a shard cut short": lambda part: os.truncate(part["shard"], 60),
    "an empty shard": lambda part: os.truncate(part["shard"], 0),
    "a shard of another part": lambda part: shutil.copyfile(part["other shard"], part["shard"]),
    "a shard of zeros": lambda part: part["shard"].write_bytes(bytes(part["shard"].stat().st_size)),
    "checksums missing": lambda part: part["checksums"].unlink(),
    "checksums of another part": lambda part: shutil.copyfile(part["other checksums"], part["checksums"]),
}


@pytest.mark.parametrize("damage", DAMAGED_PARTS.values(), ids=DAMAGED_PARTS)
def test_a_damaged_part_is_refused_in_one_line_and_the_others_are_read(full, damage):
    damage(
        {
            "record": full / "parts/clip/00001.json",
            "other record": full / "parts/clip/00000.json",
            "shard": full / "features/clip/feature_map/c.1.0.0",
            "other shard": full / "features/clip/feature_map/c.0.0.0",
            "checksums": full / "features/clip/crc32c/c.1",
            "other checksums": full / "features/clip/crc32c/c.0",
        }
    )
    cache = FeatureCache.open(full)
    assert len(cache.read([0, 1, 8], map_set="clip", token_set="sam")) == 3
    with pytest.raises(CacheError, match="part 1") as error:
        cache.read([4], map_set="clip", token_set="sam")
    assert "\n" not in str(error.value)
    assert "regionspot cache repair" in str(error.value)
    assert [problem.part for problem in verify(full).problems] == [1]


def test_reading_writes_nothing(full, small):
    for path in (full, *full.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = {path: (path.stat().st_mtime_ns, path.stat().st_ctime_ns) for path in (full, *full.rglob("*"))}
    cache = FeatureCache.open(full)
    cache.read(cache.valid_rows(), map_set="clip", token_set="sam")
    for batch in cache.loader(2, map_set="clip-int8", token_set="sam-int8", shuffle="full"):
        assert len(batch)
    assert np.array_equal(cache.pending_parts(), [])
    assert cache.failures()
    describe_cache(cache)
    assert verify(full).sound
    del cache
    assert {path: (path.stat().st_mtime_ns, path.stat().st_ctime_ns) for path in (full, *full.rglob("*"))} == before
    for path in (full, *full.rglob("*")):
        path.chmod(0o755)
