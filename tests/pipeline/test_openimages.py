"""OpenImages: boxes from its CSV, sizes from image headers and their cache, and refused files."""

import json
import os
import random

import numpy as np
import pytest
from PIL import Image

from regionspot.cache.errors import AnnotationError
from regionspot.pipeline.datasets import image_sizes as sizes_module
from regionspot.pipeline.datasets.image_sizes import SIZES_NAME, image_sizes
from regionspot.pipeline.datasets.openimages import image_id_of
from regionspot.pipeline.datasets.registry import read_dataset

HEADER = "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsOccluded,IsTruncated,IsGroupOf,IsDepiction,IsInside"
CAT, DOG = "/m/01yrx", "/m/0bt9lr"
ONE, TWO, LAST = "0000000000000001", "00000000000000ff", "ffffffffffffffff"


def row(image, label=CAT, corners="0.1,0.5,0.25,0.75", group=0):
    return f"{image},xclick,{label},1,{corners},0,-1,{group},0,0"


class World:
    """A data folder with the class file, two images of 200 x 100 and one of 64 x 32."""

    def __init__(self, folder):
        self.folder = folder
        self.image_folder = folder / "train"
        self.image_folder.mkdir()
        for image, size in ((ONE, (200, 100)), (TWO, (200, 100)), (LAST, (64, 32))):
            Image.new("RGB", size).save(self.image_folder / f"{image}.jpg")
        (folder / "class-descriptions-boxable.csv").write_text(f'{DOG},Dog\n{CAT},"Cat, tame"\n')

    def read(self, *rows, header=HEADER, **options):
        (self.folder / "oidv6-train-annotations-bbox.csv").write_text("\n".join([header, *rows]) + "\n")
        return read_dataset("openimages", self.folder, "train", **options)


@pytest.fixture
def world(tmp_path, home):
    return World(tmp_path)


def test_normalised_corners_become_pixels_in_the_order_x1_y1_x2_y2(world):
    manifest = world.read(row(TWO), row(LAST, corners="0,1,0.5,1"), row(TWO, DOG, "0.5,1,0,1"))
    assert manifest.paths.tolist() == [f"{TWO}.jpg", f"{LAST}.jpg"]
    assert (manifest.heights.tolist(), manifest.widths.tolist()) == ([100, 32], [200, 64])
    assert manifest.boxes_xyxy.tolist() == [[20, 25, 100, 75], [100, 0, 200, 100], [0, 16, 64, 32]]
    assert manifest.boxes_xyxy.dtype == np.float32


def test_categories_are_the_lines_of_the_class_file(world):
    manifest = world.read(row(ONE, CAT))
    assert [(category.id, category.name) for category in manifest.categories] == [(1, "Dog"), (2, "Cat, tame")]
    assert manifest.category_index.tolist() == [1]


def test_the_header_of_v7s_class_file_is_not_a_class(world):
    (world.folder / "class-descriptions-boxable.csv").unlink()
    (world.folder / "oidv7-class-descriptions-boxable.csv").write_text(f"LabelName,DisplayName\n{CAT},Cat\n")
    assert [category.name for category in world.read(row(ONE)).categories] == ["Cat"]


def test_image_ids_are_the_hex_digits_as_signed_integers(world):
    assert world.read(row(ONE), row(LAST)).image_ids.tolist() == [1, -1]
    for _ in range(100):
        hex_id = f"{random.getrandbits(64):016x}"
        assert image_id_of(hex_id) % 2**64 == int(hex_id, 16)
        assert -(2**63) <= image_id_of(hex_id) < 2**63


def test_group_boxes_are_dropped_unless_kept_and_unknown_flags_are_not_groups(world):
    rows = [row(ONE, group=1), row(ONE, group=-1)]
    assert world.read(*rows).report == {"dropped_group": 1}
    assert len(world.read(*rows, keep_groups=True).boxes_xyxy) == 2


def test_missing_and_unreadable_images_are_counted_and_left_out_with_their_boxes(world):
    (world.image_folder / f"{ONE}.jpg").unlink()
    (world.image_folder / f"{TWO}.jpg").write_bytes(b"no JPEG")
    manifest = world.read(row(ONE), row(ONE), row(TWO), row(LAST))
    assert manifest.paths.tolist() == [f"{LAST}.jpg"]
    assert manifest.report == {"missing_photos": 1, "unreadable_photos": 1, "dropped_photo_missing": 3}
    assert manifest.boxes_xyxy.tolist() == pytest.approx(np.array([[6.4, 8, 32, 24]]))


def test_an_image_with_only_a_group_box_is_kept(world):
    assert world.read(row(ONE, group=1), row(TWO)).region_count.tolist() == [0, 1]


