"""Which prompt tokens are computed in the next step: state in, data out. Chunked prefill under a token budget.

    submit -> waiting --admit--> running --last chunk, or stop--> held (its blocks may still be read) --release--> gone

First come, first served: the oldest prompt gets the budget first, and what it leaves goes to the next ones, so that short prompts
share a step. A prompt is admitted only when the pool can hold all of it, and is never preempted; its blocks are held after it
was computed, or given up, until the hand-off has stopped reading them. It knows no tensor, no socket, no ticket.
"""

from __future__ import annotations

import enum
import itertools
from collections import deque
from dataclasses import dataclass
from typing import Protocol

from common.blocks import root_hash
from common.clock import Clock
from common.engine.batch import ForwardResult, ScheduledBatch, SequenceSlice, first_samples
from common.engine.block_manager import BlockManager
from common.engine.core import SchedulerTotals
from common.engine.grammar import CompiledGrammar
from common.engine.sequence import PagedSequence
from common.errors import IllegalTransition, PdserveError
from common.load import WorkerLoad, pairs
from common.types import KVLayout, Request, SampledToken, TokenLogprob


class PrefillLimits(Protocol):
    """Of `common.config.PrefillConfig`, what bounds a step."""

    @property
    def chunk_tokens(self) -> int: ...

    @property
    def max_running(self) -> int: ...


_MAX_DISPATCHES = 4096  # that are remembered for a report; more than that means that nobody reads any


@dataclass(frozen=True, slots=True)
class LayersComputed:
    """The first `num_tokens` tokens of the prompt are in `blocks` (all of the prompt's, in order), as far as the layers
    [first, end) go. Layers of a chunk are reported in order, and all of them before the next chunk's. Full blocks are final."""

    request_id: str
    num_tokens: int
    blocks: tuple[int, ...]
    first_layer: int
    end_layer: int


@dataclass(frozen=True, slots=True)
class PromptComputed:
    """The whole prompt is in KV and the first token of each choice is drawn. The blocks stay until `release`."""

    request_id: str
    first_tokens: tuple[SampledToken, ...]
    prompt_logprobs: tuple[TokenLogprob, ...]
    cached_tokens: int
    queue_s: float
    prefill_s: float
    work_s: float  # its share of the steps' time


@dataclass(frozen=True, slots=True)
class PromptFailed:
    """The prompt is in KV, but no first token can be drawn. The blocks stay until `release`."""

    request_id: str
    error: PdserveError


Event = LayersComputed | PromptComputed | PromptFailed


class _State(enum.Enum):
    WAITING = "waiting"
    RUNNING = "running"
    HELD = "held"


_LEGAL = {_State.WAITING: {_State.RUNNING, _State.HELD}, _State.RUNNING: {_State.HELD}, _State.HELD: set[_State]()}


class _Prompt:
    def __init__(
        self, request: Request, sequence: PagedSequence, received_s: float, grammar: CompiledGrammar | None = None
    ) -> None:
        self.request = request
        self.grammar = grammar
        self.sequence = sequence
        self.state = _State.WAITING
        self.cached_tokens = 0
        self.expected_cached_tokens = 0  # of a prompt that waits, as it was when it came
        self.logprobs: list[TokenLogprob] = []
        self.received_s = received_s
        self.started_s: float | None = None
        self.work_s = 0.0

    def enter(self, state: _State) -> None:
        if state not in _LEGAL[self.state]:
            raise IllegalTransition(f"prompt: {self.state.name} -> {state.name}")
        self.state = state


@dataclass(frozen=True, slots=True)
class StepPlan:
    batch: ScheduledBatch
    prompts: tuple[tuple[_Prompt, int], ...]  # which prompt, how many tokens
    copies: tuple[tuple[int, int], ...] = ()  # never any: prompts share blocks only to read them


