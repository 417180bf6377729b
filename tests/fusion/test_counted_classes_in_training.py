"""Options of a training that change which regions, classes and images count: in its batches, and when it resumes."""

import math
from dataclasses import replace
from itertools import chain, islice

import numpy as np
import pytest
import torch
from makers import fill
from safetensors.torch import load_file
from small_training import CLASSES, CONFIG, feature_sets, make_vocabulary, small_manifest

from regionspot.cache.errors import InputError
from regionspot.cache.format.manifest import Ragged
from regionspot.cache.store import FeatureCache
from regionspot.fusion.training.batches import read_batches, repeated_regions
from regionspot.fusion.training.negatives import repeat_factors
from regionspot.fusion.training.train import train
from regionspot.fusion.training.training_sets import open_training_set

CPU, IMAGES = torch.device("cpu"), 30
ALL_OPTIONS = replace(
    CONFIG, padding="reference", negatives=1, repeat_threshold=0.9, iterations=16, milestones=(), warmup=0
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Image n was verified to lack class n % 6, where no region shows it."""
    manifest = small_manifest(IMAGES, seed=0)
    absent = Ragged(np.arange(IMAGES + 1), (np.arange(IMAGES) % CLASSES).astype(np.int32))
    path = tmp_path_factory.mktemp("caches") / "a.zarr"
    return fill(FeatureCache.create(path, replace(manifest, negatives=absent), feature_sets(), part_size=8))


def batches_of(cache, config, first_step=0, end_step=20):
    """A batch is valid until the next one is requested."""
    return read_batches([open_training_set(cache)], np.ones(1), config, CPU, first_step, end_step)


def test_reference_padding_repeats_the_columns_of_a_batch(cache):
    for masked, repeated in zip(
        batches_of(cache, CONFIG), batches_of(cache, replace(CONFIG, padding="reference")), strict=True
    ):
        regions = torch.from_numpy(repeated_regions(masked.region_mask.numpy()))
        images = torch.arange(len(masked))[:, None]
        assert repeated.region_mask.all()
        for name in ("tokens", "boxes", "categories"):
            assert torch.equal(getattr(repeated, name), getattr(masked, name)[images, regions])
        assert torch.equal(repeated.known, repeated.categories.flatten().greater_equal(0).nonzero().squeeze(1))


def test_a_batch_holds_the_drawn_and_the_ignored_classes(cache):
    for batch in batches_of(cache, replace(CONFIG, batch_size=1, negatives=1)):
        present = set(batch.categories[batch.categories >= 0].tolist())
        class_ids = list(range(CLASSES)) if batch.class_ids is None else batch.class_ids.tolist()
        assert present < set(class_ids)
        counts = [class_id in present or class_id == batch.rows[0] % CLASSES for class_id in class_ids]
        assert (~batch.ignored[0]).tolist() == counts


def test_all_classes_are_negatives_on_request(cache):
    (batch,) = batches_of(cache, replace(CONFIG, unverified="negative"), end_step=1)
    assert batch.class_ids is None
    assert batch.ignored is None


def test_images_with_rare_classes_are_repeated_in_every_epoch(cache):
    rows = open_training_set(cache).rows
    factors = repeat_factors(cache.manifest, rows, 0.9)
    length = math.ceil(factors.sum())
    assert length > len(rows)
    steps = -(-length // CONFIG.batch_size)
    images = [batch.rows.tolist() for batch in batches_of(cache, replace(CONFIG, repeat_threshold=0.9), 0, 2 * steps)]
    for epoch in (list(chain(*images[:steps])), list(chain(*images[steps:]))):
        assert len(epoch) == length
        counts = np.bincount(epoch, minlength=IMAGES)[rows]
        assert (counts >= np.floor(factors)).all()
        assert (counts <= np.ceil(factors * length / factors.sum())).all()


def test_a_resumed_run_reads_the_same_classes_and_repeated_images(cache):
    whole, resumed = (batches_of(cache, ALL_OPTIONS, first_step=first) for first in (0, 13))
    for expected, batch in zip(islice(whole, 13, None), resumed, strict=True):
        assert batch.rows.tolist() == expected.rows.tolist()
        for name in ("tokens", "class_ids", "ignored"):
            ours, theirs = getattr(batch, name), getattr(expected, name)
            assert (ours is None and theirs is None) or torch.equal(ours, theirs)


def test_a_resumed_run_with_all_options_is_bitwise_equal(cache, tmp_path):
    for out, lengths in (("whole", [16]), ("resumed", [7, 16])):
        for steps in lengths:
            config = replace(ALL_OPTIONS, iterations=steps)
            train([cache], [make_vocabulary()], tmp_path / out, config, resume=True)
    whole, resumed = (load_file(tmp_path / out / "head.safetensors") for out in ("whole", "resumed"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.parametrize(("field", "value"), [("negatives", -1), ("repeat_threshold", 1.0), ("padding", "repeat")])
def test_an_invalid_option_is_refused(field, value):
    with pytest.raises(InputError, match=f"training: {field} is"):
        replace(CONFIG, **{field: value})