def test_converting_in_chunks_gives_the_same_manifest(world, monkeypatch):
    rows = [row(random.choice((ONE, TWO, LAST)), corners=f"0.{at},0.9{at},0.1,0.5") for at in range(10, 60)]
    whole = world.read(*rows)
    monkeypatch.setattr("regionspot.pipeline.datasets.openimages._CHUNK", 7)
    assert world.read(*rows).digest() == whole.digest()


def test_additional_columns_are_ignored(world):
    clicks = ",XClick1X,XClick2X,XClick3X,XClick4X"
    assert len(world.read(row(ONE) + ",0.1,0.2,0.3,0.4", header=HEADER + clicks).boxes_xyxy) == 1


def test_the_source_names_both_files(world):
    names = {"oidv6-train-annotations-bbox.csv", "class-descriptions-boxable.csv"}
    assert set(world.read(row(ONE)).source["files"]) == names


# Cached sizes


@pytest.fixture
def headers_read(monkeypatch):
    """The names of the images whose headers were read."""
    names = []
    read = sizes_module._header_size
    monkeypatch.setattr(sizes_module, "_header_size", lambda path: names.append(path.name) or read(path))
    return names


def test_sizes_are_read_once_and_again_only_for_changed_images(world, headers_read):
    names = [f"{ONE}.jpg", f"{TWO}.jpg"]
    image_sizes(world.image_folder, names)
    assert sorted(headers_read) == names
    headers_read.clear()
    Image.new("RGB", (30, 50)).save(world.image_folder / f"{TWO}.jpg")
    assert image_sizes(world.image_folder, names).tolist() == [[100, 200], [50, 30]]
    assert headers_read == [f"{TWO}.jpg"]


def test_sizes_are_cached_elsewhere_if_the_image_folder_is_not_writable(world, headers_read, home, monkeypatch):
    monkeypatch.setattr(sizes_module, "SIZES_NAME", "no/such/folder")
    (world.image_folder / "no").touch()  # a file instead of a folder: nothing can be written under it
    image_sizes(world.image_folder, [f"{ONE}.jpg"])
    assert len(list((home / "sizes").iterdir())) == 1
    headers_read.clear()
    assert image_sizes(world.image_folder, [f"{ONE}.jpg"]).tolist() == [[100, 200]]
    assert not headers_read


def test_a_broken_size_cache_is_replaced(world, headers_read):
    (world.image_folder / SIZES_NAME).write_bytes(b"PAR1 broken")
    assert image_sizes(world.image_folder, [f"{ONE}.jpg"]).tolist() == [[100, 200]]
    headers_read.clear()
    image_sizes(world.image_folder, [f"{ONE}.jpg"])
    assert not headers_read


def test_no_temporary_file_is_left_beside_the_size_cache(world):
    image_sizes(world.image_folder, [f"{ONE}.jpg"])
    assert sorted(os.listdir(world.image_folder)) == sorted([SIZES_NAME, *(f"{name}.jpg" for name in (ONE, TWO, LAST))])


# Refused files


@pytest.mark.parametrize(
    ("rows", "header", "expected"),
    [
        ([row(ONE)], HEADER.replace("XMax", "XMaximum"), "XMax"),
        ([row(ONE, corners="0.1,left,0.2,0.3")], HEADER, '1 of 1 rows cannot be read, the first: XMax is "left"'),
        ([row(ONE)[:30]], HEADER, "a row has 3 fields, expected 13"),
        ([], HEADER, "holds no boxes"),
        ([row(ONE, "/m/unknown")], HEADER, "LabelName is '/m/unknown', which class-descriptions-boxable.csv lacks"),
        ([row("cat")], HEADER, "ImageID is 'cat', expected 16 hexadecimal digits"),
        ([row("0000000000000002")], HEADER, "contains none of its 1 images"),
        ([row(ONE).replace(",", ";")], HEADER.replace(",", ";"), "columns are separated by ';', expected commas"),
    ],
)
def test_a_broken_table_is_refused_in_one_line(world, rows, header, expected):
    with pytest.raises(AnnotationError) as caught:
        world.read(*rows, header=header)
    message = str(caught.value)
    assert message.startswith(str(world.folder / "oidv6-train-annotations-bbox.csv"))
    assert expected in message
    assert "\n" not in message


GOOD = [row(ONE, corners=f"0.{at},0.9,0.1,0.5") for at in range(10, 30)]


@pytest.mark.parametrize(
    ("bad", "expected"),
    [
        (HEADER, 'XMin is "XMin", expected a number'),
        (row(ONE)[:30], "a row has 3 fields, expected 13"),
        (row(ONE, corners="0.1,left,0.2,0.3"), 'XMax is "left"'),
        (row(ONE, "/m/unknown"), "LabelName is '/m/unknown'"),
        (row("cat"), "ImageID is 'cat'"),
    ],
)
def test_one_bad_row_is_skipped_counted_and_reported(world, bad, expected):
    good = world.read(*GOOD)
    manifest = world.read(*GOOD[:5], bad, *GOOD[5:])
    assert manifest.digest() == good.digest()
    assert manifest.report == {"skipped_rows": 1}
    assert "1 of 21 rows cannot be read" in manifest.remarks[0]
    assert expected in manifest.remarks[0]


