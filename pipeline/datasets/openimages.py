"""OpenImages V6 and V7: one CSV row a box, normalised corners, no image sizes.

14.6 million rows are read into Arrow columns by a columnar reader and turned into boxes some at a time. An image
whose file is absent has no known size, so it cannot be in the manifest: it is counted and left out. So are rows that
cannot be read, up to a limit.
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
from regionspot.pipeline.datasets.report import contents

_NAMES = pa.dictionary(pa.int32(), pa.string())
# x before y, both ends of each: not the order of a box (https://storage.googleapis.com/openimages/web/download_v7.html)
_CORNERS = ("XMin", "XMax", "YMin", "YMax")
_GROUP = "IsGroupOf"  # 1: a box around several things; 0: it is not; -1: not known
_NEEDED = ("ImageID", "LabelName", *_CORNERS)
_HEX_ID = re.compile("[0-9a-f]{16}")
_NUMBER = r"^\s*[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?\s*$|^\s*[+-]?([iI]nf(inity)?|[nN]a[nN])\s*$"
_PIECE = 1_000_000  # boxes turned into pixels at a time
_HEADER = ["LabelName", "DisplayName"]  # V7's class file starts with it, the earlier ones have no header


@dataclass(frozen=True)
class _Boxes:
    """The CSV's columns. `image` is a position in `hex_ids`, `label` one among the categories."""

    image: Ints
    label: Ints
    corners: list[Floats]  # in the order of _CORNERS
    is_group: NDArray[np.bool_]
    hex_ids: list[str]


def image_id_of(hex_id: str) -> int:
    """OpenImages' 16 hexadecimal digits as the signed 64-bit number that stands for them in a manifest."""
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
    """Read one split; images in the order in which the CSV first names them.

    Categories are in the class file's order, their ids its line numbers from 1. Boxes around a group of things
    (IsGroupOf) are dropped unless `keep_groups`. Raises AnnotationError where a file is not what it should be or
    the folder holds none of the images.
    """
    boxes_file, classes_file = AnnotationFile(boxes_csv), AnnotationFile(classes_csv)
    places, categories = _categories(classes_file)
    skipped = SkippedRecords(boxes_file.path, max_failures)
    boxes, remarks = _read_boxes(boxes_file, places, classes_file.path, skipped)
    paths = [f"{name}.jpg" for name in boxes.hex_ids]
    sizes = image_sizes(image_folder, paths)
    there = np.flatnonzero(sizes[:, 0] > 0)
    if not len(there):
        raise boxes_file.refuse(
            f"{image_folder} holds none of its {len(paths):,} images that can be read, and their sizes are needed; the "
            f"first is {paths[0]}, that folder {contents(image_folder)}"
        )
    images = manifest_of_images(
        "openimages",
        split,
        np.array([image_id_of(boxes.hex_ids[at]) for at in there], np.int64),
        [paths[at] for at in there],
        sizes[there, 0],
        sizes[there, 1],
        categories,
        source={"files": {**boxes_file.source["files"], **classes_file.source["files"]}},
        report={**skipped.report, **_left_out(sizes[:, 0])},
        remarks=(*skipped.remarks, *remarks),
    )
    return _with_regions(images, boxes, boxes_csv, there, keep_groups)


def _with_regions(images: Manifest, boxes: _Boxes, path: Path, there: Ints, keep_groups: bool) -> Manifest:
    row_of_image = np.full(len(boxes.hex_ids), -1, np.int64)
    row_of_image[there] = np.arange(len(there))
    scale = np.stack([images.widths, images.heights] * 2, axis=1).astype(np.float64)
    x1, x2, y1, y2 = boxes.corners
    table = RegionTable(images, path, "normalised")
    for start in range(0, len(boxes.image), _PIECE):
        piece = slice(start, start + _PIECE)
        rows = row_of_image[boxes.image[piece]]
        absent = rows < 0  # dropped below, whatever image they are measured against
        rows[absent] = 0
        stated = np.stack([x1[piece], y1[piece], x2[piece], y2[piece]], axis=1)
        drop = {"dropped_photo_missing": absent, "dropped_group": boxes.is_group[piece] & (not keep_groups)}
        table.add(rows, stated * scale[rows], boxes.label[piece], drop=drop, stated=stated)
    return table.finish()


def _read_boxes(
    file: AnnotationFile, category_of_mid: Mapping[str, int], classes: Path, skipped: SkippedRecords
) -> tuple[_Boxes, list[str]]:
    """The rows that can be used, and what is to be told of the file."""
    table = _read_table(file, skipped)
    images, labels = (table[name].combine_chunks() for name in ("ImageID", "LabelName"))
    hex_ids, image_of_entry = _unique([name.strip().lower() for name in images.dictionary.to_pylist()])
    mids = [name.strip() for name in labels.dictionary.to_pylist()]
    entry, label = (each.indices.to_numpy(zero_copy_only=False) for each in (images, labels))
    proper_id = np.array([_HEX_ID.fullmatch(name) is not None for name in hex_ids], np.bool_)
    category_of_label = np.array([category_of_mid.get(mid, -1) for mid in mids], np.int64)
    image, category = image_of_entry[entry], category_of_label[label]
    bad_id, bad_label = ~proper_id[image], category < 0
    if bad_id.any():
        first = hex_ids[image[bad_id.argmax()]]
        skipped.add("rows", f"ImageID is {first!r}, expected 16 hexadecimal digits", int(bad_id.sum()))
    if (bad_label & ~bad_id).any():
        first = mids[label[bad_label.argmax()]]
        skipped.add("rows", f"LabelName is {first!r}, which {classes.name} lacks", int((bad_label & ~bad_id).sum()))
    use = ~bad_id & ~bad_label
    skipped.add_usable("rows", int(use.sum()))
    skipped.check("rows")
    kept = np.zeros(len(hex_ids), np.bool_)
    kept[image[use]] = True
    remarks = [] if _GROUP in table.column_names else [f"{file.path}: has no column {_GROUP}: boxes of groups are kept"]
    boxes = _Boxes(
        image=(np.cumsum(kept) - 1)[image[use]],
        label=category[use],
        corners=[table[name].to_numpy()[use] for name in _CORNERS],
        is_group=_groups(table)[use],
        hex_ids=[name for name, is_kept in zip(hex_ids, kept, strict=True) if is_kept],
    )
    return boxes, remarks


