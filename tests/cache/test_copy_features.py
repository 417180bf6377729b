"""Derived caches are byte-identical to extracted ones, for any part layout of their sources."""

import errno
import json
import os
import random
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from makers import cache_content, fork, make_features, make_manifest, was_killed

from regionspot.cache import (
    CacheError,
    Category,
    CorruptPartError,
    FeatureCache,
    FeatureSet,
    ImageFeatures,
    InputError,
    Manifest,
    ProvenanceMismatchError,
)
from regionspot.cache.format.encodings import decode, statistics_of
from regionspot.cache.format.feature_dtypes import Encoding, Statistics
from regionspot.cache.format.schema import EncodedFeatures
from regionspot.cache.tools import copy_parts
from regionspot.cache.tools.copy_features import copy_features
from regionspot.cache.tools.hdf5_export import export_hdf5
from regionspot.cache.tools.merge_subset_convert import convert, copy, merge, subset
from regionspot.cache.tools.resume import open_or_create
from regionspot.cache.tools.verify import verify
from regionspot.cache.writing.claims import Claims

PART_SIZE = 4
MAPS = FeatureSet("clip", "map", (5, 8), provenance={"model": "ViT-L-14"})
SMALL = FeatureSet("dino", "map", (2, 2), "bfloat16", compression="zstd")
TOKENS = FeatureSet("sam", "token", (6,), "int8", statistics=Statistics(np.zeros(6), np.linspace(1, 2, 6)))
SETS = (MAPS, SMALL, TOKENS)
CATEGORIES = (Category(1, "star"), Category(2, "moon"))


def manifest_of(counts, first_id, **columns):
    """Images with these region counts and ids from `first_id` on; the other columns depend on `first_id`."""
    regions, rng = int(sum(counts)), np.random.default_rng(first_id)
    ids = {
        "image_ids": np.arange(first_id, first_id + len(counts)),
        "paths": [f"{first_id + row}.jpg" for row in range(len(counts))],
        "boxes_xyxy": rng.random((regions, 4), dtype=np.float32),
        "category_index": rng.integers(0, 2, regions, dtype=np.int32),
        "annotation_ids": rng.integers(0, 2**40, regions),
        "source": {"files": {f"toy_{first_id}.json": "c0ffee"}},
    }
    return make_manifest(counts, **{"categories": CATEGORIES, **ids, **columns})


def features_of(manifest, row):
    """Features that depend only on the image's id, so that they are equal in every cache."""
    image_id = int(manifest.image_ids[row])
    return (
        ImageFeatures(row, {}, f"truncated JPEG {image_id}")
        if image_id % 10 == 5
        else make_features(manifest, SETS, row)
    )


def extract(path, manifest, sets=SETS, part_size=PART_SIZE, parts=None):
    cache = open_or_create(path, manifest, sets, part_size)
    for part in cache.pending_parts() if parts is None else parts:
        cache.write_part(part, (features_of(cache.manifest, row) for row in cache.part_rows(part)))
    return cache


@pytest.fixture(scope="module")
def caches(tmp_path_factory):
    """`ten`: ten images; `five`: five images, with a larger part in regions than any of `ten`."""
    folder = tmp_path_factory.mktemp("caches")
    extract(folder / "ten", manifest_of([2, 0, 1, 5, 50, 7, 0, 0, 3, 1], 0))
    extract(folder / "five", manifest_of([30, 50, 2, 0, 4], 20, split="val"))
    return folder


def content(folder: Path):
    """`cache_content` without the origin of the cache."""
    header = json.loads((folder / "zarr.json").read_bytes())["attributes"]["regionspot"]
    header["manifest"]["source"].pop("made_from", None)
    return {**cache_content(folder), "zarr.json": {key: value for key, value in header.items() if key != "crc32c"}}


def differing(folder, other):
    one, two = content(folder), content(other)
    return {name for name in one.keys() | two.keys() if one.get(name) != two.get(name)}


def inode(folder, name):
    return (folder / name).stat().st_ino


def test_a_subset_is_byte_identical_to_extracting_its_images(caches, tmp_path):
    rows = [9, 3, 5, 4, 0, 2]
    summary = subset(caches / "ten", tmp_path / "some", rows)
    assert (summary.whole, summary.rewritten, summary.pending) == (0, 6, 0)
    extract(tmp_path / "extracted", FeatureCache.open(caches / "ten").manifest.select(np.array(rows)))
    assert differing(tmp_path / "some", tmp_path / "extracted") == set()
    assert [failure.reason for failure in FeatureCache.open(tmp_path / "some").failures()] == ["truncated JPEG 5"]
    note = FeatureCache.open(tmp_path / "some").manifest.source["made_from"][0]
    assert (note["operation"], note["caches"][0]["pictures"]) == ("subset", 10)


