import json
import pickle
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from regionspot.cache.errors import AnnotationError, InputError, ProvenanceMismatchError, WeightsError
from regionspot.cache.store import FeatureCache
from regionspot.evaluation.evaluate import LvisEvaluation, evaluate_lvis
from regionspot.evaluation.inference import resumable as inference
from regionspot.evaluation.inference.methods import HeadOnCache, HeadOnImages
from regionspot.evaluation.inference.region_spot import RegionSpot
from regionspot.evaluation.inference.resumable import Unreadable, infer
from regionspot.evaluation.inference.scoring import RegionScores
from regionspot.evaluation.metrics import lvis_ap
from regionspot.evaluation.report.sheet import judged_sheet
from regionspot.evaluation.report.tables import ap_markdown, ap_table, row_of
from regionspot.fusion.checkpoint import HeadInfo, save_checkpoint
from regionspot.fusion.head import FusionHead, HeadConfig
from regionspot.pipeline.backbones.bundle import Backbones
from regionspot.pipeline.datasets.failure_limit import FailureLimit
from regionspot.pipeline.datasets.registry import image_folder_of, read_dataset
from regionspot.pipeline.extraction.extract import extract

WEIGHTS = "random:0"  # equality and resuming do not ask for sense; the baselines' tests do


@pytest.fixture(scope="module", autouse=True)
def _home(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REGIONSPOT_HOME", str(tmp_path_factory.mktemp("home")))
        yield


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    head = FusionHead(HeadConfig(token_dim=128, width=192, text_dim=128, layers=2, ffn=128))
    info = HeadInfo(
        preset="toy",
        localizer="toy_sam",
        encoder="toy_clip",
        weights_sha256={"toy_sam": WEIGHTS, "toy_clip": WEIGHTS},
        templates=("{}.",),
    )
    path = tmp_path_factory.mktemp("head") / "head.safetensors"
    save_checkpoint(path, head, info)
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
def asked(world, checkpoint, tmp_path):
    options = {"dataset": "toy", "split": "val", "weights": WEIGHTS, "device": "cpu"}
    return LvisEvaluation(data=world, out=tmp_path / "out", checkpoint=checkpoint, **options)


class Counted:
    """A method of made-up scores that remembers which rows it was asked for."""

    name = "counted"
    device = torch.device("cpu")

    def __init__(self, manifest, identity=0, broken=()):
        self.manifest, self.identity, self.broken, self.asked = manifest, {"seed": identity}, broken, []

    def score(self, rows, timed):
        for row in rows:
            self.asked.append(row)
            if row in self.broken:
                yield Unreadable(f"image {row} is broken")
                continue
            rng = np.random.default_rng(row)
            count = int(self.manifest.region_count[row])
            with timed("work"):
                yield RegionScores(rng.random((count, len(self.manifest.categories)), np.float32))


@pytest.fixture
def parts_of_two(monkeypatch):
    monkeypatch.setattr(inference, "PART_SIZE", 2)


def same(one, other):
    return all(
        np.array_equal(getattr(one, name), getattr(other, name))
        for name in ("image_ids", "category_ids", "boxes_xywh", "scores", "regions")
    )


def test_images_and_cache_give_the_same_scores_up_to_its_rounding(world, spot, manifest, cache):
    vocabulary = spot.vocabulary([category.name for category in manifest.categories])
    images = image_folder_of("toy", world, "val", manifest)
    rows, timed = range(len(manifest)), inference._timed(inference.Progress(8, "images"), torch.device("cpu"))
    end_to_end = list(HeadOnImages(spot, manifest, images, vocabulary, masks=False).score(rows, timed))
    stored = list(HeadOnCache(spot.head, cache, vocabulary, ("toy_sam", "toy_clip")).score(rows, timed))
    for one, other, count in zip(end_to_end, stored, manifest.region_count, strict=True):
        assert one.probabilities.shape == (count, 192)
        assert one.probabilities.sum(axis=1) == pytest.approx(1, abs=1e-5)
        # The softmax is of 100 x cosine, and float16 keeps 3 digits: 0.1 in a logit, a tenth of a probability.
        assert np.abs(np.log(one.probabilities) - np.log(other.probabilities)).max() < 0.1
        assert np.abs(one.probabilities - other.probabilities).max() < 0.01


class Small:
    """A model on a GPU that holds `most` images at a time."""

    def __init__(self, model, most=2):
        self._model, self._most, self.sizes = model, most, []

    def __getattr__(self, name):
        return getattr(self._model, name)

    def _fits(self, images):
        self.sizes.append(len(images))
        if len(images) > self._most:
            raise torch.OutOfMemoryError(f"{len(images)} images")

    def encode(self, images):
        self._fits(images)
        return self._model.encode(images)

    def __call__(self, tokens, mask, maps):
        self._fits(tokens)
        return self._model(tokens, mask, maps)


def probabilities(method, manifest):
    timed = inference._timed(inference.Progress(8, "images"), torch.device("cpu"))
    return [scores.probabilities for scores in method.score(range(len(manifest)), timed)]


def test_what_the_memory_of_a_gpu_does_not_hold_is_evaluated_in_halves(world, spot, manifest, cache):
    vocabulary = spot.vocabulary([category.name for category in manifest.categories])
    images = image_folder_of("toy", world, "val", manifest)
    tight = RegionSpot(spot.head, Small(spot.localizer), Small(spot.encoder), spot.templates)
    tight.head = Small(spot.head, most=1)
    on_cache = HeadOnCache(spot.head, cache, vocabulary, ("toy_sam", "toy_clip"))
    expected = probabilities(on_cache, manifest)
    on_cache._head = Small(spot.head, most=3)
    for found, wanted in (
        (HeadOnImages(tight, manifest, images, vocabulary, masks=False), probabilities(
            HeadOnImages(spot, manifest, images, vocabulary, masks=False), manifest)),
        (on_cache, expected),
    ):  # fmt: skip
        for one, other in zip(probabilities(found, manifest), wanted, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-5)
    assert tight.localizer.sizes == tight.encoder.sizes == [8, 4, 2, 2, 2, 2]
    assert tight.head.sizes == [8, 4, 2] + 8 * [1]
    assert on_cache._head.sizes == [8, 4] + 4 * [2]


def test_an_image_whose_scores_are_not_finite_fails_and_the_others_are_scored(manifest, tmp_path, parts_of_two):
    class Overflowing(Counted):
        def score(self, rows, timed):
            for row, scores in zip(rows, super().score(rows, timed), strict=True):
                if row in self.overflowing:
                    scores.probabilities[0, 0] = np.nan
                yield scores

    method = Overflowing(manifest)
    method.overflowing = [5]
    found = infer(method, tmp_path, max_failures=FailureLimit(share=0.2))
    (reason,) = found.failures.values()
    assert reason.startswith(f"{manifest.paths[5]}: 1 of ")
    assert "scores are not finite" in reason
    assert np.isfinite(found.detections.scores).all()
    method.overflowing = range(8)
    with pytest.raises(InputError, match="scores are not finite"):
        infer(method, tmp_path / "all", max_failures=FailureLimit(share=0.2))


def test_an_evaluation_names_its_protocol_and_leaves_results_that_other_tools_read(asked, manifest):
    found = evaluate_lvis(asked)
    assert found == json.loads((asked.out / "results.json").read_text())
    assert found["protocol"]["boxes"] == "ground truth"
    assert found["protocol"]["candidates_per_box"] == "all 192 classes"
    assert found["protocol"]["detections_per_picture"] == 300
    assert (found["pictures"], found["detections"]) == (8, 8 * 300)
    assert found["seconds_per_picture"]["in_all"] > found["seconds_per_picture"]["on_shared_maps"] > 0
    truth = str(asked.data / "toy_val.json")
    with lvis_ap._lvis() as lvis:
        official = lvis.LVISEval(truth, str(asked.out / "detections.json"), "bbox")
        official.run()
    # -1 is the package's way to say that a group has no truth.
    assert {key: -1 if value is None else value for key, value in found["bbox"].items()} == {
        key: official.results[key] for key in lvis_ap.METRICS
    }
    assert found["segm"]["AP"] is not None
    table = ap_table([row_of(found), row_of(found, "segm", "masks")])
    assert f"{100 * found['bbox']['AP']:.1f}" in table.splitlines()[2]
    assert ap_markdown([row_of(found)]).count("\n") == 2


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
def test_ground_truth_is_checked_before_models_are_loaded(asked, world, tmp_path, monkeypatch, change):
    def loaded(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(RegionSpot, "load", loaded)
    path = ground_truth_with(world, tmp_path / "truth.json", change)
    with pytest.raises(AnnotationError, match=r"cannot be evaluated, the first: (annotations|categories)\[5\]"):
        evaluate_lvis(replace(asked, annotations=path))


def test_masks_of_the_ground_truth_need_not_be_sound_where_none_are_evaluated(asked, world, tmp_path):
    path = ground_truth_with(world, tmp_path / "truth.json", lambda d: d["annotations"][5].update(segmentation=None))
    assert evaluate_lvis(replace(asked, annotations=path, masks=False, limit=1))["segm"] is None


def test_results_name_images_whose_ids_are_names_and_ap_is_the_same(asked, world, tmp_path):
    def named(dataset):
        for image in dataset["images"]:
            image["id"] = f"image {image['id']}"
        for annotation in dataset["annotations"]:
            annotation["image_id"] = f"image {annotation['image_id']}"

    path = ground_truth_with(world, tmp_path / "named.json", named)
    expected = evaluate_lvis(replace(asked, masks=False))
    numbers = [each["image_id"] for each in json.loads((asked.out / "detections.json").read_text())]
    found = evaluate_lvis(replace(asked, annotations=path, masks=False, out=tmp_path / "other"))
    names = [each["image_id"] for each in json.loads((tmp_path / "other" / "detections.json").read_text())]
    assert found["bbox"] == expected["bbox"]
    assert names == [f"image {number}" for number in numbers]


def test_a_limit_evaluates_the_first_images_against_their_own_truth_only(asked, manifest, tmp_path):
    found = evaluate_lvis(replace(asked, limit=3, masks=False))
    whole = json.loads((asked.data / "toy_val.json").read_text())
    kept = set(manifest.image_ids[:3].tolist())
    cut = tmp_path / "cut.json"
    images = [image for image in whole["images"] if image["id"] in kept]
    annotations = [region for region in whole["annotations"] if region["image_id"] in kept]
    cut.write_text(json.dumps({**whole, "images": images, "annotations": annotations}))
    alone = evaluate_lvis(replace(asked, annotations=cut, masks=False, out=tmp_path / "alone"))
    assert found["pictures"] == 3
    assert found["segm"] is None
    assert found["bbox"] == alone["bbox"]


def test_a_detectors_scores_multiply_those_of_the_classes(asked, manifest, tmp_path):
    image_id, regions = int(manifest.image_ids[2]), manifest.regions(2)
    boxes = manifest.boxes_xyxy[regions].tolist()
    proposals = tmp_path / "proposals.json"
    scores = [0.5] * len(boxes)
    proposals.write_text(json.dumps({str(image_id): {"boxes": boxes, "scores": scores}}))
    found = evaluate_lvis(replace(asked, boxes=str(proposals), masks=False))
    detected = json.loads((asked.out / "detections.json").read_text())
    evaluate_lvis(replace(asked, masks=False, out=tmp_path / "truth"))
    plain = json.loads((tmp_path / "truth/detections.json").read_text())
    best = [max(each["score"] for each in some if each["image_id"] == image_id) for some in (detected, plain)]
    assert best[0] == pytest.approx(0.5 * best[1], rel=1e-4)
    assert {each["image_id"] for each in detected} == {image_id}
    assert found["protocol"]["boxes"] == "detector proposals, proposals.json"
    assert "times the detector's score" in found["protocol"]["score"]


def test_from_a_cache_ap_is_that_from_images_without_any_mask(asked, cache, tmp_path):
    stored = evaluate_lvis(replace(asked, cache=cache.path))
    images = evaluate_lvis(replace(asked, masks=False, out=tmp_path / "photos"))
    assert stored["segm"] is None
    assert stored["bbox"]["AP"] == pytest.approx(images["bbox"]["AP"], abs=0.02)
    assert "sam" not in stored["seconds"]


def test_a_cache_of_other_boxes_is_refused(asked, cache, tmp_path):
    proposals = tmp_path / "proposals.json"
    image_id = int(cache.manifest.image_ids[0])
    proposals.write_text(json.dumps({str(image_id): {"boxes": [[1, 1, 50, 50]], "scores": [1]}}))
    with pytest.raises(ProvenanceMismatchError, match="other images, boxes or classes"):
        evaluate_lvis(replace(asked, cache=cache.path, boxes=str(proposals)))


def test_backbones_that_the_head_was_not_trained_on_are_refused_unless_asked_for(asked, cache):
    with pytest.raises(WeightsError, match=r"was trained on toy_sam with weights random:0, but random:1"):
        evaluate_lvis(replace(asked, weights="random:1"))
    assert evaluate_lvis(replace(asked, weights="random:1", check_weights=False, masks=False, limit=1))["pictures"] == 1
    with pytest.raises(ProvenanceMismatchError, match="random:1 are loaded"):
        evaluate_lvis(replace(asked, cache=cache.path, weights="random:1", templates="imagenet"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"checkpoint": None}, "give --checkpoint"),
        ({"checkpoint": None, "baseline": "crop"}, "give --preset"),
        ({"baseline": "best"}, "expected one of crop, pooled"),
        ({"limit": 0}, "expected at least 1"),
        ({"templates": "none such"}, "expected one of"),
        ({"split": "test"}, "toy split 'test'"),
    ],
)
def test_options_that_do_not_fit_are_named_in_one_line(asked, change, message):
    with pytest.raises(InputError, match=message) as caught:
        evaluate_lvis(replace(asked, **change))
    assert "\n" not in str(caught.value)


