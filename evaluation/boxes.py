"""Boxes and names as a person gives them: a file, or on the command line.

"10,20,110,220"                  x1,y1,x2,y2 in pixels of the picture
"10,20,110,220; 5,5,60,80"       several
boxes.json                       [[x1, y1, x2, y2], ...] or {"boxes": [[x1, y1, x2, y2], ...]}
"dog,red umbrella"               names; or a text file with one a line, for names that hold commas
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import ArrayLike, NDArray

from regionspot.cache.errors import AnnotationError, InputError

FORM = 'expected "x1,y1,x2,y2;..." or a JSON file with [[x1, y1, x2, y2], ...]'


def parse_boxes(given: str) -> NDArray[np.float32]:
    """float32 (n, 4) from a file's name or from numbers.

    Raises InputError or AnnotationError where it is neither; `check_boxes` says whether they fit a picture.
    """
    path = Path(given)
    if path.suffix.lower() == ".json" or (given.strip() and path.is_file()):
        return _table(_read(path), str(path))
    pieces = [piece for piece in given.split(";") if piece.strip()]
    try:
        rows = [[float(number) for number in piece.split(",")] for piece in pieces]
    except ValueError:
        raise InputError(f"boxes {given!r}: are neither numbers nor a file that is there; {FORM}") from None
    return _table(rows, f"boxes {given!r}")


def parse_names(given: str) -> list[str]:
    """Names from a file with one a line, or from a list with commas. Raises InputError where there is none."""
    path = Path(given)
    if path.suffix.lower() == ".txt" or (given.strip() and path.is_file()):
        try:
            pieces = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: the names cannot be read ({error})") from None
    else:
        pieces = given.split(",")
    names = [piece.strip() for piece in pieces if piece.strip()]
    if not names:
        raise InputError(f'names {given!r}: hold no name; expected "dog,red umbrella" or a file with one a line')
    return names


def check_boxes(boxes: ArrayLike, size: tuple[int, int]) -> NDArray[np.float32]:
    """float32 (n, 4): the boxes cut to a picture of `size` (height, width).

    Raises InputError, naming the first box that is not x1 < x2, y1 < y2, or has less than a pixel in the picture.
    """
    checked = _table(boxes, "boxes")
    height, width = size
    for number, box in enumerate(checked.tolist(), start=1):
        x1, y1, x2, y2 = box
        if not (x1 < x2 and y1 < y2):
            raise InputError(f"box {number} of {len(checked)} is {box}, expected x1 < x2 and y1 < y2")
        if min(x2, width) - max(x1, 0) < 1 or min(y2, height) - max(y1, 0) < 1:
            raise InputError(
                f"box {number} of {len(checked)} is {box}: less than a pixel of it is in the picture, which is "
                f"{width} wide and {height} high; boxes are x1, y1, x2, y2 in pixels"
            )
    edges = np.array([width, height, width, height], np.float32)
    return np.clip(checked, 0, edges)


def _table(rows: Any, source: str) -> NDArray[np.float32]:
    if isinstance(rows, Sequence) and not isinstance(rows, str):
        for number, row in enumerate(rows, start=1):
            if isinstance(row, Sequence) and len(row) != 4:
                raise InputError(f"{source}: box {number} has {len(row)} numbers, expected 4: x1, y1, x2, y2")
    try:
        table = np.asarray(rows, np.float32)
    except (TypeError, ValueError):
        raise InputError(f"{source}: holds something else than numbers; {FORM}") from None
    if table.size == 0:
        return np.zeros((0, 4), np.float32)
    if table.ndim != 2 or table.shape[1] != 4:
        raise InputError(f"{source}: has the shape {table.shape}, expected (n, 4): x1, y1, x2, y2 a box")
    if not np.isfinite(table).all():
        raise InputError(f"{source}: box {int((~np.isfinite(table)).any(axis=1).argmax()) + 1} is not finite")
    return table


def _read(path: Path) -> Any:
    try:
        content = msgspec.json.decode(path.read_bytes())
    except OSError as error:
        raise AnnotationError(f"{path}: cannot be read ({error.strerror}); {FORM}") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise AnnotationError(f"{path}: is not JSON ({error}); {FORM}") from None
    if isinstance(content, dict):
        if "boxes" not in content:
            raise AnnotationError(f'{path}: has no "boxes"; {FORM}')
        return content["boxes"]
    return content
