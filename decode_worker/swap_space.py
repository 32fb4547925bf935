"""Which slot of the swap region holds which block's content: references and names, no memory.

    store(blocks) -> slots, and those of them that are to be copied       retrieve is the caller's; drop(slots) frees them

A block that bears a hash is stored once, however many sequences that share it are preempted. `common.engine.swap_region` is the
memory; the scheduler owns both accounts, and tells the engine what to copy (`StepPlan`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from common.blocks import BlockHash
from common.errors import IllegalTransition


@dataclass(frozen=True, slots=True)
class Swapped:
    """A sequence's KV in swap space: slot i holds its i-th block."""

    slots: tuple[int, ...]
    num_computed: int


class SwapSpace:
    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self._free = list(range(num_slots - 1, -1, -1))
        self._references: dict[int, int] = {}
        self._slot_of: dict[BlockHash, int] = {}
        self._hash_of: dict[int, BlockHash] = {}

    @property
    def num_free(self) -> int:
        return len(self._free)

    def num_new(self, hashes: Sequence[BlockHash | None]) -> int:
        """How many slots it would take to store blocks with these names."""
        return sum(name is None or name not in self._slot_of for name in hashes)

    def store(self, blocks: Sequence[int], hashes: Sequence[BlockHash | None]) -> tuple[tuple[int, ...], list[tuple[int, int]]]:
        """A slot for each block, and (block, slot) of those whose content is not there yet."""
        if self.num_new(hashes) > len(self._free):
            raise IllegalTransition("the swap space is full")
        slots: list[int] = []
        copies: list[tuple[int, int]] = []
        for block, name in zip(blocks, hashes, strict=True):
            slot = None if name is None else self._slot_of.get(name)
            if slot is None:
                slot = self._free.pop()
                copies.append((block, slot))
                self._references[slot] = 0
                if name is not None:
                    self._slot_of[name], self._hash_of[slot] = slot, name
            self._references[slot] += 1
            slots.append(slot)
        return tuple(slots), copies

    def drop(self, slots: Sequence[int]) -> None:
        for slot in slots:
            if slot not in self._references:
                raise IllegalTransition(f"slot {slot} holds nothing")
            self._references[slot] -= 1
            if not self._references[slot]:
                del self._references[slot]
                name = self._hash_of.pop(slot, None)
                if name is not None:
                    del self._slot_of[name]
                self._free.append(slot)