def test_unchanged_parts_are_hard_links(caches, tmp_path):
    subset(caches / "ten", tmp_path / "some", np.arange(4, 10))
    for name in ("features/clip/feature_map/c.{}.0.0", "features/sam/scale/c.{}.0"):
        assert inode(caches / "ten", name.format(1)) == inode(tmp_path / "some", name.format(0))
    extract(tmp_path / "extracted", FeatureCache.open(caches / "ten").manifest.select(np.arange(4, 10)))
    assert differing(tmp_path / "some", tmp_path / "extracted") == set()


def test_merged_caches_are_byte_identical_to_extracting_all_images(caches, tmp_path):
    summary = merge([caches / "ten", caches / "five"], tmp_path / "both")
    assert (summary.whole, summary.rewritten) == (6, 6)
    one, other = (FeatureCache.open(caches / name).manifest for name in ("ten", "five"))
    extract(tmp_path / "extracted", Manifest.concatenate([one, other]))
    assert differing(tmp_path / "both", tmp_path / "extracted") == set()
    merged = FeatureCache.open(tmp_path / "both")
    assert merged.manifest.split == "train+val"
    assert merged.geometry.capacity > FeatureCache.open(caches / "ten").geometry.capacity
    assert [source["split"] for source in merged.manifest.source["made_from"][0]["caches"]] == ["train", "val"]


def test_the_part_size_may_change(caches, tmp_path):
    merge([caches / "ten", caches / "five"], tmp_path / "both", part_size=7)
    one, other = (FeatureCache.open(caches / name).manifest for name in ("ten", "five"))
    extract(tmp_path / "extracted", Manifest.concatenate([one, other]), part_size=7)
    assert differing(tmp_path / "both", tmp_path / "extracted") == set()


def test_parts_stay_pending_until_their_images_are_extracted(caches, tmp_path):
    ten = FeatureCache.open(caches / "ten").manifest
    extract(tmp_path / "begun", ten, parts=[0, 2])
    first = merge([tmp_path / "begun", caches / "five"], tmp_path / "both")
    assert FeatureCache.open(tmp_path / "both").pending_parts() == [1]
    assert (first.pending, first.before) == (3, 0)
    assert "3 pending" in first.text()
    extract(tmp_path / "begun", ten)
    second = merge([tmp_path / "begun", caches / "five"], tmp_path / "both")
    assert (second.whole, second.rewritten, second.pending, second.before) == (3, 0, 0, 9)
    merge([caches / "ten", caches / "five"], tmp_path / "at once")
    assert differing(tmp_path / "both", tmp_path / "at once") == set()


def test_a_feature_set_missing_in_one_source_stays_pending(caches, tmp_path):
    ten = FeatureCache.open(caches / "ten").manifest
    extract(tmp_path / "clip", ten, [MAPS])
    extract(tmp_path / "others", ten, [SMALL, TOKENS])
    whole = FeatureCache.create(tmp_path / "whole", ten, SETS, PART_SIZE)
    assert copy_features([FeatureCache.open(tmp_path / "clip")], whole).pending == 6
    with pytest.raises(InputError, match="merge caches with the same feature sets"):
        merge([tmp_path / "clip", caches / "five"], tmp_path / "both")
    copy_features([FeatureCache.open(tmp_path / "others")], whole)
    assert differing(tmp_path / "whole", caches / "ten") == set()


def test_the_full_annotations_resume_a_subset(caches, tmp_path):
    ten = FeatureCache.open(caches / "ten").manifest
    extract(tmp_path / "begun", ten, parts=[0])
    subset(tmp_path / "begun", tmp_path / "some", [8, 0, 1, 2])
    extract(tmp_path / "some", ten)
    assert FeatureCache.open(tmp_path / "some").pending_parts() == []
    FeatureCache.create(tmp_path / "limited", ten.head(4), SETS, PART_SIZE)
    extract(tmp_path / "limited", ten)  # a limited cache is extended, a subset is not
    assert (len(FeatureCache.open(tmp_path / "some")), len(FeatureCache.open(tmp_path / "limited"))) == (4, 10)


