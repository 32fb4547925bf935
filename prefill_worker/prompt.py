"""A prompt in a prefill worker: its tokens, how far it is in KV, and the names of its blocks.

    WAITING --admit--> RUNNING --last chunk, stop, or its time is over--> HELD --release--> gone
        `-------------- stop, or its time is over ------------------------^

Where steps follow each other through a pipeline, its next chunk is planned while the one before is computed (`under_way`). If it
is given up meanwhile, the blocks that those steps write to stay with it until they are over (`retired`).

Owned by one scheduler, on the engine's thread. It knows neither the step's budget nor who else is there.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence

from common.blocks import BlockHash, num_full_blocks
from common.engine.grammar import CompiledGrammar
from common.engine.sequence import PagedSequence
from common.errors import IllegalTransition
from common.types import Request, TokenLogprob


class PromptState(enum.Enum):
    WAITING = "waiting"  # holds no block
    RUNNING = "running"  # holds blocks for all of it
    HELD = "held"  # is not computed any more, but its blocks may still be read


_LEGAL = {
    PromptState.WAITING: {PromptState.RUNNING, PromptState.HELD},
    PromptState.RUNNING: {PromptState.HELD},
    PromptState.HELD: set[PromptState](),
}


class Prompt:
    def __init__(
        self,
        request: Request,
        sequence: PagedSequence,
        hashes: Sequence[BlockHash],
        *,
        serial: int,
        received_s: float,
        block_tokens: int,
        grammar: CompiledGrammar | None = None,
        wants_row: bool = False,
    ) -> None:
        """`hashes` are the names of its full blocks; none of them is there if nothing is to be found by its name.
        `wants_row`: the decode side has use for the last hidden row."""
        self.request = request
        self.wants_row = wants_row
        self.grammar = grammar
        self.sequence = sequence
        self.hashes = hashes
        self.serial = serial  # in order of arrival
        self.state = PromptState.WAITING
        self.cached_tokens = 0
        self.left_behind: list[int] = []  # blocks that others' took the place of when some tokens were in them; held to the end
        self.under_way = 0  # tokens that are computed by steps which are not accounted for yet
        self.num_steps_under_way = 0
        self.retired: list[int] = []  # what it gave back while steps were under way
        self.expected_blocks = 0  # while it waits: of its first blocks so many can be found, as far as is known
        self.logprobs: list[TokenLogprob] = []
        self.received_s = received_s
        self.deadline_s = received_s + request.timeout_s
        self.started_s: float | None = None
        self.work_s = 0.0
        self._block_tokens = block_tokens
        # The last token is computed in any case, for what follows it; and log-probabilities are computed with their tokens.
        reusable = num_full_blocks(request.num_prompt_tokens - 1, block_tokens)
        self._num_reusable = min(len(hashes), 0 if request.sampling.prompt_logprobs is not None else reusable)

    def enter(self, state: PromptState) -> None:
        if state not in _LEGAL[self.state]:
            raise IllegalTransition(f"prompt: {self.state.name} -> {state.name}")
        self.state = state

    @property
    def tokens_left(self) -> int:
        """That are to be computed here by steps to come, as far as is known."""
        expected = self.expected_blocks * self._block_tokens if self.state is PromptState.WAITING else 0
        return self.sequence.remaining - self.under_way - expected

    @property
    def num_known(self) -> int:
        """Tokens that are in KV when the steps under way are over."""
        return self.sequence.num_computed + self.under_way

    @property
    def reusable_hashes(self) -> Sequence[BlockHash]:
        """The names of its first blocks, which may be taken from whoever computed them."""
        return self.hashes[: self._num_reusable]

    def lacks(self, num_blocks: int) -> BlockHash | None:
        """The block that it would compute next, having `num_blocks` of its first, if it could as well take it from another."""
        return self.hashes[num_blocks] if num_blocks < self._num_reusable else None

    def completes(self, start: int, count: int) -> Sequence[BlockHash]:
        """The blocks that are full after tokens [start, start + count) were computed, and were not before."""
        return self.hashes[start // self._block_tokens : (start + count) // self._block_tokens]

    def chunk(self, start: int, chunk_tokens: int) -> int:
        """How many tokens the chunk has that begins at `start`. Chunks end at multiples of `chunk_tokens` from the beginning of
        the prompt, whatever was cached of it and whoever computes beside it."""
        return min(self.request.num_prompt_tokens - start, chunk_tokens - start % chunk_tokens)
