"""Scores of a head from the cache of a validation split."""

import json

import numpy as np
import pytest
import torch
from small_training import CLASSES, make_cache, make_vocabulary
from torch import nn

from regionspot.cache.errors import InputError
from regionspot.evaluation.inference.methods import HeadOnCache
from regionspot.evaluation.inference.resumable import infer
from regionspot.evaluation.metrics.average_precision import average_precision
from regionspot.evaluation.metrics.ground_truth import read_ground_truth
from regionspot.evaluation.validation import cache_validator
from regionspot.pipeline.datasets.failure_limit import FailureLimit


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return make_cache(tmp_path_factory.mktemp("caches") / "val.zarr")


class Classifier(nn.Module):
    """The text embedding of class k for a token whose nearest class is k; `wrong` classes are taken for class 0."""

    def __init__(self, wrong=()):
        super().__init__()
        class_tokens = np.random.default_rng(99).standard_normal((CLASSES + 1, 8))[:CLASSES]  # as make_cache draws them
        self.class_tokens = nn.Parameter(torch.from_numpy(class_tokens).float())
        self.wrong = wrong

    def forward(self, tokens, region_mask, feature_map, boxes):
        nearest = torch.cdist(tokens, self.class_tokens).argmin(dim=-1)
        for name in self.wrong:
            nearest[nearest == name] = 0
        return make_vocabulary().embeddings[nearest]


def classes_of(cache):
    """The known classes of all images except image 7, which failed."""
    manifest = cache.manifest
    regions = [manifest.category_index[manifest.regions(row)] for row in range(len(manifest)) if row != 7]
    classes = np.concatenate(regions)
    return classes[classes >= 0]


@pytest.fixture
def annotations(cache, tmp_path):
    """An LVIS file of the boxes of the cache; class 0 is rare and classes 1 to 5 are frequent."""
    manifest, entries = cache.manifest, []
    for row in range(len(manifest)):
        regions = manifest.regions(row)
        for box, index in zip(manifest.boxes_xyxy[regions], manifest.category_index[regions], strict=True):
            x1, y1, x2, y2 = map(float, box)
            if index >= 0:
                entries.append(
                    {
                        "id": len(entries) + 1,
                        "image_id": int(manifest.image_ids[row]),
                        "category_id": int(index) + 1,
                        "bbox": [x1, y1, x2 - x1, y2 - y1],
                        "area": (x2 - x1) * (y2 - y1),
                    }
                )
    every = list(range(1, CLASSES + 1))
    document = {
        "images": [
            {"id": int(image_id), "neg_category_ids": every, "not_exhaustive_category_ids": []}
            for image_id in manifest.image_ids
        ],
        "categories": [
            {"id": number, "name": f"class {number - 1}", "frequency": "rffffff"[number - 1]} for number in every
        ],
        "annotations": entries,
    }
    path = tmp_path / "lvis.json"
    path.write_text(json.dumps(document))
    return path


def test_accuracy_counts_regions_and_classes(cache):
    validate = cache_validator(cache, make_vocabulary(), "tokens", "maps")
    assert validate(Classifier()) == {"top1": 1.0, "top5": 1.0, "class_accuracy": 1.0}
    classes = classes_of(cache)
    scores = validate(Classifier(wrong=(2,)))
    assert scores["top1"] == pytest.approx((classes != 2).mean())
    assert scores["class_accuracy"] == pytest.approx((CLASSES - 1) / CLASSES)


def test_ap_comes_first_and_equals_that_of_the_evaluation(cache, annotations, tmp_path):
    head = Classifier(wrong=(0, 2))
    scores = cache_validator(cache, make_vocabulary(), "tokens", "maps", annotations=annotations)(head)
    assert list(scores) == ["AP", "APr", "APf", "top1", "top5", "class_accuracy"]
    result = infer(
        HeadOnCache(head, cache, make_vocabulary(), "tokens", "maps"),
        tmp_path / "parts",
        max_failures=FailureLimit.parse("100%"),
    )
    evaluated = set(range(len(cache.manifest))) - {3, 5, 7}
    image_ids = cache.manifest.image_ids[sorted(evaluated)]
    expected = average_precision(read_ground_truth(annotations), result.detections, "bbox", image_ids)
    assert 0 < scores["AP"] < 1
    assert [scores[name] for name in ("AP", "APr", "APf")] == [expected[name] for name in ("AP", "APr", "APf")]


def test_a_limit_takes_images_evenly_spaced(cache, monkeypatch):
    rows = []
    score = HeadOnCache.score
    monkeypatch.setattr(
        HeadOnCache, "score", lambda self, parts, stats: rows.extend(*parts) or score(self, parts, stats)
    )
    cache_validator(cache, make_vocabulary(), "tokens", "maps", limit=3)(Classifier())
    assert rows == [0, 11, 20]


def test_scores_that_are_not_finite_stop_the_run(cache):
    head = Classifier()
    head.forward = lambda tokens, *_: torch.full((*tokens.shape[:2], 8), float("nan"))
    with pytest.raises(InputError, match=r"validation on .*val\.zarr: .*not finite"):
        cache_validator(cache, make_vocabulary(), "tokens", "maps")(head)


def test_a_cache_of_other_features_is_refused(cache, tmp_path):
    other = make_cache(tmp_path / "train.zarr", seed=1, weights="x" * 64)
    with pytest.raises(InputError, match="features of the same backbones"):
        cache_validator(cache, make_vocabulary(), "tokens", "maps", trained_on=other)


def test_annotations_of_other_classes_or_images_are_refused(cache, annotations):
    document = json.loads(annotations.read_text())
    annotations.write_text(json.dumps({**document, "images": document["images"][:9], "annotations": []}))
    with pytest.raises(InputError, match="holds no image with id"):
        cache_validator(cache, make_vocabulary(), "tokens", "maps", annotations=annotations)
    annotations.write_text(
        json.dumps({**document, "categories": document["categories"][:4], "annotations": [], "images": []})
    )
    with pytest.raises(InputError, match=r"does not define 2 of the 6 classes of .*val\.zarr, the first: class 4"):
        cache_validator(cache, make_vocabulary(), "tokens", "maps", annotations=annotations)
