"""Read OpenImages V6 and V7: one CSV row per box, normalised corners, no image sizes.

The 14.6 million rows are read into Arrow columns and converted to boxes in chunks. Image sizes come from the image
files; an image whose file is missing is counted and left out. So are unreadable rows, up to a limit.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
from numpy.typing import NDArray

from regionspot.cache.format.manifest import Category, Manifest
from regionspot.pipeline.datasets.failure_limit import EXTRACTION_LIMIT, FailureLimit, SkippedRecords
from regionspot.pipeline.datasets.field_parsing import shorten
from regionspot.pipeline.datasets.image_sizes import ABSENT, UNREADABLE, image_sizes
from regionspot.pipeline.datasets.json_stream import AnnotationFile
from regionspot.pipeline.datasets.region_table import Floats, Ints, RegionTable, manifest_of_images
from regionspot.pipeline.datasets.report import describe_contents

_NAMES = pa.dictionary(pa.int32(), pa.string())
# In the file's order (https://storage.googleapis.com/openimages/web/download_v7.html).
_CORNERS = ("XMin", "XMax", "YMin", "YMax")
_GROUP = "IsGroupOf"  # 1: a box around several objects; 0: around one; -1: unknown
_NEEDED = ("ImageID", "LabelName", *_CORNERS)
_HEX_ID = re.compile("[0-9a-f]{16}")
_NUMBER = r"^\s*[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?\s*$|^\s*[+-]?([iI]nf(inity)?|[nN]a[nN])\s*$"
_CHUNK = 1_000_000  # boxes converted to pixels at a time
_HEADER = ["LabelName", "DisplayName"]  # V7's class file has this header, earlier versions have none


@dataclass(frozen=True)
class _Boxes:
    """The CSV's columns. `image` is an index into `hex_ids`, `label` an index into the categories."""

    image: Ints
    label: Ints
    corners: list[Floats]  # in the order of _CORNERS
    is_group: NDArray[np.bool_]
    hex_ids: list[str]


def image_id_of(hex_id: str) -> int:
    """OpenImages' 16 hexadecimal digits as a signed 64-bit image id."""
    number = int(hex_id, 16)
    return number - 2**64 if number >= 2**63 else number


def read_openimages(
    boxes_csv: Path,
    classes_csv: Path,
    image_folder: Path,
    split: str,
    keep_groups: bool = False,
    max_failures: FailureLimit = EXTRACTION_LIMIT,
) -> Manifest:
    """Read one split. Images are in the order of their first row in the CSV.

    Categories are in the class file's order; their ids are its line numbers from 1. Boxes around a group of objects
    (IsGroupOf) are dropped unless `keep_groups`. Raises AnnotationError for other files, and if the folder contains
    none of the images.
    """
    boxes_file, classes_file = AnnotationFile(boxes_csv), AnnotationFile(classes_csv)
    category_of_mid, categories = read_classes(classes_file)
    skipped = SkippedRecords(boxes_file.path, max_failures)
    boxes, remarks = _read_boxes(boxes_file, category_of_mid, classes_file.path, skipped)
    paths = [f"{hex_id}.jpg" for hex_id in boxes.hex_ids]
    sizes = image_sizes(image_folder, paths)
    readable = np.flatnonzero(sizes[:, 0] > 0)
    if not len(readable):
        raise boxes_file.error(
            f"{image_folder} contains none of its {len(paths):,} images, whose sizes are needed; the first is "
            f"{paths[0]}, that folder {describe_contents(image_folder)}"
        )
    images = manifest_of_images(
        "openimages",
        split,
        np.array([image_id_of(boxes.hex_ids[index]) for index in readable], np.int64),
        [paths[index] for index in readable],
        sizes[readable, 0],
        sizes[readable, 1],
        categories,
        source={"files": {**boxes_file.source["files"], **classes_file.source["files"]}},
        report={**skipped.report, **_missing_counts(sizes[:, 0])},
        remarks=(*skipped.remarks, *remarks),
    )
    return _with_regions(images, boxes, boxes_csv, readable, keep_groups)


