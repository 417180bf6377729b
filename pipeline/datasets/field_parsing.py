"""Tolerant parsing of single annotation fields.

The readers decode whole lists with msgspec, which accepts one exact type per field. A record that msgspec rejects is
parsed here from a plain dict: integers written as 64.0 or "64" are accepted, a null flag is False, and anything else
raises FieldError with the field, its value and what was expected.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from typing import Any

INT64 = range(-(2**63), 2**63)
FIRST_NAME_ID = 2**62  # ids made from names start here
_MAX_SHOWN = 60  # characters of a wrong value that a message shows
# Digits only: "1e5" and "00e5" may be hexadecimal names.
_INTEGER = re.compile(r"\s*([+-]?\d{1,40})(?:\.0*)?\s*", re.ASCII)
_FALSE = {"", "0", "0.0", "false", "no", "none", "null"}
_TRUE = {"1", "1.0", "true", "yes"}


class FieldError(ValueError):
    """A field of a record is unusable. The message is appended to the record's position: `.bbox is null, ...`."""


def wrong_value(field: str, value: Any, expected: str) -> FieldError:
    """The error for a wrong value; an empty `field` means the record itself."""
    return FieldError(f"{'.' * bool(field)}{field} is {shorten(value)}, expected {expected}")


def shorten(value: Any) -> str:
    """The value as JSON on one line, truncated."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."


def required(record: Mapping[str, Any], name: str) -> Any:
    """The value of a field. Raises FieldError if the record lacks it."""
    try:
        return record[name]
    except KeyError:
        raise FieldError(f" has no `{name}`") from None


def json_object(value: Any) -> Mapping[str, Any]:
    """The value itself. Raises FieldError if it is not a JSON object."""
    if not isinstance(value, dict):
        raise wrong_value("", value, "an object")
    return value


def integer_or_none(value: Any) -> int | None:
    """A 64-bit integer given as 64, 64.0, "64" or "0064"; None for anything else."""
    if isinstance(value, str):
        digits = _INTEGER.fullmatch(value)
        value = int(digits[1]) if digits else None
    elif isinstance(value, float):
        value = int(value) if value.is_integer() else None
    return value if isinstance(value, int) and not isinstance(value, bool) and value in INT64 else None


def integer(
    name: str, value: Any, least: int = INT64.start, most: int = INT64[-1], expected: str = "a whole number"
) -> int:
    """An integer from `least` to `most`. Raises FieldError otherwise."""
    number = integer_or_none(value)
    if number is None or not least <= number <= most:
        raise wrong_value(name, value, expected)
    return number


def number(name: str, value: Any) -> float:
    """A float; NaN for null, because NaN and Infinity are replaced by null before a file is decoded."""
    if value is None:
        return math.nan
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            raise wrong_value(name, value, "a number") from None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise wrong_value(name, value, "a number")
    try:
        return float(value)
    except OverflowError:  # an integer of 400 digits
        return math.inf


def flag(name: str, value: Any) -> bool:
    """A boolean; 0, 0.0, "0", false and null are False."""
    if isinstance(value, str):
        word = value.strip().lower()
        if word in _FALSE or word in _TRUE:
            return word in _TRUE
    elif value is None or isinstance(value, (bool, int, float)):
        return bool(value)
    raise wrong_value(name, value, "0 or 1")


def text(name: str, value: Any) -> str:
    """The string itself. Raises FieldError for any other type."""
    if not isinstance(value, str):
        raise wrong_value(name, value, "text")
    return value


def box(name: str, value: Any, expected: str) -> tuple[float, float, float, float]:
    """Four numbers; a nested list such as [[1, 2, 3, 4]] is accepted."""
    first, second, third, fourth = box_numbers(name, value, expected)
    return first, second, third, fourth


def box_numbers(name: str, value: Any, expected: str, most: int = 4) -> list[float]:
    """Four up to `most` numbers; a nested list is accepted."""
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], list):
        value = value[0]
    if not isinstance(value, list) or not value:
        raise wrong_value(name, value, expected)
    if not 4 <= len(value) <= most:
        hint = " (a rotated box?)" if len(value) == 5 else ""
        raise FieldError(f".{name} has {len(value)} numbers{hint}, expected {expected}")
    return [number(f"{name}[{index}]", item) for index, item in enumerate(value)]


def image_id(name: str, value: Any) -> int:
    """An image id as a 64-bit integer; an id that is a name is hashed by `id_of_name`."""
    integer_id = integer_or_none(value)
    if integer_id is not None:
        return integer_id
    if isinstance(value, str) and value.strip():
        return id_of_name(value)
    if isinstance(value, int) and not isinstance(value, bool):  # beyond 64 bits
        return id_of_name(str(value))
    raise wrong_value(name, value, "a whole number or a name")


def id_of_name(name: str) -> int:
    """A 64-bit integer for an image id that is a name ("a.jpg"); equal names give equal ids in all files.

    From FIRST_NAME_ID on, where numeric ids are rare. A file with a million names has a collision once in 10**7 files.
    """
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") >> 2 | FIRST_NAME_ID
