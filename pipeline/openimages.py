"""OpenImages V6 and V7: one CSV row a box, normalised corners, no picture sizes.

14.6 million rows are read into Arrow columns by a columnar reader and turned into boxes some at a time. A picture
whose photo is absent has no known size, so it cannot be in the manifest: it is counted and left out.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
from numpy.typing import NDArray

from regionspot.cache.manifest import Category, Manifest
from regionspot.pipeline.annotation_file import AnnotationFile
from regionspot.pipeline.columns import Floats, Ints, RegionTable, manifest_of_pictures
from regionspot.pipeline.photo_sizes import ABSENT, UNREADABLE, photo_sizes

_NAMES = pa.dictionary(pa.int32(), pa.string())
# x before y, both ends of each: not the order of a box (https://storage.googleapis.com/openimages/web/download_v7.html)
_CORNERS = ("XMin", "XMax", "YMin", "YMax")
_TYPES = {"ImageID": _NAMES, "LabelName": _NAMES, **dict.fromkeys(_CORNERS, pa.float64()), "IsGroupOf": pa.int8()}
_PIECE = 1_000_000  # boxes turned into pixels at a time
_HEADER = ["LabelName", "DisplayName"]  # V7's class file starts with it, the earlier ones have no header


@dataclass(frozen=True)
class _Boxes:
    """The CSV's columns. `picture` and `label` are positions in `hex_ids` and `mids`."""

    picture: NDArray[np.int32]
    label: NDArray[np.int32]
    corners: list[Floats]  # in the order of _CORNERS
    is_group: NDArray[np.bool_]
    hex_ids: list[str]
    mids: list[str]


def image_id_of(hex_id: str) -> int:
    """OpenImages' 16 hexadecimal digits as the signed 64-bit number that stands for them in a manifest."""
    number = int(hex_id, 16)
    return number - 2**64 if number >= 2**63 else number


def hex_id_of(image_id: int) -> str:
    """The 16 hexadecimal digits of an image id of a manifest, which are also the photo's file name."""
    return f"{image_id % 2**64:016x}"


def read_openimages(
    boxes_csv: Path, classes_csv: Path, photo_folder: Path, split: str, keep_groups: bool = False
) -> Manifest:
    """Read one split; pictures in the order in which the CSV first names them.

    Categories are in the class file's order, their ids its line numbers from 1. Boxes around a group of things
    (IsGroupOf) are dropped unless `keep_groups`. Raises AnnotationError where a file is not what it should be or
    the folder holds none of the photos.
    """
    boxes_file, classes_file = AnnotationFile(boxes_csv), AnnotationFile(classes_csv)
    mids, categories = _categories(classes_file)
    boxes = _read_boxes(boxes_file)
    paths = [f"{name}.jpg" for name in boxes.hex_ids]
    sizes = photo_sizes(photo_folder, paths)
    there = np.flatnonzero(sizes[:, 0] > 0)
    if not len(there):
        raise boxes_file.refuse(f"{photo_folder} holds none of its {len(paths)} photos, whose sizes are needed")
    pictures = manifest_of_pictures(
        "openimages",
        split,
        np.array([_image_id(boxes_file, boxes.hex_ids[at]) for at in there], np.int64),
        [paths[at] for at in there],
        sizes[there, 0],
        sizes[there, 1],
        categories,
        source={"files": {**boxes_file.source["files"], **classes_file.source["files"]}},
        report=_left_out(sizes[:, 0]),
    )
    return _with_regions(pictures, boxes, there, _labels(boxes_file, boxes.mids, mids), keep_groups)


def _with_regions(
    pictures: Manifest, boxes: _Boxes, there: Ints, category_of_label: Ints, keep_groups: bool
) -> Manifest:
    row_of_picture = np.full(len(boxes.hex_ids), -1, np.int64)
    row_of_picture[there] = np.arange(len(there))
    scale = np.stack([pictures.widths, pictures.heights] * 2, axis=1).astype(np.float64)
    x1, x2, y1, y2 = boxes.corners
    table = RegionTable(pictures)
    for start in range(0, len(boxes.picture), _PIECE):
        piece = slice(start, start + _PIECE)
        rows = row_of_picture[boxes.picture[piece]]
        absent = rows < 0  # dropped below, whatever picture they are measured against
        rows[absent] = 0
        normalised = np.stack([x1[piece], y1[piece], x2[piece], y2[piece]], axis=1)
        drop = {"dropped_photo_missing": absent, "dropped_group": boxes.is_group[piece] & (not keep_groups)}
        table.add(rows, normalised * scale[rows], category_of_label[boxes.label[piece]], drop=drop)
    return table.finish()


def _read_boxes(file: AnnotationFile) -> _Boxes:
    options = pa.csv.ConvertOptions(include_columns=list(_TYPES), column_types=_TYPES)
    try:
        table = pa.csv.read_csv(file.path, convert_options=options).unify_dictionaries()
    except (pa.ArrowInvalid, KeyError) as error:
        raise file.refuse(f"this is not OpenImages' table of boxes ({str(error).splitlines()[0]})") from None
    if table["IsGroupOf"].null_count:
        raise file.refuse("column IsGroupOf has empty fields, expected 1, 0 or -1")
    if not len(table):
        raise file.refuse("the table holds no boxes")
    images, labels = (table[name].combine_chunks() for name in ("ImageID", "LabelName"))
    return _Boxes(
        picture=images.indices.to_numpy(),
        label=labels.indices.to_numpy(),
        corners=[table[name].to_numpy() for name in _CORNERS],
        is_group=table["IsGroupOf"].to_numpy() == 1,  # -1: unknown
        hex_ids=images.dictionary.to_pylist(),
        mids=labels.dictionary.to_pylist(),
    )


def _categories(file: AnnotationFile) -> tuple[dict[str, int], tuple[Category, ...]]:
    """Position of each machine id (`/m/011k07`), and the categories."""
    try:
        with file.path.open(newline="", encoding="utf-8") as lines:
            rows = [row for row in csv.reader(lines) if row and row != _HEADER]
    except (UnicodeDecodeError, csv.Error) as error:
        raise file.refuse(f"this is not a CSV file ({error})") from None
    if wrong := next((line for line, row in enumerate(rows, 1) if len(row) != 2), None):
        raise file.refuse(f"line {wrong} has {len(rows[wrong - 1])} fields, expected two: machine id and name")
    positions = {mid: index for index, (mid, _) in enumerate(rows)}
    return positions, tuple(Category(id=line, name=name.strip()) for line, (_, name) in enumerate(rows, 1))


def _labels(file: AnnotationFile, found: list[str], positions: dict[str, int]) -> Ints:
    if unknown := [mid for mid in found if mid not in positions]:
        raise file.refuse(f"{len(unknown)} of its labels are not in the class file, the first is {unknown[0]!r}")
    return np.array([positions[mid] for mid in found], np.int64)


def _image_id(file: AnnotationFile, hex_id: str) -> int:
    if len(hex_id) != 16 or set(hex_id) - set("0123456789abcdef"):
        raise file.refuse(f"ImageID {hex_id!r} is not 16 hexadecimal digits")
    return image_id_of(hex_id)


def _left_out(heights: Ints) -> dict[str, int]:
    """Report of the pictures that are not in the manifest, without zeros."""
    counts = {"missing_photos": heights == ABSENT, "unreadable_photos": heights == UNREADABLE}
    return {name: int(mask.sum()) for name, mask in counts.items() if mask.any()}
