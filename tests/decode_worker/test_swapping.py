"""Swap space: whose slots, what is copied, what it costs; and a choice that is preempted again before its KV is back."""

from __future__ import annotations

import pytest

from common.blocks import root_hash
from common.clock import ManualClock
from common.engine.block_manager import BlockManager
from common.engine.sequence import PagedSequence
from common.errors import IllegalTransition
from common.types import KVLayout, Request, SamplingParams
from decode_worker.generation import Choice, Generation
from decode_worker.holdings import Holdings
from decode_worker.preemption_cost import PreemptionCost
from decode_worker.swap_space import SwapSpace
from decode_worker.swapping import Swapping

LAYOUT = KVLayout("m", "t", 1, 1, 8, 4, "float32", True)


def test_a_block_that_two_sequences_share_is_stored_once() -> None:
    space = SwapSpace(4)
    first, copies = space.store([7, 8], [b"shared", None])
    assert copies == [(7, first[0]), (8, first[1])]
    second, copies = space.store([7, 9], [b"shared", None])
    assert second[0] == first[0]
    assert copies == [(9, second[1])]
    space.drop(first)
    assert space.num_free == 2
    assert space.num_new([b"shared"]) == 0
    space.drop(second)
    assert (space.num_free, space.num_new([b"shared"])) == (4, 1)
    with pytest.raises(IllegalTransition):
        space.drop(second)
    with pytest.raises(IllegalTransition, match="full"):
        space.store(list(range(5)), [None] * 5)


def test_auto_takes_what_costs_less_as_measured() -> None:
    cost = PreemptionCost(block_bytes=1000, bytes_per_s=1e6)  # 2 ms for a block, there and back
    swapping = Swapping(8, cost, always=False)
    assert swapping.put_out([1], [None], 4, 4) is None, "nothing is known of steps yet"
    for _ in range(50):
        cost.observe_step(rows=64, prefill_rows=64, seconds=0.064)
    assert swapping.put_out([1], [None], 2, 2) is None
    assert swapping.put_out([1], [None], 3, 3) is not None
    for _ in range(50):
        cost.observe_copies(1000, 1.0)
    assert swapping.put_out([2], [None], 4, 4) is None, "copies have become slow"
    assert Swapping(1, cost, always=True).put_out([1, 2], [None, None], 8, 8) is None, "no room"


def held(tokens: int, blocks: BlockManager) -> tuple[Holdings, Swapping, Choice]:
    swapping = Swapping(8, PreemptionCost(LAYOUT.block_bytes, 1e9), always=True)
    holdings = Holdings(LAYOUT, blocks, swapping, watermark_blocks=0, growth_tokens=0)
    request = Request("a", "m", tuple(range(10, 10 + tokens)), SamplingParams(max_tokens=9, seed=1))
    generation = Generation(request, (), PagedSequence(request.prompt_token_ids, root(""), 4), ManualClock())
    generation.prompt_in_kv = True
    choice = generation.choices[0]
    assert holdings.reserve(choice, []) == 0
    choice.sequence.advance(tokens - 1, blocks)
    return holdings, swapping, choice


def root(salt: str) -> bytes:
    return root_hash(LAYOUT.fingerprint, salt)


def test_what_is_still_cached_is_not_brought_back() -> None:
    blocks = BlockManager(8, 4, root)
    holdings, swapping, choice = held(10, blocks)  # two full blocks, findable, and one with a token
    assert holdings.put_out(choice)
    assert len(holdings.take_orders()[2]) == 3
    assert holdings.reserve(choice, []) == 8
    assert choice.sequence.num_computed == 9
    _, brought_in, _ = holdings.take_orders()
    assert [block for _, block in brought_in] == [choice.sequence.blocks[2]]
    assert swapping.space.num_free == 8
    holdings.give_back(choice)
    assert blocks.num_used == 0


def test_who_is_preempted_before_it_is_back_leaves_nothing_to_be_found() -> None:
    """Its blocks have no content yet: nobody may find them, and nothing is copied to them."""
    blocks = BlockManager(8, 4, root)
    holdings, swapping, choice = held(10, blocks)
    assert holdings.put_out(choice)
    holdings.take_orders()
    blocks.drop_cache()
    assert holdings.reserve(choice, []) == 0
    assert choice.sequence.num_computed == 9
    assert holdings.put_out(choice)
    assert holdings.take_orders() == ((), (), ())
    assert blocks.num_free == 8, "a block that was never filled can be found"
    assert swapping.space.num_free == 5, "what it has is still in swap space"
    assert holdings.reserve(choice, []) == 0
    holdings.give_back(choice)  # aborted, before the copies were ordered
    assert holdings.take_orders() == ((), (), ())
    assert (blocks.num_free, swapping.space.num_free) == (8, 8)


def test_a_new_request_leaves_room_for_those_in_progress_to_grow() -> None:
    blocks = BlockManager(8, 4, root)
    _, _, choice = held(10, blocks)  # three blocks; up to nine more tokens need two more
    for growth_tokens, watermark_blocks, fits in ((0, 0, True), (2, 0, True), (3, 0, False), (400, 0, False), (0, 1, False)):
        holdings = Holdings(LAYOUT, blocks, None, watermark_blocks=watermark_blocks, growth_tokens=growth_tokens)
        request = Request("b", "m", tuple(range(50, 70)), SamplingParams(max_tokens=9, seed=1))  # needs all that is left
        other = Generation(request, (), PagedSequence(request.prompt_token_ids, root(""), 4), ManualClock()).choices[0]
        assert (holdings.reserve(other, [choice]) is not None) == fits
        holdings.give_back(other)
    request = Request(
        "c", "m", tuple(range(50, 62)), SamplingParams(max_tokens=9, seed=1)
    )  # leaves two, which is all that can be needed
    other = Generation(request, (), PagedSequence(request.prompt_token_ids, root(""), 4), ManualClock()).choices[0]
    assert Holdings(LAYOUT, blocks, None, watermark_blocks=0, growth_tokens=400).reserve(other, [choice]) == 0