def test_a_second_run_asks_for_nothing_and_says_the_same(manifest, tmp_path, parts_of_two):
    first, second = Counted(manifest), Counted(manifest)
    one, other = infer(first, tmp_path), infer(second, tmp_path)
    assert (first.asked, second.asked) == (list(range(8)), [])
    assert same(one.detections, other.detections)
    assert one.seconds == other.seconds


def test_what_decides_the_numbers_decides_the_folder(manifest, tmp_path, parts_of_two):
    infer(Counted(manifest), tmp_path)
    for changed in (Counted(manifest, identity=1), Counted(manifest.select(np.arange(7)))):
        infer(changed, tmp_path)
        assert len(changed.asked) == len(changed.manifest)


def test_a_damaged_part_is_made_again_and_no_other(manifest, tmp_path, parts_of_two):
    whole = infer(Counted(manifest), tmp_path)
    part = next(tmp_path.glob("*/00001.npz"))
    part.write_bytes(part.read_bytes()[:-100])
    again = Counted(manifest)
    assert same(infer(again, tmp_path).detections, whole.detections)
    assert again.asked == [2, 3]


def test_an_unreadable_image_is_counted_and_tried_again_later(manifest, tmp_path, parts_of_two):
    found = infer(Counted(manifest, broken=[5]), tmp_path, max_failures=FailureLimit(share=0.2))
    assert found.failures == {int(manifest.image_ids[5]): "image 5 is broken"}
    assert manifest.image_ids[5] not in found.detections.image_ids
    mended = Counted(manifest)
    assert infer(mended, tmp_path).failures == {}
    assert mended.asked == [4, 5]


