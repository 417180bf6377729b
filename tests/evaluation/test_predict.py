import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from makers import make_manifest
from PIL import Image

from regionspot.cache.errors import ImageError, InputError, WeightsError
from regionspot.evaluation.inference.boxes import boxes_from, check_boxes, names_from, parse_boxes
from regionspot.evaluation.inference.methods import HeadOnImages
from regionspot.evaluation.inference.region_spot import RegionSpot
from regionspot.evaluation.inference.scoring import head_vectors
from regionspot.fusion.checkpoint import HeadInfo, save_checkpoint
from regionspot.fusion.heads import HeadSpec
from regionspot.fusion.heads.pooling import relative_boxes
from regionspot.pipeline.backbones.batch_size import Halving

WEIGHTS = "random:0"
NAMES = ["red star", "blue ring", "green cross"]
INFO = HeadInfo(
    preset="toy",
    localizer="toy_sam",
    encoder="toy_clip",
    weights_sha256={"toy_sam": WEIGHTS, "toy_clip": WEIGHTS},
    templates=("a {}.",),
)


@pytest.fixture(autouse=True)
def _home(home):
    """No test uses the stored vocabularies of the machine."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    spec = HeadSpec(token_dim=128, width=192, text_dim=128, options={"layers": 1, "ffn": 64})
    path = tmp_path_factory.mktemp("head") / "head.safetensors"
    save_checkpoint(path, spec, spec.build(), INFO)
    return path


@pytest.fixture(scope="module")
def spot(checkpoint):
    return RegionSpot.load(checkpoint, WEIGHTS, "cpu")


@pytest.fixture(scope="module")
def pixels():
    """A random image of 200 x 120 pixels."""
    coarse = np.random.default_rng(0).integers(0, 255, (12, 20, 3), np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((200, 120), Image.Resampling.BICUBIC))


BOXES = [[10, 10, 60, 50], [100.5, 20, 199, 119]]


def test_every_box_gets_the_most_probable_name_and_a_mask(spot, pixels):
    regions = spot.predict(pixels, BOXES, NAMES)
    assert [region.box_xyxy for region in regions] == [tuple(map(float, box)) for box in BOXES]
    for region in regions:
        scores = [score for _, score in region.scores]
        assert scores == sorted(scores, reverse=True)
        assert sum(scores) == pytest.approx(1, abs=1e-5)
        assert (region.name, region.score) == region.scores[0]
        assert region.mask.shape == (120, 200)
        assert region.mask.dtype == bool
        assert json.loads(json.dumps(region.as_json()))["name"] == region.name


def test_a_localizer_without_masks_predicts_names_and_refuses_masks(spot, pixels):
    names = ("device", "preprocess", "encode", "tokens_of_images", "name", "provenance")
    without_masks = SimpleNamespace(**{name: getattr(spot.localizer, name) for name in names})
    other = RegionSpot(spot.head, without_masks, spot.encoder, spot.templates)
    regions = other.predict(pixels, BOXES, NAMES)
    assert [region.name for region in regions] == [region.name for region in spot.predict(pixels, BOXES, NAMES)]
    assert all(region.mask is None for region in regions)
    with pytest.raises(InputError, match=r"localizer toy_sam: cannot make masks; use --no-masks"):
        HeadOnImages(other, make_manifest([1]), Path(), spot.vocabulary(NAMES))


def test_files_pil_images_and_arrays_give_the_same_result(spot, pixels, tmp_path):
    path = tmp_path / "image.png"
    Image.fromarray(pixels).save(path)
    results = [
        spot.predict(image, BOXES, NAMES, with_masks=False)
        for image in (pixels, Image.fromarray(pixels), path, str(path))
    ]
    assert all(result == results[0] for result in results)
    assert results[0][0].mask is None


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_boxes_are_those_of_the_upright_image_for_every_kind_of_input(
    spot, pixels, tmp_path, regionspot, checkpoint, format
):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees to show it upright
    path = tmp_path / "turned"
    stored = np.rot90(pixels).copy()
    Image.fromarray(stored).save(path, format, exif=exif)
    expected = spot.predict(pixels, BOXES, NAMES, with_masks=False)
    for image in (path, str(path), path.read_bytes(), Image.open(path)):
        assert spot.predict(image, BOXES, NAMES, with_masks=False) == expected
    boxes, names = ";".join(",".join(map(str, box)) for box in BOXES), ",".join(NAMES)
    options = ("--checkpoint", checkpoint, "--boxes", boxes, "--names", names, "--weights", WEIGHTS)
    code, out, err = regionspot("predict", path, *options)
    assert code == 0, err
    assert json.loads(out) == [region.as_json() for region in expected]
    not_rotated = spot.predict(stored, [[5, 5, 60, 90]], NAMES, with_masks=False)
    assert spot.predict(path, [[5, 5, 60, 90]], NAMES, with_masks=False, exif="ignore") == not_rotated


def test_the_padding_of_a_batch_does_not_change_the_vectors(spot, pixels):
    image, boxes = spot.encode(pixels), np.array(BOXES, np.float32)
    (tokens,) = spot.localizer.tokens_of_images(image.embedding[None], [boxes], [image.size])
    relative, map_ = relative_boxes(boxes, *image.size), image.feature_map
    (expected,) = head_vectors(spot.head, [tokens[:1]], [relative[:1]], map_[None], Halving())
    _, padded = head_vectors(
        spot.head, [tokens, tokens[:1]], [relative, relative[:1]], torch.stack([map_, map_]), Halving()
    )
    assert padded.numpy() == pytest.approx(expected.numpy(), abs=1e-5)


def test_masks_in_chunks_equal_masks_at_once(spot, pixels, monkeypatch):
    boxes = [[k, k, 60 + 3 * k, 50 + k] for k in range(5)]
    whole = spot.predict(pixels, boxes, NAMES)
    monkeypatch.setattr("regionspot.evaluation.inference.scoring.MASK_PIXELS", 2 * 200 * 120)
    for one, other in zip(whole, spot.predict(pixels, boxes, NAMES), strict=True):
        assert np.array_equal(one.mask, other.mask)
        assert one.score == pytest.approx(other.score, abs=1e-5)


def test_without_boxes_there_are_no_regions(spot, pixels):
    assert spot.predict(pixels, [], NAMES) == []
    assert spot.predict(pixels, np.zeros((0, 4), np.float32), NAMES) == []


def test_a_box_is_clipped_to_the_image(spot, pixels):
    assert spot.predict(pixels, [[-20, 5, 400, 90]], NAMES)[0].box_xyxy == (0, 5, 200, 90)


def test_the_default_templates_are_those_of_the_checkpoint(spot):
    assert spot.vocabulary(NAMES).templates == ("a {}.",)
    assert spot.vocabulary(NAMES, "plain").templates == ("{}.",)
    assert spot.vocabulary(NAMES, ["the {}"]).templates == ("the {}",)


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        ([[10, 10, 20, 20], [300, 10, 350, 30]], r"box 2 of 2 is \[300.*200 wide and 120 high"),
        ([[10, 10, 5, 20]], "box 1 of 1 is .*expected x1 < x2"),
        ([[10, 10, 20]], "3 numbers, expected 4"),
        ([[10, 10, 20, float("nan")]], "box 1 is not finite"),
        ([10, 10, 20, 20], r"expected \(n, 4\)"),
        ("some boxes", "is not a list of numbers"),
    ],
)
def test_an_invalid_box_is_refused(spot, pixels, boxes, message):
    with pytest.raises(InputError, match=message):
        spot.predict(pixels, boxes, NAMES)


def test_a_repeated_name_counts_once_and_logs_a_warning(spot, pixels, caplog):
    once = spot.predict(pixels, BOXES, NAMES, with_masks=False)
    assert spot.predict(pixels, BOXES, [*NAMES, " red  star"], with_masks=False) == once
    assert "1 of 4 names are repeated and count once" in caplog.text


def test_invalid_names_are_refused(spot, pixels):
    with pytest.raises(InputError, match="there are no names"):
        spot.predict(pixels, BOXES, [])
    with pytest.raises(InputError, match="name 2 of 2 is '', expected at least one word"):
        spot.predict(pixels, BOXES, ["red star", " \t"])
    with pytest.raises(InputError, match="name 1 of 1 is 7, expected at least one word"):
        spot.predict(pixels, BOXES, [7])
    with pytest.raises(InputError, match="expected a list of names such as"):
        spot.predict(pixels, BOXES, "dog,cat")
    with pytest.raises(InputError, match="expected one of"):
        spot.predict(pixels, BOXES, NAMES, templates="none such")


def test_scores_that_are_not_finite_are_refused_with_the_file_name(spot, pixels, tmp_path):
    Image.fromarray(pixels).save(tmp_path / "image.png")
    overflowing = SimpleNamespace(
        **{
            name: getattr(spot.encoder, name)
            for name in ("device", "preprocess", "embed_prompts", "name", "provenance")
        },
        weights_sha256=spot.encoder.weights_sha256,
        encode=lambda batch: spot.encoder.encode(batch) * float("inf"),
    )
    other = RegionSpot(spot.head, spot.localizer, overflowing, spot.templates)
    with pytest.raises(InputError, match=r"image\.png: scores are not finite"):
        other.predict(tmp_path / "image.png", BOXES, NAMES)


def test_an_invalid_image_is_refused(spot, pixels, tmp_path):
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"\xff\xd8\xff nothing more")
    with pytest.raises(ImageError, match=r"broken\.jpg"):
        spot.predict(broken, BOXES, NAMES)
    with pytest.raises(ImageError, match="does not exist"):
        spot.predict(tmp_path / "absent.jpg", BOXES, NAMES)
    with pytest.raises(InputError, match="float64 of shape"):
        spot.predict(pixels / 255, BOXES, NAMES)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("nothing", "does not exist"),
        ("pipe", "cannot be read (it is a named pipe or a device, not a file"),
        ("text", "is HTML or XML, not an image"),
    ],
)
def test_the_command_line_refuses_an_invalid_image_in_one_line(refused, tmp_path, kind, reason):
    path = tmp_path / "image.jpg"
    {
        "nothing": lambda: None,
        "pipe": lambda: os.mkfifo(path),
        "text": lambda: path.write_text("<html>"),
    }[kind]()
    refused(f"{path}: {reason}", "predict", path, "--checkpoint", "x", "--boxes", "1,1,9,9", "--names", "dog")


def test_a_checkpoint_needs_the_backbones_of_its_training(checkpoint):
    with pytest.raises(WeightsError, match="random:1 are loaded"):
        RegionSpot.load(checkpoint, clip_weights="random:1", sam_weights=WEIGHTS, device="cpu")
    other = RegionSpot.load(checkpoint, "random:1", "cpu", check_weights=False)
    assert other.identity()["encoder"]["weights_sha256"] == "random:1"


def test_a_checkpoint_without_backbone_names_is_refused(tmp_path):
    spec = HeadSpec(token_dim=128, width=192, text_dim=128, options={"layers": 1, "ffn": 64})
    save_checkpoint(tmp_path / "head.safetensors", spec, spec.build(), replace(INFO, preset=None, localizer=None))
    with pytest.raises(WeightsError, match="names neither its backbones nor a preset"):
        RegionSpot.load(tmp_path / "head.safetensors", WEIGHTS, "cpu")
    with pytest.raises(WeightsError, match="no such checkpoint"):
        RegionSpot.load(tmp_path / "absent.safetensors")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1,2,3,4", [[1, 2, 3, 4]]),
        (" 1, 2.5, 3, 4 ; 5,6,7,8; ", [[1, 2.5, 3, 4], [5, 6, 7, 8]]),
        ("", []),
        (";".join(["1,2,3,4"] * 100), [[1, 2, 3, 4]] * 100),
    ],
)
def test_boxes_are_read_from_the_command_line(text, expected):
    assert boxes_from(text, None).tolist() == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("dog, red umbrella ,", ["dog", "red umbrella"]),
        ("dog\ncat\n", ["dog", "cat"]),
        ("dog,cat,dog", ["dog", "cat"]),
        (",".join(f"name {number}" for number in range(1203)), [f"name {number}" for number in range(1203)]),
    ],
)
def test_names_are_read_from_the_command_line(text, expected):
    assert names_from(text, None) == (expected, None)


def test_a_list_is_never_read_as_a_file_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("red star", "1,2,3,4", "dog"):
        (tmp_path / name).write_text("[[5, 6, 7, 8]]")
    assert names_from("red star", None) == (["red star"], None)
    assert names_from("dog", None) == (["dog"], None)
    assert boxes_from("1,2,3,4", None).tolist() == [[1, 2, 3, 4]]


def test_a_file_of_boxes_is_named_by_an_option_or_by_an_at_sign(tmp_path):
    assert boxes_from(None, tmp_path / "boxes") == boxes_from(f"@{tmp_path}/boxes", None) == tmp_path / "boxes"
    assert boxes_from(None, None) is None
    with pytest.raises(InputError, match="--boxes and --boxes-file: give exactly one"):
        boxes_from("1,2,3,4", tmp_path / "boxes")


@pytest.mark.parametrize("by_option", [True, False], ids=["by option", "by @"])
@pytest.mark.parametrize("content", [b"dog, brown\ncat\n", b"\xef\xbb\xbfdog, brown\r\n\r\n cat"])
def test_names_are_read_from_a_file_with_one_per_line(tmp_path, content, by_option):
    path = tmp_path / "names"
    path.write_bytes(content)
    names = names_from(None, path) if by_option else names_from(f"@{path}", None)
    assert names == (["dog, brown", "cat"], None)


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "No such file"), (b"", "holds no name"), (b" \n ", "holds no name"), (b"\xff\xfed\x00o\x00", "UTF-8")],
)
def test_the_error_for_an_invalid_names_file_names_it(tmp_path, content, message):
    path = tmp_path / "names.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        names_from(None, path)
    assert str(path) in str(caught.value)


def test_the_error_for_boxes_that_are_not_numbers_suggests_a_file():
    with pytest.raises(InputError, match=r"are not numbers; expected .*--boxes-file"):
        parse_boxes("boxes.json")
    with pytest.raises(InputError, match="box 1 has 3 numbers"):
        parse_boxes("1,2,3")


def test_the_error_for_a_name_like_a_file_name_suggests_a_file():
    with pytest.raises(InputError, match="looks like a file name; give a file with --names-file"):
        names_from("coco_names.txt", None)


def test_exactly_one_of_a_list_and_a_file_is_required(tmp_path):
    for text, file in ((None, None), ("dog", tmp_path / "names.txt")):
        with pytest.raises(InputError, match="--names and --names-file: give exactly one of the two"):
            names_from(text, file)


def test_checked_boxes_are_a_float32_copy():
    boxes = np.array([[-5.0, 0, 50, 20]])
    assert check_boxes(boxes, (20, 40)).dtype == np.float32
    assert boxes[0, 0] == -5
