"""Who computes what in the next step: state in, data out. Continuous batching with admission, preemption and steps ahead.

    submit -> waiting --admit--> remote --remote_ready--> running --schedule/complete--> finished
                 ^        |        |                        ^ |
                 |        +--------|---- local prefill -----+ |
                 +---- remote_failed                          |
                 +----------------- preempted (no block left) +

Order is by turns throughout (`waiting_line`: arrival, put back by priority): the earliest is admitted first, the latest is
preempted first. What a preempted sequence has in KV is computed again, or comes back from swap space (`swapping`). A step takes
one token of every decoding sequence, then chunks of prompts that are prefilled here (`prompt_budget`), under one budget. What is
left of it goes to drafts: guesses of what follows (`decode_worker.speculation`), which the step checks on the way. They take
blocks only if nobody has to give any up for them, and give back at once what a wrong guess did not fill.

*Steps.* `schedule` plans a step when none is under way. `schedule_ahead` plans the next one while one is, or says what has to be
known first (`step_ahead`); the plan is the same, but for placeholders where tokens are not known, and nobody is preempted for it.
Every plan that is not empty is completed, in order. Everything else may be called between these calls, also while a step is under
way: whoever ends then leaves its blocks behind until that step was completed.

It knows no tensor, no socket, no peer; a `StepPlan` is what it asks of memory and model, `take_events` what it tells.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from common.blocks import hash_chain, root_hash
from common.clock import Clock
from common.engine.batch import ForwardResult
from common.engine.block_manager import BlockManager
from common.engine.core import SchedulerTotals
from common.engine.grammar import CompiledGrammar
from common.engine.sequence import PagedSequence
from common.errors import NoWorkerAvailable, Overloaded, PdserveError
from common.lifecycle import Phase
from common.load import WorkerLoad, pairs
from common.types import KVLayout, PrefillChoice, Request, SampledToken, Started, TokenChunk, TokenLogprob, WorkerRef
from decode_worker.admission import PrefillPlace, choose_place
from decode_worker.beginnings import Beginnings
from decode_worker.events import Event, Failed, Output, RemotePrefill, RemotePrefillWanted
from decode_worker.generation import Choice, ChoiceState, Generation
from decode_worker.holdings import Holdings
from decode_worker.limits import DecodeLimits
from decode_worker.speculation.speculator import Speculator
from decode_worker.step_account import StepAccount
from decode_worker.step_ahead import Wait
from decode_worker.step_plan import Share, StepPlan
from decode_worker.step_planner import StepPlanner
from decode_worker.swapping import Swapping
from decode_worker.waiting_line import WaitingLine

if TYPE_CHECKING:
    from common.engine.heads.rows import HiddenRow


_MAX_DISPATCHES = 4096  # that are remembered for a report; more than that means that nobody reads any


class DecodeScheduler:
    def __init__(
        self,
        config: DecodeLimits,
        layout: KVLayout,
        blocks: BlockManager,
        clock: Clock,
        speculator: Speculator | None = None,
        swapping: Swapping | None = None,
    ) -> None:
        """`speculator` is None when nobody guesses, `swapping` when there is no swap space."""
        self._config = config
        self._layout = layout
        self._blocks = blocks
        self._holdings = Holdings(
            layout, blocks, swapping, watermark_blocks=config.watermark_blocks, growth_tokens=config.growth_tokens
        )
        self._clock = clock
        self._speculator = speculator
        self._planner = StepPlanner(config, self._holdings, clock, speculator)
        self._swapping = swapping
        self._completed_s = 0.0  # when the last step was
        self._generations: dict[str, Generation] = {}
        self._waiting = WaitingLine(config.max_overtaken)
        self._beginnings = Beginnings(config, blocks)
        self._remote: dict[str, Choice] = {}
        self._running: list[Choice] = []  # in order of turns
        self._events: list[Event] = []
        self._dispatches: list[tuple[int, int]] = []  # those that no report has named yet, with their requests' serial numbers
        self._considered = 0  # requests up to this serial number were asked whether there is room for them
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
        """Of the requests that were considered. A report often comes between the arrival of a request and the next step: to say
        that it waits would mean that there is no room, and where its prompt is to be computed is not known yet."""
        tokens, work = 0, 0.0
        decoding = kv_tokens = 0
        for choice in self._running:
            if choice.sequence.remaining > 1:
                tokens += choice.sequence.remaining
                work += pairs(choice.sequence.remaining, len(choice.sequence.tokens))
            else:
                decoding += 1
                kv_tokens += len(choice.sequence.tokens)
        new = sum(choice.generation.serial > self._considered for choice in self._waiting)
        return WorkerLoad(
            running=self.num_running + self._beginnings.num_waiting,  # those have room as soon as what they wait for is there
            waiting=len(self._waiting) - self._beginnings.num_waiting - new,
            queued_tokens=tokens,
            queued_pairs=work,
            decoding=decoding,
            kv_tokens=kv_tokens,
            blocks_free=self._blocks.num_available,
        )

    def open_dispatches(self) -> tuple[int, ...]:
        considered = (one.request for one in self._generations.values() if one.serial <= self._considered)
        return tuple(request.dispatch_id for request in considered if request.dispatch_id)

    def take_dispatches(self) -> tuple[int, ...]:
        """Those that `load` counts, or did while they lasted."""
        taken = tuple(dispatch_id for serial, dispatch_id in self._dispatches if serial <= self._considered)
        self._dispatches = [one for one in self._dispatches if one[0] > self._considered]
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
        block_tokens = self._layout.block_tokens
        named = hash_chain(root, request.prompt_token_ids, block_tokens) if self._blocks.prefix_cache else ()
        prompt = PagedSequence(request.prompt_token_ids, root, block_tokens, tuple(named))
        self.totals.submitted += 1
        generation = Generation(
            request,
            candidates,
            prompt,
            self._clock,
            grammar,
            choice,
            serial=self.totals.submitted,
            aging_s=self._config.priority_aging_s,
        )
        if request.dispatch_id:
            self._dispatches.append((generation.serial, request.dispatch_id))
            del self._dispatches[:-_MAX_DISPATCHES]
        if len(self._waiting) >= self._config.max_waiting:
            self._events.append(Failed(request.request_id, Overloaded("too many requests are waiting", retry_after_s=1.0)))
            return
        generation.lifecycle.enter(Phase.QUEUED)
        self._generations[request.request_id] = generation
        self._waiting.add(generation.choices[0])

    def remote_ready(self, request_id: str, result: RemotePrefill) -> None:
        """The prompt's KV is in our blocks and verified. Ignored if the request was aborted meanwhile."""
        choice = self._remote.pop(request_id, None)
        if choice is None:
            return
        self._beginnings.end(choice)
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
        self._begin_decoding(generation, result.first_tokens, result.row)

    def remote_failed(self, request_id: str, error: PdserveError) -> None:
        """The hand-off failed. The blocks stay in quarantine until `drained`; the request is tried elsewhere, or here."""
        choice = self._remote.pop(request_id, None)
        if choice is None:
            return
        self._beginnings.end(choice)
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
        self._waiting.add(choice)

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
        """The next step, when none is under way. Its batch is empty when nothing can be computed now."""
        self._admit()
        for choice in list(self._running):
            if choice.state is ChoiceState.RUNNING and choice.remaining_ahead == 1:
                self._make_room(choice)
        return self._planned(is_ahead=False)

    def schedule_ahead(self) -> StepPlan | Wait:
        """The step behind the one that is under way, whose batch is not empty; or why it cannot be planned before that one was
        completed."""
        reason = self._planner.reason_to_wait(self._running)
        if reason is None:
            self._admit()
            reason = self._planner.room_ahead(self._running)
        if reason is None:
            self.totals.steps_ahead += 1
            return self._planned(is_ahead=True)
        self.totals.waits[reason.value] = self.totals.waits.get(reason.value, 0) + 1
        return reason

    def complete(self, plan: StepPlan, result: ForwardResult) -> None:
        """Accounts for a computed step. Whoever has ended since it was planned gets nothing of it."""
        rows, now_s = plan.batch.num_tokens, self._clock.monotonic_s()
        step_s = now_s - max(plan.started_s, self._completed_s)
        self._completed_s = now_s
        if self._speculator is not None:
            self._speculator.observe_step(rows, step_s)
        account = StepAccount(self.totals, rows=rows, seconds=step_s)
        outputs: dict[str, list[TokenChunk]] = {}
        for share, computed in zip(plan.shares, result.slices, strict=True):
            choice, generation = share.choice, share.choice.generation
            choice.num_steps_under_way -= 1
            if choice.share is share:
                choice.share = None
            if choice.state is ChoiceState.FINISHED:
                self._holdings.let_go(choice)
                account.surplus(share)
                continue
            account.prompt(generation, share, drew=bool(computed.tokens))
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
                    self._begin_decoding(generation, computed.tokens, computed.row)
            elif computed.tokens:
                chunk = self._accept_decoded(choice, computed.tokens, share, account, computed.row)
                outputs.setdefault(generation.request.request_id, []).append(chunk)
        account.close()
        if self._swapping is not None:
            self._swapping.cost.observe_step(rows, account.prompt_rows, step_s)
        for request_id, chunks in outputs.items():
            self._emit(self._generations[request_id], None, chunks)

    # Parts of the above.

    def _planned(self, *, is_ahead: bool) -> StepPlan:
        new = (choice for choice in self._waiting if not choice.generation.prompt_in_kv and choice not in self._beginnings)
        oldest = next(new, None)
        self.waiting_since_s = None if oldest is None else oldest.generation.lifecycle.stamps_s[Phase.RECEIVED]
        return self._planner.plan(self._running, is_ahead=is_ahead)

    def _admit(self) -> None:
        if self._waiting:
            self._waiting.admit(self._reserve, self._begin, self._beginnings.is_worth_waiting)
        self._considered = self.totals.submitted

    def _reserve(self, choice: Choice) -> bool:
        """Gives the choice blocks for all its tokens, if it may run and there are any."""
        generation = choice.generation
        width = 1 if generation.prompt_in_kv else generation.request.num_choices
        if self.num_running + width > self._config.max_running and self.num_running > 0:
            return False
        comes_back = choice.swapped is not None
        cached_tokens = self._holdings.reserve(choice, [*self._running, *self._remote.values()])
        if cached_tokens is None:
            return False
        if comes_back:
            self.totals.swapped_in += 1
            return True
        self.totals.prefix_queries += len(choice.sequence.tokens)
        self.totals.prefix_hits += cached_tokens
        if not generation.prompt_in_kv:
            generation.cached_tokens = cached_tokens
        return True

    def _begin(self, choice: Choice) -> None:
        if choice.generation.prompt_in_kv:
            choice.enter(ChoiceState.RUNNING)
            self._enlist(choice)
        else:
            self._place_prompt(choice)

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
            self._beginnings.begin(choice, None)
            choice.enter(ChoiceState.RUNNING)
            self._enlist(choice)
        elif place is PrefillPlace.REMOTE:
            self._beginnings.begin(choice, generation.candidates[0])
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
                    wants_row=self._speculator is not None and self._speculator.keeps_rows,
                )
            )
        else:
            self._end(generation, Phase.FAILED)
            error = NoWorkerAvailable("no prefill worker can be reached", retry_after_s=1.0)
            self._events.append(Failed(generation.request.request_id, error))

    def _make_room(self, choice: Choice) -> None:
        """A block for the choice's next token, at the cost of later turns; its own, in the end."""
        while choice.state is ChoiceState.RUNNING and not self._holdings.grow(choice):
            self._preempt(self._running[-1])

    def _preempt(self, choice: Choice) -> None:
        self.totals.preemptions += 1
        self._beginnings.end(choice)
        self._running.remove(choice)
        if self._holdings.put_out(choice):
            self.totals.swapped_out += 1
        else:
            self._holdings.give_back(choice)
        choice.enter(ChoiceState.WAITING)
        generation = choice.generation
        if not generation.prompt_in_kv:
            generation.prompt_logprobs.clear()
            generation.lifecycle.enter(Phase.QUEUED)
        self._waiting.add(choice)

    def _begin_decoding(self, generation: Generation, first_tokens: Sequence[SampledToken], row: HiddenRow | None) -> None:
        """The prompt is in KV and each choice's first token is drawn, from `row`."""
        self._beginnings.end(generation.choices[0])
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
        if self._speculator is not None and row is not None:
            for choice in generation.choices:
                self._speculator.remember(choice.key, row)
        chunks = [self._accept(choice, (token,)) for choice, token in zip(list(generation.choices), first_tokens, strict=True)]
        reported: tuple[TokenLogprob | None, ...] = (
            (None, *generation.prompt_logprobs) if generation.wants_prompt_logprobs else ()
        )
        self._emit(generation, Started(generation.timings, generation.cached_tokens, reported), chunks)

    def _fork(self, generation: Generation) -> None:
        """Further choices go on from the prompt's KV."""
        prompt = generation.choices[0]
        root = root_hash(self._layout.fingerprint, generation.request.cache_salt)
        for index in range(1, generation.request.num_choices):
            sequence = PagedSequence(prompt.sequence.tokens, root, self._layout.block_tokens)
            choice = Choice(generation, generation.request.first_choice + index, sequence)
            generation.choices.append(choice)
            if self._holdings.fork(prompt, choice):
                choice.enter(ChoiceState.RUNNING)
                self._enlist(choice)
            else:
                self._waiting.add(choice)  # as if preempted: it computes the prompt again when there is room

    def _advance(self, choice: Choice, count: int) -> None:
        choice.sequence.advance(count, self._blocks)
        self.totals.computed_tokens += count

    def _accept(self, choice: Choice, tokens: Sequence[SampledToken]) -> TokenChunk:
        """What was drawn from the prompt becomes part of the answer."""
        chunk = self._say(choice, tokens)
        if chunk.finish_reason is not None:
            self._finish(choice)
        return chunk

    def _accept_decoded(
        self, choice: Choice, tokens: Sequence[SampledToken], share: Share, account: StepAccount, row: HiddenRow | None
    ) -> TokenChunk:
        """What was drawn in the choice's share of a step; `row` is what the last token was drawn from."""
        chunk = self._say(choice, tokens)
        num_right = min(len(tokens) - 1, len(chunk.token_ids))  # drafts that the sequence now has, and whose KV is in place
        self._advance(choice, share.count + num_right)
        self._holdings.trim(choice)
        author = self._speculator.author(choice.key) if self._speculator is not None and share.num_drafts else ""
        account.decoded(choice.generation, share, num_right, author)
        if self._speculator is not None and not share.is_ahead:
            self._speculator.settle(choice.key, [token.token_id for token in tokens], row)
        elif self._speculator is not None and row is not None:
            self._speculator.remember(choice.key, row)
        if chunk.finish_reason is not None:
            self._finish(choice)
        return chunk

    def _say(self, choice: Choice, tokens: Sequence[SampledToken]) -> TokenChunk:
        chunk = choice.accept(tokens)
        num_drawn = len(chunk.token_ids) + (chunk.stop_token_id is not None)
        self.totals.generated_tokens += num_drawn
        choice.generation.work.decode_tokens += num_drawn
        return chunk

    def _emit(self, generation: Generation, started: Started | None, chunks: Sequence[TokenChunk]) -> None:
        done = generation.finished
        account = generation.account() if done else None
        self._events.append(Output(generation.request.request_id, started, tuple(chunks), done, account))
        if done:
            self._end(generation, Phase.FINISHED)

    def _enlist(self, choice: Choice) -> None:
        """Into the running list, in its turn."""
        insort(self._running, choice, key=lambda running: running.turn)

    def _finish(self, choice: Choice) -> None:
        """Takes the choice out of wherever it is and gives its blocks back. Blocks in transfer were quarantined before."""
        self._beginnings.end(choice)
        if choice.state is ChoiceState.RUNNING:
            self._running.remove(choice)
        elif choice.state is ChoiceState.WAITING and choice in self._waiting:
            self._waiting.remove(choice)
        if choice.state is not ChoiceState.FINISHED:
            self._holdings.give_back(choice)
            choice.enter(ChoiceState.FINISHED)
            if self._speculator is not None:
                request = choice.generation.request
                num_given = request.num_prompt_tokens - request.num_resumed_tokens
                self._speculator.end(choice.key, request.cache_salt, choice.sequence.tokens, num_given)

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
