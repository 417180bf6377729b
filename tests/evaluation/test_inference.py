import json
import os
import signal
from dataclasses import replace
from itertools import chain

import numpy as np
import pytest
import torch
from makers import fork, was_killed
from PIL import Image
from torch.nn.functional import normalize

from regionspot.cache.errors import AnnotationError, InputError, ProvenanceMismatchError, WeightsError
from regionspot.cache.store import FeatureCache
from regionspot.evaluation.evaluate import EvaluationOptions, evaluate
from regionspot.evaluation.inference import resumable as inference
from regionspot.evaluation.inference.methods import HeadOnCache, HeadOnImages
from regionspot.evaluation.inference.region_spot import RegionSpot
from regionspot.evaluation.inference.resumable import infer
from regionspot.evaluation.inference.scoring import FailedImage, RegionScores
from regionspot.evaluation.metrics import lvis_package
from regionspot.evaluation.metrics.average_precision import METRICS
from regionspot.evaluation.report.sheet import detections_sheet
from regionspot.evaluation.report.tables import ap_markdown, ap_table, row_of
from regionspot.fusion.checkpoint import HeadInfo, save_checkpoint
from regionspot.fusion.heads import HEAD_TYPES, HeadSpec
from regionspot.pipeline.backbones.bundle import Backbones
from regionspot.pipeline.datasets.failure_limit import FailureLimit
from regionspot.pipeline.datasets.registry import image_folder_of, read_dataset
from regionspot.pipeline.extraction.extract import extract
from regionspot.pipeline.reporting.run_stats import RunStats

pytestmark = pytest.mark.usefixtures("module_home")

WEIGHTS = "random:0"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    spec = HeadSpec(token_dim=128, width=192, text_dim=128, options={"layers": 2, "ffn": 128})
    info = HeadInfo(
        preset="toy",
        localizer="toy_sam",
        encoder="toy_clip",
        weights_sha256={"toy_sam": WEIGHTS, "toy_clip": WEIGHTS},
        templates=("{}.",),
    )
    path = tmp_path_factory.mktemp("head") / "head.safetensors"
    save_checkpoint(path, spec, spec.build(), info)
    return path


@pytest.fixture(scope="module")
def spot(checkpoint):
    return RegionSpot.load(checkpoint, WEIGHTS, "cpu")


@pytest.fixture(scope="module")
def manifest(world):
    return read_dataset("toy", world, "val")


@pytest.fixture(scope="module")
def cache(world, spot, manifest, tmp_path_factory):
    backbones = Backbones(spot.localizer, (spot.encoder,))
    store = FeatureCache.create(tmp_path_factory.mktemp("cache") / "val.zarr", manifest, backbones.feature_sets(), 4)
    extract(store, image_folder_of("toy", world, "val", manifest), backbones)
    return store


@pytest.fixture
def options(world, checkpoint, tmp_path):
    return EvaluationOptions(
        data=world, out=tmp_path / "out", checkpoint=checkpoint, dataset="toy", weights=WEIGHTS, device="cpu"
    )


class RandomScores:
    """A scoring method with random scores that records its rows."""

    name = "random"
    device = torch.device("cpu")

    def __init__(self, manifest, identity=0, broken=()):
        self.manifest, self.identity, self.broken, self.rows = manifest, {"seed": identity}, broken, []

    def score(self, parts, stats):
        for row in chain(*parts):
            self.rows.append(row)
            if row in self.broken:
                yield FailedImage(f"image {row} is broken")
                continue
            rng = np.random.default_rng(row)
            count = int(self.manifest.region_count[row])
            with stats.timed("work"):
                yield RegionScores(rng.random((count, len(self.manifest.categories)), np.float32))


@pytest.fixture
def parts_of_two(monkeypatch):
    monkeypatch.setattr(inference, "PART_SIZE", 2)


def same(one, other):
    return all(
        np.array_equal(getattr(one, name), getattr(other, name))
        for name in ("image_ids", "category_ids", "boxes_xywh", "scores", "regions")
    )