@pytest.mark.parametrize(
    ("encoding", "exact"),
    [("float32", True), ("float16+zstd", True), ("bfloat16", False), ("int8", False), ("int8+zstd", False)],
)
def test_convert_keeps_the_features_and_the_other_sets(caches, tmp_path, encoding, exact):
    summary = convert(caches / "ten", tmp_path / "out", {"clip": Encoding.parse(encoding)})
    assert (summary.whole, summary.rewritten) == (6, 3)
    name = "features/sam/token/c.1.0.0"
    assert inode(caches / "ten", name) == inode(tmp_path / "out", name)
    before, after = FeatureCache.open(caches / "ten"), FeatureCache.open(tmp_path / "out", check="always")
    rows = before.valid_rows()
    assert after.valid_rows().tolist() == rows.tolist()
    one, two = (cache.read(rows, map_set="clip") for cache in (before, after))
    scales = two.map_scale if "int8" in encoding else None
    decoded = decode(two.feature_map, after.feature_sets["clip"], scales)
    tolerance = 0 if exact else 0.02
    np.testing.assert_allclose(decoded, one.feature_map.astype(np.float32), atol=tolerance, rtol=tolerance)
    assert after.feature_sets["clip"].compression == (None if "+" not in encoding else "zstd")
    assert (after.feature_sets["clip"].dtype == encoding.partition("+")[0]) is True


def test_int8_statistics_come_from_64_evenly_spaced_images(tmp_path):
    manifest = manifest_of([0] * 200, 0)
    extract(tmp_path / "many", manifest, [MAPS], part_size=64)
    convert(tmp_path / "many", tmp_path / "int8", {"clip": Encoding("int8")})
    cache = FeatureCache.open(tmp_path / "many")
    valid = cache.valid_rows()
    rows = valid[np.linspace(0, len(valid) - 1, 64).astype(int)]
    expected = statistics_of([cache.read([row]).feature_map for row in rows])
    assert FeatureCache.open(tmp_path / "int8").feature_sets["clip"].statistics == expected


def test_a_resumed_conversion_keeps_its_statistics(caches, tmp_path):
    ten = FeatureCache.open(caches / "ten").manifest
    extract(tmp_path / "begun", ten, parts=[1])
    convert(tmp_path / "begun", tmp_path / "int8", {"clip": Encoding("int8")})
    statistics = FeatureCache.open(tmp_path / "int8").feature_sets["clip"].statistics
    extract(tmp_path / "begun", ten)
    convert(tmp_path / "begun", tmp_path / "int8", {"clip": Encoding("int8")})
    cache = FeatureCache.open(tmp_path / "int8")
    assert cache.pending_parts() == []
    assert cache.feature_sets["clip"].statistics == statistics


def test_int8_is_not_rounded_again_when_only_the_compression_changes(caches, tmp_path):
    convert(caches / "ten", tmp_path / "zstd", {"sam": Encoding("int8", "zstd")})
    convert(tmp_path / "zstd", tmp_path / "plain", {"sam": Encoding("int8")})
    name = "features/sam/token/c.0.0.0"
    assert (tmp_path / "zstd" / name).read_bytes() != (caches / "ten" / name).read_bytes()
    assert differing(tmp_path / "plain", caches / "ten") == set()


def test_an_overflow_in_the_new_encoding_is_named_and_leaves_no_partial_part(tmp_path):
    wide = replace(MAPS, dtype="float32")
    cache = FeatureCache.create(tmp_path / "wide", manifest_of([0] * 6, 0), [wide], part_size=3)
    for part in range(2):
        values = {row: np.full((5, 8), 1e5 if row == 4 else 1.0) for row in cache.part_rows(part)}
        cache.write_part(part, (ImageFeatures(row, {"clip": value}) for row, value in values.items()))
    with pytest.raises(InputError, match=r"clip, row 4: 40 of 40 values .* float16"):
        convert(tmp_path / "wide", tmp_path / "half", {"clip": Encoding("float16")})
    assert FeatureCache.open(tmp_path / "half").pending_parts() == [1]


def test_a_copy_is_byte_identical_and_has_no_hard_links(caches, tmp_path):
    summary = copy(caches / "ten", tmp_path / "copy")
    assert (summary.whole, summary.rewritten) == (9, 0)
    assert differing(tmp_path / "copy", caches / "ten") == set()
    assert (tmp_path / "copy/zarr.json").read_bytes() == (caches / "ten/zarr.json").read_bytes()
    for name in content(caches / "ten"):
        assert inode(tmp_path / "copy", name) != inode(caches / "ten", name)
    assert copy(caches / "ten", tmp_path / "copy").before == 9


