"""A request as the decode worker holds it: one prompt phase, then one sequence per choice.

    Generation  ── lifecycle (common.lifecycle), candidates for its remote prefill
       ├── Choice 0   carries the prompt through prefill, here or elsewhere
       ├── Choice 1   forked from choice 0 when the prompt is in KV: shares its full blocks, owns a copy of the partial one
       └── ...

    Choice:  WAITING -> RUNNING -> FINISHED        WAITING -> REMOTE -> RUNNING | WAITING
                ^----------+ preempted: lost its blocks, will compute all its tokens again

Owned by the scheduler, on the engine's thread. It knows neither tensors nor transport.
"""

from __future__ import annotations

import enum

from common.clock import Clock
from common.engine.batch import SampleSpec
from common.engine.sequence import PagedSequence
from common.engine.token_rules import TokenRules
from common.errors import IllegalTransition
from common.lifecycle import Lifecycle, Phase
from common.types import FinishReason, Request, SampledToken, StageTimings, TokenChunk, TokenLogprob, WorkerRef


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
        self.sequence = sequence
        self.num_generated = generation.request.num_resumed_tokens
        self.state = ChoiceState.WAITING
        self._rules = TokenRules.of(generation.request)

    def enter(self, state: ChoiceState) -> None:
        if state not in _LEGAL[self.state]:
            raise IllegalTransition(f"choice: {self.state.name} -> {state.name}")
        self.state = state

    def next_sample(self) -> SampleSpec:
        tokens = self.sequence.tokens
        return SampleSpec.for_next_token(
            self.generation.request.sampling,
            choice=self.index,
            position=len(tokens),
            rules=None if self._rules is None else self._rules.for_next(tokens),
        )

    def accept(self, sampled: SampledToken) -> TokenChunk:
        """Appends a sampled token and says what the client is to see of it. The caller acts on `finish_reason`."""
        sampling = self.generation.request.sampling
        if sampled.token_id in sampling.stop_token_ids:
            return TokenChunk(self.index, (), finish_reason=FinishReason.STOP, stop_token_id=sampled.token_id)
        self.sequence.tokens.append(sampled.token_id)
        self.num_generated += 1
        return TokenChunk(
            self.index,
            (sampled.token_id,),
            logprobs=(sampled.logprob,) if sampled.logprob is not None else (),
            finish_reason=FinishReason.LENGTH if self.num_generated >= sampling.max_tokens else None,
        )


class Generation:
    """One request. Lives in the scheduler from `submit` until its last choice has finished, it failed or was aborted."""

    def __init__(self, request: Request, candidates: tuple[WorkerRef, ...], prompt: PagedSequence, clock: Clock) -> None:
        self.request = request
        self.candidates = list(candidates)  # prefill workers still to try, best first
        self.lifecycle = Lifecycle(clock)
        self.attempt = 0  # hand-offs begun; part of a ticket's identity
        self.prompt_in_kv = False
        self.cached_tokens = 0
        self.prompt_logprobs: list[TokenLogprob] = []
        self.timings = StageTimings()
        self.choices = [Choice(self, request.first_choice, prompt)]

    @property
    def wants_prompt_logprobs(self) -> bool:
        return self.request.sampling.prompt_logprobs is not None

    @property
    def finished(self) -> bool:
        return all(choice.state is ChoiceState.FINISHED for choice in self.choices)

    def local_timings(self) -> StageTimings:
        """The stages of a prompt that was prefilled here; called when it enters DECODING."""
        stamps = self.lifecycle
        return StageTimings(
            decode_queue_s=stamps.between_s(Phase.RECEIVED, Phase.RESERVED),
            prefill_queue_s=stamps.between_s(Phase.RESERVED, Phase.PREFILLING),
            prefill_s=stamps.between_s(Phase.PREFILLING, Phase.DECODING),
        )