def _read_table(file: AnnotationFile, skipped: SkippedRecords) -> pa.Table:
    """The columns needed, of the rows whose corners are numbers."""
    header, delimiter = _header(file)
    columns = {name.strip(): name for name in header}
    if lacking := [name for name in _NEEDED if name not in columns]:
        raise file.refuse(f"this is not OpenImages' table of boxes: it has no column {', '.join(lacking)}")
    if delimiter != ",":
        raise file.refuse(f"its columns are separated by {delimiter!r}, expected commas")
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
        raise file.refuse(f"this is not OpenImages' table of boxes ({str(error).splitlines()[0]})") from None
    for row in bad:
        fields = f"{row.actual_columns} fields, expected {row.expected_columns}"
        skipped.add("rows", f"a row has {fields}: {shorten(row.text)}")
    if not len(table):
        skipped.check("rows")
        raise file.refuse("the table holds no boxes")
    return table


def _header(file: AnnotationFile) -> tuple[list[str], str]:
    """Names of the columns, and what stands between them."""
    with file.path.open(newline="", encoding="utf-8-sig", errors="replace") as lines:
        line = lines.readline()
    delimiter = max((",", ";", "\t"), key=line.count)
    return next(csv.reader([line], delimiter=delimiter), []), delimiter


def _with_numbers(table: pa.Table, skipped: SkippedRecords) -> pa.Table:
    """A table whose corners are text, as numbers; rows with something else are skipped, empty corners stay null."""
    use = pa.array(np.ones(len(table), np.bool_))
    for name in _CORNERS:
        wrong = pc.invert(pc.fill_null(pc.match_substring_regex(table[name], _NUMBER), True))
        wrong = pc.and_(wrong, pc.not_equal(pc.utf8_trim_whitespace(table[name]), ""))
        wrong = pc.and_(wrong, use).combine_chunks()
        if count := pc.sum(wrong).as_py() or 0:
            skipped.add("rows", f"{name} is {shorten(table[name].filter(wrong)[0].as_py())}, expected a number", count)
            use = pc.and_(use, pc.invert(wrong))
    table = table.filter(use)
    for name in _CORNERS:
        text = pc.utf8_trim_whitespace(table[name])
        column = pc.if_else(pc.equal(text, ""), pa.scalar(None, pa.string()), text).cast(pa.float64())
        table = table.set_column(table.column_names.index(name), name, column)
    return table


def _groups(table: pa.Table) -> NDArray[np.bool_]:
    """bool (M,): which boxes are around a group; what is neither yes nor no is none."""
    if _GROUP not in table.column_names:
        return np.zeros(len(table), np.bool_)
    column = table[_GROUP].combine_chunks()
    yes = [str(text).strip().lower() in ("1", "1.0", "true") for text in column.dictionary.to_pylist()]
    found: NDArray[np.bool_] = np.array([*yes, False])[pc.fill_null(column.indices, len(yes)).to_numpy()]
    return found


def _unique(names: list[str]) -> tuple[list[str], Ints]:
    """The names, each once and in order, and the position of each of the names given among them."""
    position = {name: at for at, name in enumerate(dict.fromkeys(names))}
    return list(position), np.array([position[name] for name in names], np.int64)


def _categories(file: AnnotationFile) -> tuple[dict[str, int], tuple[Category, ...]]:
    """Position of each machine id (`/m/011k07`), and the categories."""
    try:
        with file.path.open(newline="", encoding="utf-8-sig") as lines:
            rows = [[field.strip() for field in row] for row in csv.reader(lines) if row]
    except (UnicodeDecodeError, csv.Error) as error:
        raise file.refuse(f"this is not a CSV file in UTF-8 ({error})") from None
    rows = rows[1:] if rows[:1] == [_HEADER] else rows
    positions: dict[str, int] = {}
    for line, row in enumerate(rows, 1):
        if len(row) != 2:
            raise file.refuse(
                f"class {line} has {len(row)} fields, expected two: machine id and name; a name with a comma stands in "
                'quotes, "Person, standing"'
            )
        mid, name = row
        if not name:
            raise file.refuse(f"class {line} ({mid}) has an empty name, by which nothing can be recognised")
        if mid in positions:
            raise file.refuse(
                f"machine id {mid} is there twice, as class {positions[mid] + 1} and {line}; give each class its own"
            )
        positions[mid] = line - 1
    return positions, tuple(Category(id=line, name=name) for line, (_, name) in enumerate(rows, 1))


def _left_out(heights: Ints) -> dict[str, int]:
    """Report of the images that are not in the manifest, without zeros."""
    counts = {"missing_photos": heights == ABSENT, "unreadable_photos": heights == UNREADABLE}
    return {name: int(mask.sum()) for name, mask in counts.items() if mask.any()}
