"""The parts of a cache that a run is restricted to: `--parts "3,7-9"`, or `--shard "3/16"`, the third of 16 shares.

Shares are interleaved (parts 2, 18, 34, ... for "3/16"), so they stay equal when the cache grows, and images sorted by
size or source are spread over all of them.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from regionspot.cache.errors import InputError


def select_parts(parts: str | None, shard: str | None, n_parts: int) -> Collection[int]:
    """The selected parts of a cache of `n_parts`, in ascending order; all without a selection.

    Raises InputError for a part >= n_parts, and what `check_selection` raises.
    """
    check_selection(parts, shard)
    if shard is not None:
        number, count = _parse_shard(shard)
        return range(number - 1, n_parts, count)
    if parts is None:
        return range(n_parts)
    selected: set[int] = set()
    for first, last in _parse_spans(parts):
        if last >= n_parts:
            raise InputError(f"parts {parts!r}: there is no part {last}; this cache has parts 0 to {n_parts - 1}")
        selected.update(range(first, last + 1))
    return sorted(selected)


def check_selection(parts: str | None, shard: str | None) -> None:
    """Raises InputError when `parts` or `shard` cannot be parsed, or both are given."""
    if parts is not None and shard is not None:
        raise InputError(f"parts {parts!r} and shard {shard!r}: give one of the two")
    if parts is not None:
        _parse_spans(parts)
    if shard is not None:
        _parse_shard(shard)


def _parse_spans(text: str) -> list[tuple[int, int]]:
    """First and last part of each span."""
    spans = []
    for span in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,9})\s*(?:-\s*(\d{1,9})\s*)?", span, re.ASCII)
        if match is None:
            raise InputError(f'parts {text!r}: {span!r} is not a part; expected numbers and spans like "3,7-9"')
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise InputError(f"parts {text!r}: {span.strip()} ends before it begins; did you mean {last}-{first}?")
        spans.append((first, last))
    return spans


def _parse_shard(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"\s*(\d{1,9})\s*/\s*(\d{1,9})\s*", text, re.ASCII)
    if match is None:
        raise InputError(f'shard {text!r}: expected a number and the number of shards, like "3/16"')
    number, count = int(match[1]), int(match[2])
    if not 1 <= number <= count:
        raise InputError(
            f"shard {text!r}: shards are numbered from 1: the first is 1/{count}, the last is {count}/{count}"
        )
    return number, count
