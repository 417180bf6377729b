"""Training on both views of a cache: its original and its mirrored images."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from makers import fill
from safetensors.torch import load_file
from small_training import CONFIG, feature_sets, make_cache, make_vocabulary, small_manifest

from regionspot.cache.errors import InputError
from regionspot.cache.store import FeatureCache
from regionspot.fusion.training.batches import read_batches
from regionspot.fusion.training.runs import summary_of
from regionspot.fusion.training.train import train
from regionspot.fusion.training.training_sets import open_flipped, open_training_set

FLIP = replace(CONFIG, views="flip", milestones=(), warmup=0)


def two_views(path, **flipped) -> FeatureCache:
    views = [
        replace(one, name=one.name + ".flip", provenance={**one.provenance, "view": "flip"})
        for one in feature_sets(**flipped)
    ]
    return fill(FeatureCache.create(path, small_manifest(21, 0), [*feature_sets(), *views], part_size=8))


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return two_views(tmp_path_factory.mktemp("caches") / "views.zarr")


def run(cache, out, **options):
    return train([cache], [make_vocabulary()], out, FLIP, map_set="maps", token_set="tokens", **options)


def test_the_steps_alternate_between_the_views_and_an_epoch_of_each_holds_every_image(cache):
    original = open_training_set(cache, "maps", "tokens")
    rows = {False: [], True: []}
    for batch in read_batches(
        [original, open_flipped(original)], np.array([0.5, 0.5]), FLIP, torch.device("cpu"), 0, 10
    ):
        flipped = batch.set_index == 1
        stored = cache.read(
            batch.rows, map_set="maps.flip" if flipped else "maps", token_set="tokens.flip" if flipped else "tokens"
        )
        assert torch.equal(batch.feature_map, torch.from_numpy(stored.feature_map))
        assert torch.equal(batch.tokens, torch.from_numpy(stored.tokens))
        width, height = 640, 480  # of makers.py
        left, top, right, bottom = np.moveaxis(stored.boxes_xyxy, -1, 0)
        if flipped:
            left, right = width - right, width - left
        boxes = np.stack([left / width, top / height, right / width, bottom / height], axis=-1)
        assert batch.boxes.numpy() == pytest.approx(boxes * stored.region_mask[..., None], abs=1e-6)
        rows[flipped] += batch.rows.tolist()
    assert sorted(rows[False]) == sorted(rows[True]) == original.rows.tolist()
    assert rows[False] != rows[True]


def test_every_cache_keeps_its_share_of_the_batches(cache, tmp_path):
    other = two_views(tmp_path / "other.zarr")
    config = replace(FLIP, iterations=1)
    train(
        [cache, other],
        [make_vocabulary()] * 2,
        tmp_path / "run",
        config,
        map_set="maps",
        token_set="tokens",
        ratios=(3, 1),
    )
    saved = json.loads((tmp_path / "run/run.json").read_text())["caches"]
    assert [(one["map"]["name"], one["share"]) for one in saved] == [
        ("maps", 0.375), ("maps.flip", 0.375), ("maps", 0.125), ("maps.flip", 0.125),
    ]  # fmt: skip
    assert summary_of(tmp_path / "run").data == ["small0 train"]  # each dataset once


def test_a_resumed_run_is_bitwise_equal_to_an_uninterrupted_one(cache, tmp_path):
    for out, steps in (("whole", (24,)), ("resumed", (11, 24))):
        for iterations in steps:
            config = replace(FLIP, iterations=iterations)
            train([cache], [make_vocabulary()], tmp_path / out, config, map_set="maps", token_set="tokens", resume=True)
    whole, resumed = (load_file(tmp_path / out / "head.safetensors") for out in ("whole", "resumed"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_cache_without_the_mirrored_view_is_refused_in_one_line(tmp_path):
    with pytest.raises(
        InputError, match=r"maps\.flip and tokens\.flip is missing; run .* again with --views flip"
    ) as error:
        run(make_cache(tmp_path / "one.zarr"), tmp_path / "run")
    assert "\n" not in str(error.value)


def test_a_mirrored_view_of_other_weights_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"maps\.flip .* differ .*weights"):
        run(two_views(tmp_path / "c.zarr", weights="x" * 64), tmp_path / "run")
