"""`--shard`: shares of a cache's parts."""

from itertools import chain

import pytest

from regionspot.cache.errors import InputError
from regionspot.pipeline.extraction.part_selection import check_selection, select_parts


@pytest.mark.parametrize("count", [1, 2, 7, 16])
@pytest.mark.parametrize("n_parts", [0, 1, 6, 16, 100])
def test_every_part_is_in_exactly_one_shard_and_shards_differ_by_one_part_at_most(n_parts, count):
    shards = [list(select_parts(None, f"{number}/{count}", n_parts)) for number in range(1, count + 1)]
    assert sorted(chain.from_iterable(shards)) == list(range(n_parts))
    assert max(map(len, shards)) - min(map(len, shards)) <= 1


def test_shards_are_numbered_from_one_and_interleaved():
    assert list(select_parts(None, " 3/16 ", 40)) == [2, 18, 34]


@pytest.mark.parametrize("text", ["", "3", "3/", "/16", "3/16/2", "-1/4", "1.5/4", "a/b", "0/16", "17/16", "1/0"])
def test_an_invalid_shard_is_refused_with_an_example(text):
    with pytest.raises(InputError, match="shard") as error:
        check_selection(None, text)
    assert "\n" not in str(error.value)
    assert repr(text) in str(error.value)