@pytest.mark.parametrize("kind", [*HEAD_TYPES, "own class"])
def test_scores_from_images_and_from_a_cache_are_equal_up_to_rounding(world, spot, manifest, cache, tmp_path, kind):
    if kind == "own class":
        kind = f"{tmp_path / 'my_head.py'}:MyHead"
        (tmp_path / "my_head.py").write_text("from regionspot.fusion.heads.pooled import MlpHead as MyHead\n")
    torch.manual_seed(0)
    options = {"classes": 30} if kind == "prototypes" else {}
    head = HeadSpec(type=kind, token_dim=128, width=192, text_dim=128, options=options).build()
    if kind == "prototypes":
        head.prototypes.copy_(normalize(torch.randn(30, 192), dim=-1))
        head.texts.copy_(normalize(torch.randn(30, 128), dim=-1))
    spot = RegionSpot(head, spot.localizer, spot.encoder, spot.templates)
    vocabulary = spot.vocabulary([category.name for category in manifest.categories])
    image_folder = image_folder_of("toy", world, "val", manifest)
    parts, stats = [range(len(manifest))], RunStats()
    end_to_end = list(HeadOnImages(spot, manifest, image_folder, vocabulary, masks=False).score(parts, stats))
    stored = list(HeadOnCache(spot.head, cache, vocabulary, "toy_sam", "toy_clip").score(parts, stats))
    for one, other, count in zip(end_to_end, stored, manifest.region_count, strict=True):
        assert one.probabilities.shape == (count, 192)
        assert one.probabilities.sum(axis=1) == pytest.approx(1, abs=1e-5)
        # The softmax is over 100 x cosine, and float16 has 3 digits: an error of 0.1 in a logit.
        assert np.abs(np.log(one.probabilities) - np.log(other.probabilities)).max() < 0.1
        assert np.abs(one.probabilities - other.probabilities).max() < 0.01


def limit_batch(monkeypatch, model, method, limit):
    """Let `method` run out of memory for more than `limit` images; the list of its batch sizes."""
    compute, sizes = getattr(model, method), []

    def limited(images, *arguments):
        sizes.append(len(images))
        if len(images) > limit:
            raise torch.OutOfMemoryError(f"{len(images)} images")
        return compute(images, *arguments)

    monkeypatch.setattr(model, method, limited)
    return sizes


def probabilities(method, manifest):
    return [scores.probabilities for scores in method.score([range(len(manifest))], RunStats())]


def test_a_batch_that_does_not_fit_into_gpu_memory_is_split(world, spot, manifest, cache, monkeypatch):
    vocabulary = spot.vocabulary([category.name for category in manifest.categories])
    image_folder = image_folder_of("toy", world, "val", manifest)
    for make_method, head_limit, head_sizes in (
        (lambda: HeadOnImages(spot, manifest, image_folder, vocabulary, masks=False), 1, [8, 4, 2] + 8 * [1]),
        (lambda: HeadOnCache(spot.head, cache, vocabulary, "toy_sam", "toy_clip"), 3, [8, 4] + 4 * [2]),
    ):
        expected = probabilities(make_method(), manifest)
        with monkeypatch.context() as patch:
            encoder_sizes = [limit_batch(patch, model, "encode", 2) for model in (spot.localizer, spot.encoder)]
            sizes = limit_batch(patch, spot.head, "forward", head_limit)
            for one, other in zip(probabilities(make_method(), manifest), expected, strict=True):
                np.testing.assert_allclose(one, other, atol=1e-5)
        assert sizes == head_sizes
        assert encoder_sizes[0] == encoder_sizes[1]
        assert encoder_sizes[0] in ([8, 4, 2, 2, 2, 2], [])


def test_an_image_with_scores_that_are_not_finite_fails_alone(manifest, tmp_path, parts_of_two):
    class Overflowing(RandomScores):
        def score(self, parts, stats):
            for row, scores in zip(chain(*parts), super().score(parts, stats), strict=True):
                if row in self.overflowing:
                    scores.probabilities[0, 0] = np.nan
                yield scores

    method = Overflowing(manifest)
    method.overflowing = [5]
    result = infer(method, tmp_path, max_failures=FailureLimit(share=0.2))
    (reason,) = result.failures.values()
    assert reason.startswith(f"{manifest.paths[5]}: 1 of ")
    assert "scores are not finite" in reason
    assert np.isfinite(result.detections.scores).all()
    method.overflowing = range(8)
    with pytest.raises(InputError, match="scores are not finite"):
        infer(method, tmp_path / "all", max_failures=FailureLimit(share=0.2))


