import numpy as np
import pytest
import torch
from PIL import Image

from regionspot.evaluation.evaluate import LvisEvaluation, evaluate_lvis
from regionspot.evaluation.inference.baselines import CropBaseline, PooledBaseline, crop
from regionspot.evaluation.inference.scoring import class_probabilities
from regionspot.fusion.heads.pooling import box_weights, relative_boxes
from regionspot.fusion.vocabulary import build_vocabulary
from regionspot.pipeline.backbones.clip import load_encoder
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
def vocabulary(encoder, manifest):
    return build_vocabulary([category.name for category in manifest.categories], ["{}."], encoder)


def boxes(*rows):
    return np.array(rows, np.float32)


@pytest.mark.parametrize(("kind", "method"), [(CropBaseline, "embed_images"), (PooledBaseline, "encode")])
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
    probabilities = scores(PooledBaseline(encoder, manifest, image_folder, vocabulary), [2])[0].probabilities
    image = encoder.preprocess(Image.open(image_folder / str(manifest.paths[2])))
    patches = encoder.encode(image[None])[0, 1:]
    regions = manifest.boxes_xyxy[manifest.regions(2)]
    relative = torch.from_numpy(relative_boxes(regions, manifest.heights[2], manifest.widths[2]))
    pooled = encoder.project(box_weights(relative, 12)[:, 0] @ patches)
    expected = class_probabilities(pooled, vocabulary.embeddings, encoder.logit_scale)
    assert probabilities == pytest.approx(expected, abs=1e-5)


def test_crops_are_more_accurate_than_pooling_and_slower(world, tmp_path):
    results = {
        name: evaluate_lvis(
            LvisEvaluation(
                data=world,
                out=tmp_path / name,
                dataset="toy",
                baseline=name,
                preset="toy",
                templates="plain",
                device="cpu",
            )
        )
        for name in ("crop", "pooled")
    }
    # Guessing one of 192 classes gives an AP of about 0.01.
    assert results["crop"]["bbox"]["AP"] > 0.3
    # The toy CLIP is not trained to align its patches with names.
    assert 0 <= results["pooled"]["bbox"]["AP"] < results["crop"]["bbox"]["AP"]
    seconds = {name: result["seconds_per_picture"]["on_shared_maps"] for name, result in results.items()}
    assert seconds["crop"] > 3 * seconds["pooled"]
