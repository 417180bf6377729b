"""Showing one image of a cache: PCA colours, similarity, captions and errors."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from makers import make_manifest
from PIL import Image

from regionspot.cache import (
    NO_CATEGORY,
    Category,
    FeatureCache,
    FeatureSet,
    ImageFeatures,
    InputError,
    NotExtractedError,
)
from regionspot.cache.format.encodings import statistics_of
from regionspot.cache.tools.resume import open_or_create
from regionspot.evaluation.report import cache_view
from regionspot.evaluation.report.cache_view import box_similarity, pca_colours, show_image

GRID = 4
MAPS = FeatureSet("clip", "map", (1 + GRID * GRID, 8))


def patches_in_halves() -> np.ndarray:
    """(4, 4, 8): one vector in the left half, another in the right."""
    halves = np.zeros((GRID, GRID, 8), np.float32)
    halves[:, :2, 0], halves[:, 2:, 1] = 3, 5
    return halves


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The folder of a cache: image 10 is extracted and has two regions, 11 failed, 12 is pending."""
    folder = tmp_path_factory.mktemp("view")
    manifest = make_manifest(
        [2, 1, 0],
        dataset="coco",
        split="val",
        image_ids=np.array([10, 11, 12]),
        paths=["a.jpg", "b.jpg", "c.jpg"],
        heights=np.full(3, 120, np.int32),
        widths=np.full(3, 160, np.int32),
        boxes_xyxy=np.array([[0, 0, 60, 110], [100, 20, 150, 90], [0, 0, 9, 9]], np.float32),
        category_index=np.array([0, NO_CATEGORY, 0], np.int32),
        categories=(Category(1, "chaise longue"),),
    )
    cache = FeatureCache.create(folder / "a.zarr", manifest, [MAPS], part_size=2)
    feature_map = np.concatenate([np.zeros((1, 8), np.float32), patches_in_halves().reshape(-1, 8)])
    cache.write_part(0, [ImageFeatures(0, {"clip": feature_map}), ImageFeatures(1, {}, "b.jpg: is not there")])
    Image.new("RGB", (160, 120), (90, 120, 30)).save(folder / "a.jpg")
    return folder


@pytest.fixture
def cache(folder) -> FeatureCache:
    return FeatureCache.open(folder / "a.zarr")


@pytest.fixture
def captions(monkeypatch):
    """The texts of the last image: its title, and two lines of each panel."""
    texts = []
    original = cache_view.side_by_side

    def record(panels, title):
        texts[:] = [title, *(f"{panel.title} / {panel.detail}" for panel in panels)]
        return original(panels, title)

    monkeypatch.setattr(cache_view, "side_by_side", record)
    return texts


def test_equal_patches_have_equal_colours():
    colours, variance = pca_colours(patches_in_halves())
    assert len(np.unique(colours[:, :2].reshape(-1, 3), axis=0)) == 1
    assert len(np.unique(colours[:, 2:].reshape(-1, 3), axis=0)) == 1
    assert np.abs(colours[0, 0].astype(int) - colours[0, 3]).max() > 200
    assert variance == pytest.approx(1)


def test_an_outlier_does_not_take_the_contrast_of_the_other_patches():
    patches = np.zeros((12, 12, 6), np.float32)
    patches[:6, :, 0] = 1
    patches[0, 0, 0] = 1000
    colours, _ = pca_colours(patches)
    assert np.abs(colours[3, 5].astype(int) - colours[9, 5]).max() > 200


def test_rounding_errors_do_not_change_the_colours():
    patches = np.random.default_rng(0).standard_normal((6, 6, 20)).astype(np.float32)
    again = patches + np.float32(1e-6) * np.random.default_rng(1).standard_normal(patches.shape).astype(np.float32)
    assert np.abs(pca_colours(patches)[0].astype(int) - pca_colours(again)[0]).max() <= 1


def test_a_constant_map_is_grey():
    colours, _ = pca_colours(np.ones((3, 3, 5), np.float32))
    assert (colours == 128).all()


def test_the_similarity_is_1_for_equal_and_0_for_orthogonal_patches():
    similarity = box_similarity(patches_in_halves(), np.array([0, 0, 0.5, 1], np.float32))
    np.testing.assert_allclose(similarity[:, :2], 1)
    np.testing.assert_allclose(similarity[:, 2:], 0)


def test_patches_are_weighted_by_their_overlap_with_the_box():
    similarity = box_similarity(patches_in_halves(), np.array([0.25, 0, 0.625, 1], np.float32))
    mean = np.array([3 * 2, 5 * 1]) / 3  # one left column and half of a right one
    np.testing.assert_allclose(similarity[0], np.repeat(mean / np.linalg.norm(mean), 2), rtol=1e-6)


@pytest.mark.parametrize("box", [(1, 1, 1, 1), (0.5, 0.5, 0.5, 0.5), (0.9, 0.9, 1, 1)])
def test_a_box_without_area_selects_its_patch(box):
    similarity = box_similarity(patches_in_halves(), np.array(box, np.float32))
    np.testing.assert_allclose(similarity[:, 2:], 1)


