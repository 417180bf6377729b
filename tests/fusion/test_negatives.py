"""Which classes count in a step: drawn negatives, and the verified classes of an image."""

import numpy as np
import pytest
from makers import make_manifest

from regionspot.cache.format.manifest import Category, Ragged
from regionspot.fusion.training.negatives import CountedClasses, images_per_class, repeat_factors, repeated_rows

CLASSES = tuple(Category(index + 1, f"class {index}") for index in range(6))


def ragged(*lists):
    values = np.array([value for values in lists for value in values], np.int32)
    return Ragged(np.concatenate([[0], np.cumsum([len(values) for values in lists])]), values)


def manifest_of(*regions, **columns):
    """A manifest whose images have regions of these classes."""
    category_index = np.array([value for values in regions for value in values], np.int32)
    return make_manifest(
        [len(values) for values in regions], **{"category_index": category_index, "categories": CLASSES, **columns}
    )


def large_manifest(classes=1000):
    """Class c is on 1 + c % 100 images, except class 0, which is on none."""
    regions = [[c for c in range(1, classes) if c % 100 >= image] for image in range(100)]
    return manifest_of(*regions, categories=tuple(Category(index + 1, f"class {index}") for index in range(classes)))


def all_rows(manifest):
    return np.arange(len(manifest))


def test_an_image_counts_once_for_each_class_that_it_shows():
    manifest = manifest_of([0, 0, 2], [], [2, -1], [5])
    assert images_per_class(manifest, np.array([0, 1, 2])).tolist() == [1, 0, 2, 0, 0, 0]
    assert images_per_class(manifest, np.array([3])).tolist() == [0, 0, 0, 0, 0, 1]


def test_a_step_counts_the_classes_of_its_batch_and_as_many_others_as_asked_for():
    manifest = large_manifest()
    counted = CountedClasses(manifest, all_rows(manifest), sampled=50, seed=3)
    batch = np.array([[7, 0, -1], [7, 999, 500]], np.int32)
    class_ids, ignored = counted.of_step(12, np.array([0, 1]), batch)
    assert ignored is None
    assert len(class_ids) == 4 + 50
    assert {0, 7, 500, 999} <= set(class_ids.tolist())
    assert np.array_equal(class_ids, np.unique(class_ids))


def test_the_draw_follows_from_seed_and_step_alone():
    manifest, batch = large_manifest(), np.array([[7]], np.int32)

    def draw(seed, step):
        counted = CountedClasses(manifest, all_rows(manifest), sampled=50, seed=seed)
        return counted.of_step(step, np.array([0]), batch)[0].tolist()

    once = CountedClasses(manifest, all_rows(manifest), sampled=50, seed=1)
    for step in (0, 4, 5):
        assert once.of_step(step, np.array([0]), batch)[0].tolist() == draw(1, step)
    assert len({tuple(draw(seed, step)) for seed in (1, 2) for step in (4, 5)}) == 4


def test_a_class_is_drawn_in_proportion_to_the_square_root_of_its_images():
    manifest = large_manifest()
    counted = CountedClasses(manifest, all_rows(manifest), sampled=20)
    drawn = np.zeros(1000)
    for step in range(2000):
        class_ids, _ = counted.of_step(step, np.array([0]), np.array([[-1]], np.int32))
        drawn[class_ids] += 1
    images = images_per_class(manifest, all_rows(manifest))
    groups = [(images >= low) & (images <= low + 9) for low in (1, 21, 91)]
    shares = np.array([drawn[group].sum() for group in groups]) / drawn.sum()
    expected = np.array([np.sqrt(images[group]).sum() for group in groups]) / np.sqrt(images).sum()
    assert shares == pytest.approx(expected, rel=0.05)
    assert drawn[0] == 0  # without an image


def test_all_classes_count_where_the_vocabulary_is_not_larger_than_the_draw():
    manifest = manifest_of([0, 1], [2])
    counted = CountedClasses(manifest, all_rows(manifest), sampled=4)
    assert counted.of_step(0, np.array([0]), np.array([[0, 1]], np.int32)) == (None, None)
    assert len(counted.of_step(0, np.array([1]), np.array([[2]], np.int32))[0]) == 5