class PrefillScheduler:
    def __init__(self, config: PrefillLimits, layout: KVLayout, blocks: BlockManager, clock: Clock) -> None:
        self._config = config
        self._layout = layout
        self._blocks = blocks
        self._clock = clock
        self._prompts: dict[str, _Prompt] = {}
        self._waiting: deque[_Prompt] = deque()
        self._running: list[_Prompt] = []  # in order of arrival
        self._events: list[Event] = []
        self._dispatches: list[int] = []
        self._step_started_s = 0.0
        self.totals = SchedulerTotals()
        self.waiting_since_s: float | None = None  # since when the oldest prompt waits that nothing was computed of

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def is_idle(self) -> bool:
        """Whether every prompt has been released."""
        return not self._prompts

    def take_events(self) -> list[Event]:
        events, self._events = self._events, []
        return events

    def load(self) -> WorkerLoad:
        tokens, work = 0, 0.0
        for prompt in (*self._running, *self._waiting):
            total = prompt.request.num_prompt_tokens
            left = prompt.sequence.remaining - (prompt.expected_cached_tokens if prompt.state is _State.WAITING else 0)
            tokens += left
            work += pairs(left, total)
        return WorkerLoad(
            running=len(self._running),
            waiting=len(self._waiting),
            queued_tokens=tokens,
            queued_pairs=work,
            blocks_free=self._blocks.num_available,
        )

    def open_dispatches(self) -> tuple[int, ...]:
        prompts = (*self._running, *self._waiting)
        return tuple(prompt.request.dispatch_id for prompt in prompts if prompt.request.dispatch_id)

    def take_dispatches(self) -> tuple[int, ...]:
        taken, self._dispatches = tuple(self._dispatches), []
        return taken

    def submit(self, request: Request, grammar: CompiledGrammar | None = None) -> None:
        """`grammar` is the request's own, compiled."""
        root = root_hash(self._layout.fingerprint, request.cache_salt)
        sequence = PagedSequence(request.prompt_token_ids, root, self._layout.block_tokens)
        prompt = _Prompt(request, sequence, self._clock.monotonic_s(), grammar)
        prompt.expected_cached_tokens = len(self._match(request)) * self._layout.block_tokens
        self._prompts[request.request_id] = prompt
        self._waiting.append(prompt)
        self.totals.submitted += 1
        if request.dispatch_id:
            self._dispatches.append(request.dispatch_id)
            del self._dispatches[:-_MAX_DISPATCHES]

    def stop(self, request_id: str) -> None:
        """Computes no further chunk of this prompt; its blocks are held on. Legal in any state; unknown ids are ignored."""
        prompt = self._prompts.get(request_id)
        if prompt is None or prompt.state is _State.HELD:
            return
        if prompt.state is _State.WAITING:
            self._waiting.remove(prompt)
        else:
            self._running.remove(prompt)
        prompt.enter(_State.HELD)

    def release(self, request_id: str) -> None:
        """Nobody reads the prompt's blocks any more. Legal in any state; unknown ids are ignored."""
        self.stop(request_id)
        prompt = self._prompts.pop(request_id, None)
        if prompt is not None:
            self._blocks.release(prompt.sequence.detach())

    def schedule(self) -> StepPlan:
        """The next step. Its batch is empty when nothing can be computed now."""
        self._step_started_s = self._clock.monotonic_s()
        while self._waiting and len(self._running) < self._config.max_running and self._admit(self._waiting[0]):
            self._waiting.popleft()
        budget = self._config.chunk_tokens
        slices: list[SequenceSlice] = []
        shares: list[tuple[_Prompt, int]] = []
        for prompt in self._running:
            count = min(prompt.sequence.remaining, budget)
            if count == 0:
                break
            if prompt.started_s is None:
                prompt.started_s = self._clock.monotonic_s()
            samples = first_samples(prompt.request, prompt.grammar) if count == prompt.sequence.remaining else ()
            slices.append(prompt.sequence.slice(count, samples, prompt_logprobs=prompt.request.sampling.prompt_logprobs))
            shares.append((prompt, count))
            budget -= count
        unstarted = (prompt.received_s for prompt in itertools.chain(self._running, self._waiting) if prompt.started_s is None)
        self.waiting_since_s = next(unstarted, None)  # prompts start in the order in which they came
        return StepPlan(ScheduledBatch(tuple(slices)), tuple(shares))

    def layers_computed(self, plan: StepPlan, first_layer: int, end_layer: int) -> None:
        """Keys and values of these layers are in the pool for every token of the plan, while later layers still compute."""
        for prompt, count in plan.prompts:
            sequence = prompt.sequence
            self._events.append(
                LayersComputed(
                    prompt.request.request_id,
                    sequence.num_computed + count,
                    tuple(sequence.blocks),
                    first_layer,
                    end_layer,
                )
            )

    def complete(self, plan: StepPlan, result: ForwardResult) -> None:
        """Accounts for a computed step, whose layers have all been reported."""
        now_s = self._clock.monotonic_s()
        rows = sum(count for _, count in plan.prompts)
        step_s = now_s - self._step_started_s
        self.totals.step_done(step_s, rows=rows, prefill_rows=rows, wasted_rows=0)
        for (prompt, count), computed in zip(plan.prompts, result.slices, strict=True):
            sequence, request_id = prompt.sequence, prompt.request.request_id
            sequence.advance(count, self._blocks)
            prompt.work_s += step_s * count / rows
            self.totals.computed_tokens += count
            prompt.logprobs.extend(computed.prompt_logprobs)
            if sequence.remaining == 0:
                self.stop(request_id)
                if computed.error is not None:
                    self._events.append(PromptFailed(request_id, computed.error))
                    continue
                self.totals.generated_tokens += len(computed.tokens)
                started_s = now_s if prompt.started_s is None else prompt.started_s
                self._events.append(
                    PromptComputed(
                        request_id=request_id,
                        first_tokens=computed.tokens,
                        prompt_logprobs=tuple(prompt.logprobs),
                        cached_tokens=prompt.cached_tokens,
                        queue_s=started_s - prompt.received_s,
                        prefill_s=now_s - started_s,
                        work_s=prompt.work_s,
                    )
                )

    def _admit(self, prompt: _Prompt) -> bool:
        request, sequence = prompt.request, prompt.sequence
        cached = self._match(request)
        self._blocks.acquire(cached)
        missing = sequence.missing_blocks(request.num_prompt_tokens) - len(cached)
        if not self._blocks.can_allocate(missing):
            self._blocks.release(cached)
            return False
        sequence.attach([*cached, *self._blocks.allocate(missing)], 0)
        prompt.cached_tokens = len(cached) * self._layout.block_tokens
        sequence.advance(prompt.cached_tokens, self._blocks)
        self.totals.prefix_queries += request.num_prompt_tokens
        self.totals.prefix_hits += prompt.cached_tokens
        prompt.enter(_State.RUNNING)
        self._running.append(prompt)
        if cached:
            blocks = tuple(sequence.blocks)
            self._events.append(LayersComputed(request.request_id, prompt.cached_tokens, blocks, 0, self._layout.num_layers))
        return True

    def _match(self, request: Request) -> list[int]:
        if request.sampling.prompt_logprobs is not None:
            return []  # they are computed with the tokens, so all tokens are
        return self._blocks.match_prefix(request.prompt_token_ids, request.cache_salt, max_tokens=request.num_prompt_tokens - 1)
