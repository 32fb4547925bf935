"""The block manager against a naive model, for any order of calls, right ones and wrong ones; wrong managers must be caught.

The model knows text instead of hashes, lists of owners instead of counts, and what is really written in each block. It takes the
manager's word only for which of the free blocks it hands out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test

from common.blocks import BlockHash, next_hash, num_blocks, root_hash
from common.engine.block_manager import BlockManager
from common.errors import IllegalTransition
from support.search_depth import FACTOR, examples

BLOCK_TOKENS = 2
Text = tuple[str, tuple[int, ...]]  # a partition and a whole prefix


class NaiveBlocks:
    """What the manager is meant to be, without a thought for speed."""

    def __init__(self, blocks: range, prefix_cache: bool) -> None:
        self.all = set(blocks)
        self.prefix_cache = prefix_cache
        self.tables: list[list[int]] = []  # one for each owner
        self.idle: list[int] = []  # findable and without an owner, oldest first
        self.quarantined: set[int] = set()
        self.findable: dict[Text, int] = {}
        self.memory: dict[int, Text | None] = dict.fromkeys(blocks)

    def owners(self, block: int) -> int:
        return sum(table.count(block) for table in self.tables)

    @property
    def used(self) -> set[int]:
        return {block for table in self.tables for block in table}

    @property
    def free(self) -> set[int]:
        return self.all - self.used - set(self.idle) - self.quarantined

    def match(self, tokens: Sequence[int], salt: str, max_tokens: int) -> list[int]:
        found: list[int] = []
        for end in range(BLOCK_TOKENS, min(len(tokens), max_tokens) + 1, BLOCK_TOKENS):
            block = self.findable.get((salt, tuple(tokens[:end])))
            if block is None:
                break
            assert self.memory[block] == (salt, tuple(tokens[:end])), "a block is found that holds something else"
            found.append(block)
        return found

    def handed_out(self, blocks: list[int]) -> None:
        """All free blocks must go first, then exactly the idle ones that were idle longest."""
        assert len(set(blocks)) == len(blocks)
        assert not set(blocks) & self.used, "a block is in two tables and not shared"
        assert not set(blocks) & self.quarantined, "a block is handed out while a writer may write to it"
        num_evicted = max(0, len(blocks) - len(self.free))
        evicted, self.idle = self.idle[:num_evicted], self.idle[num_evicted:]
        self.findable = {text: block for text, block in self.findable.items() if block not in evicted}
        assert set(evicted) <= set(blocks) <= self.free
        self.memory.update(dict.fromkeys(blocks))

    def taken_again(self, blocks: Sequence[int]) -> None:
        self.idle = [block for block in self.idle if block not in blocks]

    def written(self, block: int, text: Text) -> bool:
        self.memory[block] = text
        return self.prefix_cache and self.findable.setdefault(text, block) == block

    def left(self, table: list[int]) -> None:
        self.tables.remove(table)
        known = set(self.findable.values())
        self.idle += [block for block in reversed(table) if block in known and not self.owners(block)]


# Few texts with long common prefixes: most prompts meet something that was computed before.
tokens_strategy = st.builds(lambda same, other: [0] * same + [1] * other, st.integers(1, 6), st.sampled_from([0, 0, 1, 3]))
salts = st.sampled_from(["", "tenant"])


class BlockManagerMachine(RuleBasedStateMachine):
    manager_class: type[BlockManager] = BlockManager

    @initialize(count=st.integers(3, 10), first_block=st.integers(0, 1), prefix_cache=st.sampled_from([True, True, True, False]))
    def begin(self, count: int, first_block: int, prefix_cache: bool) -> None:
        self.manager = self.manager_class(
            first_block + count,
            BLOCK_TOKENS,
            lambda salt: root_hash(b"f" * 32, salt),
            prefix_cache=prefix_cache,
            first_block=first_block,
        )
        self.naive = NaiveBlocks(range(first_block, first_block + count), prefix_cache)

    # -- sequences ----------------------------------------------------------------------------------------------------

    @rule(tokens=tokens_strategy, salt=salts, spare=st.integers(0, 3))
    def a_prompt_is_computed(self, tokens: list[int], salt: str, spare: int) -> None:
        matched = self.manager.match_prefix(tokens, salt, len(tokens) - 1)
        assert matched == self.naive.match(tokens, salt, len(tokens) - 1)
        self.obtain(tokens, salt, spare, matched)

    @rule(tokens=tokens_strategy, salt=salts)
    def a_prompt_is_computed_without_a_look(self, tokens: list[int], salt: str) -> None:
        """As two do that come at the same time: both hold the same text, the first one is found."""
        self.obtain(tokens, salt, 0, [])

    def obtain(self, tokens: list[int], salt: str, spare: int, matched: list[int]) -> None:
        missing = num_blocks(len(tokens), BLOCK_TOKENS) - len(matched)
        fits = self.manager.can_allocate(missing, keep_free=spare, reusing=matched)
        assert fits == (missing + spare <= len(self.naive.free) + len(set(self.naive.idle) - set(matched)))
        if not fits:
            return
        self.manager.acquire(matched)
        self.naive.taken_again(matched)
        self.naive.tables.append(list(matched))
        fresh = self.manager.allocate(missing)
        self.naive.handed_out(fresh)
        blocks = self.naive.tables[-1] = matched + fresh
        parent = self.manager.root(salt)
        for index in range(len(tokens) // BLOCK_TOKENS):
            end = (index + 1) * BLOCK_TOKENS
            parent = next_hash(parent, tokens[end - BLOCK_TOKENS : end])
            if index >= len(matched):
                first = self.naive.written(blocks[index], (salt, tuple(tokens[:end])))
                assert self.manager.register(blocks[index], parent) == first

    @precondition(lambda self: self.naive.tables)
    @rule(data=st.data())
    def a_sequence_forks(self, data: st.DataObject) -> None:
        table = data.draw(st.sampled_from(self.naive.tables))
        self.manager.share(table)
        self.naive.tables.append(list(table))

    @precondition(lambda self: self.naive.tables)
    @rule(data=st.data())
    def a_sequence_ends(self, data: st.DataObject) -> None:
        table = data.draw(st.sampled_from(self.naive.tables))
        self.manager.release(table)
        self.naive.left(table)

    # -- transfers ----------------------------------------------------------------------------------------------------

    @rule(count=st.integers(1, 3))
    def blocks_are_offered(self, count: int) -> None:
        if not self.manager.can_allocate(count):
            self.refuses(lambda: self.manager.allocate(count))
            return
        blocks = self.manager.allocate(count)
        self.naive.handed_out(blocks)
        self.naive.tables.append(blocks)

    @precondition(lambda self: self.naive.tables)
    @rule(data=st.data())
    def a_transfer_is_given_up(self, data: st.DataObject) -> None:
        table = data.draw(st.sampled_from(self.naive.tables))
        known = set(self.naive.findable.values())
        if any(block in known or self.naive.owners(block) != 1 for block in table):
            self.refuses(lambda: self.manager.quarantine(table))
            return
        self.manager.quarantine(table)
        self.naive.tables.remove(table)
        self.naive.quarantined.update(table)

    @precondition(lambda self: self.naive.quarantined)
    @rule(data=st.data())
    def a_writer_is_gone(self, data: st.DataObject) -> None:
        blocks = data.draw(st.lists(st.sampled_from(sorted(self.naive.quarantined)), unique=True))
        self.manager.end_quarantine(blocks)
        self.naive.quarantined.difference_update(blocks)

    # -- the rest -----------------------------------------------------------------------------------------------------

    @rule()
    def the_cache_is_dropped(self) -> None:
        assert self.manager.drop_cache() == len(self.naive.idle)
        self.naive.findable = {text: block for text, block in self.naive.findable.items() if block not in self.naive.idle}
        self.naive.idle = []

    @rule(tokens=tokens_strategy, salt=salts, max_tokens=st.integers(0, 9))
    def somebody_looks(self, tokens: list[int], salt: str, max_tokens: int) -> None:
        assert self.manager.match_prefix(tokens, salt, max_tokens) == self.naive.match(tokens, salt, max_tokens)

    @rule(data=st.data())
    def a_wrong_call(self, data: st.DataObject) -> None:
        naive, manager = self.naive, self.manager
        known = set(naive.findable.values())
        mine = data.draw(st.sampled_from([*naive.tables, []]))
        wrong: dict[str, tuple[set[int], Callable[[list[int]], object]]] = {
            # what may not be done with these blocks
            "release": (naive.all - naive.used, manager.release),
            "share": (naive.all - naive.used, manager.share),
            "acquire": (naive.free | naive.quarantined, manager.acquire),
            "quarantine": ((naive.all - naive.used) | known, manager.quarantine),
            "end_quarantine": (naive.all - naive.quarantined, manager.end_quarantine),
            "register": (naive.all - naive.used, lambda blocks: manager.register(blocks[-1], BlockHash(b"x" * 32))),
            "register anew": (known & naive.used, lambda blocks: manager.register(blocks[-1], BlockHash(b"x" * 32))),
        }
        blocks, call = wrong[data.draw(st.sampled_from(sorted(wrong)))]
        if blocks:
            block = data.draw(st.sampled_from(sorted(blocks)))
            self.refuses(lambda: call([*mine, block]))
        outside = data.draw(st.sampled_from([-1, 0, max(naive.all) + 1]))
        if outside not in naive.all:
            self.refuses(lambda: manager.release([outside]))
        if mine:
            self.refuses(lambda: manager.release([*mine, mine[0]]))
            self.refuses(lambda: manager.share([*mine, mine[0]]))
        self.refuses(lambda: manager.allocate(len(naive.free) + len(naive.idle) + 1))

    def refuses(self, call: Callable[[], object]) -> None:
        with pytest.raises(IllegalTransition):
            call()
        self.agrees()

    @invariant()
    def agrees(self) -> None:
        manager, naive = self.manager, self.naive
        counts = (manager.num_free, manager.num_cached, manager.num_used, manager.num_in_transfer)
        assert counts == (len(naive.free), len(naive.idle), len(naive.used), len(naive.quarantined))
        assert sum(counts) == manager.num_total == len(naive.all)
        assert manager.num_available == len(naive.free) + len(naive.idle)
        assert all(manager.num_references(block) == naive.owners(block) for block in naive.all)
        manager.check_integrity()

    def teardown(self) -> None:
        """When everybody has gone every block is free."""
        if not hasattr(self, "naive"):
            return
        for table in list(self.naive.tables):
            self.manager.release(table)
            self.naive.left(table)
        self.manager.end_quarantine(sorted(self.naive.quarantined))
        self.naive.quarantined.clear()
        self.agrees()
        self.the_cache_is_dropped()
        assert self.manager.num_free == self.manager.num_total


MACHINE_SETTINGS = settings(
    max_examples=examples(60),
    stateful_step_count=40,
    deadline=None,
    derandomize=FACTOR == 1,
    database=None,
    suppress_health_check=list(HealthCheck),
)
BlockManagerMachine.TestCase.settings = MACHINE_SETTINGS
TestBlockManagerMachine = BlockManagerMachine.TestCase


# -- wrong managers ----------------------------------------------------------------------------------------------------


class Unchecked(BlockManager):
    """The machine must see by itself that something is wrong."""

    def check_integrity(self) -> None:
        return


class FreesOnQuarantine(Unchecked):
    def quarantine(self, blocks: Sequence[int]) -> None:
        super().quarantine(blocks)
        self._free.extend(blocks)


class SharesWithoutCounting(Unchecked):
    def share(self, blocks: Sequence[int]) -> None:
        self._demand_used(blocks)


class RegisterOverwrites(Unchecked):
    def register(self, block: int, block_hash: BlockHash) -> bool:
        self._block_of.pop(block_hash, None)
        return super().register(block, block_hash)


class EvictsUsedBlocks(Unchecked):
    def acquire(self, blocks: Sequence[int]) -> None:
        idle = [block for block in self._cached if block in blocks]
        super().acquire(blocks)
        self._cached.update(dict.fromkeys(idle))


class FindsWhatItEvicted(Unchecked):
    def _evict_oldest(self) -> None:
        block, _ = self._cached.popitem(last=False)
        self._free.append(block)


class EvictsHeadsFirst(Unchecked):
    def release(self, blocks: Sequence[int]) -> None:
        super().release(blocks[::-1])


class ReleasesBeforeItChecks(Unchecked):
    def release(self, blocks: Sequence[int]) -> None:
        for block in blocks:
            super().release([block])


class MixesTenants(Unchecked):
    def root(self, salt: str) -> BlockHash:
        return super().root("")

    def match_prefix(self, token_ids: Sequence[int], salt: str, max_tokens: int) -> list[int]:
        return super().match_prefix(token_ids, "", max_tokens)


@pytest.mark.parametrize(
    "mutant",
    [
        FreesOnQuarantine,
        SharesWithoutCounting,
        RegisterOverwrites,
        EvictsUsedBlocks,
        FindsWhatItEvicted,
        EvictsHeadsFirst,
        ReleasesBeforeItChecks,
        MixesTenants,
    ],
)
def test_the_machine_catches(mutant: type[BlockManager]) -> None:
    class Wrong(BlockManagerMachine):
        manager_class = mutant

    with pytest.raises((AssertionError, IllegalTransition, KeyError, IndexError, pytest.fail.Exception)):
        run_state_machine_as_test(
            Wrong, settings=settings(MACHINE_SETTINGS, max_examples=500, phases=[Phase.generate], derandomize=True)
        )
