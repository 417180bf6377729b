from dataclasses import replace
from functools import partial
from typing import get_args

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from regionspot.cache import FeatureCache, FeatureSet
from regionspot.cache.errors import InputError
from regionspot.cli import app
from regionspot.evaluation.evaluate import EvaluationOptions, evaluate
from regionspot.evaluation.inference.baselines import Baseline, CropBaseline, MapBaseline
from regionspot.evaluation.inference.region_spot import RegionSpot
from regionspot.evaluation.inference.scoring import class_probabilities
from regionspot.evaluation.inference.zero_shot import ZeroShotMethod, crop, dense_embeddings
from regionspot.evaluation.metrics.detections import Masks
from regionspot.fusion.heads.pooling import box_weights, relative_boxes
from regionspot.fusion.vocabulary import build_vocabulary
from regionspot.pipeline.backbones.clip import load_encoder
from regionspot.pipeline.backbones.sam import load_localizer
from regionspot.pipeline.datasets.registry import image_folder_of, read_dataset
from regionspot.pipeline.reporting.run_stats import RunStats

pytestmark = pytest.mark.usefixtures("module_home")


@pytest.fixture(scope="module")
def manifest(world):
    return read_dataset("toy", world, "val")


@pytest.fixture(scope="module")
def encoder():
    return load_encoder("toy_clip")


@pytest.fixture(scope="module")
def localizer():
    return load_localizer("toy_sam")


@pytest.fixture(scope="module")
def vocabulary(encoder, manifest):
    return build_vocabulary([category.name for category in manifest.categories], ["{}."], encoder)


def boxes(*rows):
    return np.array(rows, np.float32)


@pytest.mark.parametrize(
    ("kind", "method"), [(CropBaseline, "embed_images"), (partial(MapBaseline, "pooled"), "encode")]
)
def test_a_batch_that_does_not_fit_into_gpu_memory_is_split(
    encoder, vocabulary, manifest, world, monkeypatch, kind, method
):
    parts = [range(8)]
    baseline = kind(encoder, manifest, image_folder_of("toy", world, "val", manifest), vocabulary)
    expected = [scores.probabilities for scores in baseline.score(parts, RunStats())]
    compute, sizes = getattr(encoder, method), []

    def limited(batch):
        sizes.append(len(batch))
        if len(batch) > 3:
            raise torch.OutOfMemoryError(f"{len(batch)} images")
        return compute(batch)

    monkeypatch.setattr(encoder, method, limited)
    for one, other in zip(baseline.score(parts, RunStats()), expected, strict=True):
        np.testing.assert_allclose(one.probabilities, other, atol=1e-5)
    assert max(sizes) > 3
    assert max(sizes[sizes.index(max(sizes)) + 2 :]) <= 3


def test_a_crop_includes_its_margin_and_is_clipped():
    image = Image.new("RGB", (100, 80))
    assert crop(image, np.float32([20, 20, 60, 40]), 0.1).size == (48, 24)
    assert crop(image, np.float32([0, 0, 100, 80]), 0.5).size == (100, 80)
    assert crop(image, np.float32([99.6, 79.6, 100, 80]), 0).size == (1, 1)


def scores(method, rows):
    return list(method.score([rows], RunStats()))


def test_the_crop_of_a_whole_image_has_the_scores_of_the_image(world, manifest, encoder, vocabulary):
    image_folder = image_folder_of("toy", world, "val", manifest)
    whole = manifest.select(np.arange(1))
    region = whole.boxes_xyxy[:1].copy()
    region[:] = [0, 0, whole.widths[0], whole.heights[0]]
    whole.boxes_xyxy[:] = region
    probabilities = scores(CropBaseline(encoder, whole, image_folder, vocabulary), [0])[0].probabilities
    image = encoder.preprocess(Image.open(image_folder / str(whole.paths[0])))
    expected = class_probabilities(encoder.embed_images(image[None]), vocabulary.embeddings, encoder.logit_scale)
    assert probabilities[0] == pytest.approx(expected[0], abs=1e-5)


def test_the_pooled_baseline_projects_the_mean_of_the_patches(world, manifest, encoder, vocabulary):
    image_folder = image_folder_of("toy", world, "val", manifest)
    probabilities = scores(MapBaseline("pooled", encoder, manifest, image_folder, vocabulary), [2])[0].probabilities
    image = encoder.preprocess(Image.open(image_folder / str(manifest.paths[2])))
    patches = encoder.encode(image[None])[0, 1:]
    regions = manifest.boxes_xyxy[manifest.regions(2)]
    relative = torch.from_numpy(relative_boxes(regions, manifest.heights[2], manifest.widths[2]))
    pooled = encoder.project(box_weights(relative, 12)[:, 0] @ patches)
    expected = class_probabilities(pooled, vocabulary.embeddings, encoder.logit_scale)
    assert probabilities == pytest.approx(expected, abs=1e-5)