def _with_regions(images: Manifest, boxes: _Boxes, path: Path, readable: Ints, keep_groups: bool) -> Manifest:
    row_of_image = np.full(len(boxes.hex_ids), -1, np.int64)
    row_of_image[readable] = np.arange(len(readable))
    scale = np.stack([images.widths, images.heights] * 2, axis=1).astype(np.float64)
    x1, x2, y1, y2 = boxes.corners
    table = RegionTable(images, path, "normalised")
    for start in range(0, len(boxes.image), _CHUNK):
        chunk = slice(start, start + _CHUNK)
        rows = row_of_image[boxes.image[chunk]]
        missing = rows < 0
        rows[missing] = 0  # any image will do: these boxes are dropped
        stated = np.stack([x1[chunk], y1[chunk], x2[chunk], y2[chunk]], axis=1)
        drop = {"dropped_photo_missing": missing, "dropped_group": boxes.is_group[chunk] & (not keep_groups)}
        table.add(rows, stated * scale[rows], boxes.label[chunk], drop=drop, stated=stated)
    return table.finish()


def _read_boxes(
    file: AnnotationFile, category_of_mid: Mapping[str, int], classes: Path, skipped: SkippedRecords
) -> tuple[_Boxes, list[str]]:
    """The usable rows, and remarks about the file."""
    table = _read_table(file, skipped)
    images, labels = (table[name].combine_chunks() for name in ("ImageID", "LabelName"))
    hex_ids, image_of_entry = _unique([name.strip().lower() for name in images.dictionary.to_pylist()])
    mids = [name.strip() for name in labels.dictionary.to_pylist()]
    entry, label = (column.indices.to_numpy(zero_copy_only=False) for column in (images, labels))
    is_hex = np.array([_HEX_ID.fullmatch(name) is not None for name in hex_ids], np.bool_)
    category_of_label = np.array([category_of_mid.get(mid, -1) for mid in mids], np.int64)
    image, category = image_of_entry[entry], category_of_label[label]
    bad_id, bad_label = ~is_hex[image], category < 0
    if bad_id.any():
        first = hex_ids[image[bad_id.argmax()]]
        skipped.add("rows", f"ImageID is {first!r}, expected 16 hexadecimal digits", int(bad_id.sum()))
    if (bad_label & ~bad_id).any():
        first = mids[label[bad_label.argmax()]]
        skipped.add("rows", f"LabelName is {first!r}, which {classes.name} lacks", int((bad_label & ~bad_id).sum()))
    usable = ~bad_id & ~bad_label
    skipped.add_usable("rows", int(usable.sum()))
    skipped.check("rows")
    used = np.zeros(len(hex_ids), np.bool_)
    used[image[usable]] = True
    remarks = [] if _GROUP in table.column_names else [f"{file.path}: has no column {_GROUP}: boxes of groups are kept"]
    boxes = _Boxes(
        image=(np.cumsum(used) - 1)[image[usable]],
        label=category[usable],
        corners=[table[name].to_numpy()[usable] for name in _CORNERS],
        is_group=_is_group(table)[usable],
        hex_ids=[name for name, is_used in zip(hex_ids, used, strict=True) if is_used],
    )
    return boxes, remarks


def _read_table(file: AnnotationFile, skipped: SkippedRecords) -> pa.Table:
    """The needed columns of the rows whose corners are numbers."""
    header, delimiter = _header(file)
    columns = {name.strip(): name for name in header}
    if missing := [name for name in _NEEDED if name not in columns]:
        raise file.error(f"this is not OpenImages' table of boxes: it has no column {', '.join(missing)}")
    if delimiter != ",":
        raise file.error(f"its columns are separated by {delimiter!r}, expected commas")
    names = [name for name in (*_NEEDED, _GROUP) if name in columns]

    def read(corners: pa.DataType) -> tuple[pa.Table, list[pa.csv.InvalidRow]]:
        bad: list[pa.csv.InvalidRow] = []

        def skip(row: pa.csv.InvalidRow) -> str:
            bad.append(row)
            return "skip"

        types = {columns[name]: corners if name in _CORNERS else _NAMES for name in names}
        convert = pa.csv.ConvertOptions(include_columns=list(types), column_types=types)
        parse = pa.csv.ParseOptions(invalid_row_handler=skip)
        table = pa.csv.read_csv(file.path, convert_options=convert, parse_options=parse)
        return table.unify_dictionaries().rename_columns(names), bad

    try:
        try:
            table, bad = read(pa.float64())
        except pa.ArrowInvalid:
            table, bad = read(pa.string())
            table = _with_numbers(table, skipped)
    except pa.ArrowInvalid as error:
        raise file.error(f"this is not OpenImages' table of boxes ({str(error).splitlines()[0]})") from None
    for row in bad:
        fields = f"{row.actual_columns} fields, expected {row.expected_columns}"
        skipped.add("rows", f"a row has {fields}: {shorten(row.text)}")
    if not len(table):
        skipped.check("rows")
        raise file.error("the table holds no boxes")
    return table