def test_more_unreadable_images_than_allowed_stop_the_run(manifest, tmp_path, parts_of_two):
    method = Counted(manifest, broken=[0, 1])
    with pytest.raises(InputError, match=r"2 of 8 images could not be read.*image 0 is broken"):
        infer(method, tmp_path, max_failures=FailureLimit(share=0.2))
    assert method.asked == [0, 1]


def test_a_missing_image_leaves_the_others_in_order(world, spot, manifest, tmp_path):
    vocabulary = spot.vocabulary([category.name for category in manifest.categories])
    paths = manifest.paths.copy()
    paths[3] = "val/absent.jpg"
    images = image_folder_of("toy", world, "val", manifest)
    whole = infer(HeadOnImages(spot, manifest, images, vocabulary, masks=False), tmp_path)
    holed = HeadOnImages(spot, replace(manifest, paths=paths), images, vocabulary, masks=False)
    found = infer(holed, tmp_path, max_failures=FailureLimit(share=0.5))
    assert "absent.jpg" in found.failures[int(manifest.image_ids[3])]
    expected = whole.detections.take(whole.detections.image_ids != manifest.image_ids[3])
    assert np.array_equal(found.detections.image_ids, expected.image_ids)
    assert found.detections.scores == pytest.approx(expected.scores, abs=1e-5)


