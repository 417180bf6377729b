"""The authors' token files become a feature set if they match the regions of the cache."""

import os
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from makers import files_under, fork, make_manifest, was_killed

from regionspot.cache import (
    NO_CATEGORY,
    Category,
    FeatureCache,
    FeatureSet,
    ImageFeatures,
    InputError,
    ProvenanceMismatchError,
)
from regionspot.cache.tools.import_tokens import import_tokens, read_token_file
from regionspot.cache.tools.resume import open_or_create

COUNTS = [2, 0, 3, 1, 4, 2, 1]
IDS = [10, 11, 12, 13, 14, -9147483648, 16]
CATEGORIES = (Category(7, "cup"), Category(3, "bowl"))
INDICES = np.array([0, 1, 1, 1, 0, NO_CATEGORY, 0, 0, 1, 0, 1, 1, 0], np.int32)


def tokens_of(row: int) -> np.ndarray:
    return np.random.default_rng(row).standard_normal((COUNTS[row], 1, 256)).astype(np.float32)


@pytest.fixture(scope="module")
def template(tmp_path_factory) -> Path:
    """`c.zarr`: seven images in three parts, no features; `tokens/`: a file of each image with regions."""
    folder = tmp_path_factory.mktemp("tokens")
    manifest = make_manifest(
        COUNTS,
        dataset="o365",
        image_ids=np.array(IDS),
        paths=[f"train/p{row}.jpg" for row in range(7)],
        category_index=INDICES,
        categories=CATEGORIES,
    )
    FeatureCache.create(folder / "c.zarr", manifest, [], part_size=3)
    (folder / "tokens").mkdir()
    for row, image_id in enumerate(IDS):
        indices = INDICES[manifest.regions(row)]
        classes = [99 if index == NO_CATEGORY else CATEGORIES[index].id for index in indices]
        # As in OpenImages, whose file names do not contain the manifest's integer id.
        name = "p5" if image_id < 0 else str(image_id)
        if classes:
            save(folder / "tokens" / f"{name}.pth", tokens_of(row), classes)
    return folder


def save(path: Path, tokens, classes) -> None:
    torch.save({"mask_tokens": torch.as_tensor(tokens), "classes": torch.as_tensor(classes)}, path)


@pytest.fixture
def files(template, tmp_path) -> Path:
    return shutil.copytree(template / "tokens", tmp_path / "tokens")


@pytest.fixture
def address(template, tmp_path) -> Path:
    return shutil.copytree(template / "c.zarr", tmp_path / "c.zarr")


class Trap:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return (Path.touch, (self.target,))


def refused(files, address, caplog, *, allow_missing=False) -> tuple[str, list[str]]:
    """The import's error message and the errors logged before; checks that the cache is unchanged."""
    before = files_under(address)
    with pytest.raises(InputError) as error:
        import_tokens(files, address, allow_missing)
    assert files_under(address) == before
    assert "\n" not in str(error.value)
    return str(error.value), [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]


def test_tokens_equal_those_in_the_files(files, address):
    summary = import_tokens(files, address)
    assert (summary.images, summary.parts, summary.failed) == (7, 3, 0)
    assert "tokens of 7 of 7 images in 3 parts" in summary.text()
    cache = FeatureCache.open(address)
    batch = cache.read(np.arange(7))
    for row, count in enumerate(COUNTS):
        np.testing.assert_array_equal(batch.tokens[row, :count], tokens_of(row)[:, 0].astype(np.float16))
    provenance = cache.feature_sets["sam_vit_b"].provenance
    assert (provenance["model"], provenance["source"]) == ("sam_vit_b", "imported from the authors' token files")
    assert "weights_sha256" not in provenance


def test_tokens_in_half_precision_are_imported(files, address):
    save(files / "16.pth", torch.as_tensor(tokens_of(6)).half(), [7])
    import_tokens(files, address)
    batch = FeatureCache.open(address).read([6])
    np.testing.assert_array_equal(batch.tokens[0], tokens_of(6)[:, 0].astype(np.float16))


