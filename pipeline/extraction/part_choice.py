"""Which parts of a cache a run is asked for: "3,7-9"."""

from __future__ import annotations

import re

from regionspot.cache.errors import InputError


def parse_parts(text: str, n_parts: int) -> list[int]:
    """The parts that "3,7-9" names, rising, each once.

    Raises InputError for anything else and for a part that is none of the cache's 0 to n_parts - 1.
    """
    chosen: set[int] = set()
    for first, last in spans(text):
        if last >= n_parts:
            raise InputError(f"parts {text!r}: there is no part {last}; this cache has parts 0 to {n_parts - 1}")
        chosen.update(range(first, last + 1))
    return sorted(chosen)


def spans(text: str) -> list[tuple[int, int]]:
    """First and last part of each span in "3,7-9". Raises InputError for anything else."""
    pairs = []
    for word in text.split(","):
        numbers = re.fullmatch(r"\s*(\d{1,9})\s*(?:-\s*(\d{1,9})\s*)?", word, re.ASCII)
        if numbers is None:
            raise InputError(f'parts {text!r}: {word!r} is no part; expected numbers and spans like "3,7-9"')
        first, last = int(numbers[1]), int(numbers[2] or numbers[1])
        if last < first:
            raise InputError(f"parts {text!r}: {word.strip()} ends before it begins; did you mean {last}-{first}?")
        pairs.append((first, last))
    return pairs
