"""An extended cache keeps its parts and is byte-identical to one created from all images at once."""

import json
import os
import random
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from makers import cache_content, fork, make_features, make_manifest, was_killed

from regionspot.cache import (
    CacheError,
    Category,
    FeatureCache,
    FeatureSet,
    ImageFeatures,
    InputError,
    ProvenanceMismatchError,
)
from regionspot.cache.format.feature_dtypes import Statistics
from regionspot.cache.storage import folder_swap as exchange
from regionspot.cache.tools.extend import extend
from regionspot.cache.tools.merge_subset_convert import subset
from regionspot.cache.tools.resume import add_feature_sets, open_or_create
from regionspot.cache.tools.verify import verify
from regionspot.cache.writing.claims import Claims

PART_SIZE, BEFORE = 4, 10
SETS = (
    FeatureSet("clip", "map", (5, 8), provenance={"model": "ViT-L-14"}),
    FeatureSet("dino", "map", (2, 2), "bfloat16", compression="zstd"),
    FeatureSet("sam", "token", (6,), "int8", statistics=Statistics(np.zeros(6), np.ones(6))),
)
CATEGORIES = (Category(1, "star"), Category(2, "moon"))


@pytest.fixture(scope="module")
def larger():
    """22 images; the largest of the first three parts has 64 regions, that of all of them 90."""
    counts = np.array([2, 0, 1, 5, 60, 1, 3, 0, 3, 1, 0, 7, 80, 4, 0, 6, 2, 2, 1, 0, 9, 5])
    regions, rng = int(counts.sum()), np.random.default_rng(0)
    return make_manifest(
        counts,
        image_ids=rng.permutation(100)[: len(counts)],
        category_index=rng.integers(0, 2, regions, dtype=np.int32),
        categories=CATEGORIES,
        source={"files": {"toy_train.json": "c0ffee"}},
    )


def features_of(manifest, row):
    """Features that depend only on the image's id."""
    failed = manifest.image_ids[row] % 16 == 0
    return ImageFeatures(row, {}, "truncated JPEG") if failed else make_features(manifest, SETS, row)


def extract(path, manifest, sets=SETS, part_size=PART_SIZE, parts=None):
    cache = open_or_create(path, manifest, sets, part_size)
    for part in cache.pending_parts() if parts is None else parts:
        cache.write_part(part, (features_of(cache.manifest, row) for row in cache.part_rows(part)))
    return cache


@pytest.fixture(scope="module")
def caches(tmp_path_factory, larger):
    """`before`: a cache of the first ten images; `at_once`: a cache created from all images."""
    folder = tmp_path_factory.mktemp("caches")
    assert (larger.image_ids[:BEFORE] % 16 == 0).any()
    extract(folder / "before", larger.head(BEFORE))
    extract(folder / "at_once", larger)
    return folder


def differing(folder, other):
    one, two = cache_content(folder), cache_content(other)
    return {name for name in one.keys() | two.keys() if one.get(name) != two.get(name)}


def test_an_extended_cache_is_byte_identical_to_one_created_at_once(caches, larger, tmp_path):
    path = shutil.copytree(caches / "before", tmp_path / "c.zarr")
    kept = path / "features/clip/feature_map/c.1.0.0"
    inode = kept.stat().st_ino
    extended = extend(path, larger)
    assert (extended.images, extended.done, extended.pending) == (12, 2, 4)
    assert extended.regions == len(larger.boxes_xyxy) - larger.offsets[BEFORE]
    assert kept.stat().st_ino == inode, "a full part of maps is not written again"
    cache = FeatureCache.open(path)
    assert cache.geometry.capacity == 128, "tokens have more room than before"
    assert cache.pending_parts() == [2, 3, 4, 5]
    assert verify(path).problems == ()
    extract(path, larger)
    assert differing(path, caches / "at_once") == set()
    assert sorted(left.name for left in tmp_path.iterdir()) == ["c.zarr"]


def test_extracted_parts_read_as_before_and_new_ones_are_pending(caches, larger, tmp_path):
    path = shutil.copytree(caches / "before", tmp_path / "c.zarr")
    (path / "parts/dino/00000.json").unlink()
    extend(path, larger)
    cache, before = FeatureCache.open(path, check="always"), FeatureCache.open(caches / "before")
    assert cache.missing_sets(0) == ["dino"]
    rows = before.valid_rows()[before.valid_rows() < 8]
    assert cache.valid_rows(["clip", "sam"]).tolist() == rows.tolist()
    now, then = (one.read(rows, map_set="clip") for one in (cache, before))
    np.testing.assert_array_equal(now.feature_map, then.feature_map)
    np.testing.assert_array_equal(now.tokens, then.tokens)
    np.testing.assert_array_equal(now.token_scale, then.token_scale)
    assert [failure.row for failure in cache.failures()] == [f.row for f in before.failures() if f.row < 8]


