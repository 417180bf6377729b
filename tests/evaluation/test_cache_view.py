"""An image of a cache to look at: equal patches look equal, what is like a region is bright, and nothing crashes."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from regionspot.cache import (
    NO_CATEGORY,
    Category,
    FeatureCache,
    FeatureSet,
    ImageFeatures,
    InputError,
    Manifest,
    NotExtractedError,
)
from regionspot.cache.format.encodings import statistics_of
from regionspot.cache.tools.resume import open_or_create
from regionspot.evaluation.report import cache_view
from regionspot.evaluation.report.cache_view import show_image
from regionspot.evaluation.report.map_views import box_likeness, pca_colours

GRID = 4
MAPS = FeatureSet("clip", "map", (1 + GRID * GRID, 8))


def patches_in_halves() -> np.ndarray:
    """(4, 4, 8): one content in the left half, another in the right."""
    halves = np.zeros((GRID, GRID, 8), np.float32)
    halves[:, :2, 0], halves[:, 2:, 1] = 3, 5
    return halves


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Images 10, 11 and 12: the first two are extracted, the second failed. The first has two regions."""
    folder = tmp_path_factory.mktemp("view")
    manifest = Manifest(
        dataset="coco",
        split="val",
        image_ids=np.array([10, 11, 12]),
        paths=np.array(["a.jpg", "b.jpg", "c.jpg"], dtype=np.dtypes.StringDType()),
        heights=np.full(3, 120, np.int32),
        widths=np.full(3, 160, np.int32),
        offsets=np.array([0, 2, 3, 3]),
        boxes_xyxy=np.array([[0, 0, 60, 110], [100, 20, 150, 90], [0, 0, 9, 9]], np.float32),
        category_index=np.array([0, NO_CATEGORY, 0], np.int32),
        annotation_ids=np.arange(3),
        categories=(Category(1, "chaise longue"),),
    )
    cache = FeatureCache.create(folder / "a.zarr", manifest, [MAPS], part_size=2)
    feature_map = np.concatenate([np.zeros((1, 8), np.float32), patches_in_halves().reshape(-1, 8)])
    cache.write_part(0, [ImageFeatures(0, {"clip": feature_map}), ImageFeatures(1, {}, "b.jpg: is not there")])
    Image.new("RGB", (160, 120), (90, 120, 30)).save(folder / "a.jpg")
    return folder


@pytest.fixture
def cache(made) -> FeatureCache:
    return FeatureCache.open(made / "a.zarr")


@pytest.fixture
def captions(monkeypatch):
    """What stands below the views of the image made last."""
    said = []
    original = cache_view.side_by_side

    def remember(views, title):
        said[:] = [title, *(f"{view.what} / {view.detail}" for view in views)]
        return original(views, title)

    monkeypatch.setattr(cache_view, "side_by_side", remember)
    return said


def test_equal_patches_have_equal_colours_and_others_do_not():
    colours, share = pca_colours(patches_in_halves())
    assert len(np.unique(colours[:, :2].reshape(-1, 3), axis=0)) == 1
    assert len(np.unique(colours[:, 2:].reshape(-1, 3), axis=0)) == 1
    assert np.abs(colours[0, 0].astype(int) - colours[0, 3]).max() > 200
    assert share == pytest.approx(1)


def test_one_odd_patch_does_not_take_the_contrast_of_all_others():
    patches = np.zeros((12, 12, 6), np.float32)
    patches[:6, :, 0] = 1
    patches[0, 0, 0] = 1000
    colours, _ = pca_colours(patches)
    assert np.abs(colours[3, 5].astype(int) - colours[9, 5]).max() > 200


def test_the_colours_come_out_alike_when_the_map_is_computed_anew():
    patches = np.random.default_rng(0).standard_normal((6, 6, 20)).astype(np.float32)
    again = patches + np.float32(1e-6) * np.random.default_rng(1).standard_normal(patches.shape).astype(np.float32)
    assert np.abs(pca_colours(patches)[0].astype(int) - pca_colours(again)[0]).max() <= 1


def test_a_map_of_one_content_is_one_grey():
    colours, _ = pca_colours(np.ones((3, 3, 5), np.float32))
    assert (colours == 128).all()


def test_what_is_like_the_box_is_bright_and_what_is_not_is_dark():
    likeness = box_likeness(patches_in_halves(), np.array([0, 0, 0.5, 1], np.float32))
    np.testing.assert_allclose(likeness[:, :2], 1)
    np.testing.assert_allclose(likeness[:, 2:], 0)


def test_a_patch_that_the_box_covers_in_part_counts_in_part():
    likeness = box_likeness(patches_in_halves(), np.array([0.25, 0, 0.625, 1], np.float32))
    mean = np.array([3 * 2, 5 * 1]) / 3  # the whole of a left column, half of a right one, of unequal lengths
    np.testing.assert_allclose(likeness[0], np.repeat(mean / np.linalg.norm(mean), 2), rtol=1e-6)


@pytest.mark.parametrize("box", [(1, 1, 1, 1), (0.5, 0.5, 0.5, 0.5), (0.9, 0.9, 1, 1)])
def test_a_box_without_area_is_like_the_patch_that_it_lies_in(box):
    likeness = box_likeness(patches_in_halves(), np.array(box, np.float32))
    np.testing.assert_allclose(likeness[:, 2:], 1)


