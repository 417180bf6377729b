"""What may be asked of an extraction: some parts, a plan, several encoders, failed images once more."""

import os
import shutil
import signal
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from regionspot.cache import Category, FeatureCache
from regionspot.cache.errors import InputError
from regionspot.cache.format.feature_dtypes import Encoding
from regionspot.cache.storage.local import LocalStorage
from regionspot.cache.tools.verify import verify
from regionspot.cli import app
from regionspot.pipeline.backbones.bundle import Backbones
from regionspot.pipeline.datasets.failure_limit import FailureLimit
from regionspot.pipeline.datasets.registry import image_folder_of, read_dataset
from regionspot.pipeline.extraction import decode_ahead as decoding
from regionspot.pipeline.extraction.config import ExtractConfig
from regionspot.pipeline.extraction.extract import Extraction, extract
from regionspot.pipeline.extraction.part_selection import select_parts
from regionspot.pipeline.extraction.plan import plan_extraction
from regionspot.pipeline.extraction.retry import retry

PART_SIZE = 4
IMAGES = 10  # parts of 4, 4 and 2


@pytest.fixture(scope="module")
def manifest(world):
    return read_dataset("toy", world, "train").head(IMAGES)


@pytest.fixture(scope="module")
def backbones() -> Backbones:
    return Backbones.load("toy", device="cpu")


@pytest.fixture
def images(world, tmp_path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(image_folder_of("toy", world), tmp_path / "photos"))


@pytest.fixture(scope="module")
def undisturbed(world, manifest, backbones, tmp_path_factory) -> FeatureCache:
    path = str(tmp_path_factory.mktemp("undisturbed") / "c.zarr")
    Extraction(ExtractConfig(path, part_size=PART_SIZE), manifest, image_folder_of("toy", world), backbones).run()
    return FeatureCache.open(path)


@pytest.fixture
def asked(world, manifest, backbones, tmp_path):
    """An extraction into a new cache, with other fields than the usual ones."""

    def extraction(**fields):
        folder = fields.pop("image_folder", image_folder_of("toy", world))
        config = ExtractConfig(**{"cache": str(tmp_path / "c.zarr"), "part_size": PART_SIZE, **fields})
        return Extraction(config, manifest, folder, backbones)

    return extraction


def features_files(cache: Path) -> dict[str, bytes]:
    return {str(path.relative_to(cache)): path.read_bytes() for path in cache.glob("features/**/*") if path.is_file()}


# --- which parts ---


def test_class_names_that_the_toy_encoder_cannot_read_are_told_before_anything_is_extracted(
    world, manifest, backbones, tmp_path, caplog
):
    words = ("person", "red circle", "traffic light", "striped zebra", "dog")
    categories = tuple(Category(number + 1, word) for number, word in enumerate(words))
    images, path = image_folder_of("toy", world), str(tmp_path / "c.zarr")
    index = manifest.category_index % len(words)
    strange = replace(manifest, categories=categories, category_index=index)
    Extraction(ExtractConfig(path), strange, images, backbones).prepare()
    (said,) = [record.getMessage() for record in caplog.records if "cannot read" in record.getMessage()]
    assert said.startswith(
        "toy_clip cannot read 4 of the 5 class names of this dataset (person, traffic light, striped"
    )
    assert "it knows the words blue, checkered, circle" in said
    caplog.clear()
    Extraction(ExtractConfig(str(tmp_path / "toy.zarr")), manifest, images, backbones).prepare()
    assert not caplog.text


def test_parts_are_numbers_and_spans():
    assert select_parts("3,7-9", None, 10) == [3, 7, 8, 9]
    assert select_parts(" 2 - 3 , 2,0", None, 10) == [0, 2, 3]


@pytest.mark.parametrize(
    ("text", "said"),
    [("", "not a part"), ("3-", "not a part"), ("a", "'a' is not a part"), ("9-7", "7-9"), ("3,10", "0 to 9")],
)
def test_what_names_no_part_is_refused_in_one_line(text, said):
    with pytest.raises(InputError, match=said):
        select_parts(text, None, 10)


def test_only_the_parts_asked_for_are_made_and_the_rest_another_time(asked, undisturbed):
    summary = asked(parts="0,2").run()
    assert (summary.images, summary.parts) == (6, 2)
    cache = FeatureCache.open(asked().config.cache)
    assert cache.pending_parts() == [1]
    assert asked(parts="0,2").run().parts == 0
    assert asked().run().parts == 1
    assert features_files(cache.path) == features_files(undisturbed.path)


