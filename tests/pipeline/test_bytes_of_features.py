"""An image's features are the same bytes whatever becomes of its neighbours, in every dtype.

They depend on the shape of the batch that an image is computed in, never on what else is in it: an image that cannot be
read leaves its place blank.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from regionspot.cache import FeatureCache
from regionspot.cache.format.feature_dtypes import Encoding
from regionspot.pipeline.backbones.bundle import Backbones
from regionspot.pipeline.datasets.failure_limit import FailureLimit
from regionspot.pipeline.datasets.registry import image_folder_of, read_dataset
from regionspot.pipeline.distributed.worker import ExtractJob
from regionspot.pipeline.extraction.config import ExtractConfig
from regionspot.pipeline.extraction.extract import Extraction

IMAGES, PART_SIZE, BATCH_SIZE = 16, 7, 3  # parts of 3 + 3 + 1, 3 + 3 + 1 and 2 images
BATCHES = [((3, 2), (1, 1)), ((3, 2), (1, 1)), ((2, 1),)]
EXACT = Encoding("float32")

BROKEN = {
    "the first of a batch": {0},
    "one in the middle of a batch": {4},
    "all but the first of a batch": {1, 2},
    "a whole batch": {3, 4, 5},
    "a batch of one image": {6},
    "the first of the last part": {14},
    "some of each part": {0, 2, 8, 9, 15},
    "a whole part": set(range(7, 14)),
}


@pytest.fixture(scope="module")
def manifest(world):
    return read_dataset("toy", world, "train").head(IMAGES)


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def backbones(request) -> Backbones:
    return Backbones.load("toy", device="cpu", dtype=request.param)


@pytest.fixture
def images(world, tmp_path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(image_folder_of("toy", world), tmp_path / "photos"))


def extraction_of(cache, manifest, images, backbones, **fields) -> Extraction:
    usual = {"encoding": EXACT, "token_encoding": EXACT, "part_size": PART_SIZE, "batch_size": BATCH_SIZE}
    config = ExtractConfig(str(cache), **{**usual, "max_failures": FailureLimit(count=IMAGES), **fields})
    return Extraction(config, manifest, images, backbones)


@pytest.fixture
def extraction(tmp_path, manifest, images, backbones):
    """`extraction(**fields)`: one of the copied images into a cache of this test."""
    return lambda **fields: extraction_of(tmp_path / "c.zarr", manifest, images, backbones, **fields)


@pytest.fixture(scope="module")
def unbroken(world, manifest, backbones, tmp_path_factory) -> FeatureCache:
    """What a run that meets no trouble makes."""
    path = tmp_path_factory.mktemp("unbroken") / "c.zarr"
    extraction_of(path, manifest, image_folder_of("toy", world), backbones).run()
    return FeatureCache.open(path)


@pytest.fixture
def breaking(images, manifest):
    """`mend = breaking({3, 5})`: the images of these rows cannot be read until `mend()`."""

    def damage(rows):
        kept = {images / str(manifest.paths[row]): b"" for row in rows}
        for path in kept:
            kept[path] = path.read_bytes()
            path.write_bytes(b"")
        return lambda: [path.write_bytes(data) for path, data in kept.items()]

    return damage


def contents(path) -> dict[str, bytes]:
    """Every file of the features, and of each part's records what does not say who wrote it and when."""
    found = {str(file.relative_to(path)): file.read_bytes() for file in Path(path).glob("features/**/c.*")}
    for file in Path(path).glob("parts/**/*.json"):
        words = json.loads(file.read_bytes())
        written_by = ("worker", "seconds", "account", "crc32c")
        found[str(file.relative_to(path))] = json.dumps({k: v for k, v in words.items() if k not in written_by})
    return found


def assert_same_features(cache: FeatureCache, expected: FeatureCache, rows) -> None:
    found, right = cache.read(np.array(rows)), expected.read(np.array(rows))
    np.testing.assert_array_equal(found.feature_map, right.feature_map)
    np.testing.assert_array_equal(found.tokens, right.tokens)


