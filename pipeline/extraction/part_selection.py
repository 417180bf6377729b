"""A cache's parts divided among runs that know nothing of each other: "3/16" is the third of sixteen shares.

Shares are interleaved (part 2, 18, 34, ... for "3/16"): a cache that grows keeps them equal, images that come in
order of size or dataset are spread over all, and wherever it is stopped, every stretch of the manifest is done alike.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from regionspot.cache.errors import InputError


@dataclass(frozen=True)
class Shard:
    """The `number`th of `count` shares, counted from 1."""

    number: int
    count: int

    def parts(self, n_parts: int) -> range:
        """Its parts of a cache of `n_parts`, rising; none where there are fewer parts than shares."""
        return range(self.number - 1, n_parts, self.count)


def parse_shard(text: str) -> Shard:
    """ "3/16": the third of sixteen. Raises InputError for anything else, "0/16" and "17/16" among them."""
    words = re.fullmatch(r"\s*(\d{1,9})\s*/\s*(\d{1,9})\s*", text, re.ASCII)
    if words is None:
        raise InputError(f'shard {text!r}: expected a number and how many there are, like "3/16"')
    number, count = int(words[1]), int(words[2])
    if not 1 <= number <= count:
        raise InputError(
            f"shard {text!r}: shards are counted from 1, so the first is 1/{count} and the last {count}/{count}"
        )
    return Shard(number, count)