def import_until_part_1(files, address):
    write = FeatureCache.write_part

    def write_or_die(self, part, *more):
        if part == 1:
            os.kill(os.getpid(), 9)
        return write(self, part, *more)

    FeatureCache.write_part = write_or_die  # in the child process
    import_tokens(files, address)


def test_a_killed_import_is_resumed(files, address):
    assert was_killed(fork(lambda: import_until_part_1(files, address)))
    (files / "10.pth").unlink()  # its part is done, so it is not read again
    summary = import_tokens(files, address)
    assert (summary.parts, summary.parts_before, summary.images) == (2, 1, 4)
    assert import_tokens(files, address).text() == "nothing to do: all 3 parts have tokens"


def test_missing_files_are_refused_with_their_names_and_count(files, address, caplog):
    for name in ("10", "p5"):
        (files / f"{name}.pth").unlink()
    line, named = refused(files, address, caplog)
    assert "of the token files 2 are missing or unusable" in line
    assert "--allow-missing" in line
    assert named == [f"{files / '10.pth'}: is missing", f"{files / '-9147483648.pth'}: is missing"]


def test_missing_files_are_recorded_as_failures_with_allow_missing(files, address):
    (files / "12.pth").write_bytes(b"no tokens")
    (files / "13.pth").unlink()
    assert import_tokens(files, address, allow_missing=True).failed == 2
    cache = FeatureCache.open(address)
    assert [failure.row for failure in cache.failures()] == [2, 3]
    assert cache.valid_rows().tolist() == [0, 1, 4, 5, 6]


def test_images_whose_files_have_other_regions_are_recorded_as_failed(files, address, caplog):
    save(files / "10.pth", tokens_of(0)[:1], [7])
    save(files / "14.pth", tokens_of(4), [7, 3, 3, 7])
    with caplog.at_level("WARNING"):
        summary = import_tokens(files, address)
    assert (summary.images, summary.differing, summary.missing) == (7, 2, 0)
    assert "tokens of 5 of 7 images" in summary.text()
    assert "2 whose file has other regions; these are recorded as failed" in summary.text()
    cache = FeatureCache.open(address)
    assert cache.valid_rows().tolist() == [1, 2, 3, 5, 6]
    batch = cache.read([2])
    np.testing.assert_array_equal(batch.tokens[0, :3], tokens_of(2)[:, 0].astype(np.float16))
    named = [
        f"{files / '10.pth'}: has 1 tokens, image 10 (row 0) has 2 regions: 1 bowl fewer",
        f"{files / '14.pth'}: 1 of 4 classes are not those of image 14 (row 4); "
        "the first, of region 1, is 3, expected 7",
    ]
    assert [failure.reason for failure in cache.failures()] == named
    assert [record.getMessage() for record in caplog.records][:2] == named


def with_report(address, **report):
    """The same cache with this report of dropped annotations."""
    manifest = replace(FeatureCache.open(address).manifest, report=report)
    shutil.rmtree(address)
    FeatureCache.create(address, manifest, [], part_size=3)


@pytest.mark.parametrize(
    ("report", "message"),
    [
        (
            {"dropped_crowd": 2, "dropped_fake": 5, "dropped_under_1_px": 1},
            "3 files differ: 6 tokens more than regions, 0 fewer; the cache dropped these annotations: 2 crowd, "
            "5 fake, 1 under 1 px: the authors kept those that are fake or under 1 px, 6 in total",
        ),
        ({"dropped_crowd": 6, "dropped_fake": 6}, "do not show which of them the authors kept"),
        ({"dropped_crowd": 3}, "do not show which of them the authors kept"),
        ({"corrected_names": 6}, "dropped no annotation, so they were made from another annotation file"),
    ],
)
def test_the_log_guesses_which_annotations_the_authors_kept(files, address, caplog, report, message):
    with_report(address, **report)
    for name, row, classes in (("10", 0, [7, 3, 7]), ("12", 2, [3, 3, 0, 3, 99]), ("p5", 5, [3, 7, 7, 7, 7])):
        tokens = np.resize(tokens_of(row), (len(classes), 1, 256))
        save(files / f"{name}.pth", tokens, classes)
    with caplog.at_level("WARNING"):
        assert import_tokens(files, address).differing == 3
    messages = [record.getMessage() for record in caplog.records]
    assert message in messages[-1]
    assert f"{files / '10.pth'}: has 3 tokens, image 10 (row 0) has 2 regions: 1 cup more" in messages