def test_a_cache_is_copied_to_an_object_store_and_back(caches, tmp_path, s3):
    there = f"{s3}/ten"
    begun = extract(tmp_path / "begun", FeatureCache.open(caches / "ten").manifest, parts=[1])
    assert copy(begun.path, there).pending == 6
    assert copy(caches / "ten", there).before == 3
    assert FeatureCache.open(there).pending_parts() == []
    copy(there, tmp_path / "back")
    assert differing(tmp_path / "back", caches / "ten") == set()
    summary = subset(there, f"{s3}/some", [9, 4, 5, 6, 7])
    assert (summary.whole, summary.rewritten) == (0, 6)
    copy(f"{s3}/some", tmp_path / "some")
    subset(caches / "ten", tmp_path / "same", [9, 4, 5, 6, 7])
    assert differing(tmp_path / "some", tmp_path / "same") == set()


def test_an_hdf5_cache_is_a_source(caches, tmp_path):
    export_hdf5(FeatureCache.open(caches / "ten"), tmp_path / "ten.h5")
    merge([tmp_path / "ten.h5", caches / "five"], tmp_path / "both")
    merge([caches / "ten", caches / "five"], tmp_path / "same")
    assert differing(tmp_path / "both", tmp_path / "same") == set()
    with pytest.raises(CacheError) as refused:
        copy_features([FeatureCache.open(caches / "ten")], FeatureCache.open(tmp_path / "ten.h5", "a"))
    assert "\n" not in str(refused.value)


def test_the_results_verify(caches, tmp_path):
    merge([caches / "ten", caches / "five"], tmp_path / "both")
    convert(tmp_path / "both", tmp_path / "int8", {"clip": Encoding("int8"), "sam": Encoding("float16", "zstd")})
    subset(tmp_path / "int8", tmp_path / "some", [14, 3, 0, 1, 2], part_size=2)
    for name in ("both", "int8", "some"):
        report = verify(tmp_path / name)
        assert (report.problems, report.warnings) == ((), ())


def test_without_hard_links_files_are_copied(caches, tmp_path, monkeypatch):
    def link(path, new_path, really=os.link):
        if Path(path).name.startswith("c."):
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        really(path, new_path)

    monkeypatch.setattr(os, "link", link)
    merge([caches / "ten"], tmp_path / "one")
    assert differing(tmp_path / "one", caches / "ten") == set()
    name = "features/clip/feature_map/c.1.0.0"
    assert inode(tmp_path / "one", name) != inode(caches / "ten", name)


def test_the_block_size_does_not_change_the_copy(caches, tmp_path, monkeypatch):
    for block in (1, 100, 200):
        monkeypatch.setattr(copy_parts, "_BLOCK", block)
        copy(caches / "ten", tmp_path / str(block))
        assert differing(tmp_path / str(block), caches / "ten") == set()


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("clip/feature_map/c.1.0.0", "flipped"),
        ("dino/feature_map/c.1.0.0", "cut"),
        ("sam/scale/c.1.0", "flipped"),
        ("sam/scale/c.1.0", "missing"),
    ],
)
def test_a_damaged_part_is_reported_and_stays_pending(caches, tmp_path, name, how):
    damaged = shutil.copytree(caches / "ten", tmp_path / "damaged") / "features" / name
    if how == "flipped":
        data = bytearray(damaged.read_bytes())
        data[10] ^= 4
        damaged.write_bytes(data)
    elif how == "cut":
        os.truncate(damaged, 100)
    else:
        damaged.unlink()
    with pytest.raises(CorruptPartError, match=rf"{name}\b.*drops part 1") as refused:
        copy(tmp_path / "damaged", tmp_path / "copy")
    assert "\n" not in str(refused.value)
    assert 1 in FeatureCache.open(tmp_path / "copy").pending_parts([name.partition("/")[0]])
    if how != "flipped":
        with pytest.raises(CorruptPartError, match="drops part 1"):
            merge([tmp_path / "damaged"], tmp_path / "linked")


