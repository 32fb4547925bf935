"""The block manager against a naive model that knows tokens instead of hashes and lists instead of maps."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from common.blocks import hash_chain, next_hash, num_blocks, root_hash
from common.engine.block_manager import BlockManager
from common.errors import IllegalTransition

BLOCK_TOKENS = 2


def make_manager(num_blocks: int = 8, *, prefix_cache: bool = True, first_block: int = 0) -> BlockManager:
    return BlockManager(
        num_blocks, BLOCK_TOKENS, lambda salt: root_hash(b"f" * 32, salt), prefix_cache=prefix_cache, first_block=first_block
    )


def compute(manager: BlockManager, token_ids: list[int], salt: str = "") -> list[int]:
    """Allocates, pretends to compute, registers the full blocks."""
    blocks = manager.allocate(num_blocks(len(token_ids), BLOCK_TOKENS))
    for block, block_hash in zip(blocks, hash_chain(manager.root(salt), token_ids, BLOCK_TOKENS), strict=False):
        manager.register(block, block_hash)
    return blocks


def test_released_blocks_are_found_by_their_prefix_and_only_in_their_partition() -> None:
    manager = make_manager()
    blocks = compute(manager, [1, 2, 3, 4, 5])
    manager.release(blocks)
    assert manager.match_prefix([1, 2, 3, 4, 5, 6], "", 100) == blocks[:2]
    assert manager.match_prefix([1, 2, 3, 4], "", 3) == blocks[:1]
    assert manager.match_prefix([1, 2, 9, 4], "", 100) == blocks[:1]
    assert manager.match_prefix([9, 2, 3, 4], "", 100) == []
    assert manager.match_prefix([1, 2, 3, 4], "other tenant", 100) == []
    assert manager.match_prefix([1, 2], "", 0) == []
    assert (manager.num_free, manager.num_cached, manager.num_used) == (6, 2, 0)


def test_used_blocks_are_found_too_and_shared() -> None:
    manager = make_manager()
    blocks = compute(manager, [1, 2, 3, 4])
    found = manager.match_prefix([1, 2, 3, 4], "", 100)
    manager.acquire(found)
    manager.release(blocks)
    assert manager.num_used == 2
    manager.release(found)
    assert (manager.num_used, manager.num_cached) == (0, 2)


def test_the_tail_of_a_chain_is_evicted_before_its_head() -> None:
    manager = make_manager(4)
    blocks = compute(manager, [1, 2, 3, 4, 5, 6])
    manager.release(blocks)
    manager.allocate(2)
    assert manager.match_prefix([1, 2, 3, 4, 5, 6], "", 100) == blocks[:2]
    manager.allocate(1)
    assert manager.match_prefix([1, 2, 3, 4, 5, 6], "", 100) == blocks[:1]


def test_the_least_recently_used_chain_is_evicted_first() -> None:
    manager = make_manager(4)
    old, new = compute(manager, [1, 2, 3, 4]), compute(manager, [5, 6, 7, 8])
    manager.release(old)
    manager.release(new)
    manager.acquire(old)
    manager.release(old)
    manager.allocate(2)
    assert manager.match_prefix([1, 2, 3, 4], "", 100) == old
    assert manager.match_prefix([5, 6, 7, 8], "", 100) == []


def test_the_first_block_keeps_a_hash() -> None:
    manager = make_manager()
    first, second = compute(manager, [1, 2]), compute(manager, [1, 2])
    assert manager.match_prefix([1, 2], "", 100) == first
    manager.release(second)
    assert (manager.num_free, manager.num_cached) == (7, 0)
    manager.release(first)
    assert manager.match_prefix([1, 2], "", 100) == first


def test_without_a_prefix_cache_nothing_is_found_and_everything_is_freed() -> None:
    manager = make_manager(prefix_cache=False)
    blocks = compute(manager, [1, 2, 3, 4])
    assert manager.match_prefix([1, 2, 3, 4], "", 100) == []
    manager.release(blocks)
    assert (manager.num_free, manager.num_cached) == (8, 0)


def test_can_allocate_counts_what_will_be_revived() -> None:
    manager = make_manager(4)
    cached = compute(manager, [1, 2, 3, 4])
    manager.release(cached)
    assert manager.can_allocate(4)
    assert not manager.can_allocate(4, keep_free=1)
    assert manager.can_allocate(2, reusing=cached)
    assert not manager.can_allocate(3, reusing=cached)
    manager.acquire(cached)
    manager.allocate(2)
    assert not manager.can_allocate(1)


def test_quarantined_blocks_are_not_handed_out_until_the_writer_is_gone() -> None:
    manager = make_manager(4)
    blocks = manager.allocate(3)
    manager.quarantine(blocks)
    assert (manager.num_in_transfer, manager.num_available) == (3, 1)
    assert set(manager.allocate(1)).isdisjoint(blocks)
    assert not manager.can_allocate(1)
    manager.end_quarantine(blocks)
    assert sorted(manager.allocate(3)) == sorted(blocks)
    manager.check_integrity()


def test_blocks_below_the_first_belong_to_nobody() -> None:
    manager = make_manager(4, first_block=1)
    assert manager.num_total == 3
    assert sorted(manager.allocate(3)) == [1, 2, 3]
    manager.check_integrity()


def test_drop_cache_frees_what_nobody_holds() -> None:
    manager = make_manager()
    held, idle = compute(manager, [1, 2]), compute(manager, [3, 4, 5, 6])
    manager.release(idle)
    assert manager.drop_cache() == 2
    assert manager.match_prefix([3, 4], "", 100) == []
    assert manager.match_prefix([1, 2], "", 100) == held
    manager.check_integrity()


def test_misuse_raises_and_changes_nothing() -> None:
    manager = make_manager(4)
    used, findable = manager.allocate(1), compute(manager, [1, 2])
    shared = manager.allocate(1)
    manager.share(shared)
    before = (manager.num_free, manager.num_cached, manager.num_used, manager.num_in_transfer)
    free = next(block for block in range(4) if manager.num_references(block) == 0)
    misuses = [
        lambda: manager.allocate(2),
        lambda: manager.allocate(-1),
        lambda: manager.release([free]),
        lambda: manager.release([*used, *used]),
        lambda: manager.release([*used, free]),
        lambda: manager.acquire([*used, free]),
        lambda: manager.share([free]),
        lambda: manager.register(free, b"h" * 32),
        lambda: manager.register(findable[0], b"h" * 32),
        lambda: manager.quarantine(findable),
        lambda: manager.quarantine([*used, *shared]),
        lambda: manager.quarantine([free]),
        lambda: manager.end_quarantine(used),
    ]
    for misuse in misuses:
        with pytest.raises(IllegalTransition):
            misuse()
        manager.check_integrity()
        assert (manager.num_free, manager.num_cached, manager.num_used, manager.num_in_transfer) == before


@pytest.mark.parametrize(
    "damage",
    [
        lambda manager: manager._free.pop(),
        lambda manager: manager._free.append(manager._free[0]),
        lambda manager: manager._references.popitem(),
        lambda manager: manager._references.update({next(iter(manager._references)): 0}),
        lambda manager: manager._cached.popitem(),
        lambda manager: manager._hash_of.popitem(),
        lambda manager: manager._block_of.popitem(),
        lambda manager: manager._in_transfer.pop(),
    ],
)
def test_check_integrity_sees_every_kind_of_damage(damage) -> None:
    manager = make_manager()
    manager.release(compute(manager, [1, 2]))
    compute(manager, [3, 4])
    manager.quarantine(manager.allocate(1))
    manager.check_integrity()
    damage(manager)
    with pytest.raises(IllegalTransition):
        manager.check_integrity()


class NaiveBlocks:
    """What the manager is meant to be, written without a thought for speed. Blocks are named by the text they stand for."""

    def __init__(self, count: int) -> None:
        self.all = set(range(count))
        self.references: dict[int, int] = {}
        self.cached: list[int] = []  # oldest first
        self.in_transfer: set[int] = set()
        self.text_of: dict[int, tuple[str, tuple[int, ...]]] = {}

    @property
    def free(self) -> set[int]:
        return self.all - set(self.references) - set(self.cached) - self.in_transfer

    def match(self, tokens: list[int], salt: str, max_tokens: int) -> list[int]:
        found: list[int] = []
        for end in range(BLOCK_TOKENS, min(len(tokens), max_tokens) + 1, BLOCK_TOKENS):
            holders = [block for block, text in self.text_of.items() if text == (salt, tuple(tokens[:end]))]
            if not holders:
                break
            found += holders
        return found

    def take(self, block: int) -> None:
        if block in self.cached:
            self.cached.remove(block)
        self.references[block] = self.references.get(block, 0) + 1

    def accept_fresh(self, blocks: list[int]) -> None:
        """What `allocate` returned must be all free blocks first, then exactly the oldest cached ones."""
        assert len(set(blocks)) == len(blocks)
        num_evicted = max(0, len(blocks) - len(self.free))
        evicted, self.cached = self.cached[:num_evicted], self.cached[num_evicted:]
        for block in evicted:
            del self.text_of[block]
        assert set(blocks) <= self.free
        assert set(evicted) <= set(blocks)
        self.references.update(dict.fromkeys(blocks, 1))

    def register(self, block: int, salt: str, tokens: tuple[int, ...]) -> None:
        if (salt, tokens) not in self.text_of.values():
            self.text_of[block] = (salt, tokens)

    def drop(self, blocks: list[int]) -> None:
        for block in reversed(blocks):
            self.references[block] -= 1
            if self.references[block] == 0:
                del self.references[block]
                if block in self.text_of:
                    self.cached.append(block)


tokens_strategy = st.lists(st.integers(0, 1), min_size=1, max_size=9)
salts = st.sampled_from(["", "tenant"])


class BlockManagerMachine(RuleBasedStateMachine):
    @initialize(count=st.integers(3, 10))
    def begin(self, count: int) -> None:
        self.manager = make_manager(count)
        self.naive = NaiveBlocks(count)
        self.sequences: list[list[int]] = []
        self.transfers: list[list[int]] = []
        self.quarantined: list[list[int]] = []

    @rule(tokens=tokens_strategy, salt=salts, spare=st.integers(0, 3))
    def run_sequence(self, tokens: list[int], salt: str, spare: int) -> None:
        matched = self.manager.match_prefix(tokens, salt, len(tokens) - 1)
        assert matched == self.naive.match(tokens, salt, len(tokens) - 1)
        missing = num_blocks(len(tokens), BLOCK_TOKENS) - len(matched)
        fits = self.manager.can_allocate(missing, keep_free=spare, reusing=matched)
        idle = len(set(self.naive.cached) - set(matched))
        assert fits == (missing + spare <= len(self.naive.free) + idle)
        if not fits:
            return
        self.manager.acquire(matched)
        for block in matched:
            self.naive.take(block)
        fresh = self.manager.allocate(missing)
        self.naive.accept_fresh(fresh)
        blocks = matched + fresh
        parent = self.manager.root(salt)
        for index in range(len(tokens) // BLOCK_TOKENS):
            end = (index + 1) * BLOCK_TOKENS
            parent = next_hash(parent, tokens[end - BLOCK_TOKENS : end])
            if index >= len(matched):
                self.manager.register(blocks[index], parent)
                self.naive.register(blocks[index], salt, tuple(tokens[:end]))
        self.sequences.append(blocks)

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def fork_sequence(self, data: st.DataObject) -> None:
        blocks = data.draw(st.sampled_from(self.sequences))
        self.manager.share(blocks)
        for block in blocks:
            self.naive.take(block)
        self.sequences.append(list(blocks))

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def end_sequence(self, data: st.DataObject) -> None:
        blocks = self.sequences.pop(data.draw(st.integers(0, len(self.sequences) - 1)))
        self.manager.release(blocks)
        self.naive.drop(blocks)

    @rule(count=st.integers(1, 3))
    def offer_blocks(self, count: int) -> None:
        if not self.manager.can_allocate(count):
            with pytest.raises(IllegalTransition):
                self.manager.allocate(count)
            return
        blocks = self.manager.allocate(count)
        self.naive.accept_fresh(blocks)
        self.transfers.append(blocks)

    @precondition(lambda self: self.transfers)
    @rule()
    def cancel_transfer(self) -> None:
        blocks = self.transfers.pop()
        self.manager.quarantine(blocks)
        for block in blocks:
            del self.naive.references[block]
        self.naive.in_transfer.update(blocks)
        self.quarantined.append(blocks)

    @precondition(lambda self: self.quarantined)
    @rule()
    def fence_writer(self) -> None:
        blocks = self.quarantined.pop()
        self.manager.end_quarantine(blocks)
        self.naive.in_transfer.difference_update(blocks)

    @rule(tokens=tokens_strategy, salt=salts, max_tokens=st.integers(0, 9))
    def look(self, tokens: list[int], salt: str, max_tokens: int) -> None:
        assert self.manager.match_prefix(tokens, salt, max_tokens) == self.naive.match(tokens, salt, max_tokens)

    @invariant()
    def agrees(self) -> None:
        self.manager.check_integrity()
        assert self.manager.num_free == len(self.naive.free)
        assert self.manager.num_cached == len(self.naive.cached)
        assert self.manager.num_in_transfer == len(self.naive.in_transfer)
        assert {block: self.manager.num_references(block) for block in self.naive.all} == {
            block: self.naive.references.get(block, 0) for block in self.naive.all
        }


BlockManagerMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestBlockManagerMachine = BlockManagerMachine.TestCase