def test_if_more_files_differ_than_match_nothing_is_written(files, address, caplog):
    for name in ("10", "12", "14", "16"):
        save(files / f"{name}.pth", tokens_of(4)[:3], [7, 7, 99])
    line, named = refused(files, address, caplog, allow_missing=True)
    assert "4 have other regions than their images and only 2 match" in line
    assert len(named) == 4


def test_a_region_without_a_class_matches_any_token(files, address):
    save(files / "13.pth", tokens_of(3), [12345])
    import_tokens(files, address)


def test_of_many_bad_files_the_first_are_named_and_the_rest_counted(tmp_path, template, caplog):
    manifest = FeatureCache.open(template / "c.zarr").manifest.select(np.zeros(14, np.int64))
    FeatureCache.create(tmp_path / "c.zarr", manifest, [], part_size=5)
    (tmp_path / "none").mkdir()
    line, named = refused(tmp_path / "none", tmp_path / "c.zarr", caplog)
    assert "of the token files 14 are missing" in line
    assert (len(named), named[-1]) == (11, "... and 4 others")


def test_pickled_code_is_never_executed(files, address, caplog, tmp_path):
    (files / "12.pth").write_bytes(pickle.dumps(Trap(tmp_path / "ran"), protocol=2))
    torch.save({"mask_tokens": tokens_of(3), "classes": Trap(tmp_path / "ran")}, files / "14.pth")
    line, named = refused(files, address, caplog)
    assert "2 are missing or unusable" in line
    assert all("its code is never executed" in message for message in named)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"tokens": torch.zeros(1, 1, 256)}, "has no mask_tokens"),
        ([1, 2, 3], "has no mask_tokens"),
        ({"mask_tokens": torch.zeros(1, 4, 256), "classes": [7]}, r"\(1, 4, 256\) for 1 classes"),
        ({"mask_tokens": torch.zeros(2, 1, 256), "classes": [7]}, r"\(2, 1, 256\) for 1 classes"),
        ({"mask_tokens": "many", "classes": [7]}, "has no mask_tokens"),
    ],
)
def test_a_file_with_other_content_is_refused(tmp_path, wrong, message):
    torch.save(wrong, tmp_path / "1.pth")
    with pytest.raises(InputError, match=message):
        read_token_file(tmp_path / "1.pth")


@pytest.mark.parametrize("value", [float("nan"), 1e6])
def test_tokens_that_overflow_float16_are_refused_before_anything_is_written(files, address, caplog, value):
    save(files / "16.pth", torch.full((1, 1, 256), value), [7])
    _, named = refused(files, address, caplog)
    assert named == [f"{files / '16.pth'}: has tokens that are not finite, or too large for float16"]


def test_imported_tokens_are_not_mixed_with_extracted_ones(files, address):
    manifest = FeatureCache.open(address).manifest
    own = FeatureSet("sam_vit_b", "token", (256,), provenance={"model": "sam_vit_b", "weights_sha256": "ec2df6"})
    cache = open_or_create(address, manifest, [own])
    cache.write_part(0, [ImageFeatures(row, {"sam_vit_b": tokens_of(row)[:, 0]}) for row in range(3)])
    with pytest.raises(ProvenanceMismatchError, match="weights_sha256"):
        import_tokens(files, address)
