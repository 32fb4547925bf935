"""A step from those that run: who gets how many rows, what is guessed, and the slices that the model computes.

    running, in order of turns -> decoding: one row each -> prompts: what is left, divided -> guesses: what is left -> StepPlan

Planned ahead (`step_ahead`) or not, it is the same: every choice is looked at as it will be when the steps under way are over,
and where its next token is not known yet a placeholder stands for it. It owns no block; `Holdings` takes and orders for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from common.clock import Clock
from common.engine.batch import ScheduledBatch, SequenceSlice, first_samples
from common.engine.in_flight_step import placeholder_of
from common.lifecycle import Phase
from decode_worker.generation import Choice
from decode_worker.holdings import Holdings
from decode_worker.prompt_budget import divide
from decode_worker.speculation.proposer import Wanted
from decode_worker.speculation.speculator import Speculator
from decode_worker.step_ahead import Asking, Wait, reason_to_wait
from decode_worker.step_plan import Share, StepPlan


class StepLimits(Protocol):
    @property
    def step_tokens(self) -> int: ...


class StepPlanner:
    def __init__(self, config: StepLimits, holdings: Holdings, clock: Clock, speculator: Speculator | None) -> None:
        self._config = config
        self._holdings = holdings
        self._clock = clock
        self._speculator = speculator
        self._asking = Asking()

    def reason_to_wait(self, running: Sequence[Choice]) -> Wait | None:
        """Before anybody new is let in."""
        if self._speculator is not None and self._asking.is_due:
            return Wait.GUESSES
        return Wait.FORK if self._holdings.has_copies else reason_to_wait(running)

    def room_ahead(self, running: Sequence[Choice]) -> Wait | None:
        """Takes the blocks for a step ahead, if there are enough for all, and anything is to be computed."""
        active = [choice for choice in running if choice.remaining_ahead and not choice.ends_ahead]
        if not active:
            return Wait.NOTHING
        if not self._holdings.grow_all(choice for choice in active if choice.remaining_ahead == 1):
            return Wait.ROOM
        return None

    def plan(self, running: Sequence[Choice], *, is_ahead: bool) -> StepPlan:
        """The next step of those that run, who have what room they need; in order of turns."""
        remaining = [(choice, choice.remaining_ahead) for choice in running if not choice.ends_ahead]
        counts = [(choice, 1) for choice, count in remaining if count == 1]
        budget = max(self._config.step_tokens, len(running)) - len(counts)
        prompts = [(choice, count) for choice, count in remaining if count > 1]
        shares = divide(budget, [count for _, count in prompts])
        counts += [(choice, count) for (choice, _), count in zip(prompts, shares, strict=True) if count]
        if is_ahead:
            self._asking.skipped()
        drafts = {} if is_ahead else self._draft(counts, budget - sum(shares))
        slices: list[SequenceSlice] = []
        planned = tuple(self._share(choice, count, drafts.get(choice, ()), slices, is_ahead) for choice, count in counts)
        for share in planned:
            share.choice.share = share
            share.choice.num_steps_under_way += 1

        keeps_rows = self._speculator is not None and self._speculator.keeps_rows
        copies, brought_in, put_out = self._holdings.take_orders()
        return StepPlan(
            copies, ScheduledBatch(tuple(slices), keeps_rows), planned, self._clock.monotonic_s(), brought_in, put_out
        )

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
            most = max(0, min(choice.most_drafts, spare_rows))
            taken = self._holdings.grow_for_drafts(choice, draft[:most]) if draft and most else ()
            if taken:
                drafts[choice] = taken
                spare_rows -= len(taken)
        self._asking.asked(guessed=bool(drafts))
        return drafts

    def _share(self, choice: Choice, count: int, drafts: Sequence[int], slices: list[SequenceSlice], is_ahead: bool) -> Share:
        generation, sequence, before = choice.generation, choice.sequence, choice.share
        prompt_in_kv, index = choice.prompt_in_kv_ahead, len(slices)
        if not prompt_in_kv and generation.lifecycle.phase is Phase.RESERVED:
            generation.lifecycle.enter(Phase.PREFILLING)
        at_end = count == choice.remaining_ahead
        if before is not None and before.draws:
            token = placeholder_of(before.index)
            slices.append(sequence.slice(1, choice.sample_ahead(), under_way=before.count, placeholder=token))
        elif prompt_in_kv:
            samples = choice.next_samples(drafts) if at_end else ()
            drafts = drafts[: max(0, len(samples) - 1)]
            slices.append(sequence.slice(count, samples, drafts=drafts, under_way=choice.under_way))
        else:
            slices.append(
                sequence.slice(
                    count,
                    first_samples(generation.request, generation.grammar) if at_end else (),
                    prompt_logprobs=generation.request.sampling.prompt_logprobs,
                    under_way=choice.under_way,
                )
            )
        return Share(
            choice,
            index,
            count,
            len(drafts),
            is_prompt_end=at_end and not prompt_in_kv,
            draws=bool(slices[-1].samples),
            is_ahead=is_ahead,
        )