def test_an_evaluation_states_its_protocol_and_other_tools_read_its_results(options, manifest):
    result = evaluate(options)
    assert result == json.loads((options.out / "results.json").read_text())
    assert result["protocol"]["boxes"] == "ground truth"
    assert result["protocol"]["prompts_from"] == "name"
    assert result["protocol"]["candidates_per_box"] == "all 192 classes"
    assert result["protocol"]["detections_per_image"] == 300
    assert (result["images"], result["detections"]) == (8, 8 * 300)
    assert result["seconds_per_image"]["in_all"] > result["seconds_per_image"]["on_shared_maps"] > 0
    ground_truth = str(options.data / "toy_val.json")
    with lvis_package._lvis() as lvis:
        official = lvis.LVISEval(ground_truth, str(options.out / "detections.json"), "bbox")
        official.run()
    # lvis gives -1 for a group without ground truth.
    assert {key: -1 if value is None else value for key, value in result["bbox"].items()} == {
        key: official.results[key] for key in METRICS
    }
    assert result["segm"]["AP"] is not None
    table = ap_table([row_of(result), row_of(result, "segm", "masks")])
    assert f"{100 * result['bbox']['AP']:.1f}" in table.splitlines()[2]
    assert ap_markdown([row_of(result)]).count("\n") == 2