def test_all_shards_together_make_the_cache(asked, undisturbed):
    for shard in ("2/3", "3/3", "1/3"):
        assert asked(shard=shard).run().parts == 1
    assert features_files(Path(asked().config.cache)) == features_files(undisturbed.path)


def test_parts_and_a_shard_at_once_are_refused(asked):
    with pytest.raises(InputError, match="one of the two"):
        asked(parts="0", shard="1/3").run()


# --- plans and room ---


@pytest.mark.parametrize("encoding", ["float16", "int8", "float32"])
def test_the_bytes_that_are_foretold_are_those_that_are_written(asked, encoding):
    extraction = asked(encoding=Encoding.parse(encoding), token_encoding=Encoding.parse(encoding))
    foretold = extraction.dry_run().plan
    assert not Path(extraction.config.cache).exists()
    extraction.run()
    for name, size in foretold.bytes.items():
        files = [
            path
            for path in Path(extraction.config.cache, "features", name).glob("**/c.*")
            if "crc32c" not in path.parts
        ]
        assert sum(path.stat().st_size for path in files) == size
    assert extraction.dry_run().plan.total_bytes == 0


def test_a_plan_says_how_much_there_is_and_how_long_it_takes_and_writes_nothing(asked, manifest):
    plan = asked(parts="1-2").dry_run()
    assert (plan.plan.parts, plan.plan.images) == ((1, 2), 6)
    assert plan.plan.regions == manifest.offsets[10] - manifest.offsets[4]
    assert plan.rate > 0
    assert "6 images" in plan.text()
    assert "nothing was written" in plan.text()
    assert not Path(asked().config.cache).exists()


def test_a_plan_counts_what_a_feature_set_lacks(asked, manifest, backbones):
    asked(parts="0").run()
    one = [each for each in backbones.feature_sets() if each.kind == "map"]
    needed = plan_extraction(asked().config.cache, manifest, one, PART_SIZE)
    assert needed.parts == (1, 2)
    assert set(needed.bytes) == {one[0].name}


def test_a_plan_of_a_wrong_folder_says_so(asked, tmp_path):
    plan = asked(image_folder=tmp_path / "nowhere").dry_run()
    assert plan.rate is None
    assert "could not be read" in plan.text()


def test_a_disk_that_is_too_small_is_refused_before_anything_is_made(asked, monkeypatch):
    needed = asked().dry_run().plan.total_bytes
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 0, needed))
    with pytest.raises(InputError, match=r"10 images need .* free; .*--no-room-check"):
        asked().run()
    assert not Path(asked().config.cache).exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 0, int(needed * 1.02)))
    assert asked().run().parts == 3


def test_a_disk_that_is_too_small_can_be_tried_all_the_same(asked, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("usage", "total used free")(1, 1, 0))
    assert asked(check_disk_space=False).run().parts == 3


# --- models ---


def test_several_encoders_share_one_reading_of_an_image(asked, tmp_path, monkeypatch):
    both = Backbones.load(
        "toy", "random:0", device="cpu", localizer="none", encoders=["toy_clip", "open_clip:ViT-S-32-alt"]
    )
    opened, decode = [], decoding.decode_image
    monkeypatch.setattr(decoding, "decode_image", lambda *args: opened.append(args) or decode(*args))
    extraction = replace(asked(), backbones=both)
    extraction.run()
    cache = FeatureCache.open(extraction.config.cache)
    assert set(cache.feature_sets) == {encoder.name for encoder in both.encoders}
    assert len(opened) == IMAGES
    for encoder in both.encoders:
        alone = replace(asked(cache=str(tmp_path / encoder.name)), backbones=Backbones(encoders=(encoder,)))
        alone.run()
        expected = FeatureCache.open(alone.config.cache).read(np.arange(IMAGES), map_set=encoder.name).feature_map
        np.testing.assert_array_equal(cache.read(np.arange(IMAGES), map_set=encoder.name).feature_map, expected)


def test_an_encoder_named_twice_is_refused():
    with pytest.raises(InputError, match="named twice"):
        Backbones.load("toy", device="cpu", encoders=["toy_clip", "toy_clip"])


def test_a_cache_goes_on_in_the_dtype_that_it_was_made_in(asked, manifest, world):
    rounded = Backbones.load("toy", device="cpu", dtype="bfloat16")
    path, folder = asked().config.cache, image_folder_of("toy", world)
    Extraction(ExtractConfig(path, part_size=PART_SIZE, parts="0"), manifest, folder, rounded).run()
    stored = FeatureCache.open(path).feature_sets
    again = Backbones.load("toy", device="cpu", stored=stored)
    assert {each.provenance["dtype"] for each in again.feature_sets()} == {"bfloat16"}


