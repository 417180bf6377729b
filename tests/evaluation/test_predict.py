import json
import os
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from regionspot.cache.errors import AnnotationError, ImageError, InputError, WeightsError
from regionspot.evaluation.inference.boxes import boxes_from, check_boxes, names_from, parse_boxes
from regionspot.evaluation.inference.region_spot import RegionSpot
from regionspot.fusion.checkpoint import HeadInfo, save_checkpoint
from regionspot.fusion.head import FusionHead, HeadConfig

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
    """No vocabulary of the machine is seen."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    head = FusionHead(HeadConfig(token_dim=128, width=192, text_dim=128, layers=1, ffn=64))
    path = tmp_path_factory.mktemp("head") / "head.safetensors"
    save_checkpoint(path, head, INFO)
    return path


@pytest.fixture(scope="module")
def spot(checkpoint):
    return RegionSpot.load(checkpoint, WEIGHTS, "cpu")


@pytest.fixture(scope="module")
def pixels():
    """An image of 200 x 120 with something on it everywhere."""
    coarse = np.random.default_rng(0).integers(0, 255, (12, 20, 3), np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((200, 120), Image.Resampling.BICUBIC))


BOXES = [[10, 10, 60, 50], [100.5, 20, 199, 119]]


def test_every_box_gets_the_likeliest_of_the_names_and_a_mask_of_the_image(spot, pixels):
    found = spot.predict(pixels, BOXES, NAMES)
    assert [region.box_xyxy for region in found] == [tuple(map(float, box)) for box in BOXES]
    for region in found:
        scores = [score for _, score in region.scores]
        assert scores == sorted(scores, reverse=True)
        assert sum(scores) == pytest.approx(1, abs=1e-5)
        assert (region.name, region.score) == region.scores[0]
        assert region.mask.shape == (120, 200)
        assert region.mask.dtype == bool
        assert json.loads(json.dumps(region.as_json()))["name"] == region.name


def test_a_localizer_that_draws_no_masks_names_boxes_and_refuses_to_make_masks(spot, pixels):
    names = ("device", "preprocess", "encode", "tokens_of_images", "name", "provenance")
    bare = SimpleNamespace(**{name: getattr(spot.localizer, name) for name in names})
    other = RegionSpot(spot.head, bare, spot.encoder, spot.templates)
    found = other.predict(pixels, BOXES, NAMES)
    assert [region.name for region in found] == [region.name for region in spot.predict(pixels, BOXES, NAMES)]
    assert all(region.mask is None for region in found)
    prepared = other.prepare(Image.fromarray(pixels), np.array(BOXES, np.float32))
    with pytest.raises(InputError, match=r"localizer toy_sam: draws no masks; .*--no-masks"):
        other.score([prepared], other.text(other.vocabulary(NAMES)), masks=True)


def test_an_image_is_the_same_from_a_file_pil_or_numpy(spot, pixels, tmp_path):
    path = tmp_path / "image.png"
    Image.fromarray(pixels).save(path)
    answers = [
        spot.predict(image, BOXES, NAMES, masks=False) for image in (pixels, Image.fromarray(pixels), path, str(path))
    ]
    assert all(answer == answers[0] for answer in answers)
    assert answers[0][0].mask is None


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_an_image_is_turned_upright_before_boxes_are_laid_on_it_however_it_is_given(
    spot, pixels, tmp_path, regionspot, checkpoint, format
):
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side: turn by a quarter to see it
    path = tmp_path / "turned"
    stored = np.rot90(pixels).copy()
    Image.fromarray(stored).save(path, format, exif=exif)
    expected = spot.predict(pixels, BOXES, NAMES, masks=False)
    for image in (path, str(path), path.read_bytes(), Image.open(path)):
        assert spot.predict(image, BOXES, NAMES, masks=False) == expected
    boxes, names = ";".join(",".join(map(str, box)) for box in BOXES), ",".join(NAMES)
    given = ("--checkpoint", checkpoint, "--boxes", boxes, "--names", names, "--weights", WEIGHTS)
    code, out, err = regionspot("predict", path, *given)
    assert code == 0, err
    assert json.loads(out) == [region.as_json() for region in expected]
    on_its_side = spot.predict(stored, [[5, 5, 60, 90]], NAMES, masks=False)
    assert spot.predict(path, [[5, 5, 60, 90]], NAMES, masks=False, exif="ignore") == on_its_side


def test_one_box_scores_the_same_whatever_boxes_stand_around_it_in_another_call(spot, pixels):
    """Only regions of one image see each other; the padding of a batch must not."""
    alone = spot.prepare(Image.fromarray(pixels), np.array(BOXES[:1], np.float32))
    both = spot.prepare(Image.fromarray(pixels), np.array(BOXES, np.float32))
    text = spot.text(spot.vocabulary(NAMES))
    single = spot.score([alone], text)[0].probabilities
    assert spot.score([both, alone], text)[1].probabilities == pytest.approx(single, abs=1e-5)


def test_masks_made_a_few_at_a_time_are_those_made_at_once(spot, pixels, monkeypatch):
    boxes = [[k, k, 60 + 3 * k, 50 + k] for k in range(5)]
    whole = spot.predict(pixels, boxes, NAMES)
    monkeypatch.setattr("regionspot.evaluation.inference.region_spot.MASK_PIXELS", 2 * 200 * 120)
    for one, other in zip(whole, spot.predict(pixels, boxes, NAMES), strict=True):
        assert np.array_equal(one.mask, other.mask)
        assert one.score == pytest.approx(other.score, abs=1e-5)


def test_without_boxes_there_is_nothing_to_name(spot, pixels):
    assert spot.predict(pixels, [], NAMES) == []
    assert spot.predict(pixels, np.zeros((0, 4), np.float32), NAMES) == []


def test_a_box_over_the_edge_is_cut_to_the_image(spot, pixels):
    assert spot.predict(pixels, [[-20, 5, 400, 90]], NAMES)[0].box_xyxy == (0, 5, 200, 90)


def test_templates_are_those_of_the_checkpoint_unless_others_are_named(spot):
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
        ("some boxes", "something else than numbers"),
    ],
)
def test_a_box_that_cannot_be_is_named(spot, pixels, boxes, message):
    with pytest.raises(InputError, match=message):
        spot.predict(pixels, boxes, NAMES)


def test_a_name_given_twice_is_taken_once_and_said(spot, pixels, caplog):
    once = spot.predict(pixels, BOXES, NAMES, masks=False)
    assert spot.predict(pixels, BOXES, [*NAMES, " red  star"], masks=False) == once
    assert "1 of 4 names are given twice and taken once" in caplog.text


def test_names_must_be_there_and_be_a_list(spot, pixels):
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


def test_scores_that_are_not_finite_are_refused_by_the_images_name(spot, pixels, tmp_path):
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
    with pytest.raises(InputError, match=r"image\.png: 6 of 6 scores are not finite"):
        other.predict(tmp_path / "image.png", BOXES, NAMES)


def test_what_is_no_image_is_refused(spot, pixels, tmp_path):
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
        ("folder", "cannot be read (Is a directory)"),
        ("empty", "is empty (0 bytes)"),
        ("pipe", "cannot be read (it is a named pipe or a device, not a file"),
        ("device", "cannot be read (it is a named pipe or a device, not a file"),
        ("text", "is HTML or XML, not an image"),
        ("half", "is broken or cut off"),
    ],
)
def test_the_command_line_refuses_what_is_no_image_in_one_line(refused, pixels, tmp_path, kind, reason):
    path = tmp_path / "image.jpg"
    {
        "nothing": lambda: None,
        "folder": path.mkdir,
        "empty": path.touch,
        "pipe": lambda: os.mkfifo(path),
        "device": lambda: path.symlink_to("/dev/zero"),
        "text": lambda: path.write_text("<html>"),
        "half": lambda: (Image.fromarray(pixels).save(path), os.truncate(path, path.stat().st_size // 2)),
    }[kind]()
    refused(f"{path}: {reason}", "predict", path, "--checkpoint", "x", "--boxes", "1,1,9,9", "--names", "dog")


def test_a_checkpoint_is_loaded_only_with_the_backbones_that_it_was_trained_on(checkpoint):
    with pytest.raises(WeightsError, match="random:1 are loaded"):
        RegionSpot.load(checkpoint, clip_weights="random:1", sam_weights=WEIGHTS, device="cpu")
    other = RegionSpot.load(checkpoint, "random:1", "cpu", check_weights=False)
    assert other.identity()["encoder"]["weights_sha256"] == "random:1"


def test_a_checkpoint_that_names_no_backbones_is_refused(tmp_path):
    head = FusionHead(HeadConfig(token_dim=128, width=192, text_dim=128, layers=1, ffn=64))
    save_checkpoint(tmp_path / "head.safetensors", head, replace(INFO, preset=None, localizer=None))
    with pytest.raises(WeightsError, match="names neither its backbones nor a preset"):
        RegionSpot.load(tmp_path / "head.safetensors", WEIGHTS, "cpu")
    with pytest.raises(WeightsError, match="no such checkpoint"):
        RegionSpot.load(tmp_path / "absent.safetensors")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("1,2,3,4", [[1, 2, 3, 4]]),
        (" 1, 2.5, 3, 4 ; 5,6,7,8; ", [[1, 2.5, 3, 4], [5, 6, 7, 8]]),
        ("", []),
        (";".join(["1,2,3,4"] * 100), [[1, 2, 3, 4]] * 100),
    ],
)
def test_boxes_are_read_from_the_command_line(given, expected):
    assert boxes_from(given, None).tolist() == expected


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("dog, red umbrella ,", ["dog", "red umbrella"]),
        ("dog\ncat\n", ["dog", "cat"]),
        ("dog,cat,dog", ["dog", "cat"]),
        (",".join(f"name {number}" for number in range(1203)), [f"name {number}" for number in range(1203)]),
    ],
)
def test_names_are_read_from_the_command_line(given, expected):
    assert names_from(given, None) == expected


def test_a_list_is_a_list_whatever_files_there_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("red star", "1,2,3,4", "dog"):
        (tmp_path / name).write_text("[[5, 6, 7, 8]]")
    assert names_from("red star", None) == ["red star"]
    assert names_from("dog", None) == ["dog"]
    assert boxes_from("1,2,3,4", None).tolist() == [[1, 2, 3, 4]]


@pytest.mark.parametrize("by_option", [True, False], ids=["by option", "by @"])
@pytest.mark.parametrize("content", ["[[1, 2, 3, 4]]", '{"boxes": [[1, 2, 3, 4]]}'])
def test_boxes_are_read_from_a_file(tmp_path, content, by_option):
    path = tmp_path / "boxes"
    path.write_text(content)
    found = boxes_from(None, path) if by_option else boxes_from(f"@{path}", None)
    assert found.tolist() == [[1, 2, 3, 4]]


@pytest.mark.parametrize("by_option", [True, False], ids=["by option", "by @"])
@pytest.mark.parametrize("content", [b"dog, brown\ncat\n", b"\xef\xbb\xbfdog, brown\r\n\r\n cat"])
def test_names_are_read_from_a_file_one_a_line(tmp_path, content, by_option):
    path = tmp_path / "names"
    path.write_bytes(content)
    found = names_from(None, path) if by_option else names_from(f"@{path}", None)
    assert found == ["dog, brown", "cat"]


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (None, AnnotationError, "cannot be read"),
        ("[[1, 2", AnnotationError, "is not JSON"),
        ('{"box": []}', AnnotationError, 'has no "boxes"'),
        ('[[1, 2, 3, "x"]]', InputError, "something else than numbers"),
        ("[[1, 2, 3, 1e300]]", InputError, "box 1 is not finite"),
    ],
)
def test_a_boxes_file_that_is_none_is_named(tmp_path, content, error, message):
    path = tmp_path / "boxes.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(error, match=message) as caught:
        boxes_from(None, path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "No such file"), (b"", "holds no name"), (b" \n ", "holds no name"), (b"\xff\xfed\x00o\x00", "UTF-8")],
)
def test_a_names_file_that_is_none_is_named(tmp_path, content, message):
    path = tmp_path / "names.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        names_from(None, path)
    assert str(path) in str(caught.value)


def test_boxes_that_are_no_numbers_are_refused_with_how_a_file_is_given():
    with pytest.raises(InputError, match=r"are not numbers; expected .*--boxes-file"):
        parse_boxes("boxes.json")
    with pytest.raises(InputError, match="box 1 has 3 numbers"):
        parse_boxes("1,2,3")


def test_a_name_that_looks_like_a_file_is_refused_with_how_a_file_is_given():
    with pytest.raises(InputError, match="one name and looks like a file's; give it by --names-file"):
        names_from("coco_names.txt", None)


def test_one_of_a_list_and_a_file_is_needed(tmp_path):
    for text, file in ((None, None), ("dog", tmp_path / "names.txt")):
        with pytest.raises(InputError, match="--names and --names-file: give one of the two"):
            names_from(text, file)


def test_checked_boxes_are_float32_and_leave_what_was_given_alone():
    given = np.array([[-5.0, 0, 50, 20]])
    assert check_boxes(given, (20, 40)).dtype == np.float32
    assert given[0, 0] == -5