def test_annotations_in_another_order_keep_the_order_of_the_cache(caches, larger, tmp_path):
    path = shutil.copytree(caches / "before", tmp_path / "c.zarr")
    shuffled = larger.select(np.random.default_rng(1).permutation(len(larger)))
    extend(path, shuffled)
    old, new = FeatureCache.open(caches / "before").manifest, FeatureCache.open(path).manifest
    assert new.head(BEFORE).digest() == old.digest()
    came = [image_id for image_id in shuffled.image_ids.tolist() if image_id not in old.image_ids]
    assert new.image_ids[BEFORE:].tolist() == came
    extract(path, shuffled)  # annotations in any order resume it
    assert FeatureCache.open(path).pending_parts() == []


def test_new_categories_are_appended(caches, larger, tmp_path):
    path = shutil.copytree(caches / "before", tmp_path / "c.zarr")
    more = replace(larger, categories=(*CATEGORIES, Category(3, "sun")))
    assert extend(path, more).images == 12
    assert [category.name for category in FeatureCache.open(path).categories] == ["star", "moon", "sun"]


def test_without_new_images_nothing_changes(caches, larger, tmp_path):
    path = shutil.copytree(caches / "before", tmp_path / "c.zarr")
    inode = path.stat().st_ino
    extended = extend(path, larger.head(BEFORE))
    assert (extended.images, extended.done, extended.pending) == (0, 3, 0)
    assert path.stat().st_ino == inode
    assert differing(path, caches / "before") == set()


def test_a_small_single_part_gets_the_default_part_size(larger, tmp_path):
    path = tmp_path / "c.zarr"
    extract(path, larger.head(3), part_size=512)
    assert FeatureCache.open(path).part_size == 3
    extend(path, larger, part_size=16)
    assert FeatureCache.open(path).part_size == 16


def test_files_and_attributes_of_others_are_kept(caches, larger, tmp_path):
    path = shutil.copytree(caches / "before", tmp_path / "c.zarr")
    (path / "features/clip/mean").mkdir()
    (path / "features/clip/mean/zarr.json").write_text("{}")
    (path / "notes.txt").write_text("mine")
    root = json.loads((path / "zarr.json").read_text())
    root["attributes"]["owner"] = "me"
    (path / "zarr.json").write_text(json.dumps(root))
    (path / "features/clip/feature_map/c.2.0.0.elsewhere-1.partial").write_text("half a part")
    extend(path, larger)
    assert (path / "notes.txt").read_text() == "mine"
    assert (path / "features/clip/mean/zarr.json").read_text() == "{}"
    assert json.loads((path / "zarr.json").read_text())["attributes"]["owner"] == "me"
    assert not list(path.rglob("*.partial"))
    assert len(FeatureCache.open(path)) == len(larger)


def test_a_symbolic_link_to_a_cache_is_kept(caches, larger, tmp_path):
    path = shutil.copytree(caches / "before", tmp_path / "disk" / "c.zarr")
    link = tmp_path / "c.zarr"
    link.symlink_to(path)
    extend(link, larger)
    assert link.is_symlink()
    assert len(FeatureCache.open(link)) == len(larger)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda larger: larger.select(np.arange(1, len(larger))), "1 of its images are not there, the first"),
        (lambda larger: replace(larger, boxes_xyxy=larger.boxes_xyxy + 1), "(row 0, 0.jpg), region 0: box is ["),
        (lambda larger: replace(larger, split="val"), "it holds toy/train"),
        (lambda larger: replace(larger, categories=CATEGORIES[::-1]), "add new categories at the end only"),
    ],
)
def test_other_annotations_are_refused_with_the_first_difference(caches, larger, tmp_path, change, message):
    path = shutil.copytree(caches / "before", tmp_path / "c.zarr")
    with pytest.raises(ProvenanceMismatchError) as refused:
        extend(path, change(larger))
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)
    assert differing(path, caches / "before") == set()


def test_a_cache_outside_a_folder_is_refused(larger):
    with pytest.raises(InputError, match="only a cache in a folder can be extended"):
        extend("memory://c.zarr", larger)


