"""What placement is told and what it says: a worker of the last snapshot, a prompt as its blocks, a decision with its reasons."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from common.blocks import BlockKey
from common.types import PrefillChoice, Role, WorkerRef, WorkerState

EXPECTED_OUTPUT_TOKENS = 512
"""An answer may be as long as the context, few are; more than this is not charged up front."""


@dataclass(frozen=True, slots=True)
class WorkerView:
    """A worker as the last snapshot of the registry tells it."""

    ref: WorkerRef
    role: Role
    model: str
    state: WorkerState
    max_model_tokens: int  # 0 = not known


@dataclass(frozen=True, slots=True)
class Prompt:
    """A request as far as placement looks at it."""

    num_tokens: int
    output_tokens: int = 0  # of all choices, as far as they are charged
    num_choices: int = 1
    block_tokens: int = 0  # 0 = not known, then there are no keys
    keys: Sequence[BlockKey] = ()  # of its full blocks, in order; perhaps only the first so many
    elsewhere: Prompt | None = None  # the same prompt in blocks of the prefill pool, where those are not as the decode pool's

    def at(self, role: Role) -> Prompt:
        """As the workers of a pool cut and name it."""
        return self if self.elsewhere is None or role is Role.DECODE else self.elsewhere

    def cached_tokens(self, num_blocks: int) -> int:
        """What a holder of so many blocks need not compute. The last token is always computed."""
        return min(num_blocks * self.block_tokens, (self.num_tokens - 1) // max(1, self.block_tokens) * self.block_tokens)


@dataclass(frozen=True, slots=True)
class Placement:
    decode: WorkerRef
    prefill: tuple[WorkerRef, ...]  # in order of preference; empty = the decode worker prefills itself
    choice: PrefillChoice = PrefillChoice.WORKER
    ttft_s: float | None = None  # predicted, from the dispatch on; None without a forecast
    decode_cached_tokens: int = 0  # of the prompt, on the decode worker
    prefill_cached_tokens: int = 0  # on the first candidate
    reason: str = ""
