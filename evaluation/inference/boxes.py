"""Parse the boxes and names of `regionspot predict`, from the command line or a file.

"10,20,110,220"                  x1,y1,x2,y2 in pixels of the image
"10,20,110,220; 5,5,60,80"       several boxes
@boxes.json                      a file of one of the forms in box_files.py
"dog,red umbrella"               names
@names.txt                       a text file with one name per line, for names that contain commas
@instances.json                  a JSON file with "categories", such as COCO annotations; their ids are kept

Only the file option or "@" selects a file; a list is never read as a file name.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import ArrayLike, NDArray

from regionspot.cache.errors import AnnotationError, InputError

log = logging.getLogger(__name__)

FORM = '"x1,y1,x2,y2;..." or a JSON file with [[x1, y1, x2, y2], ...]'
CATEGORIES = "categories"  # of COCO annotations, whose names have ids
_MAX_QUOTED = 60  # characters of the input in an error message


def boxes_from(text: str | None, file: Path | None) -> NDArray[np.float32] | Path | None:
    """The boxes of `--boxes`, float32 (n, 4); or the file of `--boxes @FILE` or `--boxes-file`; None: none are given.

    `check_boxes` then compares boxes with an image. Raises InputError for both, and for text that is not boxes.
    """
    if text is None and file is None:
        return None
    path = _input_file("boxes", text, file)
    return path or parse_boxes(text or "")


def names_from(text: str | None, file: Path | None) -> tuple[list[str], dict[str, int] | None]:
    """Names from either `--names` or `--names-file`, and their category ids if a file has them.

    Raises InputError if there is no name.
    """
    path = _input_file("names", text, file)
    if path is None:
        return parse_names(text or ""), None
    if path.suffix == ".json":
        ids = _read_categories(path)
        return _checked_names(list(ids), str(path)), ids
    return read_names(path), None


def _read_categories(path: Path) -> dict[str, int]:
    content = read_json(path)
    try:
        return {str(category["name"]).strip(): int(category["id"]) for category in content[CATEGORIES]}
    except (KeyError, TypeError, ValueError):
        raise InputError(
            f'{path}: expected {{"{CATEGORIES}": [{{"id": 1, "name": "dog"}}, ...]}}, or a text file with one name per '
            "line"
        ) from None


def parse_boxes(text: str) -> NDArray[np.float32]:
    """float32 (n, 4) from text. Raises InputError for anything but numbers."""
    try:
        rows = [[float(number) for number in box.split(",")] for box in text.split(";") if box.strip()]
    except ValueError:
        raise InputError(
            f"boxes {_short(text)}: are not numbers; expected {FORM} with --boxes-file FILE or --boxes @FILE"
        ) from None
    return box_table(rows, f"boxes {_short(text)}")


def parse_names(text: str) -> list[str]:
    """The names of a list separated by commas or line breaks. Raises InputError if there is none."""
    if re.fullmatch(r"[^,\n]+\.(txt|csv|tsv|json|names)", text.strip(), re.IGNORECASE):
        raise InputError(f"names {_short(text)}: looks like a file name; give a file with --names-file or @")
    return _checked_names(re.split("[,\n]", text), f"names {_short(text)}")


def read_names(path: Path) -> list[str]:
    """The names of a text file with one per line. Raises InputError if there is none or the file cannot be read."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"{path}: the names cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: is not UTF-8 text; expected one name per line") from None
    return _checked_names(text.split("\n"), str(path))


def _input_file(kind: str, text: str | None, file: Path | None) -> Path | None:
    """The file; None if a list is given. Raises InputError unless exactly one of the two is given."""
    if (text is None) == (file is None):
        raise InputError(f"--{kind} and --{kind}-file: give exactly one of the two")
    if text is not None and text.startswith("@"):
        return Path(text[1:]).expanduser()
    return file


def _checked_names(texts: Sequence[str], source: str) -> list[str]:
    names = [text.strip() for text in texts if text.strip()]
    if not names:
        raise InputError(f'{source}: holds no name; expected "dog,red umbrella", or a file with one name per line')
    unique = list(dict.fromkeys(names))
    if len(unique) < len(names):
        # A repeated name would split its probability.
        log.warning("%s: %d names are repeated and count once", source, len(names) - len(unique))
    return unique


def _short(text: str) -> str:
    return repr(text if len(text) <= _MAX_QUOTED else f"{text[: _MAX_QUOTED - 3]}...")


def check_boxes(boxes: ArrayLike, size: tuple[int, int]) -> NDArray[np.float32]:
    """float32 (n, 4): the boxes clipped to an image of `size` (height, width).

    Raises InputError for the first box that is not x1 < x2, y1 < y2, or has less than a pixel in the image.
    """
    checked = box_table(boxes, "boxes")
    height, width = size
    for number, box in enumerate(checked.tolist(), start=1):
        x1, y1, x2, y2 = box
        if not (x1 < x2 and y1 < y2):
            raise InputError(f"box {number} of {len(checked)} is {box}, expected x1 < x2 and y1 < y2")
        if min(x2, width) - max(x1, 0) < 1 or min(y2, height) - max(y1, 0) < 1:
            raise InputError(
                f"box {number} of {len(checked)} is {box}: less than a pixel of it is inside the image, which is "
                f"{width} wide and {height} high; boxes are x1, y1, x2, y2 in pixels"
            )
    edges = np.array([width, height, width, height], np.float32)
    return np.clip(checked, 0, edges)


def box_table(rows: Any, source: str) -> NDArray[np.float32]:
    """float32 (n, 4) of numbers; `source` names them in errors. Raises InputError for anything else."""
    if isinstance(rows, Sequence) and not isinstance(rows, str):
        for number, row in enumerate(rows, start=1):
            if isinstance(row, Sequence) and len(row) != 4:
                raise InputError(f"{source}: box {number} has {len(row)} numbers, expected 4: x1, y1, x2, y2")
    try:
        with np.errstate(over="ignore"):  # numbers that are too large become infinite, an error below
            table = np.asarray(rows, np.float32)
    except (TypeError, ValueError):
        raise InputError(f"{source}: is not a list of numbers; expected {FORM}") from None
    if table.size == 0:
        return np.zeros((0, 4), np.float32)
    if table.ndim != 2 or table.shape[1] != 4:
        raise InputError(f"{source}: has the shape {table.shape}, expected (n, 4): x1, y1, x2, y2 of each box")
    if not np.isfinite(table).all():
        raise InputError(f"{source}: box {int((~np.isfinite(table)).any(axis=1).argmax()) + 1} is not finite")
    return table


def read_json(path: Path) -> Any:
    """The content of a JSON file. Raises AnnotationError if there is none."""
    try:
        return msgspec.json.decode(path.read_bytes())
    except OSError as error:
        raise AnnotationError(f"{path}: cannot be read ({error.strerror}); expected {FORM}") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise AnnotationError(f"{path}: is not JSON ({error}); expected {FORM}") from None
