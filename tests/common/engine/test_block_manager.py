"""The block manager: one example of each thing that it does. Any order of calls: `test_block_manager_machine`."""

from __future__ import annotations

import pytest

from common.blocks import hash_chain, num_blocks, root_hash
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
