"""A manifest opened for training: large columns are in temporary files, and paths are read when they are first used."""

import pickle
import resource
import shutil
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from makers import make_manifest

from regionspot.cache import FeatureCache, FeatureSet, Manifest, NotACacheError, Ragged

MAPS = FeatureSet("clip", "map", (1, 1))
IMAGES, REGIONS = 600, 1_000  # of each image: 9.6 MB of boxes, 2.4 MB of classes


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("large") / "c.zarr"
    rng = np.random.default_rng(0)
    FeatureCache.create(
        path,
        make_manifest(
            np.full(IMAGES, REGIONS),
            category_index=rng.integers(-1, 1, IMAGES * REGIONS, dtype=np.int32),
            negatives=Ragged(np.arange(IMAGES + 1), np.zeros(IMAGES, np.int32)),
        ),
        [MAPS],
    )
    return path


@pytest.fixture
def temporary_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


def maps_of(folder: Path) -> list[str]:
    return [line for line in Path("/proc/self/maps").read_text().splitlines() if str(folder) in line]


def require_equal(one: Manifest, other: Manifest) -> None:
    for field in fields(Manifest):
        mine, theirs = getattr(one, field.name), getattr(other, field.name)
        if isinstance(mine, Ragged):
            np.testing.assert_array_equal(mine.offsets, theirs.offsets, strict=True)
            np.testing.assert_array_equal(mine.values, theirs.values, strict=True)
        else:
            np.testing.assert_array_equal(mine, theirs, strict=isinstance(mine, np.ndarray))


def test_large_columns_are_in_temporary_files_if_wanted(path, temporary_folder):
    in_memory = FeatureCache.open(path)
    assert not maps_of(temporary_folder)
    on_disk = FeatureCache.open(path, manifest_on_disk=True)
    assert len(maps_of(temporary_folder)) == 2  # boxes and ids of annotations; the other columns are small
    assert not list(temporary_folder.iterdir())  # nothing is left by a process that is killed
    require_equal(on_disk.manifest, in_memory.manifest)
    reopened = pickle.loads(pickle.dumps(on_disk))
    assert len(maps_of(temporary_folder)) == 4
    require_equal(reopened.manifest, in_memory.manifest)
    del on_disk, reopened
    assert not maps_of(temporary_folder)


def test_without_space_for_temporary_files_the_columns_are_in_memory(path, temporary_folder, caplog):
    allowed = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, allowed[1]))  # the kernel refuses longer files
    try:
        on_disk = FeatureCache.open(path, manifest_on_disk=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, allowed)
    assert not maps_of(temporary_folder)
    require_equal(on_disk.manifest, FeatureCache.open(path).manifest)
    assert f"{temporary_folder}: no temporary file of 10 MB (File too large); that much is kept" in caplog.text


def test_paths_are_then_read_when_they_are_first_used(path, tmp_path):
    copy = shutil.copytree(path, tmp_path / "c.zarr")
    in_memory, used, unused = (FeatureCache.open(copy, manifest_on_disk=on_disk) for on_disk in (False, True, True))
    assert used.manifest.paths[1] == "1.jpg"
    # Replaced by a cache of other images.
    shutil.rmtree(copy)
    FeatureCache.create(copy, make_manifest([1] * IMAGES, paths=[f"{row}.png" for row in range(IMAGES)]), [MAPS])
    for cache in (in_memory, used):
        assert cache.manifest.paths[2] == "2.jpg"
    assert len(unused.manifest) == IMAGES
    for _ in range(2):
        with pytest.raises(
            NotACacheError, match=r"images/path cannot be read \(images/path/c\.0 is not .*: open it ag"
        ):
            unused.manifest.select(np.arange(2))


def test_the_digest_of_unchanged_files_is_that_of_their_columns(path):
    stored = FeatureCache.open(path).manifest
    assert stored.select(np.arange(IMAGES)).digest() == stored.digest()  # computed again