def ground_truth_with(world, path, change):
    dataset = json.loads((world / "toy_val.json").read_text())
    change(dataset)
    path.write_text(json.dumps(dataset))
    return path


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d["annotations"][5].update(segmentation=[]),
        lambda d: d["annotations"][5].update(segmentation=[[1, 2, 30, 40]]),
        lambda d: d["annotations"][5].update(area="large"),
        lambda d: d["categories"][5].pop("frequency"),
    ],
)
def test_ground_truth_is_checked_before_models_are_loaded(options, world, tmp_path, monkeypatch, change):
    def loaded(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(RegionSpot, "load", loaded)
    path = ground_truth_with(world, tmp_path / "truth.json", change)
    with pytest.raises(AnnotationError, match=r"cannot be evaluated, the first: (annotations|categories)\[5\]"):
        evaluate(replace(options, annotations=path))


def test_invalid_masks_are_ignored_if_masks_are_not_evaluated(options, world, tmp_path):
    path = ground_truth_with(world, tmp_path / "truth.json", lambda d: d["annotations"][5].update(segmentation=None))
    assert evaluate(replace(options, annotations=path, masks=False, limit=1))["segm"] is None


def test_image_ids_that_are_strings_are_kept_in_the_results(options, world, tmp_path):
    def named(dataset):
        for image in dataset["images"]:
            image["id"] = f"image {image['id']}"
        for annotation in dataset["annotations"]:
            annotation["image_id"] = f"image {annotation['image_id']}"

    path = ground_truth_with(world, tmp_path / "named.json", named)
    expected = evaluate(replace(options, masks=False, limit=2))
    numbers = [detection["image_id"] for detection in json.loads((options.out / "detections.json").read_text())]
    result = evaluate(replace(options, annotations=path, masks=False, limit=2, out=tmp_path / "other"))
    names = [detection["image_id"] for detection in json.loads((tmp_path / "other" / "detections.json").read_text())]
    assert result["bbox"] == expected["bbox"]
    assert names == [f"image {number}" for number in numbers]


def test_a_limit_evaluates_the_first_images_only(options, manifest, tmp_path):
    result = evaluate(replace(options, limit=3, masks=False))
    whole = json.loads((options.data / "toy_val.json").read_text())
    kept = set(manifest.image_ids[:3].tolist())
    cut = tmp_path / "cut.json"
    images = [image for image in whole["images"] if image["id"] in kept]
    annotations = [region for region in whole["annotations"] if region["image_id"] in kept]
    cut.write_text(json.dumps({**whole, "images": images, "annotations": annotations}))
    alone = evaluate(replace(options, annotations=cut, masks=False, out=tmp_path / "alone"))
    assert result["images"] == 3
    assert result["segm"] is None
    assert result["bbox"] == alone["bbox"]


def test_the_scores_of_a_detector_multiply_those_of_the_classes(options, manifest, tmp_path):
    image_id, regions = int(manifest.image_ids[0]), manifest.regions(0)
    boxes = manifest.boxes_xyxy[regions].tolist()
    proposals = tmp_path / "proposals.json"
    scores = [0.5] * len(boxes)
    proposals.write_text(json.dumps({str(image_id): {"boxes": boxes, "scores": scores}}))
    result = evaluate(replace(options, boxes=str(proposals), masks=False, limit=1))
    detected = json.loads((options.out / "detections.json").read_text())
    evaluate(replace(options, masks=False, limit=1, out=tmp_path / "truth"))
    plain = json.loads((tmp_path / "truth/detections.json").read_text())
    best = [max(item["score"] for item in items if item["image_id"] == image_id) for items in (detected, plain)]
    assert best[0] == pytest.approx(0.5 * best[1], rel=1e-4)
    assert {item["image_id"] for item in detected} == {image_id}
    assert result["protocol"]["boxes"] == "detector proposals, proposals.json"
    assert "times the detector's score" in result["protocol"]["score"]


def test_ap_from_a_cache_equals_ap_from_images(options, cache, tmp_path):
    stored = evaluate(replace(options, cache=cache.path))
    images = evaluate(replace(options, masks=False, out=tmp_path / "photos"))
    assert stored["segm"] is None
    assert stored["bbox"]["AP"] == pytest.approx(images["bbox"]["AP"], abs=0.02)
    assert "encode" not in stored["seconds"]


def test_a_cache_of_other_boxes_is_refused(options, cache, tmp_path):
    proposals = tmp_path / "proposals.json"
    image_id = int(cache.manifest.image_ids[0])
    proposals.write_text(json.dumps({str(image_id): {"boxes": [[1, 1, 50, 50]], "scores": [1]}}))
    with pytest.raises(ProvenanceMismatchError, match="other images, boxes or classes"):
        evaluate(replace(options, cache=cache.path, boxes=str(proposals)))


def test_other_backbones_than_in_training_need_no_check_weights(options, cache):
    with pytest.raises(WeightsError, match=r"was trained on toy_sam with weights random:0, but random:1"):
        evaluate(replace(options, weights="random:1"))
    unchecked = replace(options, weights="random:1", check_weights=False, masks=False, limit=1)
    assert evaluate(unchecked)["images"] == 1
    with pytest.raises(ProvenanceMismatchError, match="random:1 are loaded"):
        evaluate(replace(options, cache=cache.path, weights="random:1", templates="imagenet"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"checkpoint": None}, "give --checkpoint"),
        ({"checkpoint": None, "baseline": "crop"}, "give --preset"),
        ({"baseline": "best"}, "expected one of crop, pooled"),
        ({"limit": 0}, "expected at least 1"),
        ({"templates": "none such"}, "expected one of"),
        ({"names_from": "synonyms"}, "the categories have none"),
        ({"split": "test"}, "toy split 'test'"),
    ],
)
def test_invalid_options_are_refused_in_one_line(options, change, message):
    with pytest.raises(InputError, match=message) as caught:
        evaluate(replace(options, **change))
    assert "\n" not in str(caught.value)


def test_a_second_run_loads_all_parts(manifest, tmp_path, parts_of_two):
    first, second = RandomScores(manifest), RandomScores(manifest)
    one, other = infer(first, tmp_path), infer(second, tmp_path)
    assert (first.rows, second.rows) == (list(range(8)), [])
    assert same(one.detections, other.detections)
    assert one.seconds == other.seconds


def test_another_method_or_manifest_uses_another_folder(manifest, tmp_path, parts_of_two):
    infer(RandomScores(manifest), tmp_path)
    for changed in (RandomScores(manifest, identity=1), RandomScores(manifest.select(np.arange(7)))):
        infer(changed, tmp_path)
        assert len(changed.rows) == len(changed.manifest)


def test_only_a_damaged_part_is_computed_again(manifest, tmp_path, parts_of_two):
    whole = infer(RandomScores(manifest), tmp_path)
    part = next(tmp_path.glob("*/00001.npz"))
    part.write_bytes(part.read_bytes()[:-100])
    again = RandomScores(manifest)
    assert same(infer(again, tmp_path).detections, whole.detections)
    assert again.rows == [2, 3]