def test_sources_with_other_images_are_refused(caches, tmp_path):
    ten = FeatureCache.open(caches / "ten")
    moved = ten.manifest.boxes_xyxy.copy()
    moved[4] += 1
    other = FeatureCache.create(tmp_path / "moved", replace(ten.manifest, boxes_xyxy=moved), SETS, PART_SIZE)
    with pytest.raises(ProvenanceMismatchError, match=r"image 3 \(row 3, 3.jpg\), region 1: box is"):
        copy_features([ten], other)
    renamed = replace(ten.manifest, categories=CATEGORIES[::-1])
    with pytest.raises(ProvenanceMismatchError, match="categories differ"):
        copy_features([ten], FeatureCache.create(tmp_path / "renamed", renamed, SETS, PART_SIZE))
    sets = [replace(MAPS, provenance={"model": "ViT-B-16"})]
    with pytest.raises(ProvenanceMismatchError, match=r"provenance\.model is 'ViT-L-14', requested"):
        copy_features([ten], FeatureCache.create(tmp_path / "backbone", ten.manifest, sets, PART_SIZE))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda caches, out: merge([caches / "ten", caches / "ten"], out), "10 images are in more than one of them"),
        (lambda caches, out: merge([], out), "no cache to merge was given"),
        (lambda caches, out: subset(caches / "ten", out, [1, 10]), "there is no row 10: this cache has rows 0 to 9"),
        (lambda caches, out: subset(caches / "ten", out, [1, 1]), r"image \d+ \(row 1\) is given more than once"),
        (lambda caches, out: subset(caches / "ten", out, []), "holds no image"),
        (lambda caches, out: subset(caches / "ten", out, [1], part_size=0), "part_size is 0, expected 1 to 65536"),
        (lambda caches, out: convert(caches / "ten", out, {"sma": Encoding("int8")}), "there is no feature set 'sma'"),
        (lambda caches, out: convert(caches / "ten", out, {"sam": Encoding("int4")}), "dtype is 'int4'"),
    ],
)
def test_bad_arguments_are_refused_in_one_line_before_anything_is_written(caches, tmp_path, call, message):
    with pytest.raises(InputError, match=message) as refused:
        call(caches, tmp_path / "out")
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_statistics_need_features(caches, tmp_path):
    FeatureCache.create(tmp_path / "empty", FeatureCache.open(caches / "ten").manifest, [MAPS], PART_SIZE)
    with pytest.raises(InputError, match="has no features of clip yet"):
        convert(tmp_path / "empty", tmp_path / "int8", {"clip": Encoding("int8")})


def test_a_part_claimed_by_another_run_is_skipped(caches, tmp_path):
    ten = FeatureCache.open(caches / "ten")
    out = FeatureCache.create(tmp_path / "out", ten.manifest, SETS, PART_SIZE)
    with Claims(out.storage) as other:
        assert other.claim(1)
        assert copy_features([ten], out).pending == 3
    assert out.pending_parts() == [1]


@pytest.mark.parametrize("link", [True, False])
def test_a_part_that_was_taken_over_is_not_published(caches, tmp_path, link):
    ten = FeatureCache.open(caches / "ten")
    out = FeatureCache.create(tmp_path / "out", ten.manifest, SETS, PART_SIZE)

    def taken_over():
        raise CacheError("part 1 was taken over")

    with pytest.raises(CacheError, match="taken over"):
        copy_parts.copy_part(*(copy_parts.PartRef(cache, "sam", 1) for cache in (ten, out)), link, taken_over)
    assert not list(tmp_path.rglob("c.1*[0-9]"))
    assert out.pending_parts(["sam"]) == [0, 1, 2]


@pytest.mark.parametrize("codes", [np.zeros((5, 8), np.float32), np.zeros((4, 8), np.float16)])
def test_encoded_features_of_another_shape_are_refused(tmp_path, codes):
    cache = FeatureCache.create(tmp_path / "c", manifest_of([0], 0), [MAPS])
    with pytest.raises(InputError, match=r"clip, row 0: got encoded .*, expected float16 \(5, 8\)"):
        cache.write_part(0, [ImageFeatures(0, {"clip": EncodedFeatures(codes)})])
    too_much = EncodedFeatures(np.zeros((5, 8), np.float16), np.zeros(5, np.float16))
    with pytest.raises(InputError, match="got encoded"):
        cache.write_part(0, [ImageFeatures(0, {"clip": too_much})])


def test_runs_killed_at_random_moments_resume_to_the_same_bytes(caches, tmp_path):
    merge([caches / "ten", caches / "five"], tmp_path / "undisturbed", part_size=3)
    whole = Manifest.concatenate([FeatureCache.open(caches / name).manifest for name in ("ten", "five")])
    FeatureCache.create(tmp_path / "killed", whole, SETS, part_size=3)
    rng, kills = random.Random(0), 0
    while kills < 6:
        left = [rng.randrange(1, 80)]

        def run(left=left):
            for name in ("link", "replace", "rename", "fsync", "write", "unlink"):
                setattr(os, name, dying(getattr(os, name), left))
            merge([caches / "ten", caches / "five"], tmp_path / "killed", part_size=3)

        if not was_killed(fork(run)):
            break
        kills += 1
    assert kills > 2
    merge([caches / "ten", caches / "five"], tmp_path / "killed", part_size=3)
    FeatureCache.open(tmp_path / "killed", "a")  # removes partial files of the killed runs
    assert differing(tmp_path / "killed", tmp_path / "undisturbed") == set()


def dying(real, left):
    def instead(*args, **kwargs):
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)

    return instead