KILLED = """
import os, pickle, signal, sys
from pathlib import Path
import numpy as np, torch
from regionspot.evaluation.inference import resumable as inference
from regionspot.evaluation.inference.scoring import RegionScores
inference.PART_SIZE = 2

class Counted:
    name, device, identity = "counted", torch.device("cpu"), {"seed": 0}
    manifest = pickle.loads(Path(sys.argv[1]).read_bytes())

    def score(self, rows, timed):
        for row in rows:
            if row == 5:
                os.kill(os.getpid(), signal.SIGKILL)
            count = int(self.manifest.region_count[row])
            rng = np.random.default_rng(row)
            yield RegionScores(rng.random((count, len(self.manifest.categories)), np.float32))

inference.infer(Counted(), Path(sys.argv[2]))
"""


def test_a_run_killed_inside_a_part_goes_on_with_that_part(manifest, tmp_path, parts_of_two):
    (tmp_path / "manifest").write_bytes(pickle.dumps(manifest))
    killed = subprocess.run([sys.executable, "-c", KILLED, tmp_path / "manifest", tmp_path / "parts"], check=False)
    assert killed.returncode == -signal.SIGKILL
    resumed = Counted(manifest)
    found = infer(resumed, tmp_path / "parts")
    assert resumed.asked == [4, 5, 6, 7]
    assert same(found.detections, infer(Counted(manifest), tmp_path / "never stopped").detections)


