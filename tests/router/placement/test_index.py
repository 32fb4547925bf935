"""The index against a set of blocks per worker, kept naively."""

from __future__ import annotations

import sys

from hypothesis import given, settings
from hypothesis import strategies as st

from router.placement.index import PrefixIndex, slots_of

TTL_S = 30.0


def depths(index: PrefixIndex, keys: list[int], now_s: float = 0.0) -> dict[int, int]:
    """slot -> blocks, as `match` says."""
    found = index.match(keys, now_s)
    said = {slot: match.num_blocks for match in found for slot in slots_of(match.slots)}
    assert len(said) == sum(match.slots.bit_count() for match in found), "a worker is in two groups"
    assert [match.num_blocks for match in found] == sorted({*said.values()}, reverse=True)
    return said


def naive_depth(held: set[int], keys: list[int]) -> int:
    return next((position for position, key in enumerate(keys) if key not in held), len(keys))


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_it_is_a_set_of_blocks_per_worker(data: st.DataObject) -> None:
    """A tree of prefixes; workers hold, lose and are promised blocks; some come, go, and are seen through a gap."""
    index = PrefixIndex(max_blocks=10_000, speculative_ttl_s=TTL_S)
    trunk = list(range(1, 25))
    paths = [trunk[: data.draw(st.integers(0, 24))] + list(range(100 * branch, 100 * branch + 20)) for branch in (1, 2, 3)]
    reported: dict[int, set[int]] = {}
    promised: dict[int, dict[int, float]] = {}
    now_s = 0.0
    for _ in range(data.draw(st.integers(5, 40))):
        action = data.draw(st.sampled_from(["add", "hold", "evict", "promise", "drop", "gap", "wait", "sweep"]))
        if action == "add" or not reported:
            slot = index.add()
            assert slot not in reported, "a slot is given out twice"
            reported[slot], promised[slot] = set(), {}
        slot = data.draw(st.sampled_from(sorted(reported)))
        path = data.draw(st.sampled_from(paths))
        depth = data.draw(st.integers(1, len(path)))
        beyond = {key for one in paths if path[depth - 1] in one for key in one[one.index(path[depth - 1]) :]}
        match action:
            case "hold":
                index.apply(slot, path[:depth], ())
                reported[slot] |= set(path[:depth])
                promised[slot] = {key: until_s for key, until_s in promised[slot].items() if key not in path[:depth]}
            case "evict" if not beyond & promised[slot].keys():
                index.apply(slot, (), beyond)
                reported[slot] -= beyond
            case "promise":
                index.promise(slot, path[:depth], now_s)
                promised[slot] |= {key: now_s + TTL_S for key in path[:depth] if key not in reported[slot]}
            case "drop":
                index.drop(slot)
                del reported[slot], promised[slot]
            case "gap":  # what it said was missed: it gets a new slot and says everything
                index.drop(slot)
                picture, _ = reported.pop(slot), promised.pop(slot)
                slot = index.add()
                assert slot not in reported
                index.apply(slot, picture, ())
                reported[slot], promised[slot] = picture, {}
            case "wait":
                now_s += data.draw(st.sampled_from([1.0, TTL_S / 2, TTL_S]))
            case "sweep":
                for _ in range(3):
                    index.sweep()
        promised = {one: {key: end for key, end in keys.items() if end > now_s} for one, keys in promised.items()}
        for keys in paths:
            expected = {one: naive_depth(blocks | promised[one].keys(), keys) for one, blocks in reported.items()}
            assert depths(index, keys, now_s) == {one: count for one, count in expected.items() if count}


