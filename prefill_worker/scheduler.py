"""Which prompt tokens are computed in the next step: state in, data out. Chunked prefill of several prompts under a token budget.

    submit -> waiting --admit--> running --last chunk, or stop--> held (its blocks may still be read) --release--> gone

A step holds the next chunk of the first prompt in the order of `prefill_worker.order`, and of as many others as its budget has
room for. Where a chunk ends depends on the prompt alone: one that does not fit is not cut, it comes in a later step. So where a
prompt is divided is the same under any load.

A block that a running step computes is not computed by another prompt in the same step: that one lets the step pass and takes the
block from there, as running prompts take what became findable since their last chunk. Nobody waits like this who goes first in a
step, so it costs no prompt its turn.

A prompt gets its blocks, all of them, when its first chunk comes, and is never preempted; they are held after it was computed, or
given up, until the hand-off has stopped reading them. When the first that wants blocks finds none, nobody behind it gets any.
A prompt whose time is over is ended before a step. A step of which no prompt is wanted any more (`give_up`, from any thread) is
stopped between two layers, where the engine can do that; its prompts are stopped before the next one.

Where steps follow each other through a pipeline, `schedule` is called while one is under way. Then that one's chunks count as
computed but for what others may find of them; `complete` comes in order. It knows no tensor, no socket, no ticket.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from common.blocks import BlockHash, hash_chain, root_hash
from common.clock import Clock
from common.engine.batch import ForwardResult, ScheduledBatch, first_samples
from common.engine.block_manager import BlockManager
from common.engine.core import SchedulerTotals
from common.engine.grammar import CompiledGrammar
from common.engine.sequence import PagedSequence
from common.errors import DeadlineExceeded, PdserveError
from common.load import WorkerLoad, pairs
from common.types import KVLayout, Request, SampledToken, TokenLogprob
from prefill_worker.order import TurnOrder
from prefill_worker.prompt import Prompt, PromptState

if TYPE_CHECKING:
    from common.engine.heads.rows import HiddenRow


class PrefillLimits(Protocol):
    """Of `common.config.PrefillConfig`, what bounds a step."""

    @property
    def chunk_tokens(self) -> int: ...

    @property
    def shared_tokens(self) -> int: ...

    @property
    def max_running(self) -> int: ...

    @property
    def oldest_first_every(self) -> int: ...


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
    row: HiddenRow | None = None  # what the first tokens were drawn from, if it is wanted


@dataclass(frozen=True, slots=True)
class PromptFailed:
    """There is no first token: its rules leave none, or its time was over before. The blocks stay until `release`."""

    request_id: str
    error: PdserveError


Event = LayersComputed | PromptComputed | PromptFailed


@dataclass(frozen=True, slots=True)
class StepPlan:
    batch: ScheduledBatch
    prompts: tuple[tuple[Prompt, int], ...]  # which prompt, how many tokens
    started_s: float
    copies: tuple[tuple[int, int], ...] = ()  # never any: prompts share blocks only to read them


class PrefillScheduler:
    def __init__(self, config: PrefillLimits, layout: KVLayout, blocks: BlockManager, clock: Clock) -> None:
        self._config = config
        self._layout = layout
        self._blocks = blocks
        self._clock = clock
        self._prompts: dict[str, Prompt] = {}
        self._waiting: dict[str, Prompt] = {}  # in order of arrival, as are those that run
        self._running: dict[str, Prompt] = {}
        self._order = TurnOrder(config.oldest_first_every)
        self._serials = itertools.count()
        self._events: list[Event] = []
        self._dispatches: list[int] = []
        self._given_up: set[str] = set()
        self._completed_s = 0.0  # when the last step was
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
        for prompt in self._unfinished():
            tokens += prompt.tokens_left
            work += pairs(prompt.tokens_left, prompt.request.num_prompt_tokens)
        return WorkerLoad(
            running=len(self._running),
            waiting=len(self._waiting),
            queued_tokens=tokens,
            queued_pairs=work,
            blocks_free=self._blocks.num_available,
        )

    def open_dispatches(self) -> tuple[int, ...]:
        return tuple(prompt.request.dispatch_id for prompt in self._unfinished() if prompt.request.dispatch_id)

    def take_dispatches(self) -> tuple[int, ...]:
        taken, self._dispatches = tuple(self._dispatches), []
        return taken

    def submit(
        self,
        request: Request,
        grammar: CompiledGrammar | None = None,
        wants_row: bool = False,
        received_s: float | None = None,
    ) -> None:
        """`grammar` is the request's own, compiled; `wants_row` says whether the decode side has use for the last hidden row. Its
        time began when it was received, which may be a long step ago; by default now."""
        block_tokens = self._layout.block_tokens
        root = root_hash(self._layout.fingerprint, request.cache_salt)
        named = hash_chain(root, request.prompt_token_ids, block_tokens) if self._blocks.prefix_cache else ()
        names = tuple(named)
        prompt = Prompt(
            request,
            PagedSequence(request.prompt_token_ids, root, block_tokens, names),
            names,
            serial=next(self._serials),
            received_s=self._clock.monotonic_s() if received_s is None else received_s,
            block_tokens=block_tokens,
            grammar=grammar,
            wants_row=wants_row,
        )
        self._look(prompt)
        self._prompts[request.request_id] = self._waiting[request.request_id] = prompt
        self.totals.submitted += 1
        if request.dispatch_id:
            self._dispatches.append(request.dispatch_id)
            del self._dispatches[:-_MAX_DISPATCHES]

    def give_up(self, request_id: str) -> None:
        """From any thread, and only before `release`: nobody wants any more of this prompt, `stop` will follow."""
        self._given_up.add(request_id)

    def stop(self, request_id: str) -> None:
        """Computes no further chunk of this prompt; its blocks are held on. Legal in any state; unknown ids are ignored."""
        prompt = self._waiting.pop(request_id, None) or self._running.pop(request_id, None)
        if prompt is not None:
            prompt.enter(PromptState.HELD)

    def release(self, request_id: str) -> None:
        """Nobody reads the prompt's blocks any more. Legal in any state; unknown ids are ignored."""
        self.stop(request_id)
        self._given_up.discard(request_id)
        prompt = self._prompts.pop(request_id, None)
        if prompt is not None:
            prompt.retired = [*prompt.sequence.detach(), *prompt.left_behind]
            self._let_go(prompt)

    def schedule(self) -> StepPlan:
        """The next step, behind those under way. Its batch is empty when nothing can be computed now."""
        now_s = self._clock.monotonic_s()
        self._end_late(now_s)
        for prompt in self._waiting.values():
            self._look(prompt)
        shares = self._shares(now_s)
        self._order.planned([prompt for prompt, _ in shares])
        self.waiting_since_s = next((prompt.received_s for prompt in self._waiting.values()), None)
        slices = tuple(
            prompt.sequence.slice(
                count,
                first_samples(prompt.request, prompt.grammar) if count == prompt.tokens_left else (),
                prompt_logprobs=prompt.request.sampling.prompt_logprobs,
                under_way=prompt.under_way,
            )
            for prompt, count in shares
        )
        keeps_rows = any(prompt.wants_row and item.samples for (prompt, _), item in zip(shares, slices, strict=True))
        for prompt, count in shares:
            prompt.under_way += count
            prompt.num_steps_under_way += 1
        return StepPlan(ScheduledBatch(slices, keeps_rows), tuple(shares), now_s)

    def layers_computed(self, plan: StepPlan, first_layer: int, end_layer: int) -> None:
        """Keys and values of these layers are in the pool for every token of the plan, while later layers still compute."""
        for prompt, count in plan.prompts:
            sequence = prompt.sequence
            if prompt.state is not PromptState.RUNNING:
                continue  # it was stopped since
            self._events.append(
                LayersComputed(
                    prompt.request.request_id,
                    sequence.num_computed + count,
                    tuple(sequence.blocks),
                    first_layer,
                    end_layer,
                )
            )

    def wants(self, plan: StepPlan) -> bool:
        return not all(prompt.request.request_id in self._given_up for prompt, _ in plan.prompts)

    def stopped(self, plan: StepPlan) -> None:
        """Of its prompts nothing is computed but what was before; its rows were for nothing. Those prompts go no further."""
        rows = sum(count for _, count in plan.prompts)
        self.totals.step_done(self._since(plan), rows=rows, prefill_rows=0, wasted_rows=rows)
        for prompt, count in plan.prompts:
            self._step_over(prompt, count)
            self.stop(prompt.request.request_id)

    def complete(self, plan: StepPlan, result: ForwardResult) -> None:
        """Accounts for a computed step, whose layers have all been reported."""
        step_s = self._since(plan)
        now_s = self._completed_s
        rows = sum(count for _, count in plan.prompts)
        wasted = sum(count for prompt, count in plan.prompts if prompt.state is not PromptState.RUNNING)
        self.totals.step_done(step_s, rows=rows, prefill_rows=rows - wasted, wasted_rows=wasted)
        for (prompt, count), computed in zip(plan.prompts, result.slices, strict=True):
            sequence, request_id = prompt.sequence, prompt.request.request_id
            self._step_over(prompt, count)
            if prompt.state is not PromptState.RUNNING:
                continue
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
                        row=computed.row if prompt.wants_row else None,
                    )
                )

    def _since(self, plan: StepPlan) -> float:
        """How long the plan's step took, which is over: since it was planned, or since the one before it was over."""
        now_s, before_s = self._clock.monotonic_s(), max(plan.started_s, self._completed_s)
        self._completed_s = now_s
        return now_s - before_s

    def _step_over(self, prompt: Prompt, count: int) -> None:
        prompt.under_way -= count
        prompt.num_steps_under_way -= 1
        self._let_go(prompt)

    def _let_go(self, prompt: Prompt) -> None:
        if not prompt.num_steps_under_way:
            self._blocks.release(prompt.retired)
            prompt.retired = []

    # -- what is in a step ---------------------------------------------------------------------------------------------

    def _unfinished(self) -> list[Prompt]:
        return [*self._running.values(), *self._waiting.values()]

    def _shares(self, now_s: float) -> list[tuple[Prompt, int]]:
        shares: list[tuple[Prompt, int]] = []
        being_computed: set[BlockHash] = set()
        for prompt in self._running.values():
            being_computed.update(prompt.completes(prompt.sequence.num_computed, prompt.under_way))
        budget = self._config.shared_tokens
        admitting = True
        for prompt in self._order.of([prompt for prompt in self._unfinished() if prompt.sequence.remaining > prompt.under_way]):
            if budget <= 0:
                break
            if prompt.state is PromptState.WAITING:
                if not admitting:
                    continue
                found = self._blocks.find(prompt.reusable_hashes)
                known = len(found) * self._layout.block_tokens
            else:
                if not prompt.num_steps_under_way:
                    self._catch_up(prompt)
                known = prompt.num_known
            if prompt.lacks(known // self._layout.block_tokens) in being_computed:
                continue
            count = prompt.chunk(known, self._config.chunk_tokens)
            if count > budget and shares:
                continue
            if prompt.state is PromptState.WAITING and not self._admit(prompt, found, now_s):
                admitting = False
                continue
            being_computed.update(prompt.completes(known, count))
            shares.append((prompt, count))
            budget -= count
        return shares

    def _admit(self, prompt: Prompt, found: Sequence[int], now_s: float) -> bool:
        """Gives it the blocks that were found of it and room for the rest. False if there is no room."""
        request, sequence = prompt.request, prompt.sequence
        missing = sequence.missing_blocks(request.num_prompt_tokens) - len(found)
        if len(self._running) >= self._config.max_running or not self._blocks.can_allocate(missing, reusing=found):
            return False
        self._blocks.acquire(found)
        sequence.attach([*found, *self._blocks.allocate(missing)], 0)
        self.totals.prefix_queries += request.num_prompt_tokens
        prompt.enter(PromptState.RUNNING)
        prompt.started_s = now_s
        self._running[request.request_id] = self._waiting.pop(request.request_id)
        self._reuse(prompt, len(found) * self._layout.block_tokens)
        return True

    def _catch_up(self, prompt: Prompt) -> None:
        """Blocks that others computed since its last chunk take the place of its own, which are empty, or partly the first."""
        sequence = prompt.sequence
        first = sequence.num_computed // self._layout.block_tokens
        found = self._blocks.find(prompt.reusable_hashes[first:])
        if found:
            self._blocks.acquire(found)
            replaced = sequence.replace(first, found)
            if sequence.num_computed % self._layout.block_tokens:
                # Its first tokens may be on their way already, in a smaller block of the peer's: they are read from here.
                prompt.left_behind.append(replaced.pop(0))
            self._blocks.release(replaced)
            self._reuse(prompt, (first + len(found)) * self._layout.block_tokens - sequence.num_computed)

    def _reuse(self, prompt: Prompt, count: int) -> None:
        """Its next `count` tokens are in its blocks already."""
        if count == 0:
            return
        sequence = prompt.sequence
        sequence.advance(count, self._blocks)
        prompt.cached_tokens += count
        self.totals.prefix_hits += count
        blocks = tuple(sequence.blocks)
        self._events.append(LayersComputed(prompt.request.request_id, sequence.num_computed, blocks, 0, self._layout.num_layers))

    def _look(self, prompt: Prompt) -> None:
        """Brings up to date how much of a waiting prompt can be found, mostly by looking at the end of it."""
        names = prompt.reusable_hashes
        known = prompt.expected_blocks
        if known and not self._blocks.has(names[known - 1]):
            known = 0
        while known < len(names) and self._blocks.has(names[known]):
            known += 1
        prompt.expected_blocks = known

    def _end_late(self, now_s: float) -> None:
        for prompt in self._unfinished():
            if prompt.deadline_s <= now_s:
                self.stop(prompt.request.request_id)
                late = DeadlineExceeded("the prompt was not computed in time")
                self._events.append(PromptFailed(prompt.request.request_id, late))
