"""Beginnings of prompts that are on their way here, so that equal ones are neither computed nor sent side by side.

    begin(choice, prefill) ── its blocks are computed here, or arrive from there ──> end(choice), however it ended
         `-> is_worth_waiting(other): others that lack these very blocks wait in line, and find them when they are there

Who waits is not asked for room meanwhile, and who goes on has not overtaken it. It waits for somebody whose turn is before its
own, so nothing urgent waits for what is put off, and the first of all waits for nobody. It waits only where that spares work:

  - its own rest would be computed here: what is sent to it, or computed, is then the rest alone
  - its rest would be computed by the very worker that computes the beginning: that one has to come to it first in any case
  - its rest would be computed elsewhere, but is short beside a beginning that is computed here: then it is computed here too, for
    elsewhere all of it would be

and not for a beginning that is the lesser part of what arrives with it, for blocks from elsewhere are there when all of them are.
A beginning that is computed here can be found block by block.

Owned by the scheduler. It owns no block; what it knows is names.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from common.blocks import BlockHash, num_full_blocks
from common.engine.block_manager import BlockManager
from common.types import PrefillChoice, WorkerRef
from decode_worker.admission import LocalPrefill, PrefillPlace, choose_place
from decode_worker.generation import Choice

_SHORT = 4  # a rest that the beginning is so many times as long as


@dataclass(frozen=True, slots=True)
class _Bringer:
    choice: Choice
    prefill: WorkerRef | None  # None: it is computed here
    names: Sequence[BlockHash]  # of its first blocks, with those that were here before
    num_found: int

    def num_shared(self, names: Sequence[BlockHash], known: int) -> int:
        """So many first blocks have the same names, of which the first `known` + 1 have: a name stands for all before it."""
        low, high = known + 1, min(len(names), len(self.names))
        while low < high:
            middle = (low + high + 1) // 2
            if names[middle - 1] == self.names[middle - 1]:
                low = middle
            else:
                high = middle - 1
        return low


class Beginnings:
    def __init__(self, config: LocalPrefill, blocks: BlockManager) -> None:
        self._config = config
        self._blocks = blocks
        self._bringers: dict[BlockHash, _Bringer] = {}  # of blocks that cannot be found yet
        self._bringing: set[Choice] = set()
        self._known: dict[Choice, int] = {}  # of those that wait: so many of their first blocks can be found, as far as is known

    @property
    def num_waiting(self) -> int:
        return len(self._known)

    def __contains__(self, choice: Choice) -> bool:
        """Whether it waits, as was said when it was last asked about."""
        return choice in self._known

    def begin(self, choice: Choice, prefill: WorkerRef | None) -> None:
        """The blocks that it lacks are under way. `prefill` computes them; None: they are computed here."""
        self._known.pop(choice, None)
        self._bringing.add(choice)
        names = choice.sequence.names
        found = choice.sequence.num_computed // self._blocks.block_tokens
        bringer = _Bringer(choice, prefill, names, found)
        for name in names[found:]:
            self._bringers.setdefault(name, bringer)

    def end(self, choice: Choice) -> None:
        """They are here, or will not come. Idempotent; also for who only waited."""
        self._known.pop(choice, None)
        if choice not in self._bringing:
            return
        self._bringing.remove(choice)
        for name in choice.sequence.names:
            bringer = self._bringers.get(name)
            if bringer is not None and bringer.choice is choice:
                del self._bringers[name]

    def is_worth_waiting(self, choice: Choice) -> bool:
        """Whether the choice, which has no block yet, waits for blocks that another brings."""
        waits = bool(self._bringers) and self._waits(choice)
        if not waits:
            self._known.pop(choice, None)
        return waits

    def _waits(self, choice: Choice) -> bool:
        generation = choice.generation
        if generation.prompt_in_kv or generation.wants_prompt_logprobs:
            return False
        num_tokens, block_tokens = generation.request.num_prompt_tokens, self._blocks.block_tokens
        names = choice.sequence.names[: num_full_blocks(num_tokens - 1, block_tokens)]  # the last token is computed in any case
        known = self._look(choice, names)
        bringer = self._bringers.get(names[known]) if known < len(names) else None
        if bringer is None or bringer.choice.turn > choice.turn:
            return False
        shared = bringer.num_shared(names, known)
        place = choose_place(
            self._config,
            generation.prefill_choice,
            uncached_tokens=num_tokens - shared * block_tokens,
            num_candidates=len(generation.candidates),
        )
        if place is PrefillPlace.REMOTE and bringer.prefill is None:
            if _SHORT * (num_tokens - shared * block_tokens) > shared * block_tokens:
                return False
            generation.prefill_choice = PrefillChoice.HERE
        elif place is PrefillPlace.REMOTE and bringer.prefill != generation.candidates[0]:
            return False
        return bringer.prefill is None or 2 * (shared - bringer.num_found) >= len(bringer.names) - bringer.num_found

    def _look(self, choice: Choice, names: Sequence[BlockHash]) -> int:
        """How many of them can be found, mostly by looking at the end of what could be."""
        known = self._known.get(choice, 0)
        if known and not self._blocks.has(names[known - 1]):
            known = 0
        while known < len(names) and self._blocks.has(names[known]):
            known += 1
        self._known[choice] = known
        return known
