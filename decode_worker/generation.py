"""A request as the decode worker holds it: one prompt phase, then one sequence per choice.

    Generation  ── lifecycle (common.lifecycle), candidates for its remote prefill
       ├── Choice 0   carries the prompt through prefill, here or elsewhere
       ├── Choice 1   forked from choice 0 when the prompt is in KV: shares its full blocks, owns a copy of the partial one
       └── ...

    Choice:  WAITING -> RUNNING -> FINISHED        WAITING -> REMOTE -> RUNNING | WAITING
                ^----------+ preempted: lost its blocks. Its KV is computed again, or comes back from swap space (`swapped`)

A choice may take part in two steps at a time: one that is computed, and the one planned behind it (`share` is the latter's part).
What `..._ahead` says is how things stand when the steps under way are over. If the choice ends before that, the blocks that such
a step still writes to stay with it (`retired`).

Owned by the scheduler, on the engine's thread. It knows neither tensors nor transport.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from common.clock import Clock
from common.engine.batch import SampleSpec
from common.engine.grammar import CompiledGrammar
from common.engine.sequence import PagedSequence
from common.engine.token_rules import TokenRules
from common.errors import IllegalTransition
from common.lifecycle import Lifecycle, Phase
from common.types import (
    FinishReason,
    PrefillChoice,
    Request,
    SampledToken,
    StageTimings,
    TokenChunk,
    TokenLogprob,
    WorkAccount,
    WorkerRef,
)
from decode_worker.speculation.proposer import ChoiceKey
from decode_worker.swap_space import Swapped

if TYPE_CHECKING:
    from decode_worker.step_plan import Share

_UNKNOWN = -1  # in place of a token that a step under way is to draw, while rules are asked that do not look at it


class ChoiceState(enum.Enum):
    WAITING = "waiting"  # holds no blocks
    REMOTE = "remote"  # holds blocks that a prefill worker is writing
    RUNNING = "running"  # takes part in steps
    FINISHED = "finished"  # holds no blocks


_LEGAL: dict[ChoiceState, frozenset[ChoiceState]] = {
    ChoiceState.WAITING: frozenset({ChoiceState.REMOTE, ChoiceState.RUNNING, ChoiceState.FINISHED}),
    ChoiceState.REMOTE: frozenset({ChoiceState.RUNNING, ChoiceState.WAITING, ChoiceState.FINISHED}),
    ChoiceState.RUNNING: frozenset({ChoiceState.WAITING, ChoiceState.FINISHED}),
    ChoiceState.FINISHED: frozenset(),
}


class Choice:
    """One continuation of the prompt."""

    def __init__(self, generation: Generation, index: int, sequence: PagedSequence) -> None:
        self.generation = generation
        self.index = index
        self.key = ChoiceKey(generation.request.request_id, index)
        self.sequence = sequence
        self.num_generated = generation.request.num_resumed_tokens
        self.state = ChoiceState.WAITING
        self.turn = (generation.turn_s, generation.serial, index)  # the order of admission, prefill and preemption
        self.share: Share | None = None  # of the latest step that was planned, until it is accounted for
        self.num_steps_under_way = 0
        self.retired: list[int] = []  # blocks of a choice that has ended, until its steps under way have
        self.swapped: Swapped | None = None  # where its KV is, while it waits, and until the copies back are ordered
        self.num_overtaken = 0  # how many later ones found room while it did not
        self.refused: tuple[int, int] | None = (
            None  # blocks that were available, and choices that held some, when it last did not
        )
        self._rules = TokenRules.of(generation.request, generation.grammar)

    def enter(self, state: ChoiceState) -> None:
        if state not in _LEGAL[self.state]:
            raise IllegalTransition(f"choice: {self.state.name} -> {state.name}")
        self.state = state

    @property
    def needs_tokens(self) -> bool:
        """Whether a token's rules depend on the tokens before it."""
        return self._rules is not None and self._rules.needs_tokens

    @property
    def under_way(self) -> int:
        """Tokens that a step under way computes."""
        return 0 if self.share is None else self.share.count

    @property
    def length_ahead(self) -> int:
        return len(self.sequence.tokens) + (self.share is not None and self.share.draws)

    @property
    def remaining_ahead(self) -> int:
        """Tokens that will be there and not in KV."""
        share, remaining = self.share, self.sequence.remaining
        return remaining if share is None else remaining + share.draws - share.count

    @property
    def prompt_in_kv_ahead(self) -> bool:
        return self.generation.prompt_in_kv or (self.share is not None and self.share.is_prompt_end)

    @property
    def ends_ahead(self) -> bool:
        """Whether the token under way is the last one for certain."""
        most = self.generation.request.sampling.max_tokens
        return self.share is not None and self.share.draws and self.num_generated + 1 >= most

    @property
    def most_length(self) -> int:
        """Tokens that it can come to."""
        return len(self.sequence.tokens) + self.generation.request.sampling.max_tokens - self.num_generated

    @property
    def most_drafts(self) -> int:
        """How many guesses the next step may hold: the one draw after the last of them must still be wanted."""
        return self.generation.request.sampling.max_tokens - self.num_generated - 1

    def next_samples(self, drafts: Sequence[int] = ()) -> tuple[SampleSpec, ...]:
        """How to draw the next token, and the one after each draft. Fewer, if a draft is one that cannot come or ends the answer:
        then it and what follows it are no use."""
        sampling, tokens = self.generation.request.sampling, self.sequence.tokens
        num_known = len(tokens)
        if not drafts:
            rules = None if self._rules is None else self._rules.for_next(tokens)
            return (SampleSpec.for_next_token(sampling, choice=self.index, position=num_known, rules=rules),)
        specs: list[SampleSpec] = []
        for place in range(len(drafts) + 1):
            rules = None if self._rules is None else self._rules.for_next(tokens)
            specs.append(SampleSpec.for_next_token(sampling, choice=self.index, position=num_known + place, rules=rules))
            if place == len(drafts) or drafts[place] in sampling.stop_token_ids:
                break
            if rules is not None and not rules.allow(drafts[place]):
                break
            if self._rules is not None:
                tokens.append(drafts[place])  # until all rules are known
        del tokens[num_known:]
        return tuple(specs)

    def sample_ahead(self) -> tuple[SampleSpec, ...]:
        """How to draw the token behind the one that a step under way draws. Not for a choice that `needs_tokens`."""
        tokens, rules = self.sequence.tokens, None
        if self._rules is not None:
            tokens.append(_UNKNOWN)
            rules = self._rules.for_next(tokens)
            tokens.pop()
        sampling = self.generation.request.sampling
        return (SampleSpec.for_next_token(sampling, choice=self.index, position=len(tokens) + 1, rules=rules),)

    def accept(self, sampled: Sequence[SampledToken]) -> TokenChunk:
        """Appends sampled tokens and says what the client is to see of them. The caller acts on `finish_reason`."""
        sampling = self.generation.request.sampling
        accepted: list[SampledToken] = []
        finish_reason: FinishReason | None = None
        stop_token_id: int | None = None
        if self._rules is not None:
            self._rules.rewind(len(self.sequence.tokens))  # what was guessed; what comes is counted when it is asked about
        for token in sampled:
            if token.token_id in sampling.stop_token_ids:
                finish_reason, stop_token_id = FinishReason.STOP, token.token_id
                break
            accepted.append(token)
            self.sequence.tokens.append(token.token_id)
            self.num_generated += 1
            if self._rules is not None and self._rules.is_over(self.sequence.tokens):
                finish_reason = FinishReason.STOP  # the grammar leaves nothing to add: no end token has to be drawn
                break
            if self.num_generated >= sampling.max_tokens:
                finish_reason = FinishReason.LENGTH
                break
        return TokenChunk(
            self.index,
            tuple([token.token_id for token in accepted]),
            logprobs=tuple([token.logprob for token in accepted if token.logprob is not None]),
            finish_reason=finish_reason,
            stop_token_id=stop_token_id,
        )