@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN)
def test_broken_images_change_no_byte_of_the_others_and_get_their_own_by_a_retry(
    extraction, breaking, unbroken, broken
):
    mend = breaking(broken)
    assert extraction().run().failed == len(broken)
    cache = FeatureCache.open(extraction().config.cache)
    good = [row for row in range(IMAGES) if row not in broken]
    assert cache.valid_rows().tolist() == good
    assert_same_features(cache, unbroken, good)
    for name in ("toy_clip", "toy_sam"):
        assert [cache.record(part, name).batches for part in range(3)] == BATCHES
    mend()
    assert extraction(batch_size=None).retry().read == len(broken)
    assert contents(extraction().config.cache) == contents(unbroken.path)


def test_a_retry_of_some_gives_each_of_them_its_bytes(extraction, breaking, unbroken):
    mend_one, mend_others = breaking({4}), breaking({3, 5, 10})
    extraction().run()
    mend_one()
    assert extraction().retry().read == 1
    assert_same_features(FeatureCache.open(extraction().config.cache), unbroken, [0, 1, 2, 4, 6])
    mend_others()
    assert extraction(batch_size=5).retry().read == 3  # a part's own size is what counts
    assert contents(extraction().config.cache) == contents(unbroken.path)


def test_feature_sets_that_lack_other_images_get_the_bytes_of_a_run_that_met_no_trouble(
    extraction, breaking, unbroken, backbones
):
    for rows, models in (({1, 8}, Backbones(encoders=backbones.encoders)), ({2, 8}, Backbones(backbones.localizer))):
        mend = breaking(rows)
        assert replace(extraction(), backbones=models).run().failed == 2
        mend()
    assert extraction().retry().read == 3
    assert contents(extraction().config.cache) == contents(unbroken.path)


@pytest.mark.parametrize("batch_size", [None, BATCH_SIZE])
def test_a_resumed_run_computes_in_batches_of_the_size_that_is_there(extraction, unbroken, batch_size):
    extraction(parts="1").run()
    assert extraction(batch_size=batch_size).run().parts == 2
    assert contents(extraction().config.cache) == contents(unbroken.path)


def test_a_feature_set_added_later_has_the_bytes_of_one_made_with_the_others(extraction, unbroken, backbones):
    replace(extraction(), backbones=Backbones(encoders=backbones.encoders)).run()
    extraction().run()
    assert contents(extraction().config.cache) == contents(unbroken.path)


def test_a_worker_writes_the_bytes_of_one_process_whatever_is_broken(extraction, breaking, unbroken, images):
    cache, backbones = extraction().prepare()
    dtype = backbones.localizer.provenance["dtype"]
    config = ExtractConfig(str(cache.path), "toy", str(images.parent), preset="toy", device="cpu", dtype=dtype)
    job = ExtractJob(replace(config, batch_size=BATCH_SIZE))
    broken = BROKEN["some of each part"]
    mend = breaking(broken)
    worker = job.open()
    for part in (2, 0, 1):
        worker.make(part)
    worker.close()
    assert_same_features(cache, unbroken, [row for row in range(IMAGES) if row not in broken])
    mend()
    assert extraction().retry().read == len(broken)
    assert contents(cache.path) == contents(unbroken.path)


@pytest.mark.parametrize("encoding", ["int8", "bfloat16+zstd"])
def test_broken_images_change_no_byte_of_the_others_in_any_encoding(
    extraction, breaking, tmp_path, manifest, images, backbones, encoding
):
    encodings = {"encoding": Encoding.parse(encoding), "token_encoding": Encoding.parse(encoding)}
    whole = extraction_of(tmp_path / "whole.zarr", manifest, images, backbones, **encodings)
    whole.run()
    extraction(**encodings).prepare()  # int8 takes its statistics from a sample of the images that can be read now
    mend = breaking({0, 4, 8, 9, 10})
    extraction(**encodings).run()
    assert_same_features(
        FeatureCache.open(extraction().config.cache), FeatureCache.open(whole.config.cache), [1, 2, 3, 5, 6, 7, 11]
    )
    mend()
    extraction(**encodings).retry()
    assert contents(extraction().config.cache) == contents(whole.config.cache)


# --- what a part's record states ---


def test_the_record_of_a_part_states_the_rows_of_its_batches(unbroken):
    records = [unbroken.record(part, "toy_clip") for part in range(3)]
    assert [record.batches for record in records] == BATCHES
    assert records[1].batch_rows() == [range(7, 10), range(10, 13), range(13, 14)]


