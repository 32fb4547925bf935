"""What is asked of Ray for a worker to come, after others have changed their roles: counts agree, and no host stays unused."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from common.types import Role
from deploy.slots import Place, SlotBook

PREFILL, DECODE = Role.PREFILL, Role.DECODE


def fleet(prefill: int, decode: int) -> tuple[SlotBook, dict[Role, int], list[Place]]:
    """As many workers as slots, each in one of its own."""
    book, offered = SlotBook(), {PREFILL: prefill, DECODE: decode}
    return book, offered, [book.take(role, 1, offered) for role, count in offered.items() for _ in range(count)]


def slots_in_use(book: SlotBook) -> Counter[Role]:
    return Counter(place.slot for place in book.places)


def roles(book: SlotBook) -> Counter[Role]:
    return Counter(place.role for place in book.places)


def test_after_a_flip_the_next_worker_of_the_lender_asks_for_a_slot_of_the_other_role() -> None:
    """Two of each are wanted. Asking for a third prefill slot would make three hosts for prompts and one for decoding."""
    book, offered, places = fleet(2, 1)
    places[0].becomes(DECODE, 1)
    assert book.take(PREFILL, 1, offered).slot is DECODE
    assert slots_in_use(book) == roles(book) == {PREFILL: 2, DECODE: 2}


def test_a_fixed_fleet_takes_a_flipped_worker_back_into_the_slot_that_it_left() -> None:
    book, offered, places = fleet(2, 1)
    places[0].becomes(DECODE, 1)
    places[0].leave()  # killed
    assert book.take(DECODE, 1, offered).slot is PREFILL, "the only one that is free"
    assert book.take(DECODE, 1, offered).slot is DECODE, "nothing is free: a host of its own role is wanted"


@pytest.mark.parametrize("role", list(Role))
def test_who_never_flips_is_never_put_in_a_slot_of_the_other_role(role: Role) -> None:
    book, offered = SlotBook(), {PREFILL: 3, DECODE: 3}
    assert [book.take(role, 1, offered).slot for _ in range(5)] == [role] * 5


def test_a_flip_that_is_taken_back_leaves_no_right_behind() -> None:
    book, offered, places = fleet(2, 1)
    places[0].becomes(DECODE, 1)
    places[0].becomes(PREFILL, 1)
    places[0].leave()
    places[0].leave()
    assert book.take(DECODE, 1, offered).slot is DECODE
    assert len(book.places) == 3


def test_who_holds_more_than_it_needs_is_asked_for_as_it_is_held() -> None:
    """A prefill worker of four ranks that became a decode worker of one holds four CPUs until it ends."""
    book = SlotBook()
    place = book.take(PREFILL, 4, {PREFILL: 0, DECODE: 0})
    book.take(DECODE, 1, {PREFILL: 0, DECODE: 0})
    assert book.asked_ranks([4, 1]) == [1, 4]
    place.becomes(DECODE, 1)
    assert book.asked_ranks([1, 1]) == [1, 4]
    assert book.asked_ranks([1, 1, 4]) == [1, 4, 4]
    place.leave()
    assert book.asked_ranks([1, 1]) == [1, 1]


@pytest.mark.parametrize("seed", range(20))
def test_whatever_flips_and_dies_a_full_fixed_fleet_always_has_a_slot_for_everybody(seed: int) -> None:
    draw = random.Random(seed)
    book, offered, places = fleet(draw.randint(1, 4), draw.randint(1, 4))
    for _ in range(100):
        place = places.pop(draw.randrange(len(places)))
        if draw.random() < 0.5:
            place.becomes(draw.choice(list(Role)), 1)
        else:
            place.leave()
            place = book.take(place.role, 1, offered)
        places.append(place)
        assert slots_in_use(book) == offered


@pytest.mark.parametrize("seed", range(20))
def test_where_hosts_can_be_had_slots_follow_roles(seed: int) -> None:
    """Nothing is free, as where an autoscaler keeps no host to spare. Pools that flip and then grow have as many slots of each
    role in use as workers, once growth has made up for the flips."""
    draw = random.Random(seed)
    book, nothing = SlotBook(), {PREFILL: 0, DECODE: 0}
    places = [book.take(role, 1, nothing) for role in Role for _ in range(4)]
    for place in draw.sample(places, 3):
        place.becomes(DECODE if place.role is PREFILL else PREFILL, 1)
    for role in Role:
        for _ in range(4):
            book.take(role, 1, nothing)
    assert slots_in_use(book) == roles(book)