def test_only_classes_that_were_verified_or_that_another_region_shows_are_negatives():
    manifest = manifest_of([0, 2, -1], [], [1], negatives=ragged([3], [0, 5], []))
    _, ignored = CountedClasses(manifest, all_rows(manifest)).of_step(
        0, np.array([2, 0, 1]), np.zeros((3, 3), np.int32)
    )
    counted = [np.flatnonzero(~row).tolist() for row in ignored]
    assert counted == [[1], [0, 2, 3], [0, 5]]


def test_a_region_that_the_batch_left_out_still_shows_its_class():
    manifest = manifest_of([0, 2], negatives=ragged([3]))
    _, ignored = CountedClasses(manifest, all_rows(manifest)).of_step(0, np.array([0]), np.array([[0]], np.int32))
    assert np.flatnonzero(~ignored[0]).tolist() == [0, 2, 3]


def test_a_class_that_is_not_exhaustively_annotated_is_no_negative():
    lists = {"not_exhaustive": ragged([0, 4], [])}
    manifest = manifest_of([0, 2], [1], **lists)
    _, ignored = CountedClasses(manifest, all_rows(manifest)).of_step(0, np.array([0, 1]), np.zeros((2, 2), np.int32))
    assert [np.flatnonzero(row).tolist() for row in ignored] == [[0, 4], []]


def test_ignored_classes_are_in_the_order_of_the_drawn_ones():
    manifest = manifest_of([0, 2], [1], [3, 4, 5], negatives=ragged([3], [3], [3]))
    counted = CountedClasses(manifest, all_rows(manifest), sampled=2)
    class_ids, ignored = counted.of_step(0, np.array([0]), np.array([[0, 2]], np.int32))
    assert (~ignored[0]).tolist() == [class_id in (0, 2, 3) for class_id in class_ids.tolist()]


def test_unverified_classes_count_like_any_other_on_request():
    manifest = manifest_of([0, 2], negatives=ragged([3]), not_exhaustive=ragged([2]))
    counted = CountedClasses(manifest, all_rows(manifest), unverified="negative")
    assert counted.of_step(0, np.array([0]), np.array([[0, 2]], np.int32)) == (None, None)


# Repeated images


def test_an_image_is_repeated_by_the_factor_of_its_rarest_class():
    """Class 0 is on all 4 images, class 1 on two, class 2 on one."""
    manifest = manifest_of([0], [0, 0, 1], [1, 0, 2], [0, -1])
    assert repeat_factors(manifest, np.arange(4), 0.5).tolist() == pytest.approx([1, 1, 2**0.5, 1])
    assert repeat_factors(manifest, np.array([2, 1]), 0.9).tolist() == pytest.approx([1.8**0.5, 1])


def test_an_epoch_repeats_every_image_by_its_factor_rounded_at_random():
    rows, factors = np.arange(50) * 3, np.array([1.0, 1.5, 2.25, 1.0, 3.0] * 10)
    epochs = [repeated_rows(rows, factors, seed=5, epoch=epoch) for epoch in range(400)]
    counts = np.array([np.bincount(epoch, minlength=150)[rows] for epoch in epochs])
    assert {len(epoch) for epoch in epochs} == {88}  # 87.5, rounded up
    assert ((counts == np.floor(factors)) | (counts == np.ceil(factors * 88 / 87.5))).all()
    assert counts.mean(axis=0) == pytest.approx(factors * 88 / 87.5, abs=0.1)
    assert np.array_equal(epochs[7], repeated_rows(rows, factors, seed=5, epoch=7))
    assert len({tuple(epoch) for epoch in epochs}) == 400


def test_an_epoch_without_rare_classes_holds_every_image_once():
    rows = np.arange(1000)
    assert np.array_equal(np.sort(repeated_rows(rows, np.ones(1000), seed=0, epoch=3)), rows)
