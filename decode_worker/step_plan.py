"""One step as the scheduler has planned it: what is to be done to memory, what is computed, and for whom. Values only."""

from __future__ import annotations

from dataclasses import dataclass

from common.engine.batch import ScheduledBatch
from decode_worker.generation import Choice


@dataclass(frozen=True, slots=True, eq=False)
class Share:
    """What a choice has of a step."""

    choice: Choice
    index: int  # of its slice
    count: int  # tokens of it, without guesses
    num_drafts: int
    is_prompt_end: bool
    draws: bool  # a token, at the end
    is_ahead: bool  # planned while another step was under way


@dataclass(frozen=True, slots=True)
class StepPlan:
    """Blocks are brought back from swap space first, then others are put there, then blocks are copied; then the batch is
    computed. Only what was brought back is there in a plan that was made ahead."""

    copies: tuple[tuple[int, int], ...]
    batch: ScheduledBatch
    shares: tuple[Share, ...]
    started_s: float
    swapped_in: tuple[tuple[int, int], ...] = ()  # (slot, block)
    swapped_out: tuple[tuple[int, int], ...] = ()  # (block, slot)