@pytest.fixture
def small_memory(backbones, monkeypatch):
    """`small_memory(2)`: the encoder of maps takes so many images at a time and no more."""
    encoder = backbones.encoders[0]
    encode = encoder.encode

    def hold(images):
        def limited(batch):
            if len(batch) > images:
                raise torch.OutOfMemoryError(f"{len(batch)} images")
            return encode(batch)

        monkeypatch.setattr(encoder, "encode", limited)

    return hold


def test_batches_that_had_to_be_halved_are_recorded_and_retried_as_they_were(
    extraction, breaking, small_memory, tmp_path, manifest, images, backbones
):
    whole = extraction_of(tmp_path / "whole.zarr", manifest, images, backbones, batch_size=6)
    small_memory(4)
    whole.run()
    batches = {name: FeatureCache.open(whole.config.cache).record(0, name).batches for name in ("toy_clip", "toy_sam")}
    assert batches == {"toy_clip": ((3, 2), (1, 1)), "toy_sam": ((6, 1), (1, 1))}
    mend = breaking({0, 4, 5})
    extraction(batch_size=6).run()
    mend()
    small_memory(IMAGES)
    assert extraction().retry().read == 3
    assert contents(extraction().config.cache) == contents(whole.config.cache)


def test_a_retry_in_smaller_batches_than_the_parts_own_leaves_the_record_without_a_claim(
    extraction, breaking, small_memory
):
    mend = breaking({1})
    extraction().run()
    mend()
    small_memory(1)
    assert extraction().retry().read == 1
    cache = FeatureCache.open(extraction().config.cache)
    assert (cache.record(0, "toy_clip").batches, cache.record(0, "toy_sam").batches) == ((), ((3, 2), (1, 1)))


def test_a_part_whose_record_states_no_batches_is_retried_in_batches_of_what_is_asked_for(
    extraction, breaking, unbroken
):
    mend = breaking({3, 8})
    extraction().run()
    cache = FeatureCache.open(extraction().config.cache)
    for name in ("toy_clip", "toy_sam"):
        for part in range(3):  # as an earlier version wrote it
            replace(cache.record(part, name), batches=()).save(cache.storage, f"parts/{name}/{part:05d}.json")
    mend()
    assert extraction().retry().read == 2
    assert_same_features(FeatureCache.open(extraction().config.cache), unbroken, range(IMAGES))


# --- the machine ---


@pytest.mark.parametrize("computes", ["float32", "float32,bfloat16,float16"])
def test_nothing_depends_on_what_the_cpu_has_instructions_for(
    world, manifest, unbroken, tmp_path, monkeypatch, computes, backbones
):
    monkeypatch.setenv("REGIONSPOT_CPU_DTYPES", computes)
    dtype = backbones.localizer.provenance["dtype"]
    again = Backbones.load("toy", device="cpu", dtype="auto" if dtype == "float32" else dtype)
    extraction_of(tmp_path / "c.zarr", manifest, image_folder_of("toy", world), again).run()
    assert contents(tmp_path / "c.zarr") == contents(unbroken.path)
    assert FeatureCache.open(tmp_path / "c.zarr").feature_sets == unbroken.feature_sets


class Overflowing:
    """An encoder whose map of one image is not finite, as float16's is of rare ones."""

    def __init__(self, encoder, at):
        self._encoder, self._at, self._seen = encoder, at, 0

    def __getattr__(self, name):
        return getattr(self._encoder, name)

    def encode(self, batch):
        maps = self._encoder.encode(batch)
        if 0 <= self._at - self._seen < len(maps):
            maps[self._at - self._seen, 3, 5] = float("nan")
        self._seen += len(maps)
        return maps


def test_an_image_whose_features_are_not_finite_fails_alone_and_nothing_of_it_is_stored(
    manifest, images, backbones, tmp_path
):
    overflowing = replace(backbones, encoders=(Overflowing(backbones.encoders[0], at=4),))
    summary = extraction_of(tmp_path / "a.zarr", manifest, images, overflowing).run()
    assert summary.failed == 1
    cache = FeatureCache.open(tmp_path / "a.zarr")
    (failure,) = cache.failures()
    assert failure.row == 4
    assert failure.reason.startswith(f"{manifest.paths[4]}: its toy_clip features are not finite; ")
    assert cache.valid_rows().tolist() == [row for row in range(IMAGES) if row != 4]
    extraction_of(tmp_path / "a.zarr", manifest, images, backbones).retry()
    assert len(FeatureCache.open(tmp_path / "a.zarr").valid_rows()) == IMAGES
