"""Which parts of a cache a run is asked for: "3,7-9"."""

from __future__ import annotations

import re

from regionspot.cache.errors import InputError


def parse_parts(text: str, n_parts: int) -> list[int]:
    """The parts that "3,7-9" names, rising, each once.

    Raises InputError for anything else and for a part that is none of the cache's 0 to n_parts - 1.
    """
    found: set[int] = set()
    for word in text.split(","):
        numbers = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", word)
        if numbers is None:
            raise InputError(f'parts {text!r}: {word!r} is no part; expected numbers and spans like "3,7-9"')
        first, last = int(numbers[1]), int(numbers[2] or numbers[1])
        if last < first:
            raise InputError(f"parts {text!r}: {word.strip()} ends before it begins; did you mean {last}-{first}?")
        if last >= n_parts:
            raise InputError(f"parts {text!r}: there is no part {last}; this cache has parts 0 to {n_parts - 1}")
        found.update(range(first, last + 1))
    return sorted(found)
