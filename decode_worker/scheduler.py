"""Who computes what in the next step: state in, data out. Continuous batching with admission and preemption by recompute.

    submit -> waiting --admit--> remote --remote_ready--> running --schedule/complete--> finished
                 ^        |        |                        ^ |
                 |        +--------|---- local prefill -----+ |
                 +---- remote_failed                          |
                 +----------------- preempted (no block left) +

Order is by arrival throughout: the oldest is admitted first, the youngest is preempted first, and a preempted sequence waits at
the head. A step takes one token of every decoding sequence, then chunks of prompts that are prefilled here, under one budget.
What is left of it goes to drafts: guesses of what follows (`decode_worker.speculation`), which the step checks on the way. They
take blocks only if nobody has to give any up for them, and give back at once what a wrong guess did not fill.

`schedule` and `complete` alternate; everything else may be called between them. It owns the block manager's references of all
its sequences. It knows no tensor, no socket, no peer; `StepPlan.copies` is what it asks of memory, `take_events` what it tells.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from common.blocks import root_hash
from common.clock import Clock
from common.engine.batch import ForwardResult, ScheduledBatch, SequenceSlice, first_samples
from common.engine.block_manager import BlockManager
from common.engine.core import SchedulerTotals
from common.engine.grammar import CompiledGrammar
from common.engine.sequence import PagedSequence
from common.errors import NoWorkerAvailable, Overloaded, PdserveError
from common.lifecycle import Phase
from common.load import WorkerLoad, pairs
from common.types import (
    KVLayout,
    PrefillChoice,
    Request,
    SampledToken,
    StageTimings,
    Started,
    TokenChunk,
    TokenLogprob,
    WorkAccount,
    WorkerRef,
)
from decode_worker.admission import LocalPrefill, PrefillPlace, choose_place
from decode_worker.generation import Choice, ChoiceState, Generation
from decode_worker.speculation.proposer import Wanted
from decode_worker.speculation.speculator import Speculator


class DecodeLimits(LocalPrefill, Protocol):
    """Of `common.config.DecodeConfig`, what bounds a step."""

    @property
    def max_running(self) -> int: ...

    @property
    def max_waiting(self) -> int: ...

    @property
    def step_tokens(self) -> int: ...

    @property
    def watermark_blocks(self) -> int: ...


_MAX_DISPATCHES = 4096  # that are remembered for a report; more than that means that nobody reads any


@dataclass(frozen=True, slots=True)
class Output:
    """News of a request for its stream. `done` = every choice has finished; nothing follows, and the account is there."""

    request_id: str
    started: Started | None
    chunks: tuple[TokenChunk, ...]
    done: bool
    account: WorkAccount | None = None


@dataclass(frozen=True, slots=True)
class Failed:
    """The request ends in this error; nothing follows."""

    request_id: str
    error: PdserveError


@dataclass(frozen=True, slots=True)
class RemotePrefillWanted:
    """Blocks are reserved; somebody is to have them written. Answered by remote_ready, or by remote_failed and drained."""

    request: Request
    prefill: WorkerRef
    attempt: int
    first_block: int
    blocks: tuple[int, ...]


Event = Output | Failed | RemotePrefillWanted


@dataclass(frozen=True, slots=True)
class RemotePrefill:
    """A verified hand-off. Written by the hand-off; `timings` holds every stage but `decode_queue_s` and `activate_s`."""

    first_tokens: tuple[SampledToken, ...]
    prompt_logprobs: tuple[TokenLogprob, ...]
    cached_tokens: int
    timings: StageTimings
    work_s: float = 0.0  # the prompt's share of steps elsewhere,
    work_tokens: int = 0  # and how many tokens of it were computed there


@dataclass(frozen=True, slots=True)
class _Share:
    choice: Choice
    count: int
    num_drafts: int
    is_prompt_end: bool


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step: block copies to be made first, then the batch."""

    copies: tuple[tuple[int, int], ...]
    batch: ScheduledBatch
    shares: tuple[_Share, ...]