@pytest.mark.parametrize(
    "changed",
    [
        lambda text: "\ufeff" + text,
        lambda text: text.replace("\n", "\r\n"),
        lambda text: text.replace(",", ", "),
        lambda text: text.replace("\n", "\n\n"),
        lambda text: text.replace("0,-1,0,", "0,-1,0.0,"),
        lambda text: text.replace("0,-1,0,", "0,-1,False,"),
        lambda text: text.replace("0,-1,0,", "0,-1,,"),
        lambda text: text.replace(TWO, TWO.upper()),
        lambda text: "\n".join(",".join(f'"{field}"' for field in line.split(",")) for line in text.splitlines()),
    ],
)
def test_equivalent_files_give_the_same_manifest(world, changed):
    good = world.read(row(ONE), row(TWO, corners=".1,1e-0,0,1"))
    path = world.folder / "oidv6-train-annotations-bbox.csv"
    path.write_text(changed(path.read_text()), newline="")
    assert read_dataset("openimages", world.folder, "train").digest() == good.digest()


@pytest.mark.parametrize("group", ["1", "1.0", "True", " 1"])
def test_every_spelling_of_a_group_flag_is_read(world, group):
    assert world.read(row(ONE), row(ONE, group=group)).report == {"dropped_group": 1}


def test_without_a_group_column_all_boxes_are_kept_with_a_remark(world):
    narrow = "ImageID,LabelName,XMin,XMax,YMin,YMax"
    manifest = world.read(f"{ONE},{CAT},0.1,0.5,0.25,0.75", header=narrow)
    assert len(manifest.boxes_xyxy) == 1
    assert "has no column IsGroupOf" in manifest.remarks[0]


def test_pixels_other_corner_orders_and_repeated_rows_are_reported(world):
    assert "look like x1, y1, x2, y2 in pixels" in world.read(row(ONE, corners="10,50,20,40")).remarks[0]
    assert "their corners are in another order" in world.read(row(ONE, corners="0.5,0.1,0.2,0.8")).remarks[0]
    assert world.read(row(ONE), row(ONE), row(ONE, DOG)).report == {"repeated_boxes": 1}


@pytest.mark.parametrize(
    ("name", "expected"), [("train_0/", "contains train_0/"), ("{}.JPG", "contains {}.JPG"), ("", "is empty")]
)
def test_if_no_image_is_found_the_error_lists_the_folder(world, name, expected):
    for image in world.image_folder.iterdir():
        image.unlink()
    path = world.image_folder / name.format(ONE)
    path.mkdir(exist_ok=True) if name.endswith("/") or not name else path.touch()
    with pytest.raises(AnnotationError, match=expected.format(ONE)):
        world.read(row(ONE))


@pytest.mark.parametrize(
    ("classes", "expected"),
    [
        (f"{CAT},Cat\n{DOG}\n", "class 2 has 1 fields, expected two"),
        (
            f"{CAT},Cat, tame\n",
            "class 1 has 3 fields, expected two: machine id and name; a name with a comma needs",
        ),
        (f"{CAT},\n", f"class 1 ({CAT}) has an empty name"),
        (f"{CAT},Cat\n{DOG},Dog\n{CAT},Tom\n", f"machine id {CAT} is repeated, as class 1 and 3"),
    ],
)
def test_a_broken_class_file_is_refused(world, classes, expected):
    path = world.folder / "class-descriptions-boxable.csv"
    path.write_text(classes)
    with pytest.raises(AnnotationError) as caught:
        world.read(row(ONE))
    assert str(caught.value).startswith(f"{path}: {expected}")


def test_a_byte_order_mark_in_the_class_file_is_ignored(world):
    good, path = world.read(row(ONE)), world.folder / "class-descriptions-boxable.csv"
    path.write_text("\ufeff" + path.read_text())
    assert world.read(row(ONE)).digest() == good.digest()


def test_a_missing_class_file_is_reported(world):
    (world.folder / "class-descriptions-boxable.csv").unlink()
    with pytest.raises(AnnotationError, match=r"openimages needs class-descriptions-boxable\.csv or"):
        world.read(row(ONE))


def test_a_box_with_a_non_finite_corner_is_dropped(world):
    manifest = world.read(row(ONE), row(ONE, corners="nan,0.5,0.1,0.2"), row(ONE, corners="0,inf,0.1,0.2"))
    assert json.loads(json.dumps(manifest.report)) == {"dropped_not_finite": 2}
