"""Comparing, reordering and concatenating manifests."""

from dataclasses import replace

import numpy as np
import pytest
from makers import make_manifest

from regionspot.cache import Category, InputError, Manifest, Ragged
from regionspot.cache.format.manifest_diff import first_difference, order_like, rows_by_id

CATEGORIES = (Category(1, "star"), Category(2, "moon"))


def manifest_of(ids, seed=0, **columns):
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, 4, len(ids))
    regions = int(counts.sum())
    random = {
        "image_ids": np.array(ids, np.int64),
        "paths": [f"{image_id}.jpg" for image_id in ids],
        "heights": rng.integers(1, 2000, len(ids), dtype=np.int32),
        "widths": rng.integers(1, 2000, len(ids), dtype=np.int32),
        "category_index": rng.integers(-1, 2, regions, dtype=np.int32),
        "annotation_ids": rng.integers(0, 2**40, regions),
        "categories": CATEGORIES,
        "scores": rng.random(regions, dtype=np.float32),
        "negatives": Ragged(np.arange(len(ids) + 1), np.arange(len(ids), dtype=np.int32) % 2),
        "source": {"files": {f"toy_{seed}.json": "c0ffee"}},
        "report": {"boxes under 1 pixel": 3},
    }
    return make_manifest(counts, **{**random, **columns})


def test_rows_by_id_finds_each_image_or_minus_one():
    manifest = manifest_of([40, -7, 2**62, 3])
    assert rows_by_id(manifest, np.array([3, 5, -7, 2**62, 2**62 + 1, -(2**63)])).tolist() == [3, -1, 1, 2, -1, -1]


def test_the_first_difference_of_each_column_is_reported_with_its_image():
    manifest = manifest_of([4, 9, 1, 5, 8])
    row = int(np.flatnonzero(manifest.region_count > 1)[-1])
    region = int(manifest.offsets[row]) + 1
    assert first_difference(manifest, manifest_of([4, 9, 1, 5, 8])) is None
    where = f"image {manifest.image_ids[row]} (row {row}, {manifest.paths[row]})"
    for column, message in {
        "image_ids": f"{where}: image id is",
        "paths": f"{where}: path is '{manifest.paths[row]}', not 'other.jpg'",
        "heights": f"{where}: height is {manifest.heights[row]}, not 7",
        "widths": f"{where}: width is {manifest.widths[row]}, not 7",
        "boxes_xyxy": f"{where}, region 1: box is [",
        "category_index": f"{where}, region 1: category index is",
        "annotation_ids": f"{where}, region 1: annotation id is {manifest.annotation_ids[region]}, not 7",
        "scores": f"{where}, region 1: score is",
    }.items():
        changed = getattr(manifest, column).copy()
        index = row if len(changed) == len(manifest) else region
        changed[index] = {"paths": "other.jpg", "category_index": (manifest.category_index[region] + 2) % 3 - 1}.get(
            column, 7
        )
        difference = first_difference(manifest, replace(manifest, **{column: changed}))
        assert difference is not None
        assert difference.startswith(message), column
    counts = manifest.offsets.copy()
    counts[row] -= 1 if manifest.region_count[row - 1] else -1
    assert "number of regions is" in first_difference(manifest, replace(manifest, offsets=counts))
    assert "scores" in first_difference(manifest, replace(manifest, scores=None))


def test_new_images_are_ordered_after_the_stored_ones():
    stored = manifest_of([4, 9, 1])
    grown = Manifest.concatenate([manifest_of([7, 2], 1), stored])
    ordered = order_like(stored, grown.select(np.array([0, 3, 1, 4, 2])))
    assert ordered.image_ids.tolist() == [4, 9, 1, 7, 2]
    assert first_difference(stored, ordered.head(3)) is None
    assert order_like(stored, stored) is stored
    assert order_like(stored, manifest_of([4, 9, 7])) is None


def test_a_concatenated_manifest_can_be_split_again():
    parts = [manifest_of([4, 9, 1]), manifest_of([2], 1, split="val"), manifest_of([8, 7], 2)]
    whole = Manifest.concatenate(parts)
    assert (whole.dataset, whole.split, whole.categories) == ("toy", "train+val", CATEGORIES)
    assert whole.source == {"files": {f"toy_{seed}.json": "c0ffee" for seed in range(3)}}
    assert whole.report == {"boxes under 1 pixel": 9}
    for rows, part in zip(([0, 1, 2], [3], [4, 5]), parts, strict=True):
        selected = whole.select(np.array(rows))
        assert selected.digest() == part.digest()
        assert selected.negatives.values.tolist() == part.negatives.values.tolist()
        assert selected.negatives.offsets.tolist() == part.negatives.offsets.tolist()
        assert selected.not_exhaustive is None


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (manifest_of([2, 9], 1), "1 images are in more than one of them, the first has id 9"),
        (manifest_of([2], categories=(Category(1, "star"), Category(2, "sun"))), "their categories differ"),
        (manifest_of([2], scores=None), "only one of them has scores"),
        (manifest_of([2], negatives=None), "only one of them has negatives"),
    ],
)
def test_manifests_that_do_not_fit_are_not_concatenated(other, message):
    with pytest.raises(InputError, match=message) as error:
        Manifest.concatenate([manifest_of([4, 9, 1]), other])
    assert "\n" not in str(error.value)
