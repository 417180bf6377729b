"""An image's features are the same bytes whether or not its neighbours can be read, in every dtype.

They depend on the shape of the image's batch, never on its other images: an unreadable image leaves its slot blank.
"""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from makers import extracted_content

from regionspot.cache import FeatureCache
from regionspot.cache.format.feature_dtypes import Encoding
from regionspot.pipeline.backbones.bundle import Backbones
from regionspot.pipeline.datasets.failure_limit import FailureLimit
from regionspot.pipeline.datasets.registry import image_folder_of
from regionspot.pipeline.distributed.worker import ExtractJob
from regionspot.pipeline.extraction.config import ExtractConfig
from regionspot.pipeline.extraction.extract import Extraction

IMAGES, PART_SIZE, BATCH_SIZE = 10, 4, 3  # parts of 3 + 1, 3 + 1 and 2 images
BATCHES = [((3, 1), (1, 1)), ((3, 1), (1, 1)), ((2, 1),)]
EXACT = Encoding("float32")

# Batches are independent of each other, so each run breaks several.
BROKEN = {
    "the first of a batch, a batch of one image, a whole part": {0, 3, 4, 5, 6, 7},
    "one in the middle of a batch, a whole batch, the first of the last part": {1, 4, 5, 6, 8},
    "all but the first of a batch, the last image": {1, 2, 9},
}
# For tests of what does not depend on the dtype. Of the two, this rounds more coarsely.
in_bfloat16 = pytest.mark.parametrize("backbones", ["bfloat16"], indirect=True)


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def backbones(request) -> Backbones:
    return Backbones.load("toy", device="cpu", dtype=request.param)


def extraction_of(cache, manifest, image_folder, backbones, **fields) -> Extraction:
    usual = {"encoding": EXACT, "token_encoding": EXACT, "part_size": PART_SIZE, "batch_size": BATCH_SIZE}
    config = ExtractConfig(str(cache), **{**usual, "max_failures": FailureLimit(count=IMAGES), **fields})
    return Extraction(config, manifest, image_folder, backbones)


@pytest.fixture
def extraction(tmp_path, manifest, image_folder, backbones):
    """`extraction(**fields)`: an extraction of the copied images into the cache of this test."""
    return lambda **fields: extraction_of(tmp_path / "c.zarr", manifest, image_folder, backbones, **fields)


@pytest.fixture(scope="module")
def unbroken(world, manifest, backbones, tmp_path_factory) -> FeatureCache:
    """The cache of a run without failures."""
    path = tmp_path_factory.mktemp("unbroken") / "c.zarr"
    extraction_of(path, manifest, image_folder_of("toy", world), backbones).run()
    return FeatureCache.open(path)


@pytest.fixture
def damage(image_folder, manifest):
    """`repair = damage({3, 5})`: the images of these rows cannot be read until `repair()`."""

    def damage_rows(rows):
        kept = {image_folder / str(manifest.paths[row]): b"" for row in rows}
        for path in kept:
            kept[path] = path.read_bytes()
            path.write_bytes(b"")
        return lambda: [path.write_bytes(data) for path, data in kept.items()]

    return damage_rows


def contents(path) -> dict[str, bytes]:
    """The features and the part records."""
    return {name: data for name, data in extracted_content(path).items() if name.startswith(("features/", "parts/"))}


def assert_same_features(cache: FeatureCache, expected: FeatureCache, rows) -> None:
    batch, expected_batch = cache.read(np.array(rows)), expected.read(np.array(rows))
    np.testing.assert_array_equal(batch.feature_map, expected_batch.feature_map)
    np.testing.assert_array_equal(batch.tokens, expected_batch.tokens)


@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN)
def test_broken_images_change_no_byte_of_the_others_and_are_added_by_a_retry(extraction, damage, unbroken, broken):
    repair = damage(broken)
    assert extraction().run().failed == len(broken)
    cache = FeatureCache.open(extraction().config.cache)
    readable = [row for row in range(IMAGES) if row not in broken]
    assert cache.valid_rows().tolist() == readable
    assert_same_features(cache, unbroken, readable)
    for name in ("toy_clip", "toy_sam"):
        assert [cache.record(part, name).batches for part in range(3)] == BATCHES
    repair()
    assert extraction(batch_size=None).retry().read == len(broken)
    assert contents(extraction().config.cache) == contents(unbroken.path)


