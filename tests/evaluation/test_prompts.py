"""What `RegionSpot.predict` takes besides boxes, what it gives, and how it works without a trained head."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask

from regionspot.cache.errors import InputError
from regionspot.evaluation import RegionSpot, threshold_at_precision
from regionspot.fusion.heads import HeadSpec
from regionspot.pipeline.backbones import sam
from regionspot.pipeline.backbones.clip import load_text_encoder
from regionspot.pipeline.backbones.sam import load_localizer
from regionspot.pipeline.datasets.registry import image_folder_of, read_dataset

pytestmark = pytest.mark.usefixtures("module_home")

NAMES = ["red star", "blue ring", "green cross"]


@pytest.fixture(scope="module")
def backbones():
    return load_localizer("toy_sam"), load_text_encoder("toy_clip")


@pytest.fixture(scope="module")
def spot(backbones):
    torch.manual_seed(0)
    spec = HeadSpec(token_dim=128, width=192, text_dim=128, options={"layers": 1, "ffn": 64})
    return RegionSpot(spec.build(), *backbones, ["{}."])


@pytest.fixture(scope="module")
def zero_shot(backbones):
    return RegionSpot(None, *backbones, ["{}."], method="dense")


@pytest.fixture(scope="module")
def toy_image(world):
    """An image of the toy world, its boxes and the names of what they show."""
    manifest = read_dataset("toy", world, "val")
    regions = manifest.regions(0)
    names = [manifest.categories[index].name for index in manifest.category_index[regions]]
    path = image_folder_of("toy", world, "val", manifest) / manifest.paths[0]
    return path, manifest.boxes_xyxy[regions], names


@pytest.fixture
def more_points(monkeypatch):
    """The toy SAM was trained on boxes alone: it segments little around points, and of low quality."""
    for name, limit in {"POINTS_PER_SIDE": 8, "MIN_PREDICTED_IOU": 0.35, "MIN_STABILITY": 0.1}.items():
        monkeypatch.setattr(sam, name, limit)


def same_names(one, other):
    assert [(region.name, region.box_xyxy) for region in one] == [(region.name, region.box_xyxy) for region in other]
    assert [region.score for region in one] == pytest.approx([region.score for region in other], abs=1e-5)


def test_a_mask_has_the_result_of_the_box_around_it_and_is_returned(spot, toy_image):
    path, boxes, _ = toy_image
    of_boxes = spot.predict(path, boxes[:2], NAMES)
    masks = np.zeros((2, *of_boxes[0].mask.shape), bool)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes[:2].astype(int), strict=True):
        mask[y1:y2, x1:x2] = True
    of_masks = spot.predict(path, names=NAMES, masks=masks)
    same_names(of_masks, spot.predict(path, boxes[:2].astype(int), NAMES))
    assert np.array_equal([region.mask for region in of_masks], masks)


def test_a_point_has_the_result_of_the_box_around_what_is_segmented_there(spot, toy_image):
    path, boxes, _ = toy_image
    image = spot.encode(path)
    x, y = (boxes[0, :2] + boxes[0, 2:]) / 2
    prompts = [(x, y), [(x, y, 1), (boxes[0, 0], boxes[0, 1], 1), (5, 5, 0)]]
    regions = spot.predict(image, names=NAMES, points=prompts)
    for region, prompt in zip(regions, prompts, strict=True):
        values = np.array(prompt if isinstance(prompt, list) else [(*prompt, 1)], np.float32)[None]
        (mask,) = spot.localizer.masks_of_points(
            image.embedding, values[..., :2], values[..., 2].astype(np.int64), image.size
        )
        rows, columns = np.nonzero(mask)
        assert region.box_xyxy == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
    same_names(regions, spot.predict(image, [region.box_xyxy for region in regions], NAMES))


def test_without_boxes_regions_are_proposed(spot, toy_image, more_points):
    image = spot.encode(toy_image[0])
    proposed = spot.localizer.propose_boxes(image.embedding, image.size)
    regions = spot.predict(image, names=NAMES)
    assert len(regions) > 2
    assert [region.box_xyxy for region in regions] == [tuple(box) for box in proposed.tolist()]


def test_no_proposal_is_no_region_and_a_warning(spot, toy_image, caplog, monkeypatch):
    monkeypatch.setattr(sam, "POINTS_PER_SIDE", 2)
    assert spot.predict(toy_image[0], names=NAMES) == []
    assert f"{toy_image[0]}: toy_sam proposes no region; give boxes" in caplog.text


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ({"points": [(1, 2, 3, 4)]}, "point 1 is .*expected a point"),
        ({"points": [(10, 10), (999, 10)]}, r"point 2 is \[\[999.* wide and "),
        ({"points": [[(10, 10, 7)]]}, "point 1 is .*the label 1 inside"),
        ({"points": [(209, 111)]}, "point 1 of 1: toy_sam segments nothing there"),
        ({"masks": np.ones((1, 4, 4), bool)}, r"mask 1 of 1 is bool of shape \(4, 4\)"),
        ({"masks": False}, "`with_masks` decides whether masks are returned"),
        ({"masks": [], "points": []}, "give either boxes, points or masks"),
    ],
)
def test_invalid_points_and_masks_are_refused(spot, toy_image, prompts, message):
    with pytest.raises(InputError, match=message):
        spot.predict(toy_image[0], names=NAMES, **prompts)


def test_an_empty_mask_is_refused(spot, toy_image):
    image = spot.encode(toy_image[0])
    with pytest.raises(InputError, match="mask 1 of 1 has no pixel"):
        spot.predict(image, names=NAMES, masks=np.zeros((1, *image.size), bool))


def test_an_iterable_of_images_gives_one_result_after_the_other(spot, toy_image):
    path, boxes, _ = toy_image
    pixels = np.asarray(Image.open(path).convert("RGB"))
    results = spot.predict((image for image in (path, pixels)), [boxes[:1], boxes[1:3]], NAMES)
    same_names(next(results), spot.predict(path, boxes[:1], NAMES))
    same_names(next(results), spot.predict(path, boxes[1:3], NAMES))
    assert list(results) == []
    with pytest.raises(InputError, match="have no item for image 2"):
        list(spot.predict([path, path], [boxes], NAMES))


def test_other_names_need_no_image(spot, toy_image):
    path, boxes, _ = toy_image
    regions = spot.predict(path, boxes[:2], NAMES)
    other = ["red ring", "green star"]
    renamed = spot.rename(regions, other)
    same_names(renamed, spot.predict(path, boxes[:2], other))
    assert np.array_equal(renamed[1].mask, regions[1].mask)


def test_the_score_is_the_softmax_of_the_embeddings_cosines(spot, toy_image):
    path, boxes, _ = toy_image
    region = spot.predict(path, boxes[:1], NAMES, top=3)[0]
    text = spot.vocabulary(NAMES).embeddings.numpy()
    cosines = text @ region.embedding
    assert np.linalg.norm(region.embedding) == pytest.approx(1, abs=1e-5)
    assert region.similarity == pytest.approx(cosines.max(), abs=1e-5)
    expected = np.exp(100 * (cosines - cosines.max()))
    assert region.score == pytest.approx(1 / expected.sum(), abs=1e-4)


def test_a_region_that_no_name_fits_is_unknown(spot, toy_image):
    path, boxes, _ = toy_image
    similarities = sorted(region.similarity for region in spot.predict(path, boxes, NAMES))
    between = (similarities[0] + similarities[1]) / 2
    regions = spot.predict(path, boxes, NAMES, unknown_below=between)
    assert [region.name == "unknown" for region in regions].count(True) == 1
    (unknown,) = [region for region in regions if region.name == "unknown"]
    assert unknown.similarity == pytest.approx(similarities[0], abs=1e-5)
    assert unknown.scores[0][0] in NAMES
    assert len(regions.to_coco(1)) == len(boxes) - 1


def test_the_threshold_keeps_the_precision_and_as_many_regions_as_it_allows():
    similarities, correct = [0.9, 0.8, 0.7, 0.6, 0.6, 0.5], [True, True, False, True, True, False]
    assert threshold_at_precision(similarities, correct, 0.8) == 0.6
    assert threshold_at_precision(similarities, correct, 0.9) == 0.8
    assert threshold_at_precision(similarities, correct, 0.5) == 0.5
    assert threshold_at_precision([0.5, 0.5], [True, False], 0.9) == float("inf")  # equal values are kept together
    assert threshold_at_precision([], [], 0.9) == float("inf")


def test_regions_as_coco_results(spot, toy_image):
    path, boxes, _ = toy_image
    regions = spot.predict(path, boxes[:2], NAMES)
    results = json.loads(json.dumps(regions.to_coco(7)))
    for region, result in zip(regions, results, strict=True):
        x1, y1, x2, y2 = region.box_xyxy
        assert (result["image_id"], result["category_id"]) == (7, NAMES.index(region.name) + 1)
        assert (result["bbox"], result["score"]) == ([x1, y1, x2 - x1, y2 - y1], region.score)
        assert np.array_equal(coco_mask.decode(result["segmentation"]), region.mask)
    ids = {name: 100 + number for number, name in enumerate(NAMES)}
    assert regions.to_coco("a", ids)[0]["category_id"] == ids[regions[0].name]
    with pytest.raises(InputError, match="has no category id"):
        regions.to_coco(7, {"dog": 1})


def test_regions_as_detections_of_supervision(spot, toy_image):
    supervision = pytest.importorskip("supervision")
    path, boxes, _ = toy_image
    regions = spot.predict(path, boxes[:2], NAMES)
    detections = regions.to_supervision()
    assert detections.xyxy.tolist() == boxes[:2].tolist()
    assert [NAMES[index] for index in detections.class_id] == detections["class_name"].tolist()
    assert detections.confidence.tolist() == pytest.approx([region.score for region in regions])
    assert np.array_equal(detections.mask, [region.mask for region in regions])
    image = np.asarray(Image.open(path).convert("RGB"))
    assert (supervision.MaskAnnotator().annotate(image.copy(), detections) != image).any()
    assert len(spot.predict(path, [], NAMES).to_supervision()) == 0


@pytest.mark.parametrize("method", ["dense", "crop"])
def test_without_a_head_regions_are_named_by_clip(backbones, toy_image, method):
    path, boxes, names = toy_image
    spot = RegionSpot(None, *backbones, ["{}."], method=method)
    candidates = sorted({*names, *NAMES})
    regions = spot.predict(path, boxes, candidates)
    right = [region.name == name for region, name in zip(regions, names, strict=True)]
    assert sum(right) >= 0.6 * len(right)
    assert all(region.mask is not None for region in regions)
    assert spot.identity()["method"] == method
    with pytest.raises(InputError, match=f"method {method}: has no head"):
        _ = spot.head


def test_the_dense_map_is_averaged_over_a_given_mask(zero_shot, toy_image):
    path, boxes, _ = toy_image
    image = zero_shot.encode(path)
    mask = np.zeros((1, *image.size), bool)
    x1, y1, x2, y2 = boxes[0].astype(int)
    mask[0, y1 : (y1 + y2) // 2, x1:x2] = True  # the upper half
    mask[0, y2 - 1, x1:x2] = True
    of_box = zero_shot.predict(image, [[x1, y1, x2, y2]], NAMES)[0]
    of_mask = zero_shot.predict(image, names=NAMES, masks=mask)[0]
    assert of_mask.box_xyxy == of_box.box_xyxy
    assert of_mask.embedding @ of_box.embedding < 0.9999


def test_boxes_without_masks_do_not_run_sam_without_a_head(zero_shot, toy_image, monkeypatch):
    monkeypatch.setattr(zero_shot.localizer, "encode", lambda images: pytest.fail("SAM was run"))
    path, boxes, _ = toy_image
    assert zero_shot.predict(path, boxes, NAMES, with_masks=False)[0].mask is None


def test_a_preset_in_place_of_a_checkpoint_names_regions_without_training(caplog):
    caplog.set_level("INFO")
    spot = RegionSpot.load("toy", device="cpu")
    assert spot.method == "dense"
    assert (
        "preset toy: regions are named by the mean of CLIP's dense map in each region, without training" in caplog.text
    )
    assert "a head trained on boxes with names" in caplog.text
    with pytest.raises(InputError, match="method 'other': unknown; expected one of crop, dense"):
        RegionSpot.zero_shot("toy", "other", device="cpu")