@pytest.mark.parametrize(("rule", "first"), [("apply", (0, 0, 255)), ("ignore", (255, 0, 0)), (None, (255, 0, 0))])
def test_the_image_is_turned_by_the_rule_of_the_features(made, cache, tmp_path, monkeypatch, rule, first):
    views, original = [], cache_view.side_by_side
    monkeypatch.setattr(cache_view, "side_by_side", lambda each, title: views.extend(each) or original(each, title))
    sets = [MAPS if rule is None else replace(MAPS, provenance={"exif": rule})]
    turned = FeatureCache.create(tmp_path / "turned.zarr", cache.manifest, sets, part_size=2)
    turned.write_part(0, [ImageFeatures(row, {"clip": np.zeros(MAPS.shape)}) for row in (0, 1)])
    halves = np.zeros((120, 160, 3), np.uint8)
    halves[:, :80, 0] = halves[:, 80:, 2] = 255
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.fromarray(halves).save(tmp_path / "b.jpg", "PNG", exif=exif)
    show_image(turned, 11, tmp_path)
    image = views[0].image
    assert image.getpixel((image.width // 4, image.height * 3 // 4)) == first


def test_three_views_stand_side_by_side_and_say_what_they_show(cache, made, captions):
    sheet = show_image(cache, 10, made)
    assert sheet.width > 3 * cache_view.LEAST_COLUMN
    assert captions[0] == "coco val, image 10 (row 0)"
    assert captions[1] == "a.jpg / 2 regions"
    assert captions[2].startswith("clip: 4 x 4 patches")
    assert captions[3].startswith("what is like region 0 chaise longue / cosine")
    assert captions[3].endswith("0.00 dark to 1.00 bright")
    assert (90, 120, 30) in {colour for _, colour in sheet.getcolors(2**24)}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_every_encoding_looks_the_same(made, captions, tmp_path, dtype):
    original = FeatureCache.open(made / "a.zarr")
    feature_map = original.read([0]).feature_map[0].astype(np.float32)
    statistics = statistics_of(feature_map[None]) if dtype == "int8" else None
    maps = FeatureSet("clip", "map", MAPS.shape, dtype, compression="zstd", statistics=statistics)
    cache = FeatureCache.create(tmp_path / "a.zarr", original.manifest.head(1), [maps])
    cache.write_part(0, [ImageFeatures(0, {"clip": feature_map})])
    sheets = [np.asarray(show_image(each, 10), int) for each in (cache, original)]
    views = slice(0, len(sheets[0]) - cache_view.GAP - 2 * cache_view.LINE)  # below stand rounded numbers
    assert np.abs(sheets[0][views] - sheets[1][views]).max() <= 16


def test_maps_are_shown_before_the_tokens_are_there(made, captions, tmp_path):
    copy = shutil.copytree(made / "a.zarr", tmp_path / "a.zarr")
    manifest = FeatureCache.open(copy).manifest
    show_image(open_or_create(copy, manifest, [FeatureSet("sam", "token", (6,))]), 10)
    assert len(captions) == 4


def test_a_region_can_be_chosen_by_its_number(cache, captions):
    show_image(cache, 10, region=1)
    assert captions[3].startswith("what is like region 1 unnamed")


def test_without_the_image_the_rest_is_shown_and_that_is_said(cache, made, captions, tmp_path):
    show_image(cache, 10)
    assert captions[1] == "a.jpg / 2 regions; no folder of images given"
    show_image(cache, 10, tmp_path)
    assert captions[1] == "a.jpg / 2 regions; image does not exist"


def test_a_cache_without_maps_shows_the_regions(made, captions, tmp_path):
    manifest = FeatureCache.open(made / "a.zarr").manifest
    show_image(FeatureCache.create(tmp_path / "t.zarr", manifest, []), 10, made)
    assert captions[1:] == ["a.jpg / 2 regions"]


def test_an_image_that_is_not_there_failed_or_is_pending_is_told_in_one_line(cache):
    for image_id, error, words in (
        (99, InputError, "no image with id 99"),
        (11, NotExtractedError, "is not there"),
        (12, NotExtractedError, "not written yet"),
    ):
        with pytest.raises(error, match=words) as told:
            show_image(cache, image_id)
        assert "\n" not in str(told.value)


def test_a_region_or_feature_set_that_is_not_there_is_refused_with_those_there_are(cache):
    with pytest.raises(InputError, match="no region 2; it has 2, from 0 on"):
        show_image(cache, 10, region=2)
    with pytest.raises(InputError, match="map feature sets are clip"):
        show_image(cache, 10, map_set="dino")


def test_a_map_without_a_square_of_patches_is_refused(made, tmp_path):
    manifest = FeatureCache.open(made / "a.zarr").manifest
    odd = FeatureCache.create(tmp_path / "odd.zarr", manifest, [FeatureSet("odd", "map", (7, 8))])
    with pytest.raises(InputError, match="odd has 7 tokens"):
        show_image(odd, 10)


def test_every_region_and_word_fits_into_the_image(made, captions, tmp_path):
    copy = FeatureCache.open(shutil.copytree(made / "a.zarr", tmp_path / "a.zarr"))
    sheet = np.asarray(show_image(copy, 10, made))
    paper = np.array(cache_view.PAPER)
    assert (sheet[:, -cache_view.GAP :] == paper).all()
    assert (sheet[-4:] == paper).all()


def test_a_map_without_a_class_token_gives_the_same_views(cache, tmp_path, captions):
    show_image(cache, 10)
    expected = captions[1:]
    bare = FeatureSet("siglip", "map", (GRID * GRID, 8), provenance={"class_token": False})
    other = FeatureCache.create(tmp_path / "b.zarr", cache.manifest, [bare], part_size=2)
    patches = {"siglip": patches_in_halves().reshape(-1, 8)}
    other.write_part(0, [ImageFeatures(0, patches), ImageFeatures(1, {}, "b.jpg: is not there")])
    show_image(other, 10)
    assert [words.replace("siglip", "clip") for words in captions[1:]] == expected