@in_bfloat16
def test_failed_images_can_be_retried_one_after_the_other(extraction, damage, unbroken):
    repair_one, repair_others = damage({1}), damage({0, 2, 8})
    extraction().run()
    repair_one()
    assert extraction().retry().read == 1
    assert_same_features(FeatureCache.open(extraction().config.cache), unbroken, [1, 3, 4, 9])
    repair_others()
    assert extraction(batch_size=2).retry().read == 3  # the batch size of the part counts
    assert contents(extraction().config.cache) == contents(unbroken.path)


@in_bfloat16
def test_feature_sets_that_lack_different_images_get_the_bytes_of_a_run_without_failures(
    extraction, damage, unbroken, backbones
):
    for rows, models in (({1, 8}, Backbones(encoders=backbones.encoders)), ({2, 8}, Backbones(backbones.localizer))):
        repair = damage(rows)
        assert replace(extraction(), backbones=models).run().failed == 2
        repair()
    assert extraction().retry().read == 3
    assert contents(extraction().config.cache) == contents(unbroken.path)


@in_bfloat16
@pytest.mark.parametrize("batch_size", [None, BATCH_SIZE])
def test_a_resumed_run_uses_the_batch_size_of_the_existing_parts(extraction, unbroken, batch_size):
    extraction(parts="1").run()
    assert extraction(batch_size=batch_size).run().parts == 2
    assert contents(extraction().config.cache) == contents(unbroken.path)


@in_bfloat16
def test_a_feature_set_added_later_has_the_same_bytes(extraction, unbroken, backbones):
    replace(extraction(), backbones=Backbones(encoders=backbones.encoders)).run()
    extraction().run()
    assert contents(extraction().config.cache) == contents(unbroken.path)


@in_bfloat16
def test_a_worker_writes_the_same_bytes_as_one_process(extraction, damage, unbroken, image_folder):
    cache, backbones = extraction().prepare()
    dtype = backbones.localizer.provenance["dtype"]
    config = ExtractConfig(str(cache.path), "toy", str(image_folder.parent), preset="toy", device="cpu", dtype=dtype)
    job = ExtractJob(replace(config, batch_size=BATCH_SIZE))
    broken = {0, 2, 4, 5, 9}
    repair = damage(broken)
    worker = job.open()
    for part in (2, 0, 1):
        worker.make(part)
    worker.close()
    assert_same_features(cache, unbroken, [row for row in range(IMAGES) if row not in broken])
    repair()
    assert extraction().retry().read == len(broken)
    assert contents(cache.path) == contents(unbroken.path)


@in_bfloat16
@pytest.mark.parametrize("encoding", ["int8", "bfloat16+zstd"])
def test_broken_images_change_no_byte_of_the_others_in_any_encoding(
    extraction, damage, tmp_path, manifest, image_folder, backbones, encoding
):
    encodings = {"encoding": Encoding.parse(encoding), "token_encoding": Encoding.parse(encoding)}
    cache, _ = extraction(**encodings).prepare()  # takes the int8 statistics from images that can be read now
    whole = shutil.copytree(cache.path, tmp_path / "whole.zarr")
    extraction_of(whole, manifest, image_folder, backbones, **encodings).run()
    repair = damage({0, 4, 5, 6, 8})
    extraction(**encodings).run()
    assert_same_features(FeatureCache.open(cache.path), FeatureCache.open(whole), [1, 2, 3, 7, 9])
    repair()
    extraction(**encodings).retry()
    assert contents(cache.path) == contents(whole)


# --- part records ---


@pytest.fixture
def small_memory(backbones, monkeypatch):
    """`small_memory(2)`: the map encoder runs out of memory with more images per batch."""
    encoder = backbones.encoders[0]
    encode = encoder.encode

    def limit(max_images):
        def limited(batch):
            if len(batch) > max_images:
                raise torch.OutOfMemoryError(f"{len(batch)} images")
            return encode(batch)

        monkeypatch.setattr(encoder, "encode", limited)

    return limit