# --- failed images once more ---


@pytest.fixture
def with_failures(asked, images, manifest):
    """An extraction with images 2, 7 and 8 failed, their images still broken, and how to mend one."""
    kept = {row: (images / str(manifest.paths[row])).read_bytes() for row in (2, 7, 8)}
    for row in kept:
        (images / str(manifest.paths[row])).write_bytes(b"")
    extraction = asked(image_folder=images, max_failures=FailureLimit(count=3))
    assert extraction.run().failed == 3
    return extraction, lambda row: (images / str(manifest.paths[row])).write_bytes(kept[row])


def test_failed_images_that_can_be_read_now_are_put_in_their_places(with_failures, undisturbed):
    extraction, mend = with_failures
    before = FeatureCache.open(extraction.config.cache).read(np.array([0, 1, 3]))
    mend(2), mend(8)
    summary = extraction.retry()
    assert (summary.read, summary.failed) == (2, 1)
    assert "1 still cannot be read" in summary.text()
    cache = FeatureCache.open(extraction.config.cache, check="always")
    assert [failure.row for failure in cache.failures()] == [7]
    assert not verify(cache).problems
    page = Path(extraction.config.cache, "summary.md").read_text()
    assert str(cache.manifest.paths[7]) in page
    assert str(cache.manifest.paths[2]) not in page
    after, expected = cache.read(np.array([2, 8])), undisturbed.read(np.array([2, 8]))
    np.testing.assert_array_equal(after.feature_map, expected.feature_map)
    np.testing.assert_array_equal(after.tokens, expected.tokens)
    np.testing.assert_array_equal(cache.read(np.array([0, 1, 3])).feature_map, before.feature_map)


def test_images_that_fail_again_leave_every_byte_as_it_was(with_failures):
    extraction, _ = with_failures
    before = {
        path: path.stat().st_mtime_ns for path in Path(extraction.config.cache).glob("[fp]*/**/*") if path.is_file()
    }
    assert extraction.retry().failed == 3
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_without_failures_there_is_nothing_to_try(asked):
    asked().run()
    assert "nothing to retry" in asked().retry().text()


def test_a_retry_where_there_is_no_cache_is_refused(asked):
    with pytest.raises(InputError, match="no such cache"):
        asked().retry()


def test_a_retry_killed_between_two_files_is_mended_by_the_next_extract(with_failures, undisturbed, monkeypatch):
    extraction, mend = with_failures
    for row in (2, 7, 8):
        mend(row)
    remove = LocalStorage.remove

    def remove_and_die(self, name):
        remove(self, name)
        if name.startswith("parts/"):
            os.kill(os.getpid(), signal.SIGKILL)

    cache = FeatureCache.open(extraction.config.cache, "a")
    pid = os.fork()
    if not pid:
        monkeypatch.setattr(LocalStorage, "remove", remove_and_die)
        retry(cache, extraction.image_folder, extraction.backbones, extraction.config)
        os._exit(0)
    assert os.WIFSIGNALED(os.waitpid(pid, 0)[1])
    assert FeatureCache.open(extraction.config.cache).pending_parts() == [0]
    extract(FeatureCache.open(extraction.config.cache, "a"), extraction.image_folder, extraction.backbones)
    assert extraction.retry().read == 3  # the killed run had come to one feature set of one part
    assert features_files(Path(extraction.config.cache)) == features_files(undisturbed.path)


# --- the command ---


def test_the_command_takes_them_all(world, tmp_path):
    path = tmp_path / "c.zarr"
    words = ["extract", "toy", "--data", str(world), "--cache", str(path), "--preset", "toy", "--device", "cpu"]
    words += ["--limit", "10", "--part-size", "4"]
    planned = CliRunner().invoke(app, [*words, "--dry-run"])
    assert "10 images" in planned.stdout, planned.output
    assert not path.exists()
    some = CliRunner().invoke(app, [*words, "--parts", "0,2", "--localizer", "none", "--exact"])
    assert "6 images with 40 regions in 2 parts" in some.stdout, some.output
    assert list(FeatureCache.open(path).feature_sets) == ["toy_clip"]
    rest = CliRunner().invoke(app, [*words, "--max-failures", "0"])
    assert "10 images" in rest.stdout, rest.output
    again = CliRunner().invoke(app, [*words, "--retry-failed"])
    assert "nothing to retry" in again.stdout, again.output
