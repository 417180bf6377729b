"""Which worker is given which part next, without any worker: every order of events can be had here."""

import random

import pytest

from regionspot.cache.errors import CacheError
from regionspot.pipeline.dealing import DEATHS, HANDS, HELD_SECONDS, SLOW, Dealer


def dealt(dealer, now=0.0):
    """Offers until there is none."""
    offers = []
    while (offer := dealer.next_offer(now)) is not None:
        offers.append(offer)
    return offers


def test_parts_go_out_in_order_to_the_workers_with_most_room_and_no_more_than_they_can_hold():
    dealer = Dealer(range(10))
    dealer.workers_are({"a": 2, "b": 8, "c": 1})
    assert [(offer.part, offer.worker) for offer in dealt(dealer)] == [(0, "a"), (1, "b"), (2, "c"), (3, "a"), (4, "b")]
    assert HANDS == 2
    assert not any(offer.again for offer in dealer.in_hand.values())


def test_a_worker_that_is_gone_has_its_parts_done_by_others_first_and_without_waiting_for_its_claims():
    dealer = Dealer(range(10))
    dealer.workers_are({"a": 2, "b": 2})
    dealt(dealer)
    assert [offer.part for offer in dealer.workers_are({"b": 2})] == [0, 2]
    dealer.is_done(next(offer for offer in dealer.in_hand.values() if offer.part == 1), 1.0)
    offer = dealer.next_offer(1.0)
    assert (offer.part, offer.worker, offer.again) == (2, "b", True)


def test_a_part_that_workers_die_of_ends_the_run():
    dealer = Dealer([7])
    for number in range(DEATHS):
        dealer.workers_are({str(number): 1})
        assert dealer.next_offer(0.0).part == 7
    with pytest.raises(CacheError, match=f"part 7: {DEATHS} workers died"):
        dealer.workers_are({})


def test_near_the_end_an_idle_worker_is_given_what_a_slow_one_has_but_never_what_it_has_itself():
    dealer = Dealer(range(3))
    dealer.workers_are({"slow": 1, "fast": 1})
    first, second = dealt(dealer)
    dealer.is_done(second, 10.0)
    third = dealer.next_offer(10.0)
    dealer.is_done(third, 20.0)
    assert dealer.next_offer(10.0 * SLOW - 1) is None
    again = dealer.next_offer(10.0 * SLOW + 1)
    assert (again.part, again.worker, again.again) == (first.part, "fast", True)
    assert dealer.next_offer(1000.0) is None
    dealer.is_done(again, 1001.0)
    assert dealer.finished


def test_a_second_run_of_a_part_that_stands_still_too_is_offered_to_a_third_worker():
    dealer = Dealer(range(2))
    dealer.workers_are({"a": 1, "b": 1, "c": 1})
    first, second = dealt(dealer)
    dealer.is_done(second, 10.0)
    again = dealer.next_offer(30.0)
    assert again.part == first.part
    assert dealer.next_offer(49.0) is None
    third = dealer.next_offer(51.0)
    assert {first.worker, again.worker, third.worker} == {"a", "b", "c"}


def test_the_loser_of_a_part_brings_nothing_back():
    dealer = Dealer([0, 1])
    dealer.workers_are({"a": 1, "b": 1})
    first, second = dealt(dealer)
    dealer.is_done(second, 1.0)
    again = dealer.next_offer(100.0)
    dealer.is_done(again, 101.0)
    dealer.is_left(first)
    assert dealer.finished
    assert dealt(dealer, 1000.0) == []


def test_a_part_given_up_for_a_run_that_then_dies_is_offered_again():
    dealer = Dealer([0, 1])
    dealer.workers_are({"a": 1, "b": 1})
    first, second = dealt(dealer)
    dealer.is_done(second, 1.0)
    assert dealer.next_offer(100.0).worker == "b"
    dealer.is_left(first)
    dealer.workers_are({"a": 1})
    assert dealer.next_offer(101.0).part == first.part


def test_a_worker_that_fails_gets_no_more_and_its_part_goes_to_another():
    dealer = Dealer(range(4))
    dealer.workers_are({"full": 1, "good": 1})
    first, second = dealt(dealer)
    dealer.has_failed(first, "no space left")
    dealer.is_done(second, 1.0)
    offers = []
    while (offer := dealer.next_offer(1.0)) is not None:
        dealer.is_done(offer, 2.0)
        offers.append((offer.part, offer.worker))
    assert offers == [(0, "good"), (2, "good"), (3, "good")]
    assert dealer.asides == {"full": "no space left"}


def test_a_part_that_two_workers_fail_or_that_nobody_is_left_for_ends_the_run_with_their_words():
    dealer = Dealer([0])
    dealer.workers_are({"a": 1, "b": 1, "c": 1})
    dealer.has_failed(dealer.next_offer(0.0), "no space left")
    with pytest.raises(CacheError, match="no space left"):
        dealer.has_failed(dealer.next_offer(0.0), "no space left")
    alone = Dealer([0])
    alone.workers_are({"a": 1})
    with pytest.raises(CacheError, match="no space left"):
        alone.has_failed(alone.next_offer(0.0), "no space left")


def test_a_part_that_another_run_holds_is_asked_for_later_while_others_go_on():
    dealer = Dealer([0, 1, 2])
    dealer.workers_are({"a": 1})
    dealer.is_held(dealer.next_offer(0.0), 0.0)
    one = dealer.next_offer(0.0)
    dealer.is_done(one, 1.0)
    two = dealer.next_offer(1.0)
    dealer.is_done(two, 2.0)
    assert [one.part, two.part] == [1, 2]
    assert dealer.next_offer(HELD_SECONDS - 0.1) is None
    again = dealer.next_offer(HELD_SECONDS)
    assert (again.part, again.again) == (0, False)


@pytest.mark.parametrize("seed", range(40))
def test_whatever_becomes_of_workers_every_part_is_done_and_none_is_in_two_hands_of_one_worker(seed):
    rng, now, dealer = random.Random(seed), 0.0, Dealer(range(30))
    names = [str(number) for number in range(4)]
    deaths = failures = 0
    while not dealer.finished:
        now += rng.expovariate(1)
        there = names
        if deaths < DEATHS - 1 and rng.random() < 0.05:
            deaths += 1
            there = rng.sample(names, 3)
        dealer.workers_are(dict.fromkeys(there, 2))
        dealt(dealer, now)
        held = [(offer.part, offer.worker) for offer in dealer.in_hand.values()]
        assert len(set(held)) == len(held)
        for offer in rng.sample(list(dealer.in_hand.values()), rng.randrange(len(held) + 1)):
            what = rng.choice(("done", "done", "done", "left", "held", "stands still", "failed"))
            if what == "done":
                dealer.is_done(offer, now)
            elif what == "left":
                dealer.is_left(offer)
            elif what == "held":
                dealer.is_held(offer, now)
            elif what == "failed" and not failures:
                failures += 1
                dealer.has_failed(offer, "no space left")
    assert dealer.done == set(range(30))
