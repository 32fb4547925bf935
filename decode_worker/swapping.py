"""Whether a preempted answer's KV goes to swap space, and what is ordered to be copied: the account and the cost, together.

Only what decodes is swapped; a prompt that loses its blocks while it is read is read again, as far as its full blocks do not stay
findable. In mode `auto` what is expected to take less time is done; where there is no room left in swap space, KV is computed
again.
"""

from __future__ import annotations

from collections.abc import Sequence

from common.blocks import BlockHash
from decode_worker.preemption_cost import PreemptionCost
from decode_worker.swap_space import Swapped, SwapSpace


class Swapping:
    def __init__(self, num_slots: int, cost: PreemptionCost, *, always: bool) -> None:
        """`always`: without asking what costs less."""
        self.space = SwapSpace(num_slots)
        self.cost = cost
        self._always = always
        self._put_out: list[tuple[int, int]] = []
        self._brought_in: list[tuple[int, int]] = []

    def put_out(self, blocks: Sequence[int], names: Sequence[BlockHash | None], num_tokens: int, num_lost: int) -> Swapped | None:
        """Orders copies of the blocks that hold `num_tokens` tokens; `num_lost` of these would have to be computed again. None:
        it does not pay, or there is no room."""
        num_new = self.space.num_new(names)
        if num_new > self.space.num_free:
            return None
        if not self._always and self.cost.swap_s(num_new) >= self.cost.recompute_s(num_lost):
            return None
        slots, copies = self.space.store(blocks, names)
        self._put_out.extend(copies)
        return Swapped(slots, num_tokens)

    def bring_in(self, swapped: Swapped, blocks: Sequence[int], first: int) -> None:
        """Orders copies back into a sequence's blocks, from its block `first` on. The slots are dropped when `take_orders` was
        called."""
        self._brought_in.extend(zip(swapped.slots[first:], blocks[first:], strict=False))

    def forget(self, blocks: Sequence[int]) -> None:
        """These were to be brought something, and are given away instead."""
        gone = set(blocks)
        self._brought_in = [order for order in self._brought_in if order[1] not in gone]

    def take_orders(self) -> tuple[tuple[tuple[int, int], ...], tuple[tuple[int, int], ...]]:
        """(slot, block) of what is to be brought in first, (block, slot) of what is to be put out then."""
        brought_in, put_out = tuple(self._brought_in), tuple(self._put_out)
        self._brought_in, self._put_out = [], []
        return brought_in, put_out