def test_an_unreadable_image_is_a_failure_and_retried_by_the_next_run(manifest, tmp_path, parts_of_two):
    result = infer(RandomScores(manifest, broken=[5]), tmp_path, max_failures=FailureLimit(share=0.2))
    assert result.failures == {int(manifest.image_ids[5]): "image 5 is broken"}
    assert manifest.image_ids[5] not in result.detections.image_ids
    second = RandomScores(manifest)
    assert infer(second, tmp_path).failures == {}
    assert second.rows == [4, 5]


def test_more_unreadable_images_than_allowed_stop_the_run(manifest, tmp_path, parts_of_two):
    method = RandomScores(manifest, broken=[0, 1])
    with pytest.raises(InputError, match=r"2 of 8 images could not be read.*image 0 is broken"):
        infer(method, tmp_path, max_failures=FailureLimit(share=0.2))
    assert method.rows == [0, 1]


def test_a_missing_image_does_not_change_the_others(world, spot, manifest, tmp_path):
    vocabulary = spot.vocabulary([category.name for category in manifest.categories])
    paths = manifest.paths.copy()
    paths[3] = "val/absent.jpg"
    image_folder = image_folder_of("toy", world, "val", manifest)
    whole = infer(HeadOnImages(spot, manifest, image_folder, vocabulary, masks=False), tmp_path)
    method = HeadOnImages(spot, replace(manifest, paths=paths), image_folder, vocabulary, masks=False)
    result = infer(method, tmp_path, max_failures=FailureLimit(share=0.5))
    assert "absent.jpg" in result.failures[int(manifest.image_ids[3])]
    expected = whole.detections.take(whole.detections.image_ids != manifest.image_ids[3])
    assert np.array_equal(result.detections.image_ids, expected.image_ids)
    assert result.detections.scores == pytest.approx(expected.scores, abs=1e-5)


def test_a_run_killed_inside_a_part_resumes_with_that_part(manifest, tmp_path, parts_of_two):
    class Killed(RandomScores):
        def score(self, parts, stats):
            for row, scores in zip(chain(*parts), super().score(parts, stats), strict=True):
                if row == 5:
                    os.kill(os.getpid(), signal.SIGKILL)
                yield scores

    assert was_killed(fork(lambda: infer(Killed(manifest), tmp_path / "parts")))
    resumed = RandomScores(manifest)
    result = infer(resumed, tmp_path / "parts")
    assert resumed.rows == [4, 5, 6, 7]
    assert same(result.detections, infer(RandomScores(manifest), tmp_path / "uninterrupted").detections)


def test_the_sheet_draws_wrong_classes_in_red_and_correct_ones_in_green(world, manifest, tmp_path):
    image_folder = image_folder_of("toy", world, "val", manifest)

    class FirstCorrect(RandomScores):
        """Correct for the first region of every image only."""

        def score(self, parts, stats):
            for row in chain(*parts):
                classes = self.manifest.category_index[self.manifest.regions(row)].copy()
                classes[1:] = (classes[1:] + 1) % 192
                yield RegionScores(np.eye(192, dtype=np.float32)[classes] * np.float32(0.9))

    result = infer(FirstCorrect(manifest), tmp_path)
    sheet = np.asarray(detections_sheet(manifest, image_folder, result.detections, count=4, title="four"))
    green, red = ((sheet == colour).all(axis=-1).sum() for colour in ((70, 200, 90), (235, 70, 60)))
    assert green > 500
    assert red > 2 * green


def test_a_sheet_rotates_images_by_the_exif_rule_of_the_features(world, manifest, tmp_path):
    image_folder, path = image_folder_of("toy", world, "val", manifest), str(manifest.paths[0])
    detections = infer(RandomScores(manifest), tmp_path / "inference").detections
    exif = Image.Exif()
    exif[0x0112] = 3
    for folder, angle in (("upright", 0), ("stored", 180)):
        (tmp_path / folder / path).parent.mkdir(parents=True)
        Image.open(image_folder / path).rotate(angle).save(
            tmp_path / folder / path, "PNG", **({"exif": exif} if angle else {})
        )
    sheets = [
        np.asarray(detections_sheet(manifest, tmp_path / folder, detections, 1, exif=rule))
        for folder, rule in [("upright", "auto"), ("stored", "apply"), ("stored", "ignore")]
    ]
    assert np.array_equal(sheets[0], sheets[1])
    assert not np.array_equal(sheets[0], sheets[2])