class DecodeScheduler:
    def __init__(
        self, config: DecodeLimits, layout: KVLayout, blocks: BlockManager, clock: Clock, speculator: Speculator | None = None
    ) -> None:
        """`speculator` is None when nobody guesses."""
        self._config = config
        self._layout = layout
        self._blocks = blocks
        self._clock = clock
        self._speculator = speculator
        self._step_started_s = 0.0
        self._row_s = 0.0  # of the last step: its time per row
        self._generations: dict[str, Generation] = {}
        self._waiting: deque[Choice] = deque()
        self._remote: dict[str, Choice] = {}
        self._running: list[Choice] = []  # in order of arrival
        self._copies: list[tuple[int, int]] = []
        self._events: list[Event] = []
        self._dispatches: list[int] = []
        self.totals = SchedulerTotals()
        self.waiting_since_s: float | None = None  # since when the oldest request waits that nothing was reserved for

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running) + len(self._remote)

    @property
    def is_idle(self) -> bool:
        return not self._generations

    def take_events(self) -> list[Event]:
        events, self._events = self._events, []
        return events

    def load(self) -> WorkerLoad:
        tokens, work = 0, 0.0
        decoding = kv_tokens = 0
        for choice in self._running:
            if choice.sequence.remaining > 1:
                tokens += choice.sequence.remaining
                work += pairs(choice.sequence.remaining, len(choice.sequence.tokens))
            else:
                decoding += 1
                kv_tokens += len(choice.sequence.tokens)
        return WorkerLoad(
            running=self.num_running,
            waiting=len(self._waiting),
            queued_tokens=tokens,
            queued_pairs=work,
            decoding=decoding,
            kv_tokens=kv_tokens,
            blocks_free=self._blocks.num_available,
        )

    def open_dispatches(self) -> tuple[int, ...]:
        requests = (generation.request for generation in self._generations.values())
        return tuple(request.dispatch_id for request in requests if request.dispatch_id)

    def take_dispatches(self) -> tuple[int, ...]:
        taken, self._dispatches = tuple(self._dispatches), []
        return taken

    # Commands, in the order of a request's life.

    def submit(
        self,
        request: Request,
        candidates: tuple[WorkerRef, ...],
        grammar: CompiledGrammar | None = None,
        choice: PrefillChoice = PrefillChoice.WORKER,
    ) -> None:
        """`grammar` is the request's own, compiled; `choice` is the router's."""
        root = root_hash(self._layout.fingerprint, request.cache_salt)
        prompt = PagedSequence(request.prompt_token_ids, root, self._layout.block_tokens)
        generation = Generation(request, candidates, prompt, self._clock, grammar, choice)
        self.totals.submitted += 1
        if request.dispatch_id:
            self._dispatches.append(request.dispatch_id)
            del self._dispatches[:-_MAX_DISPATCHES]
        if len(self._waiting) >= self._config.max_waiting:
            self._events.append(Failed(request.request_id, Overloaded("too many requests are waiting", retry_after_s=1.0)))
            return
        generation.lifecycle.enter(Phase.QUEUED)
        self._generations[request.request_id] = generation
        self._waiting.append(generation.choices[0])

    def remote_ready(self, request_id: str, result: RemotePrefill) -> None:
        """The prompt's KV is in our blocks and verified. Ignored if the request was aborted meanwhile."""
        choice = self._remote.pop(request_id, None)
        if choice is None:
            return
        generation = choice.generation
        generation.lifecycle.enter(Phase.VERIFIED)
        generation.cached_tokens += result.cached_tokens
        generation.prompt_logprobs = list(result.prompt_logprobs)
        generation.timings = result.timings
        generation.work.prefill_s += result.work_s
        generation.work.prefill_tokens += result.work_tokens
        choice.sequence.advance(choice.sequence.remaining, self._blocks)
        choice.enter(ChoiceState.RUNNING)
        self._enlist(choice)
        self._begin_decoding(generation, result.first_tokens)

    def remote_failed(self, request_id: str, error: PdserveError) -> None:
        """The hand-off failed. The blocks stay in quarantine until `drained`; the request is tried elsewhere, or here."""
        choice = self._remote.pop(request_id, None)
        if choice is None:
            return
        generation = choice.generation
        self._quarantine(choice)
        generation.candidates.pop(0)
        place = choose_place(
            self._config,
            generation.prefill_choice,
            uncached_tokens=generation.request.num_prompt_tokens,
            num_candidates=len(generation.candidates),
        )
        if place is PrefillPlace.NOWHERE:
            self._end(generation, Phase.FAILED)
            self._events.append(Failed(request_id, error))
            return
        choice.enter(ChoiceState.WAITING)
        generation.lifecycle.enter(Phase.QUEUED)
        self._waiting.appendleft(choice)

    def drained(self, blocks: Sequence[int]) -> None:
        """No writer can reach these quarantined blocks any more."""
        self._blocks.end_quarantine(blocks)

    def abort(self, request_id: str) -> None:
        """Forgets the request and frees what it holds. Unknown ids are ignored: the request may just have ended."""
        generation = self._generations.get(request_id)
        if generation is None:
            return
        choice = self._remote.pop(request_id, None)
        if choice is not None:
            self._quarantine(choice)
        self._end(generation, Phase.CANCELLED)

    # A step.

    def schedule(self) -> StepPlan:
        """The next step. Its batch is empty when nothing can be computed now."""
        self._admit()
        budget = max(self._config.step_tokens, len(self._running))
        counts: list[tuple[Choice, int]] = []
        for choice in list(self._running):
            if choice.state is ChoiceState.RUNNING and choice.sequence.remaining == 1 and self._make_room(choice):
                counts.append((choice, 1))
                budget -= 1
        for choice in self._running:
            count = min(choice.sequence.remaining, budget)
            if choice.sequence.remaining > 1 and count > 0:
                counts.append((choice, count))
                budget -= count
        drafts = self._draft(counts, budget)
        slices: list[SequenceSlice] = []
        shares = [self._share(choice, count, drafts.get(choice, ()), slices) for choice, count in counts]

        new = (choice.generation for choice in self._waiting if not choice.generation.prompt_in_kv)
        oldest = next(new, None)
        self.waiting_since_s = None if oldest is None else oldest.lifecycle.stamps_s[Phase.RECEIVED]
        copies, self._copies = tuple(self._copies), []
        self._step_started_s = self._clock.monotonic_s()
        return StepPlan(copies, ScheduledBatch(tuple(slices)), tuple(shares))

    def complete(self, plan: StepPlan, result: ForwardResult) -> None:
        """Accounts for a computed step, in which every share of the plan is still running."""
        rows, step_s = plan.batch.num_tokens, self._clock.monotonic_s() - self._step_started_s
        if self._speculator is not None:
            self._speculator.observe_step(rows, step_s)
        self._row_s = step_s / max(1, rows)
        prefill_rows, wasted_before = 0, self.totals.drafted_tokens - self.totals.accepted_tokens
        outputs: dict[str, list[TokenChunk]] = {}
        for share, computed in zip(plan.shares, result.slices, strict=True):
            choice, generation = share.choice, share.choice.generation
            if share.count > 1 or not generation.prompt_in_kv:
                prompt_rows = share.count - (generation.prompt_in_kv and bool(computed.tokens))
                prefill_rows += prompt_rows
                generation.work.prefill_s += prompt_rows * self._row_s
                generation.work.prefill_tokens += prompt_rows
            if generation.lifecycle.phase is Phase.FAILED:
                continue  # by another choice, a moment ago
            if computed.error is not None:
                self._end(generation, Phase.FAILED)
                outputs.pop(generation.request.request_id, None)
                self._events.append(Failed(generation.request.request_id, computed.error))
                continue
            if not computed.tokens or share.is_prompt_end:
                self._advance(choice, share.count)
            if not generation.prompt_in_kv:
                generation.prompt_logprobs.extend(computed.prompt_logprobs)
                if share.is_prompt_end:
                    self._begin_decoding(generation, computed.tokens)
            elif computed.tokens:
                chunk = self._accept(choice, computed.tokens, share)
                outputs.setdefault(generation.request.request_id, []).append(chunk)
        wasted_rows = self.totals.drafted_tokens - self.totals.accepted_tokens - wasted_before
        self.totals.step_done(step_s, rows=rows, prefill_rows=prefill_rows, wasted_rows=wasted_rows)
        for request_id, chunks in outputs.items():
            self._emit(self._generations[request_id], None, chunks)

    # Parts of the above.

    def _admit(self) -> None:
        while self._waiting:
            choice = self._waiting[0]
            generation = choice.generation
            width = 1 if generation.prompt_in_kv else generation.request.num_choices
            if self.num_running + width > self._config.max_running and self.num_running > 0:
                return
            if not self._reserve(choice):
                return
            self._waiting.popleft()
            if generation.prompt_in_kv:
                choice.enter(ChoiceState.RUNNING)
                self._enlist(choice)
            else:
                self._place_prompt(choice)

    def _reserve(self, choice: Choice) -> bool:
        """Gives the choice blocks for all its tokens, reusing cached ones for what can be reused."""
        generation, sequence = choice.generation, choice.sequence
        cached: list[int] = []
        if generation.prompt_in_kv or not generation.wants_prompt_logprobs:
            cached = self._blocks.match_prefix(
                sequence.tokens, generation.request.cache_salt, max_tokens=len(sequence.tokens) - 1
            )
        self._blocks.acquire(cached)
        missing = sequence.missing_blocks(len(sequence.tokens)) - len(cached)
        keep_free = self._config.watermark_blocks if self.num_running else 0
        if not self._blocks.can_allocate(missing, keep_free=keep_free):
            self._blocks.release(cached)
            return False
        cached_tokens = len(cached) * self._layout.block_tokens
        sequence.attach([*cached, *self._blocks.allocate(missing)], 0)
        sequence.advance(cached_tokens, self._blocks)
        self.totals.prefix_queries += len(sequence.tokens)
        self.totals.prefix_hits += cached_tokens
        if not generation.prompt_in_kv:
            generation.cached_tokens = cached_tokens
        return True

    def _place_prompt(self, choice: Choice) -> None:
        generation = choice.generation
        generation.lifecycle.enter(Phase.RESERVED)
        place = choose_place(
            self._config,
            generation.prefill_choice,
            uncached_tokens=choice.sequence.remaining,
            num_candidates=len(generation.candidates),
        )
        if place is PrefillPlace.LOCAL:
            choice.enter(ChoiceState.RUNNING)
            self._enlist(choice)
        elif place is PrefillPlace.REMOTE:
            choice.enter(ChoiceState.REMOTE)
            generation.lifecycle.enter(Phase.PREFILLING)
            generation.attempt += 1
            self._remote[generation.request.request_id] = choice
            first_block = choice.sequence.num_computed // self._layout.block_tokens
            self._events.append(
                RemotePrefillWanted(
                    request=generation.request,
                    prefill=generation.candidates[0],
                    attempt=generation.attempt,
                    first_block=first_block,
                    blocks=tuple(choice.sequence.blocks[first_block:]),
                )
            )
        else:
            self._end(generation, Phase.FAILED)
            error = NoWorkerAvailable("no prefill worker can be reached", retry_after_s=1.0)
            self._events.append(Failed(generation.request.request_id, error))

    def _draft(self, counts: Sequence[tuple[Choice, int]], spare_rows: int) -> dict[Choice, Sequence[int]]:
        """Guesses for those that decode, as far as there are rows and blocks that nobody needs."""
        decoding = [choice for choice, _ in counts if choice.sequence.remaining == 1 and choice.generation.prompt_in_kv]
        if self._speculator is None or not decoding:
            return {}
        wanted = [
            Wanted(choice.key, request.cache_salt, choice.sequence.tokens, request.sampling, choice.most_drafts)
            for choice in decoding
            for request in (choice.generation.request,)
        ]
        offered = self._speculator.draft(wanted, num_rows=sum(count for _, count in counts), most_rows=spare_rows)
        drafts: dict[Choice, Sequence[int]] = {}
        for choice, draft in zip(decoding, offered, strict=True):
            taken = draft[: max(0, min(choice.most_drafts, spare_rows, self._room_for_drafts(choice)))]
            if taken:
                sequence = choice.sequence
                missing = sequence.missing_blocks(len(sequence.tokens) + len(taken))
                sequence.blocks.extend(self._blocks.allocate(missing))
                drafts[choice] = taken
                spare_rows -= len(taken)
        return drafts

    def _room_for_drafts(self, choice: Choice) -> int:
        """Tokens that fit behind the choice's last one without taking a block from anybody."""
        sequence = choice.sequence
        spare = max(0, self._blocks.num_available - self._config.watermark_blocks)
        return (len(sequence.blocks) + spare) * self._layout.block_tokens - len(sequence.tokens)

    def _share(self, choice: Choice, count: int, drafts: Sequence[int], slices: list[SequenceSlice]) -> _Share:
        generation, sequence = choice.generation, choice.sequence
        if not generation.prompt_in_kv and generation.lifecycle.phase is Phase.RESERVED:
            generation.lifecycle.enter(Phase.PREFILLING)
        at_end = count == sequence.remaining
        if generation.prompt_in_kv:
            samples = choice.next_samples(drafts) if at_end else ()
            drafts = drafts[: max(0, len(samples) - 1)]
            slices.append(sequence.slice(count, samples, drafts=drafts))
        else:
            slices.append(
                sequence.slice(
                    count,
                    first_samples(generation.request, generation.grammar) if at_end else (),
                    prompt_logprobs=generation.request.sampling.prompt_logprobs,
                )
            )
        return _Share(choice, count, len(drafts), is_prompt_end=at_end and not generation.prompt_in_kv)

    def _make_room(self, choice: Choice) -> bool:
        """A block for the choice's next token, at the cost of younger ones. False: the choice itself was preempted."""
        while choice.sequence.missing_blocks(len(choice.sequence.tokens)):
            if self._blocks.can_allocate(1):
                choice.sequence.blocks.extend(self._blocks.allocate(1))
                break
            victim = self._running[-1]
            self._preempt(victim)
            if victim is choice:
                return False
        return True

    def _preempt(self, choice: Choice) -> None:
        self.totals.preemptions += 1
        self._running.remove(choice)
        self._give_back(choice)
        choice.enter(ChoiceState.WAITING)
        generation = choice.generation
        if not generation.prompt_in_kv:
            generation.prompt_logprobs.clear()
            generation.lifecycle.enter(Phase.QUEUED)
        self._waiting.appendleft(choice)

    def _begin_decoding(self, generation: Generation, first_tokens: Sequence[SampledToken]) -> None:
        """The prompt is in KV and each choice's first token is drawn."""
        generation.lifecycle.enter(Phase.DECODING)
        generation.prompt_in_kv = True
        stamps = generation.lifecycle
        if Phase.VERIFIED in stamps.stamps_s:
            generation.timings = replace(
                generation.timings,
                decode_queue_s=stamps.between_s(Phase.RECEIVED, Phase.PREFILLING),
                activate_s=stamps.between_s(Phase.VERIFIED, Phase.DECODING),
            )
        else:
            generation.timings = generation.local_timings()
        self._fork(generation)
        chunks = [self._accept(choice, (token,)) for choice, token in zip(list(generation.choices), first_tokens, strict=True)]
        reported: tuple[TokenLogprob | None, ...] = (
            (None, *generation.prompt_logprobs) if generation.wants_prompt_logprobs else ()
        )
        self._emit(generation, Started(generation.timings, generation.cached_tokens, reported), chunks)

    def _fork(self, generation: Generation) -> None:
        """Further choices share the prompt's full blocks; a partly filled one is copied, for each will write to it."""
        prompt = generation.choices[0].sequence
        num_tokens = prompt.num_computed
        num_full = num_tokens // self._layout.block_tokens
        has_partial = num_tokens % self._layout.block_tokens != 0
        root = root_hash(self._layout.fingerprint, generation.request.cache_salt)
        for index in range(1, generation.request.num_choices):
            choice = Choice(
                generation, generation.request.first_choice + index, PagedSequence(prompt.tokens, root, self._layout.block_tokens)
            )
            generation.choices.append(choice)
            if has_partial and not self._blocks.can_allocate(1):
                self._waiting.appendleft(choice)  # as if preempted: it computes the prompt again when there is room
                continue
            shared = prompt.blocks[:num_full]
            self._blocks.share(shared)
            own = self._blocks.allocate(1) if has_partial else []
            if has_partial:
                self._copies.append((prompt.blocks[num_full], own[0]))
            choice.sequence.attach([*shared, *own], 0)
            choice.sequence.advance(num_tokens, self._blocks)
            choice.enter(ChoiceState.RUNNING)
            self._enlist(choice)

    def _advance(self, choice: Choice, count: int) -> None:
        choice.sequence.advance(count, self._blocks)
        self.totals.computed_tokens += count

    def _accept(self, choice: Choice, tokens: Sequence[SampledToken], share: _Share | None = None) -> TokenChunk:
        """What was drawn becomes part of the answer; `share` is the choice's part of the step, unless its prompt was computed."""
        chunk = choice.accept(tokens)
        sequence, num_said = choice.sequence, len(chunk.token_ids)
        num_drawn = num_said + (chunk.stop_token_id is not None)
        self.totals.generated_tokens += num_drawn
        work = choice.generation.work
        work.decode_tokens += num_drawn
        if share is not None:
            num_right = min(len(tokens) - 1, num_said)  # drafts that the sequence now has, and whose KV is in place
            self._advance(choice, share.count + num_right)
            work.decode_s += (1 + num_right) * self._row_s
            self._blocks.release(sequence.trim(len(sequence.tokens)))
            if share.num_drafts:
                self.totals.drafted(share.num_drafts, num_right)
                work.wasted_s += (share.num_drafts - num_right) * self._row_s
                work.wasted_tokens += share.num_drafts - num_right
            if self._speculator is not None:
                self._speculator.settle(choice.key, [token.token_id for token in tokens])
        if chunk.finish_reason is not None:
            self._finish(choice)
        return chunk

    def _emit(self, generation: Generation, started: Started | None, chunks: Sequence[TokenChunk]) -> None:
        done = generation.finished
        account = generation.account() if done else None
        self._events.append(Output(generation.request.request_id, started, tuple(chunks), done, account))
        if done:
            self._end(generation, Phase.FINISHED)

    def _enlist(self, choice: Choice) -> None:
        """Into the running list, behind all that arrived earlier."""
        arrival = choice.generation.lifecycle.stamps_s[Phase.RECEIVED]
        position = len(self._running)
        while position and self._running[position - 1].generation.lifecycle.stamps_s[Phase.RECEIVED] > arrival:
            position -= 1
        self._running.insert(position, choice)

    def _finish(self, choice: Choice) -> None:
        """Takes the choice out of wherever it is and gives its blocks back. Blocks in transfer were quarantined before."""
        if choice.state is ChoiceState.RUNNING:
            self._running.remove(choice)
        elif choice.state is ChoiceState.WAITING and choice in self._waiting:
            self._waiting.remove(choice)
        if choice.state is not ChoiceState.FINISHED:
            self._give_back(choice)
            choice.enter(ChoiceState.FINISHED)
            if self._speculator is not None:
                request = choice.generation.request
                num_given = request.num_prompt_tokens - request.num_resumed_tokens
                self._speculator.end(choice.key, request.cache_salt, choice.sequence.tokens, num_given)

    def _give_back(self, choice: Choice) -> None:
        """The choice's blocks, and with them the copies that were still to be made into them."""
        blocks = choice.sequence.detach()
        self._copies = [copy for copy in self._copies if copy[1] not in blocks]
        self._blocks.release(blocks)

    def _end(self, generation: Generation, phase: Phase) -> None:
        for choice in generation.choices:
            self._finish(choice)
        generation.lifecycle.enter(phase)
        del self._generations[generation.request.request_id]

    def _quarantine(self, choice: Choice) -> None:
        """The blocks that a writer was given leave the sequence; those that were cached before are simply let go."""
        num_cached = choice.sequence.num_computed // self._layout.block_tokens
        blocks = choice.sequence.detach()
        self._blocks.release(blocks[:num_cached])
        self._blocks.quarantine(blocks[num_cached:])
