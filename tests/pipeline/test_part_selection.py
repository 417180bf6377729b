"""`--parts` and `--shard`: the parts of a cache that a run is restricted to."""

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


def test_parts_are_numbers_and_spans():
    assert select_parts("3,7-9", None, 10) == [3, 7, 8, 9]
    assert select_parts(" 2 - 3 , 2,0", None, 10) == [0, 2, 3]


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "not a part"), ("3-", "not a part"), ("a", "'a' is not a part"), ("9-7", "7-9"), ("3,10", "0 to 9")],
)
def test_invalid_parts_are_refused(text, message):
    with pytest.raises(InputError, match=message):
        select_parts(text, None, 10)