def _header(file: AnnotationFile) -> tuple[list[str], str]:
    """Column names and delimiter."""
    with file.path.open(newline="", encoding="utf-8-sig", errors="replace") as lines:
        line = lines.readline()
    delimiter = max((",", ";", "\t"), key=line.count)
    return next(csv.reader([line], delimiter=delimiter), []), delimiter


def _with_numbers(table: pa.Table, skipped: SkippedRecords) -> pa.Table:
    """Convert corners from text to numbers; rows with other text are skipped, empty corners become null."""
    usable = pa.array(np.ones(len(table), np.bool_))
    for name in _CORNERS:
        wrong = pc.invert(pc.fill_null(pc.match_substring_regex(table[name], _NUMBER), True))
        wrong = pc.and_(wrong, pc.not_equal(pc.utf8_trim_whitespace(table[name]), ""))
        wrong = pc.and_(wrong, usable).combine_chunks()
        if count := pc.sum(wrong).as_py() or 0:
            skipped.add("rows", f"{name} is {shorten(table[name].filter(wrong)[0].as_py())}, expected a number", count)
            usable = pc.and_(usable, pc.invert(wrong))
    table = table.filter(usable)
    for name in _CORNERS:
        text = pc.utf8_trim_whitespace(table[name])
        column = pc.if_else(pc.equal(text, ""), pa.scalar(None, pa.string()), text).cast(pa.float64())
        table = table.set_column(table.column_names.index(name), name, column)
    return table


def _is_group(table: pa.Table) -> NDArray[np.bool_]:
    """bool (M,): whether a box is around a group; False if unknown."""
    if _GROUP not in table.column_names:
        return np.zeros(len(table), np.bool_)
    column = table[_GROUP].combine_chunks()
    is_true = [str(text).strip().lower() in ("1", "1.0", "true") for text in column.dictionary.to_pylist()]
    groups: NDArray[np.bool_] = np.array([*is_true, False])[pc.fill_null(column.indices, len(is_true)).to_numpy()]
    return groups


def _unique(names: list[str]) -> tuple[list[str], Ints]:
    """The unique names in order, and for each given name its index among them."""
    index_of = {name: index for index, name in enumerate(dict.fromkeys(names))}
    return list(index_of), np.array([index_of[name] for name in names], np.int64)


def read_classes(file: AnnotationFile) -> tuple[dict[str, int], tuple[Category, ...]]:
    """The index of each machine id (`/m/011k07`), and the categories."""
    try:
        with file.path.open(newline="", encoding="utf-8-sig") as lines:
            rows = [[field.strip() for field in row] for row in csv.reader(lines) if row]
    except (UnicodeDecodeError, csv.Error) as error:
        raise file.error(f"this is not a CSV file in UTF-8 ({error})") from None
    rows = rows[1:] if rows[:1] == [_HEADER] else rows
    indices: dict[str, int] = {}
    for line, row in enumerate(rows, 1):
        if len(row) != 2:
            raise file.error(
                f"class {line} has {len(row)} fields, expected two: machine id and name; a name with a comma needs "
                'quotes, "Person, standing"'
            )
        mid, name = row
        if not name:
            raise file.error(f"class {line} ({mid}) has an empty name")
        if mid in indices:
            raise file.error(
                f"machine id {mid} is repeated, as class {indices[mid] + 1} and {line}; give each class its own"
            )
        indices[mid] = line - 1
    return indices, tuple(Category(id=line, name=name) for line, (_, name) in enumerate(rows, 1))


def _missing_counts(heights: Ints) -> dict[str, int]:
    """The non-zero counts of images that are not in the manifest."""
    counts = {"missing_photos": heights == ABSENT, "unreadable_photos": heights == UNREADABLE}
    return {name: int(mask.sum()) for name, mask in counts.items() if mask.any()}