def test_a_cache_that_another_run_is_working_on_is_refused(caches, larger, tmp_path):
    path = shutil.copytree(caches / "before", tmp_path / "c.zarr")
    cache = FeatureCache.open(path, "a")
    with Claims(cache.storage) as other:
        assert other.claim(1)
        with pytest.raises(CacheError, match="is working on"):
            extend(path, larger)
        assert differing(path, caches / "before") <= {
            name for name in cache_content(path) if name.startswith("claims/")
        }
        extend(path, larger, take_over=True)
        with pytest.raises(CacheError, match="was taken over"):
            other.require_owned(1)
    assert len(FeatureCache.open(path)) == len(larger)


def test_a_run_that_opened_the_old_cache_writes_nothing_into_the_new_one(caches, larger, tmp_path):
    path = shutil.copytree(caches / "before", tmp_path / "c.zarr")
    (path / "parts/clip/00002.json").unlink()
    late, in_the_middle = FeatureCache.open(path, "a"), FeatureCache.open(path, "a")

    def images(cache):
        for row in cache.part_rows(2):
            yield features_of(cache.manifest, row)
            if row == 8:
                extend(path, larger)

    for cache in (in_the_middle, late):
        with pytest.raises(CacheError, match="part 2 could not be written"):
            cache.write_part(2, images(cache))
    with pytest.raises(CacheError, match="it was extended or replaced"):
        add_feature_sets(late, {"more": FeatureSet("more", "map", (2, 2))})
    assert FeatureCache.open(path).pending_parts() == [2, 3, 4, 5]
    extract(path, larger)
    assert differing(path, caches / "at_once") == set()


WATCHED = ("link", "replace", "rename", "fsync", "unlink", "rmdir", "mkdir")


def watch(before_call):
    """Call `before_call(name)` before every function that changes a folder."""

    def watched(name, real):
        def instead(*args, **kwargs):
            before_call(name)
            return real(*args, **kwargs)

        return instead

    for name in WATCHED:
        setattr(os, name, watched(name, getattr(os, name)))
    exchange._exchange = watched("exchange", exchange._exchange)


def calls_of(function, file):
    """The calls of `function` that change a folder, as (name, number of earlier calls of that name)."""

    def traced():
        with open(file, "w") as trace:
            watch(lambda name: print(name, file=trace, flush=True))
            function()

    assert not was_killed(fork(traced))
    names = file.read_text().split()
    return [(name, names[:place].count(name)) for place, name in enumerate(names)]


def killed_at(function, call):
    """Run `function` in a process that is killed right before a call; whether it was reached."""
    left = [call[1]]

    def die(name):
        if name == call[0]:
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    def dying():
        watch(die)
        function()

    return was_killed(fork(dying))


@pytest.mark.parametrize("in_one_step", [True, False])
def test_a_kill_at_any_moment_leaves_the_old_or_the_new_cache(caches, larger, tmp_path, monkeypatch, in_one_step):
    if not in_one_step:
        monkeypatch.setattr(exchange, "_exchange", lambda new, old: False)
    path, extended = tmp_path / "c.zarr", shutil.copytree(caches / "before", tmp_path / "extended")
    calls = calls_of(lambda: extend(extended, larger), tmp_path / "trace")
    before, after, at = cache_content(caches / "before"), cache_content(extended), calls.index(("exchange", 0))
    moments = [*random.Random(0).sample(range(at), 5 if in_one_step else 0), at, at + 1, at + 2, at + 3, at + 9]
    outcomes = []
    for moment in moments:
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(caches / "before", path)
        assert killed_at(lambda: extend(path, larger), calls[moment])
        if not path.exists():
            with pytest.raises(CacheError, match=r"left it in .*c\.zarr\.replaced"):
                FeatureCache.open(path)
            open_or_create(path, larger.head(BEFORE), SETS, PART_SIZE)
            outcomes.append("recovered")
        now = {name: value for name, value in cache_content(path).items() if not name.startswith("claims/")}
        assert now in (before, after), calls[moment]
        outcomes.append(len(FeatureCache.open(path)))
    assert ("recovered" in outcomes) != in_one_step
    assert {BEFORE, len(larger)} <= set(outcomes)
    extend(path, larger)
    assert cache_content(path) == after
    FeatureCache.create(tmp_path / "c.zarr.other", larger, SETS)
    extend(path, replace(larger, categories=(*CATEGORIES, Category(3, "sun"))))
    assert {left.name for left in tmp_path.iterdir()} == {"c.zarr", "c.zarr.other", "extended", "trace"}


# extract --limit


