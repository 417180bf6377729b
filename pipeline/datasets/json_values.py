"""Values of annotation files as programs really write them, one at a time.

The readers decode whole lists with msgspec, which wants every field in exactly one type. A record that it refuses comes
here as a plain dict: whole numbers written as 64.0 or "64" are read as what they mean, a null flag is no flag, and what
cannot be meant is a FieldError, which names the field, what was found and what was expected.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from typing import Any

INT64 = range(-(2**63), 2**63)
FIRST_NAME = 2**62  # the numbers that stand for names begin here
_SHOWN = 60  # characters of a wrong value that a message shows
# Digits alone: "1e5" and "00e5" are hexadecimal names as often as they are numbers.
_WHOLE = re.compile(r"\s*([+-]?\d{1,40})(?:\.0*)?\s*", re.ASCII)
_NO_FLAG = {"", "0", "0.0", "false", "no", "none", "null"}
_FLAG = {"1", "1.0", "true", "yes"}


class FieldError(ValueError):
    """One field of one record cannot be used. The text follows the record's place: `.bbox is null, expected ...`."""


def wrong(field: str, value: Any, expected: str) -> FieldError:
    """The error for a field with a wrong value; `field` may be empty for the record itself."""
    return FieldError(f"{'.' * bool(field)}{field} is {shown(value)}, expected {expected}")


def shown(value: Any) -> str:
    """A value as JSON, cut short, on one line."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def field(record: Mapping[str, Any], name: str) -> Any:
    """Raises FieldError where the record lacks the field."""
    try:
        return record[name]
    except KeyError:
        raise FieldError(f" has no `{name}`") from None


def record(value: Any) -> Mapping[str, Any]:
    """Raises FieldError for anything but a JSON object."""
    if not isinstance(value, dict):
        raise wrong("", value, "an object")
    return value


def whole_or_none(value: Any) -> int | None:
    """The whole number that a value means, of 64 bits; None where it means none. 64, 64.0, "64" and "0064" are one."""
    if isinstance(value, str):
        digits = _WHOLE.fullmatch(value)
        value = int(digits[1]) if digits else None
    elif isinstance(value, float):
        value = int(value) if value.is_integer() else None
    return value if isinstance(value, int) and not isinstance(value, bool) and value in INT64 else None


def whole(name: str, value: Any, least: int = INT64.start, most: int = INT64[-1], what: str = "a whole number") -> int:
    """Raises FieldError for what is no whole number from `least` to `most`."""
    number = whole_or_none(value)
    if number is None or not least <= number <= most:
        raise wrong(name, value, what)
    return number


def number(name: str, value: Any) -> float:
    """A number, NaN for null: that is what NaN and Infinity become before a file is decoded."""
    if value is None:
        return math.nan
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            raise wrong(name, value, "a number") from None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise wrong(name, value, "a number")
    try:
        return float(value)
    except OverflowError:  # an integer of 400 digits
        return math.inf


def flag(name: str, value: Any) -> bool:
    """Whether a flag is set: 0, 0.0, "0", false and null are not."""
    if isinstance(value, str):
        word = value.strip().lower()
        if word in _NO_FLAG or word in _FLAG:
            return word in _FLAG
    elif value is None or isinstance(value, (bool, int, float)):
        return bool(value)
    raise wrong(name, value, "0 or 1")


def text(name: str, value: Any) -> str:
    """Raises FieldError for anything but text."""
    if not isinstance(value, str):
        raise wrong(name, value, "text")
    return value


def box(name: str, value: Any, expected: str) -> tuple[float, float, float, float]:
    """Four numbers, also where they stand in a list of their own: [[1, 2, 3, 4]]."""
    first, second, third, fourth = box_numbers(name, value, expected)
    return first, second, third, fourth


def box_numbers(name: str, value: Any, expected: str, most: int = 4) -> list[float]:
    """As `box`, with up to `most` numbers."""
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], list):
        value = value[0]
    if not isinstance(value, list) or not value:
        raise wrong(name, value, expected)
    if not 4 <= len(value) <= most:
        turned = " (a rotated box?)" if len(value) == 5 else ""
        raise FieldError(f".{name} has {len(value)} numbers{turned}, expected {expected}")
    return [number(f"{name}[{at}]", each) for at, each in enumerate(value)]


def image_id(name: str, value: Any) -> int:
    """An image's id as a number of 64 bits. What is a name stays one: `number_of_name` stands for it."""
    found = whole_or_none(value)
    if found is not None:
        return found
    if isinstance(value, str) and value.strip():
        return number_of_name(value)
    if isinstance(value, int) and not isinstance(value, bool):  # beyond 64 bits
        return number_of_name(str(value))
    raise wrong(name, value, "a whole number or a name")


def number_of_name(name: str) -> int:
    """A number of 64 bits that stands for an image id which is a name ("a.jpg"), the same in every file.

    From FIRST_NAME on, where hardly an id is a number. Two of a million names are given one number once in 10**7 files.
    """
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") >> 2 | FIRST_NAME