def test_a_promise_says_when_it_is_kept() -> None:
    index = PrefixIndex(max_blocks=100, speculative_ttl_s=TTL_S)
    slot, other = index.add(), index.add()
    index.promise(slot, [1, 2], 0.0, 3.0)
    index.promise(slot, [1, 2, 3], 1.0, 5.0)  # who follows the first
    assert [index.there_s(slot, key) for key in (1, 2, 3, 4)] == [3.0, 3.0, 5.0, 0.0]
    assert index.there_s(other, 1) == 0.0
    index.apply(slot, [1], ())
    assert [index.there_s(slot, key) for key in (1, 2, 3)] == [0.0, 3.0, 5.0]
    index.match([1, 2, 3], TTL_S + 0.5)  # the first promise is over, the second is not
    assert depths(index, [1, 2, 3], TTL_S + 0.5) == {slot: 3}
    assert depths(index, [1, 2, 3], TTL_S + 1.0) == {slot: 1}


def test_few_blocks_of_a_long_prompt_are_looked_at() -> None:
    index = PrefixIndex(max_blocks=10_000, speculative_ttl_s=TTL_S)
    keys = list(range(1, 4001))
    for blocks in (4000, 2500, 7):
        index.apply(index.add(), keys[:blocks], ())
    looked_at: list[int] = []
    holders = index.holders
    index.holders = lambda key: (looked_at.append(key), holders(key))[1]  # type: ignore[method-assign]
    assert depths(index, keys) == {0: 4000, 1: 2500, 2: 7}
    assert len(looked_at) < 80


def test_a_block_takes_less_than_a_hundred_bytes() -> None:
    """Held by up to eight of a hundred workers, as prefixes are."""
    index = PrefixIndex(max_blocks=1_000_000, speculative_ttl_s=TTL_S)
    slots = [index.add() for _ in range(100)]
    keys = [(number * 0x9E3779B97F4A7C15 >> 4) & (2**60 - 1) | 1 << 59 for number in range(150_000)]
    for turn, slot in enumerate(slots):
        index.apply(slot, keys[turn * 1500 : turn * 1500 + 12_000], ())
    table, sets = sys.getsizeof(index._holders), {id(bits): sys.getsizeof(bits) for bits in index._holders.values()}
    allocated = sum((sys.getsizeof(key) + 15) // 16 * 16 for key in index._holders)
    assert (table + allocated + sum(sets.values())) / len(index) <= 100


def test_a_full_index_takes_nothing_in_and_says_so() -> None:
    index = PrefixIndex(max_blocks=10, speculative_ttl_s=TTL_S)
    slot = index.add()
    index.apply(slot, range(1, 16), ())
    index.promise(slot, range(100, 120), 0.0)
    assert (len(index), index.dropped) == (10, 5)
    assert depths(index, list(range(1, 16))) == {slot: 10}
    index.apply(slot, (), range(1, 11))
    index.apply(slot, range(5, 8), ())
    assert len(index) == 3


def test_a_gone_workers_bits_are_swept_before_its_slot_is_given_out() -> None:
    index = PrefixIndex(max_blocks=100_000, speculative_ttl_s=TTL_S)
    stays, goes = index.add(), index.add()
    index.apply(stays, range(1, 10), ())
    index.apply(goes, range(1, 9000), ())
    index.drop(goes)
    assert depths(index, list(range(1, 9000))) == {stays: 9}
    assert index.add() not in (stays, goes)
    for _ in range(10):
        index.sweep()
    assert len(index) == 9
    assert index.add() == goes
    assert depths(index, [5]) == {stays: 1}


def test_a_promise_ends_when_the_worker_has_the_block_and_lasts_when_it_is_made_again() -> None:
    index = PrefixIndex(max_blocks=100, speculative_ttl_s=TTL_S)
    slot = index.add()
    index.promise(slot, [1, 2, 3], 0.0)
    index.apply(slot, [1, 2, 3], ())
    index.apply(slot, (), [3])
    assert depths(index, [1, 2, 3], 1.0) == {slot: 2}
    index.promise(slot, [1, 2, 3], 2.0)
    index.promise(slot, [1, 2, 3], 20.0)
    assert depths(index, [1, 2, 3], 2.0 + TTL_S) == {slot: 3}
    assert depths(index, [1, 2, 3], 20.0 + TTL_S) == {slot: 2}