def test_a_limited_cache_is_extended_and_keeps_its_full_parts(larger, tmp_path):
    kept: dict[Path, int] = {}
    for images in (3, BEFORE, 14, None):
        cache = extract(tmp_path / "c.zarr", larger.head(images))
        assert {path: path.stat().st_ino for path in kept} == kept
        full = [part for part in range(cache.n_parts) if len(cache.part_rows(part)) == PART_SIZE]
        kept = {
            path: path.stat().st_ino
            for part in full
            for path in [cache.path / f"features/clip/feature_map/c.{part}.0.0"]
        }
    assert len(kept) == len(larger) // PART_SIZE
    extract(tmp_path / "at_once", larger)
    assert differing(tmp_path / "c.zarr", tmp_path / "at_once") == set()
    assert verify(tmp_path / "c.zarr").problems == ()


def test_a_run_with_a_limit_joins_a_cache_of_more_images(larger, tmp_path):
    extract(tmp_path / "c.zarr", larger)
    before = cache_content(tmp_path / "c.zarr")
    cache = open_or_create(tmp_path / "c.zarr", larger.head(5), SETS, PART_SIZE)
    assert len(cache) == len(larger)
    assert cache_content(tmp_path / "c.zarr") == before


def test_a_cache_that_may_not_grow_is_opened_unchanged(larger, tmp_path):
    extract(tmp_path / "c.zarr", larger.head(5))
    assert len(open_or_create(tmp_path / "c.zarr", larger, SETS, PART_SIZE, may_grow=False)) == 5


@pytest.mark.parametrize(
    "change",
    [
        lambda whole: replace(whole, source={"files": {"boxes.json": "another"}}),
        lambda whole: replace(whole, source={}),
        lambda whole: replace(whole, boxes_xyxy=whole.boxes_xyxy + 1),
        lambda whole: replace(whole, split="val"),
        lambda whole: replace(whole, categories=(*whole.categories, Category(99, "new"))),
    ],
)
def test_annotations_that_differ_by_more_than_a_limit_are_refused(larger, tmp_path, change):
    extract(tmp_path / "c.zarr", larger.head(5))
    before = cache_content(tmp_path / "c.zarr")
    with pytest.raises(ProvenanceMismatchError):
        open_or_create(tmp_path / "c.zarr", change(larger), SETS, PART_SIZE)
    assert cache_content(tmp_path / "c.zarr") == before


def test_other_features_are_refused_before_the_cache_is_extended(larger, tmp_path):
    extract(tmp_path / "c.zarr", larger.head(5))
    before = cache_content(tmp_path / "c.zarr")
    other = replace(SETS[0], provenance={**SETS[0].provenance, "dtype": "other"})
    with pytest.raises(ProvenanceMismatchError, match="differs from the requested"):
        open_or_create(tmp_path / "c.zarr", larger, [other, *SETS[1:]], PART_SIZE)
    assert cache_content(tmp_path / "c.zarr") == before


def test_a_subset_is_not_extended_to_its_full_annotations(larger, tmp_path):
    extract(tmp_path / "whole", larger)
    subset(tmp_path / "whole", tmp_path / "cut", [0, 1, 2])
    assert len(open_or_create(tmp_path / "cut", larger, SETS, PART_SIZE)) == 3


def test_a_cache_that_another_run_works_on_is_not_extended(larger, tmp_path):
    cache = extract(tmp_path / "c.zarr", larger.head(5), parts=[0])
    with Claims(cache.storage) as claims:
        claims.claim(1)
        with pytest.raises(CacheError, match="is working on part 1"):
            open_or_create(tmp_path / "c.zarr", larger, SETS, PART_SIZE)
    assert len(open_or_create(tmp_path / "c.zarr", larger, SETS, PART_SIZE)) == len(larger)


def test_of_two_runs_that_extend_a_cache_at_once_both_continue(larger, tmp_path):
    extract(tmp_path / "c.zarr", larger.head(5))

    def opened(_):
        return len(open_or_create(tmp_path / "c.zarr", larger, SETS, PART_SIZE))

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(opened, range(4))) == [len(larger)] * 4
    assert verify(tmp_path / "c.zarr").problems == ()


def test_a_cache_in_an_object_store_cannot_be_extended(larger, s3):
    extract(f"{s3}/c.zarr", larger.head(5))
    with pytest.raises(InputError, match=r"holds 5 of the 22 images.* give that limit or another cache"):
        open_or_create(f"{s3}/c.zarr", larger, SETS, PART_SIZE)
    assert len(open_or_create(f"{s3}/c.zarr", larger.head(3), SETS, PART_SIZE)) == 5