@in_bfloat16
def test_halved_batches_are_recorded_and_retried_with_the_same_shapes(
    extraction, damage, small_memory, tmp_path, manifest, image_folder, backbones
):
    sizes = {"part_size": 7, "batch_size": 6}
    whole = extraction_of(tmp_path / "whole.zarr", manifest, image_folder, backbones, **sizes)
    small_memory(4)
    whole.run()
    cache = FeatureCache.open(whole.config.cache)
    assert [cache.record(0, name).batches for name in ("toy_clip", "toy_sam")] == [((3, 2), (1, 1)), ((6, 1), (1, 1))]
    assert cache.record(0, "toy_clip").batch_rows() == [range(3), range(3, 6), range(6, 7)]
    assert cache.record(1, "toy_clip").batch_rows() == [range(7, 10)]
    repair = damage({0, 4, 5})
    extraction(**sizes).run()
    repair()
    small_memory(IMAGES)
    assert extraction(part_size=7).retry().read == 3
    assert contents(extraction().config.cache) == contents(whole.config.cache)


@in_bfloat16
def test_a_retry_with_smaller_batches_removes_the_batches_from_the_record(extraction, damage, small_memory):
    repair = damage({1})
    extraction().run()
    repair()
    small_memory(1)
    assert extraction().retry().read == 1
    cache = FeatureCache.open(extraction().config.cache)
    assert (cache.record(0, "toy_clip").batches, cache.record(0, "toy_sam").batches) == ((), BATCHES[0])


@in_bfloat16
def test_a_part_whose_record_states_no_batches_is_retried_with_the_batch_size_of_the_run(extraction, damage, unbroken):
    repair = damage({2, 8})
    extraction().run()
    cache = FeatureCache.open(extraction().config.cache)
    for name in ("toy_clip", "toy_sam"):
        for part in range(3):  # as an earlier version wrote it
            replace(cache.record(part, name), batches=()).save(cache.storage, f"parts/{name}/{part:05d}.json")
    repair()
    assert extraction().retry().read == 2
    assert_same_features(FeatureCache.open(extraction().config.cache), unbroken, range(IMAGES))


# --- the machine ---


@pytest.mark.parametrize("computes", ["float32", "float32,bfloat16,float16"])
def test_the_bytes_do_not_depend_on_the_instruction_set_of_the_cpu(
    world, manifest, unbroken, tmp_path, monkeypatch, computes, backbones
):
    monkeypatch.setenv("REGIONSPOT_CPU_DTYPES", computes)
    dtype = backbones.localizer.provenance["dtype"]
    again = Backbones.load("toy", device="cpu", dtype="auto" if dtype == "float32" else dtype)
    extraction_of(tmp_path / "c.zarr", manifest, image_folder_of("toy", world), again).run()
    assert contents(tmp_path / "c.zarr") == contents(unbroken.path)
    assert FeatureCache.open(tmp_path / "c.zarr").feature_sets == unbroken.feature_sets


@in_bfloat16
def test_only_the_image_with_non_finite_features_fails_and_nothing_of_it_is_stored(
    manifest, image_folder, backbones, tmp_path, monkeypatch
):
    encode, rows = backbones.encoders[0].encode, iter(range(IMAGES))

    def overflow_at_row_4(batch):
        maps = encode(batch)
        for feature_map in maps:
            if next(rows) == 4:
                feature_map[3, 5] = float("nan")
        return maps

    with monkeypatch.context() as patch:
        patch.setattr(backbones.encoders[0], "encode", overflow_at_row_4)
        summary = extraction_of(tmp_path / "a.zarr", manifest, image_folder, backbones).run()
    assert summary.failed == 1
    cache = FeatureCache.open(tmp_path / "a.zarr")
    (failure,) = cache.failures()
    assert failure.row == 4
    assert failure.reason.startswith(f"{manifest.paths[4]}: its toy_clip features are not finite; ")
    assert cache.valid_rows().tolist() == [row for row in range(IMAGES) if row != 4]
    extraction_of(tmp_path / "a.zarr", manifest, image_folder, backbones).retry()
    assert len(FeatureCache.open(tmp_path / "a.zarr").valid_rows()) == IMAGES