@pytest.fixture(scope="module")
def results(world, tmp_path_factory):
    """What `eval-lvis --baseline` returns, for each baseline, on the toy world."""
    out = tmp_path_factory.mktemp("results")
    options = {"data": world, "dataset": "toy", "preset": "toy", "templates": "plain", "device": "cpu"}
    return {name: evaluate(EvaluationOptions(**options, out=out / name, baseline=name)) for name in get_args(Baseline)}


def test_crops_are_more_accurate_than_pooling(results):
    # Guessing one of 192 classes gives an AP of about 0.01.
    assert results["crop"]["bbox"]["AP"] > 0.3
    # The toy CLIP is not trained to align its patches with names.
    assert 0 <= results["pooled"]["bbox"]["AP"] < results["crop"]["bbox"]["AP"]


def test_dense_maps_name_regions_that_the_plain_map_does_not(results):
    for name in ("dense", "dense-mask"):
        assert results[name]["bbox"]["AP"] > 0.2 + results["pooled"]["bbox"]["AP"]


def test_only_the_baseline_with_masks_has_an_ap_of_masks(results):
    assert {name for name, result in results.items() if result["segm"]} == {"dense-mask"}


def test_a_dense_embedding_is_the_mean_over_the_parts_of_patches_in_the_box_or_mask():
    dense_map = torch.eye(4)  # 2 x 2 patches, each along an axis of its own
    boxes = np.float32([[0, 0, 0.5, 0.5], [0.25, 0, 0.75, 0.5], [0, 0, 1, 1], [0.6, 0.6, 0.7, 0.7]])
    of_boxes = np.float32([[1, 0, 0, 0], [0.5, 0.5, 0, 0], [0.25] * 4, [0, 0, 0, 1]])
    np.testing.assert_allclose(dense_embeddings(dense_map, boxes).square(), of_boxes, atol=1e-3)
    bits = np.zeros((4, 3, 3), bool)  # the middle row and column are halves of two patches
    bits[0, 0, 0] = bits[1, 0, 1] = bits[2, :, 2] = True
    of_masks = np.float32([[1, 0, 0, 0], [0.5, 0.5, 0, 0], [0, 0.5, 0, 0.5], [0, 0, 0, 1]])  # the last is its box
    embedded = dense_embeddings(dense_map, boxes, Masks.encode(bits))
    np.testing.assert_allclose(embedded.square(), of_masks, atol=1e-3)


@pytest.mark.parametrize("method", get_args(ZeroShotMethod))
def test_regionspot_without_a_head_has_the_scores_of_the_baseline(
    world, manifest, encoder, vocabulary, localizer, method
):
    image_folder, boxes = image_folder_of("toy", world, "val", manifest), manifest.boxes_xyxy[manifest.regions(2)]
    spot = RegionSpot(None, localizer, encoder, vocabulary.templates, method=method)
    regions = spot.predict(image_folder / str(manifest.paths[2]), boxes, vocabulary.names, top=1)
    arguments = encoder, manifest, image_folder, vocabulary
    baseline = CropBaseline(*arguments) if method == "crop" else MapBaseline("dense", *arguments)
    expected = scores(baseline, [2])[0].probabilities.max(axis=1)
    np.testing.assert_allclose([region.score for region in regions], expected, atol=1e-5)


def test_the_mean_in_masks_needs_a_localizer(encoder):
    with pytest.raises(InputError, match="baseline dense-mask: there is no localizer; use --baseline dense"):
        MapBaseline("dense-mask", encoder, None, None, None)


@pytest.fixture(scope="module")
def cache(world, tmp_path_factory):
    """A float32 cache of the maps of the validation images, extracted by the command."""
    path = tmp_path_factory.mktemp("cache") / "val.zarr"
    options = ["--preset", "toy", "--localizer", "none", "--map", "dense", "--encoding", "float32", "--device", "cpu"]
    result = CliRunner().invoke(
        app, ["extract", "toy", "--data", str(world), "--split", "val", "--cache", str(path), *options]
    )
    assert not result.exit_code, result.output
    return path


def test_dense_maps_from_a_cache_give_the_results_of_the_images(world, cache, results, tmp_path):
    options = {"data": world, "dataset": "toy", "preset": "toy", "templates": "plain", "device": "cpu"}
    from_cache = evaluate(EvaluationOptions(**options, out=tmp_path / "out", baseline="dense", cache=cache))
    assert from_cache["bbox"] == pytest.approx(results["dense"]["bbox"], nan_ok=True)
    assert from_cache["detections"] == results["dense"]["detections"]


def test_a_baseline_that_a_cache_cannot_give_is_refused(world, manifest, tmp_path):
    cache = FeatureCache.create(tmp_path / "c.zarr", manifest, [FeatureSet("toy_clip", "map", (145, 192))])
    options = EvaluationOptions(data=world, dataset="toy", preset="toy", out=tmp_path / "out", cache=cache.path)
    with pytest.raises(
        InputError, match=r"baseline dense-mask: runs from images, a cache holds no masks; leave --cache"
    ):
        evaluate(replace(options, baseline="dense-mask"))
    with pytest.raises(InputError, match=r"--baseline dense needs toy_clip_dense_map; run .* again with --map dense"):
        evaluate(replace(options, baseline="dense"))