@dataclass(slots=True)
class Work:
    """What a request took of steps so far."""

    prefill_s: float = 0.0
    decode_s: float = 0.0
    wasted_s: float = 0.0
    prefill_tokens: int = 0
    decode_tokens: int = 0
    wasted_tokens: int = 0


class Generation:
    """One request. Lives in the scheduler from `submit` until its last choice has finished, it failed or was aborted."""

    def __init__(
        self,
        request: Request,
        candidates: tuple[WorkerRef, ...],
        prompt: PagedSequence,
        clock: Clock,
        grammar: CompiledGrammar | None = None,
        prefill_choice: PrefillChoice = PrefillChoice.WORKER,
        *,
        serial: int = 0,
        aging_s: float = 0.0,
    ) -> None:
        """`serial` orders those that come at the same time; `aging_s` is what one band of priority is worth (`waiting_line`)."""
        self.request = request
        self.grammar = grammar  # the request's own, compiled
        self.prefill_choice = prefill_choice
        self.candidates = list(candidates)  # prefill workers still to try, best first
        self.lifecycle = Lifecycle(clock)
        self.serial = serial
        self.turn_s = self.lifecycle.stamps_s[Phase.RECEIVED] + request.priority * aging_s
        self.attempt = 0  # hand-offs begun; part of a ticket's identity
        self.prompt_in_kv = False
        self.cached_tokens = 0
        self.prompt_logprobs: list[TokenLogprob] = []
        self.timings = StageTimings()
        self.work = Work()
        self.choices = [Choice(self, request.first_choice, prompt)]

    @property
    def wants_prompt_logprobs(self) -> bool:
        return self.request.sampling.prompt_logprobs is not None

    @property
    def finished(self) -> bool:
        return all([choice.state is ChoiceState.FINISHED for choice in self.choices])

    def account(self) -> WorkAccount:
        work = self.work
        return WorkAccount(
            prefill_s=work.prefill_s,
            decode_s=work.decode_s,
            wasted_s=work.wasted_s,
            transfer_s=self.timings.transfer_exposed_s,
            prefill_tokens=work.prefill_tokens,
            decode_tokens=work.decode_tokens,
            wasted_tokens=work.wasted_tokens,
            cached_tokens=self.cached_tokens,
        )

    def local_timings(self) -> StageTimings:
        """The stages of a prompt that was prefilled here; called when it enters DECODING."""
        stamps = self.lifecycle
        return StageTimings(
            decode_queue_s=stamps.between_s(Phase.RECEIVED, Phase.RESERVED),
            prefill_queue_s=stamps.between_s(Phase.RESERVED, Phase.PREFILLING),
            prefill_s=stamps.between_s(Phase.PREFILLING, Phase.DECODING),
        )