def test_the_sheet_marks_wrong_names_in_red_and_right_ones_in_green(world, manifest, tmp_path):
    images = image_folder_of("toy", world, "val", manifest)

    class Half(Counted):
        """Right about the first region of every image, wrong about all others."""

        def score(self, rows, timed):
            for row in rows:
                classes = self.manifest.category_index[self.manifest.regions(row)].copy()
                classes[1:] = (classes[1:] + 1) % 192
                yield RegionScores(np.eye(192, dtype=np.float32)[classes] * np.float32(0.9))

    found = infer(Half(manifest), tmp_path)
    sheet = np.asarray(judged_sheet(manifest, images, found.detections, count=4, title="four"))
    green, red = ((sheet == colour).all(axis=-1).sum() for colour in ((70, 200, 90), (235, 70, 60)))
    assert green > 500
    assert red > 2 * green


def test_a_sheet_turns_images_by_the_rule_of_the_features(world, manifest, tmp_path):
    images, path = image_folder_of("toy", world, "val", manifest), str(manifest.paths[0])
    detections = infer(Counted(manifest), tmp_path / "inference").detections
    exif = Image.Exif()
    exif[0x0112] = 3
    for folder, angle in (("upright", 0), ("stored", 180)):
        (tmp_path / folder / path).parent.mkdir(parents=True)
        Image.open(images / path).rotate(angle).save(
            tmp_path / folder / path, "PNG", **({"exif": exif} if angle else {})
        )
    sheets = [
        np.asarray(judged_sheet(manifest, tmp_path / folder, detections, 1, exif=rule))
        for folder, rule in [("upright", "auto"), ("stored", "apply"), ("stored", "ignore")]
    ]
    assert np.array_equal(sheets[0], sheets[1])
    assert not np.array_equal(sheets[0], sheets[2])