@pytest.mark.parametrize(("rule", "first"), [("apply", (0, 0, 255)), ("ignore", (255, 0, 0)), (None, (255, 0, 0))])
def test_the_image_is_rotated_by_the_exif_rule_of_the_features(cache, tmp_path, monkeypatch, rule, first):
    shown, original = [], cache_view.side_by_side
    monkeypatch.setattr(cache_view, "side_by_side", lambda panels, _: shown.extend(panels) or original(panels, ""))
    sets = [MAPS if rule is None else replace(MAPS, provenance={"exif": rule})]
    turned = FeatureCache.create(tmp_path / "turned.zarr", cache.manifest, sets, part_size=2)
    turned.write_part(0, [ImageFeatures(row, {"clip": np.zeros(MAPS.shape)}) for row in (0, 1)])
    halves = np.zeros((120, 160, 3), np.uint8)
    halves[:, :80, 0] = halves[:, 80:, 2] = 255
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.fromarray(halves).save(tmp_path / "b.jpg", "PNG", exif=exif)
    show_image(turned, 11, tmp_path)
    image = shown[0].image
    assert image.getpixel((image.width // 4, image.height * 3 // 4)) == first


def test_three_panels_have_captions(cache, folder, captions):
    sheet = show_image(cache, 10, folder)
    assert sheet.width > 3 * cache_view.MIN_COLUMN
    assert captions[0] == "coco val, image 10 (row 0)"
    assert captions[1] == "a.jpg / 2 regions"
    assert captions[2].startswith("clip: 4 x 4 patches")
    assert captions[3].startswith("what is like region 0 chaise longue / cosine")
    assert captions[3].endswith("0.00 dark to 1.00 bright")
    assert (90, 120, 30) in {colour for _, colour in sheet.getcolors(2**24)}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_every_encoding_gives_the_same_image(folder, captions, tmp_path, dtype):
    original = FeatureCache.open(folder / "a.zarr")
    feature_map = original.read([0]).feature_map[0].astype(np.float32)
    statistics = statistics_of(feature_map[None]) if dtype == "int8" else None
    maps = FeatureSet("clip", "map", MAPS.shape, dtype, compression="zstd", statistics=statistics)
    cache = FeatureCache.create(tmp_path / "a.zarr", original.manifest.head(1), [maps])
    cache.write_part(0, [ImageFeatures(0, {"clip": feature_map})])
    sheets = [np.asarray(show_image(shown, 10), int) for shown in (cache, original)]
    panels = slice(0, len(sheets[0]) - cache_view.GAP - 2 * cache_view.LINE)  # without the text below
    assert np.abs(sheets[0][panels] - sheets[1][panels]).max() <= 16


def test_maps_are_shown_before_the_tokens_are_extracted(folder, captions, tmp_path):
    copy = shutil.copytree(folder / "a.zarr", tmp_path / "a.zarr")
    manifest = FeatureCache.open(copy).manifest
    show_image(open_or_create(copy, manifest, [FeatureSet("sam", "token", (6,))]), 10)
    assert len(captions) == 4


def test_a_region_is_selected_by_its_number(cache, captions):
    show_image(cache, 10, region=1)
    assert captions[3].startswith("what is like region 1 unnamed")


def test_without_the_image_its_caption_states_the_reason(cache, folder, captions, tmp_path):
    show_image(cache, 10)
    assert captions[1] == "a.jpg / 2 regions; no folder of images given"
    show_image(cache, 10, tmp_path)
    assert captions[1] == "a.jpg / 2 regions; image does not exist"


def test_a_cache_without_maps_shows_the_regions(folder, captions, tmp_path):
    manifest = FeatureCache.open(folder / "a.zarr").manifest
    show_image(FeatureCache.create(tmp_path / "t.zarr", manifest, []), 10, folder)
    assert captions[1:] == ["a.jpg / 2 regions"]


def test_an_unknown_failed_or_pending_image_is_refused_in_one_line(cache):
    for image_id, error, message in (
        (99, InputError, "no image with id 99"),
        (11, NotExtractedError, "is not there"),
        (12, NotExtractedError, "not written yet"),
    ):
        with pytest.raises(error, match=message) as caught:
            show_image(cache, image_id)
        assert "\n" not in str(caught.value)


def test_the_error_for_an_unknown_region_or_feature_set_lists_the_valid_ones(cache):
    with pytest.raises(InputError, match="no region 2; it has 2, from 0 on"):
        show_image(cache, 10, region=2)
    with pytest.raises(InputError, match="map feature sets are clip"):
        show_image(cache, 10, map_set="dino")


def test_a_map_without_a_square_of_patches_is_refused(folder, tmp_path):
    manifest = FeatureCache.open(folder / "a.zarr").manifest
    odd = FeatureCache.create(tmp_path / "odd.zarr", manifest, [FeatureSet("odd", "map", (7, 8))])
    with pytest.raises(InputError, match="odd has 7 tokens"):
        show_image(odd, 10)


def test_all_text_fits_into_the_image(folder, captions, tmp_path):
    copy = FeatureCache.open(shutil.copytree(folder / "a.zarr", tmp_path / "a.zarr"))
    sheet = np.asarray(show_image(copy, 10, folder))
    background = np.array(cache_view.BACKGROUND)
    assert (sheet[:, -cache_view.GAP :] == background).all()
    assert (sheet[-4:] == background).all()


def test_a_map_without_a_class_token_gives_the_same_panels(cache, tmp_path, captions):
    show_image(cache, 10)
    expected = captions[1:]
    no_class_token = FeatureSet("siglip", "map", (GRID * GRID, 8), provenance={"class_token": False})
    other = FeatureCache.create(tmp_path / "b.zarr", cache.manifest, [no_class_token], part_size=2)
    patches = {"siglip": patches_in_halves().reshape(-1, 8)}
    other.write_part(0, [ImageFeatures(0, patches), ImageFeatures(1, {}, "b.jpg: is not there")])
    show_image(other, 10)
    assert [text.replace("siglip", "clip") for text in captions[1:]] == expected
