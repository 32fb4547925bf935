"""The decode scheduler against rules it must keep whatever happens: a fake runner, a random driver, no tensors, no clock."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.blocks import num_blocks as blocks_for
from common.blocks import root_hash
from common.clock import ManualClock
from common.config import DecodeConfig
from common.engine.batch import ForwardResult, SequenceSlice, SliceResult
from common.engine.block_manager import BlockManager
from common.engine.heads.rows import HiddenRow
from common.engine.in_flight_step import with_tokens_of
from common.errors import Overloaded, WorkerLost
from common.load import WorkerLoad
from common.types import (
    FinishReason,
    KVLayout,
    PrefillChoice,
    Request,
    SampledToken,
    SamplingParams,
    StageTimings,
    WorkAccount,
    WorkerRef,
)
from decode_worker.admission import PrefillPlace, choose_place
from decode_worker.events import Failed, Output, RemotePrefill, RemotePrefillWanted
from decode_worker.preemption_cost import PreemptionCost
from decode_worker.scheduler import DecodeScheduler
from decode_worker.speculation.proposer import ChoiceKey, Wanted
from decode_worker.step_plan import StepPlan
from decode_worker.swapping import Swapping

BLOCK_TOKENS = 4
LAYOUT = KVLayout("m", "t", 1, 1, 8, BLOCK_TOKENS, "float32", True)
PREFILL = WorkerRef("p", 1, "127.0.0.1:1")


def next_token(tokens: Sequence[int], choice: int) -> int:
    """The fake model: the next token is a function of all tokens before it, and of the choice."""
    return random.Random(hash((tuple(tokens), choice))).randrange(10, 1000)


def expected_output(prompt: Sequence[int], choice: int, count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens, choice))
    return tokens[len(prompt) :]


class Guessing:
    """A speculator that is right as often as it is told, and pays no heed to what fits."""

    keeps_rows = False

    def __init__(self, seed: int, *, right: float, longest: int) -> None:
        self._random = random.Random(seed)
        self._right = right
        self._longest = longest
        self.known: set[ChoiceKey] = set()
        self.ended: list[ChoiceKey] = []

    def draft(self, wanted: Sequence[Wanted], *, num_rows: int, most_rows: int) -> list[Sequence[int]]:
        assert num_rows >= len(wanted)
        assert most_rows >= 0
        self.known.update(item.key for item in wanted)
        return [self._guess(item) for item in wanted]

    def _guess(self, item: Wanted) -> list[int]:
        guess: list[int] = []
        for _ in range(self._random.randint(0, self._longest)):
            right = next_token([*item.tokens, *guess], item.key.choice)
            guess.append(right if self._random.random() < self._right else self._random.randrange(10, 1000))
        return guess

    def author(self, key: ChoiceKey) -> str:
        return "guessing"

    def remember(self, key: ChoiceKey, row: HiddenRow) -> None:
        raise AssertionError("nobody asked for rows")

    def settle(self, key: ChoiceKey, came: Sequence[int], row: HiddenRow | None = None) -> None:
        assert key in self.known or came
        assert key not in self.ended

    def observe_step(self, num_rows: int, seconds: float) -> None:
        assert num_rows > 0

    def end(self, key: ChoiceKey, salt: str, tokens: Sequence[int], num_prompt_tokens: int) -> None:
        self.ended.append(key)


class Driver:
    """Runs a scheduler with the fake model; keeps, per block, which tokens were written to it, as real KV would."""

    def __init__(
        self,
        config: DecodeConfig,
        num_blocks: int,
        guessing: Guessing | None = None,
        *,
        overlap: bool = False,
        num_slots: int = 0,
    ) -> None:
        """With `overlap`, a step's tokens are revealed when the next one was planned. `num_slots` are of swap space; in mode auto
        what is cheaper is anybody's guess: copies are made to look as dear as the clock makes steps."""
        self.overlap = overlap
        self.under_way: StepPlan | None = None
        self.late: ForwardResult | None = None  # of the step before, for placeholders
        self.slots: dict[int, list[int]] = {}
        self.clock = ManualClock()
        cost = PreemptionCost(LAYOUT.block_bytes, bytes_per_s=LAYOUT.block_bytes / 0.25)
        self.swapping = Swapping(num_slots, cost, always=config.preemption == "swap") if num_slots else None
        self.blocks = BlockManager(num_blocks, BLOCK_TOKENS, lambda salt: root_hash(LAYOUT.fingerprint, salt))
        self.scheduler = DecodeScheduler(config, LAYOUT, self.blocks, self.clock, guessing, self.swapping)
        self.config = config
        self.guessing = guessing
        self.memory: dict[int, list[int]] = {block: [0] * BLOCK_TOKENS for block in range(num_blocks)}
        self.outputs: dict[str, dict[int, list[int]]] = {}
        self.finished: dict[str, dict[int, FinishReason]] = {}
        self.failed: dict[str, Failed] = {}
        self.wanted: list[RemotePrefillWanted] = []
        self.prompts: dict[str, Request] = {}
        self.busy_s = 0.0
        self.accounts: dict[str, WorkAccount] = {}

    def submit(
        self,
        request: Request,
        candidates: tuple[WorkerRef, ...] = (),
        choice: PrefillChoice = PrefillChoice.WORKER,
    ) -> None:
        self.clock.advance(1.0)
        self.prompts[request.request_id] = request
        self.scheduler.submit(request, candidates, None, choice)

    def step(self) -> bool:
        plan = self.under_way
        if plan is None:
            plan = self.scheduler.schedule()
            self._move(plan)
            self.late = None
        following = self.scheduler.schedule_ahead() if self.overlap and plan.batch.slices else None
        if isinstance(following, StepPlan):
            assert following.batch.slices
            assert not following.copies
            assert not following.swapped_out
            self._move(following)
        result = self._compute(plan)
        self.late = result
        if plan.batch.slices:
            self.clock.advance(0.5)
            self.busy_s += 0.5
            self.scheduler.complete(plan, result)
            for share in plan.shares:
                sequence = share.choice.sequence
                if share.choice.share is None:
                    assert len(sequence.blocks) <= blocks_for(len(sequence.tokens), BLOCK_TOKENS), "a block for drafts was kept"
        self.under_way = following if isinstance(following, StepPlan) else None
        self._take_events()
        return bool(plan.batch.slices)

    def _move(self, plan: StepPlan) -> None:
        assert plan.batch.num_tokens <= max(self.config.step_tokens, len(self.scheduler._running)), "more than the budget"
        for slot, block in plan.swapped_in:
            self.memory[block] = list(self.slots[slot])
        for block, slot in plan.swapped_out:
            self.slots[slot] = list(self.memory[block])
        for source, destination in plan.copies:
            self.memory[destination] = list(self.memory[source])

    def _compute(self, plan: StepPlan) -> ForwardResult:
        written: set[tuple[int, int]] = set()
        results = []
        batch = plan.batch if self.late is None else with_tokens_of(plan.batch, self.late)
        for item in batch.slices:
            assert min(item.token_ids) >= 0, "a placeholder stands for a token that no step draws"
            for block in item.block_table:
                assert self.blocks.num_references(block), "a step writes to a block that was given away"
            context = self._read(item.block_table, item.start) + list(item.token_ids)
            assert len(item.block_table) == blocks_for(len(context), BLOCK_TOKENS)
            for offset, token in enumerate(item.token_ids):
                place = (item.block_table[(item.start + offset) // BLOCK_TOKENS], (item.start + offset) % BLOCK_TOKENS)
                assert place not in written, "two slices write one slot"
                written.add(place)
                self.memory[place[0]][place[1]] = token
            results.append(SliceResult(tuple(self._drawn(item, context))))
        return ForwardResult(tuple(results))

    def _drawn(self, item: SequenceSlice, context: list[int]) -> list[SampledToken]:
        drawn: list[SampledToken] = []
        assert not item.num_drafts or len(item.samples) == item.num_drafts + 1
        for place, spec in enumerate(item.samples):
            known = context[: len(context) - item.num_drafts + place] if item.num_drafts else context
            assert spec.position == len(known)
            if spec.rules is not None and spec.rules.penalties is not None:
                assert set(spec.rules.penalties.token_ids.tolist()) <= set(known), "a rule was worked out without the tokens"
            drawn.append(SampledToken(next_token(known, spec.choice)))
            if place < item.num_drafts and drawn[-1].token_id != context[len(known)]:
                break
        return drawn

    def _read(self, table: Sequence[int], count: int) -> list[int]:
        return [self.memory[table[index // BLOCK_TOKENS]][index % BLOCK_TOKENS] for index in range(count)]

    def _take_events(self) -> None:
        for event in self.scheduler.take_events():
            match event:
                case Output():
                    for chunk in event.chunks:
                        assert chunk.choice not in self.finished.setdefault(event.request_id, {})
                        self.outputs.setdefault(event.request_id, {}).setdefault(chunk.choice, []).extend(chunk.token_ids)
                        if chunk.finish_reason:
                            self.finished[event.request_id][chunk.choice] = chunk.finish_reason
                    width = self.prompts[event.request_id].num_choices
                    assert event.done == (len(self.finished[event.request_id]) == width)
                    assert event.done == (event.account is not None)
                    if event.account is not None:
                        self.accounts[event.request_id] = event.account
                case Failed():
                    self.failed[event.request_id] = event
                case RemotePrefillWanted():
                    self.wanted.append(event)

    def answer_remote(self, wanted: RemotePrefillWanted) -> None:
        """Does what a prefill worker and the hand-off would: writes the missing blocks, draws the first tokens."""
        request = wanted.request
        prompt = list(request.prompt_token_ids)
        for index, block in enumerate(wanted.blocks):
            start = (wanted.first_block + index) * BLOCK_TOKENS
            for offset, token in enumerate(prompt[start : start + BLOCK_TOKENS]):
                self.memory[block][offset] = token
        first = tuple(SampledToken(next_token(prompt, choice)) for choice in range(request.num_choices))
        self.scheduler.remote_ready(request.request_id, RemotePrefill(first, (), 0, StageTimings(transport="shm")))
        self._take_events()

    def assert_idle(self) -> None:
        self.blocks.check_integrity()
        assert self.blocks.num_used == 0
        assert self.blocks.num_in_transfer == 0
        assert self.scheduler.num_running == 0
        assert self.scheduler.num_waiting == 0
        assert self.under_way is None
        if self.swapping is not None:
            assert self.swapping.space.num_free == self.swapping.space.num_slots
        if self.guessing is not None:
            assert len(set(self.guessing.ended)) == len(self.guessing.ended)
            assert self.guessing.known <= set(self.guessing.ended)


def make_request(
    name: str, prompt: Sequence[int], *, max_tokens: int = 5, choices: int = 1, stop: tuple[int, ...] = ()
) -> Request:
    return Request(name, "m", tuple(prompt), SamplingParams(max_tokens=max_tokens, seed=1, stop_token_ids=stop), choices)


def assert_right(driver: Driver, request: Request) -> None:
    for choice in range(request.num_choices):
        expected = expected_output(request.prompt_token_ids, choice, request.sampling.max_tokens)
        stop = next((place for place, token in enumerate(expected) if token in request.sampling.stop_token_ids), None)
        assert driver.outputs[request.request_id][choice] == expected[:stop]
        reason = FinishReason.LENGTH if stop is None else FinishReason.STOP
        assert driver.finished[request.request_id][choice] is reason


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_whatever_happens_outputs_are_right_and_nothing_leaks(data: st.DataObject) -> None:
    """Random prompts (with shared prefixes), choices, remote prefills that succeed, fail or hang, aborts, a small pool, and
    perhaps somebody who guesses: well, badly, and more than fits."""
    config = DecodeConfig(
        local_prefill=data.draw(st.sampled_from(["auto", "always"])),
        local_prefill_tokens=data.draw(st.integers(0, 6)),
        step_tokens=data.draw(st.integers(1, 12)),
        max_running=data.draw(st.integers(1, 6)),
        watermark_blocks=data.draw(st.integers(0, 2)),
        growth_tokens=data.draw(st.sampled_from([0, 0, 6])),
        preemption=data.draw(st.sampled_from(["auto", "swap"])),
        max_overtaken=data.draw(st.integers(0, 3)),
        priority_aging_s=data.draw(st.sampled_from([0.1, 5.0])),
    )
    overlap, num_slots = data.draw(st.booleans()), data.draw(st.sampled_from([0, 3, 40]))
    guessing = None
    if data.draw(st.booleans()):
        right = data.draw(st.sampled_from([0.0, 0.5, 0.9, 1.0]))
        guessing = Guessing(data.draw(st.integers(0, 1000)), right=right, longest=data.draw(st.sampled_from([1, 4, 20])))
    num_blocks = data.draw(st.integers(12, 40))
    driver = Driver(config, num_blocks, guessing, overlap=overlap, num_slots=num_slots)
    shared = list(range(100, 120))
    aborted: set[str] = set()
    undrained: list[tuple[int, ...]] = []
    number = 0
    for _ in range(data.draw(st.integers(5, 40))):
        action = data.draw(st.sampled_from(["submit", "step", "step", "step", "remote", "abort", "drain"]))
        if action == "submit" and number < 10:
            length = data.draw(st.integers(1, 20))
            prompt = [*shared[: data.draw(st.integers(0, 16))], *range(200 + number, 200 + number + length)][:24]
            candidates = (PREFILL,) * data.draw(st.integers(0, 2))
            choices = data.draw(st.sampled_from([1, 1, 1, 2, 3]))
            longest = data.draw(st.integers(1, 10))
            stop = (expected_output(prompt, 0, longest)[-1],) if data.draw(st.integers(0, 4)) == 0 else ()
            work = make_request(str(number), prompt, max_tokens=longest, choices=choices, stop=stop)
            work = replace(work, priority=data.draw(st.integers(0, 2)))
            if data.draw(st.integers(0, 5)) == 0:  # what may come depends on what came
                work = replace(work, sampling=replace(work.sampling, frequency_penalty=0.5))
            driver.submit(work, candidates, data.draw(st.sampled_from(PrefillChoice)))
            number += 1
        elif action == "step":
            driver.step()
        elif action == "remote" and driver.wanted:
            wanted = driver.wanted.pop(0)
            if wanted.request.request_id in aborted:
                undrained.append(wanted.blocks)
            elif data.draw(st.booleans()):
                driver.answer_remote(wanted)
            else:
                driver.scheduler.remote_failed(wanted.request.request_id, WorkerLost("gone"))
                undrained.append(wanted.blocks)
        elif action == "abort" and number:
            name = str(data.draw(st.integers(0, number - 1)))
            driver.scheduler.abort(name)
            aborted.add(name)
        elif action == "drain" and undrained:
            driver.scheduler.drained(undrained.pop(0))
        driver.blocks.check_integrity()

    for _ in range(2000):
        while driver.wanted:
            wanted = driver.wanted.pop(0)
            if wanted.request.request_id in aborted:
                undrained.append(wanted.blocks)
            else:
                driver.answer_remote(wanted)
        while undrained:
            driver.scheduler.drained(undrained.pop())
        if not driver.step() and not driver.wanted:
            break
    driver.assert_idle()
    assert not driver.failed
    for name, request in driver.prompts.items():
        if name not in aborted:
            assert_right(driver, request)


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_under_pressure_what_is_swapped_comes_back_as_it_was(data: st.DataObject) -> None:
    """A pool that holds little more than one answer, choices that share prompts, swap space that suffices or does not, aborts."""
    config = DecodeConfig(
        local_prefill="always",
        step_tokens=data.draw(st.integers(2, 12)),
        watermark_blocks=data.draw(st.integers(0, 1)),
        growth_tokens=0,
        preemption=data.draw(st.sampled_from(["swap", "swap", "auto"])),
        priority_aging_s=data.draw(st.sampled_from([0.1, 50.0])),
    )
    num_blocks, num_slots = data.draw(st.integers(9, 16)), data.draw(st.sampled_from([2, 8, 60]))
    driver = Driver(config, num_blocks, overlap=data.draw(st.booleans()), num_slots=num_slots)
    shared, aborted = list(range(100, 108)), set()
    count = data.draw(st.integers(2, 6))
    for number in range(count):
        own = range(200 + 20 * number, 200 + 20 * number + data.draw(st.integers(1, 9)))
        work = make_request(
            str(number),
            [*shared[: data.draw(st.sampled_from([0, 4, 8]))], *own],
            max_tokens=data.draw(st.integers(4, 14)),
            choices=data.draw(st.sampled_from([1, 1, 2])),
        )
        driver.submit(replace(work, priority=data.draw(st.integers(0, 2))))
        for _ in range(data.draw(st.integers(0, 4))):
            driver.step()
    steps = 0
    while not driver.scheduler.is_idle or driver.under_way is not None:
        steps += 1
        assert steps < 2000, "somebody starves"
        if data.draw(st.integers(0, 20)) == 0:
            aborted.add(name := str(data.draw(st.integers(0, count - 1))))
            driver.scheduler.abort(name)
        driver.step()
        driver.blocks.check_integrity()
    driver.assert_idle()
    for name, request in driver.prompts.items():
        if name not in aborted:
            assert_right(driver, request)


def test_the_youngest_is_preempted_and_everyone_finishes() -> None:
    driver = Driver(DecodeConfig(local_prefill="always", watermark_blocks=0, growth_tokens=0), num_blocks=8)
    work = [make_request(str(number), range(10 * number + 10, 10 * number + 17), max_tokens=12) for number in range(3)]
    for request in work:
        driver.submit(request)
    while driver.step():
        pass
    assert driver.scheduler.totals.preemptions > 0
    assert list(driver.finished) == ["0", "1", "2"], "the oldest must finish first"
    for request in work:
        assert_right(driver, request)
    driver.assert_idle()


def test_the_least_urgent_is_preempted_first_though_it_came_first() -> None:
    driver = Driver(DecodeConfig(local_prefill="always", watermark_blocks=0, growth_tokens=0), num_blocks=8)
    work = [
        replace(make_request(name, range(10 * number + 10, 10 * number + 17), max_tokens=12), priority=priority)
        for number, (name, priority) in enumerate([("low", 2), ("middle", 1), ("high", 0)])
    ]
    for request in work:
        driver.submit(request)
    while driver.step():
        pass
    assert list(driver.finished) == ["high", "middle", "low"]
    for request in work:
        assert_right(driver, request)


def test_whoever_is_more_urgent_gets_room_and_rows_first() -> None:
    config = DecodeConfig(local_prefill="always", max_running=1, priority_aging_s=10.0, step_tokens=8)
    driver = Driver(config, num_blocks=64)
    for name, priority in (("running", 0), ("low", 1), ("high", 0), ("late", 0)):
        if name == "late":
            driver.clock.advance(10.0)  # longer than a band is worth: the low one goes before it
        driver.submit(replace(make_request(name, range(40)), priority=priority))
    while driver.step():
        pass
    assert list(driver.finished) == ["running", "high", "low", "late"]
    driver = Driver(config.model_copy(update={"max_running": 2}), num_blocks=64)
    for name, priority in (("low", 1), ("high", 0)):
        driver.submit(replace(make_request(name, range(len(name), 40)), priority=priority))
    plan = driver.scheduler.schedule()
    assert [share.choice.generation.request.request_id for share in plan.shares] == ["high"]


def test_a_short_prompt_is_answered_while_a_long_one_is_read() -> None:
    """And the long one is not held up more than half by however many short ones that come."""
    driver = Driver(DecodeConfig(local_prefill="always", step_tokens=8), num_blocks=256)
    driver.submit(make_request("long", range(80)))
    steps = 0
    while "long" not in driver.outputs:
        driver.submit(make_request(f"short {steps}", range(100 + 8 * steps, 106 + 8 * steps), max_tokens=1))
        driver.step()
        steps += 1
    assert "short 0" in driver.finished
    assert len(driver.finished) >= 8
    assert steps <= 2 * 80 / 8 + 1


def test_decodes_come_before_prompt_chunks_and_the_budget_holds() -> None:
    driver = Driver(DecodeConfig(local_prefill="always", step_tokens=6), num_blocks=64)
    driver.submit(make_request("a", range(10, 13), max_tokens=30))
    driver.step()
    driver.submit(make_request("b", range(20, 50)))
    plan = driver.scheduler.schedule()
    assert [len(item.token_ids) for item in plan.batch.slices] == [1, 5]
    assert plan.batch.slices[0].samples
    assert not plan.batch.slices[1].samples


def run_alone(driver: Driver, request: Request) -> list[int]:
    """The tokens computed in each step, until the request is done."""
    driver.submit(request)
    rows: list[int] = []
    while not driver.scheduler.is_idle:
        before = driver.scheduler.totals.computed_tokens
        assert driver.step()
        rows.append(driver.scheduler.totals.computed_tokens - before)
    return rows


def test_right_guesses_make_few_steps_and_wrong_ones_none_more() -> None:
    request = make_request("a", range(10, 20), max_tokens=13)
    for right, steps in ((1.0, 4), (0.0, 13)):
        guessing = Guessing(0, right=right, longest=3)
        guessing._random.randint = lambda low, high: high  # type: ignore[method-assign]
        driver = Driver(DecodeConfig(local_prefill="always"), num_blocks=32, guessing=guessing)
        # The prompt gives one token; then each step three right guesses and the draw after them.
        assert len(run_alone(driver, request)) == steps
        assert_right(driver, request)
        totals = driver.scheduler.totals
        assert totals.computed_tokens == 10 + 12, "wrong guesses do not count as computed"
        assert totals.generated_tokens == 13
        assert totals.accepted_tokens == (9 if right else 0)
        assert totals.drafted_tokens == (9 if right else 3 * 9 + 2 + 1)  # never more than could still be said
        assert totals.steps_by_accepted == ([0, 0, 0, 3] if right else [11])
        driver.assert_idle()


def test_a_draft_takes_no_block_from_anybody() -> None:
    """Three sequences whose ends need the whole pool: with the worst of guesses nobody is preempted, as without any."""
    for guessing in (None, Guessing(3, right=0.0, longest=40), Guessing(3, right=1.0, longest=40)):
        driver = Driver(
            DecodeConfig(local_prefill="always", watermark_blocks=0, growth_tokens=0), num_blocks=3 * 5, guessing=guessing
        )
        work = [make_request(str(number), range(10 * number + 10, 10 * number + 17), max_tokens=13) for number in range(3)]
        for request in work:
            driver.submit(request)
        while driver.step():
            pass
        assert driver.scheduler.totals.preemptions == 0
        for request in work:
            assert_right(driver, request)
        driver.assert_idle()


def test_drafts_leave_the_watermark_alone_and_prompts_their_rows() -> None:
    config = DecodeConfig(local_prefill="always", step_tokens=8, watermark_blocks=4)
    driver = Driver(config, num_blocks=6, guessing=Guessing(1, right=0.0, longest=400))
    driver.guessing._random.randint = lambda low, high: high  # type: ignore[union-attr, method-assign]
    driver.submit(make_request("a", range(10, 13), max_tokens=14))
    driver.step()
    # One block is full with the first token; behind it are five, four of which stay free.
    plan = driver.scheduler.schedule()
    assert [(len(item.token_ids), item.num_drafts) for item in plan.batch.slices] == [(5, 4)]
    roomy = Driver(config, num_blocks=60, guessing=driver.guessing)
    roomy.submit(make_request("a", range(10, 13), max_tokens=30))
    roomy.step()
    roomy.submit(make_request("b", range(20, 24)))
    plan = roomy.scheduler.schedule()
    assert [(len(item.token_ids), item.num_drafts) for item in plan.batch.slices] == [(4, 3), (4, 0)]


def test_what_a_wrong_guess_left_is_never_found_by_others() -> None:
    """Blocks are registered with what was said, also when a wrong guess had filled them before."""
    driver = Driver(DecodeConfig(local_prefill="always"), num_blocks=64, guessing=Guessing(5, right=0.6, longest=11))
    first = make_request("a", range(10, 19), max_tokens=30)
    run_alone(driver, first)
    whole = [*first.prompt_token_ids, *expected_output(first.prompt_token_ids, 0, 30)]
    for name, length in (("b", 20), ("c", 28), ("d", 38)):
        again = make_request(name, whole[:length], max_tokens=20)
        before = driver.scheduler.totals.prefix_hits
        run_alone(driver, again)
        assert driver.scheduler.totals.prefix_hits - before == (length - 1) // BLOCK_TOKENS * BLOCK_TOKENS
        assert_right(driver, again)


def test_a_guess_ends_where_the_answer_would() -> None:
    """What stands behind a stop token in a guess is not computed."""
    prompt = list(range(10, 20))
    said = expected_output(prompt, 0, 6)
    driver = Driver(DecodeConfig(local_prefill="always"), num_blocks=32, guessing=Guessing(1, right=1.0, longest=8))
    driver.guessing._random.randint = lambda low, high: high  # type: ignore[union-attr, method-assign]
    driver.submit(make_request("a", prompt, max_tokens=20, stop=(said[3],)))
    driver.step()
    plan = driver.scheduler.schedule()
    assert list(plan.batch.slices[0].token_ids) == said[:3]


def test_quarantined_blocks_are_not_handed_out_until_drained() -> None:
    """A cancelled remote prefill's blocks stay away from everybody while a late writer may still write."""
    driver = Driver(DecodeConfig(local_prefill="never"), num_blocks=8)
    driver.submit(make_request("a", range(10, 30)), (PREFILL,))
    driver.step()
    wanted = driver.wanted.pop()
    assert len(wanted.blocks) == 5
    driver.scheduler.abort("a")
    assert driver.blocks.num_in_transfer == 5
    driver.submit(make_request("b", range(40, 60)), (PREFILL,))
    driver.step()
    assert not driver.wanted, "5 blocks were handed out although only 3 are free of writers"
    driver.scheduler.drained(wanted.blocks)
    driver.step()
    assert driver.wanted
    driver.answer_remote(driver.wanted.pop())
    while driver.step():
        pass
    assert_right(driver, driver.prompts["b"])
    driver.assert_idle()


def test_only_missing_blocks_are_asked_for() -> None:
    driver = Driver(DecodeConfig(local_prefill="never"), num_blocks=32)
    prompt = list(range(10, 27))
    for name, first_block, count in (("a", 0, 5), ("b", 4, 1)):
        driver.submit(make_request(name, prompt), (PREFILL,))
        driver.step()
        wanted = driver.wanted.pop()
        assert (wanted.first_block, len(wanted.blocks)) == (first_block, count)
        driver.answer_remote(wanted)
        while driver.step():
            pass
        assert_right(driver, driver.prompts[name])


def test_another_tenant_finds_nothing() -> None:
    driver = Driver(DecodeConfig(local_prefill="always"), num_blocks=32)
    prompt = list(range(10, 30))
    for name, salt, hits in (("a", "", 0), ("b", "tenant", 0), ("c", "tenant", 16)):
        before = driver.scheduler.totals.prefix_hits
        request = make_request(name, prompt)
        driver.submit(Request(name, "m", request.prompt_token_ids, request.sampling, cache_salt=salt))
        while driver.step():
            pass
        assert driver.scheduler.totals.prefix_hits - before == hits


def test_a_stop_token_ends_a_choice_without_being_sent() -> None:
    driver = Driver(DecodeConfig(local_prefill="always"), num_blocks=32)
    prompt = list(range(10, 20))
    fourth = expected_output(prompt, 0, 4)[3]
    driver.submit(make_request("a", prompt, max_tokens=9, stop=(fourth,)))
    while driver.step():
        pass
    assert driver.outputs["a"][0] == expected_output(prompt, 0, 3)
    assert driver.finished["a"][0] is FinishReason.STOP


def test_a_full_waiting_room_refuses() -> None:
    driver = Driver(DecodeConfig(local_prefill="always", max_waiting=1), num_blocks=32)
    for name in ("a", "b"):
        driver.submit(make_request(name, [1, 2, 3]))
    driver.step()
    assert isinstance(driver.failed["b"].error, Overloaded)


def test_a_step_that_cannot_compute_is_empty() -> None:
    driver = Driver(DecodeConfig(local_prefill="never"), num_blocks=8)
    driver.submit(make_request("a", range(10, 20)), (PREFILL,))
    assert not driver.step()
    assert isinstance(driver.scheduler.schedule(), StepPlan)
    assert not driver.scheduler.schedule().batch.slices


@pytest.mark.parametrize(
    ("policy", "choice", "uncached", "candidates", "place"),
    [
        ("auto", PrefillChoice.WORKER, 33, 1, PrefillPlace.REMOTE),
        ("auto", PrefillChoice.WORKER, 32, 1, PrefillPlace.LOCAL),
        ("auto", PrefillChoice.WORKER, 5000, 0, PrefillPlace.LOCAL),
        ("auto", PrefillChoice.HERE, 5000, 1, PrefillPlace.LOCAL),
        ("auto", PrefillChoice.THERE, 1, 1, PrefillPlace.REMOTE),
        ("auto", PrefillChoice.THERE, 5000, 0, PrefillPlace.LOCAL),
        ("always", PrefillChoice.THERE, 5000, 3, PrefillPlace.LOCAL),
        ("never", PrefillChoice.HERE, 1, 1, PrefillPlace.REMOTE),
        ("never", PrefillChoice.WORKER, 1, 1, PrefillPlace.REMOTE),
        ("never", PrefillChoice.WORKER, 1, 0, PrefillPlace.NOWHERE),
    ],
)
def test_where_a_prompt_is_prefilled(
    policy: str, choice: PrefillChoice, uncached: int, candidates: int, place: PrefillPlace
) -> None:
    config = DecodeConfig(local_prefill=policy, local_prefill_tokens=32)
    assert choose_place(config, choice, uncached_tokens=uncached, num_candidates=candidates) is place


def test_load_is_what_decodes_and_what_is_left_of_prompts() -> None:
    driver = Driver(DecodeConfig(local_prefill="always", step_tokens=8), num_blocks=64)
    driver.submit(replace(make_request("a", range(10, 16)), dispatch_id=5))
    driver.submit(make_request("b", range(40, 61)))
    driver.step()
    assert driver.scheduler.take_dispatches() == driver.scheduler.open_dispatches() == (5,)
    load = driver.scheduler.load()
    assert (load.running, load.waiting, load.decoding, load.kv_tokens) == (2, 0, 1, 7)
    assert (load.queued_tokens, load.queued_pairs) == (19, 19 * (21 - 9.5))
    while driver.step():
        pass
    assert driver.scheduler.load() == WorkerLoad(blocks_free=64)
    assert driver.scheduler.take_dispatches() == driver.scheduler.open_dispatches() == ()


def test_who_just_came_is_counted_once_it_is_known_whether_there_is_room() -> None:
    """A router takes those that wait for a sign that there is none, and counts who is not named yet by itself."""
    driver = Driver(DecodeConfig(local_prefill="always", step_tokens=8, max_running=1), num_blocks=64)
    driver.submit(replace(make_request("a", range(10, 16)), dispatch_id=5))
    driver.submit(replace(make_request("b", range(40, 61)), dispatch_id=6))
    assert driver.scheduler.load() == WorkerLoad(blocks_free=64)
    assert driver.scheduler.take_dispatches() == driver.scheduler.open_dispatches() == ()
    driver.step()
    driver.submit(replace(make_request("c", range(70, 80)), dispatch_id=7))
    load = driver.scheduler.load()
    assert (load.running, load.waiting) == (1, 1), "b has to wait, and of c nothing is known"
    assert driver.scheduler.open_dispatches() == (5, 6)
    assert driver.scheduler.take_dispatches() == (5, 6)
    driver.step()
    assert driver.scheduler.load().waiting == 2
    assert driver.scheduler.take_dispatches() == (7,)
    assert driver.scheduler.take_dispatches() == ()


@pytest.mark.parametrize("guesses", [None, 0.0, 0.6, 1.0])
def test_the_accounts_of_all_requests_add_up_to_the_time_of_all_steps(guesses: float | None) -> None:
    """Chunked prompts, several choices, preemptions in a small pool, guesses that are right and wrong: no second is lost, none
    is told twice."""
    guessing = None if guesses is None else Guessing(5, right=guesses, longest=3)
    config = DecodeConfig(local_prefill="always", step_tokens=10, max_running=6, watermark_blocks=0, growth_tokens=0)
    driver = Driver(config, num_blocks=24, guessing=guessing)
    work = [
        make_request(str(index), range(100 * index, 100 * index + 14), max_tokens=12, choices=1 + index % 2) for index in range(5)
    ]
    for request in work:
        driver.submit(request)
    while driver.step():
        continue
    accounts = driver.accounts.values()
    assert len(accounts) == len(work)
    total_s = sum(account.prefill_s + account.decode_s + account.wasted_s for account in accounts)
    assert total_s == pytest.approx(driver.busy_s)
    totals = driver.scheduler.totals
    assert totals.prefill_s == pytest.approx(sum(account.prefill_s for account in accounts))
    assert totals.decode_s == pytest.approx(sum(account.decode_s for account in accounts))
    assert totals.wasted_s == pytest.approx(sum(account.wasted_s for account in accounts))
    assert (totals.wasted_s > 0) == (guesses in (0.0, 0.6))
    assert sum(account.decode_tokens for account in accounts) == totals.generated_tokens
    assert sum(account.wasted_tokens for account in accounts) == totals.drafted_tokens - totals.accepted_tokens
    assert totals.preemptions > 0, "the pool is not small enough for this test"
    assert sum(account.prefill_tokens for account in accounts) > sum(request.num_prompt_tokens for request in work) - sum(
        account.cached_tokens for account in accounts
    ), "what is computed again counts again"


def test_what_a_prefill_worker_took_is_part_of_the_account() -> None:
    driver = Driver(DecodeConfig(local_prefill="never"), num_blocks=20)
    request = make_request("a", range(10, 20), max_tokens=3)
    driver.submit(request, (PREFILL,))
    driver.step()
    (wanted,) = driver.wanted
    first = (SampledToken(next_token(request.prompt_token_ids, 0)),)
    timings = StageTimings(transport="shm", transfer_exposed_s=0.25)
    driver.scheduler.remote_ready("a", RemotePrefill(first, (), 4, timings, work_s=2.0, work_tokens=6))
    while driver.step():
        continue
    account = driver.accounts[wanted.request.request_id]
    assert (account.prefill_s, account.prefill_tokens, account.cached_tokens) == (2.0, 6, 4)
    assert (account.transfer_s, account.decode_s, account.decode_tokens) == (0.25, pytest.approx(driver.busy_s), 3)


BEGINNING = list(range(100, 116))  # four blocks


def sharing(count: int, *, own_tokens: int = 3) -> list[Request]:
    return [
        make_request(str(number), [*BEGINNING, *range(200 + 20 * number, 200 + 20 * number + own_tokens)])
        for number in range(count)
    ]


def finish(driver: Driver) -> None:
    while driver.step() or driver.wanted:
        while driver.wanted:
            driver.answer_remote(driver.wanted.pop(0))
    driver.assert_idle()
    for request in driver.prompts.values():
        assert_right(driver, request)


@pytest.mark.parametrize("overlap", [False, True])
def test_a_beginning_that_many_share_is_computed_once_here(overlap: bool) -> None:
    driver = Driver(DecodeConfig(local_prefill="always", step_tokens=7), num_blocks=100, overlap=overlap)
    for request in sharing(12):
        driver.submit(request)
    finish(driver)
    assert sum(account.prefill_tokens for account in driver.accounts.values()) == len(BEGINNING) + 12 * 3
    assert sorted(account.cached_tokens for account in driver.accounts.values()) == [0, *[len(BEGINNING)] * 11]


def test_a_beginning_that_is_on_its_way_here_is_neither_computed_nor_sent_again() -> None:
    driver = Driver(DecodeConfig(), num_blocks=100)
    first, *others = sharing(12)
    driver.submit(first, (PREFILL,), PrefillChoice.THERE)
    for number, request in enumerate(others):
        driver.submit(request, (PREFILL,), PrefillChoice.HERE if number % 2 else PrefillChoice.THERE)
    assert not driver.step()
    assert [wanted.request.request_id for wanted in driver.wanted] == ["0"]
    assert (driver.scheduler.load().running, driver.scheduler.load().waiting) == (12, 0), "nobody waits for room"
    assert driver.scheduler.waiting_since_s is None
    driver.answer_remote(driver.wanted.pop(0))
    driver.step()
    assert [wanted.first_block for wanted in driver.wanted] == [4] * 6, "those that are computed there, without the beginning"
    finish(driver)
    here = [driver.accounts[request.request_id].prefill_tokens for number, request in enumerate(others) if number % 2]
    assert here == [3] * 5


def test_when_a_beginning_does_not_come_the_next_one_brings_it() -> None:
    driver = Driver(DecodeConfig(), num_blocks=100)
    for request in sharing(4):
        driver.submit(request, (PREFILL, PREFILL), PrefillChoice.THERE)
    driver.step()
    (wanted,) = driver.wanted
    driver.wanted.clear()
    driver.scheduler.abort("0")
    driver.step()
    assert [wanted.request.request_id for wanted in driver.wanted] == ["1"]
    driver.scheduler.remote_failed("1", WorkerLost("gone"))
    driver.scheduler.drained([*wanted.blocks, *driver.wanted.pop().blocks])
    del driver.prompts["0"]
    finish(driver)


@pytest.mark.parametrize(
    ("second", "candidates", "choice", "waits"),
    [
        (sharing(2)[1], (PREFILL,), PrefillChoice.THERE, True),
        (sharing(2)[1], (PREFILL,), PrefillChoice.HERE, True),
        (sharing(2)[1], (WorkerRef("other", 1, "127.0.0.1:2"),), PrefillChoice.THERE, False),  # has to compute it in any case
        (replace(sharing(2)[1], priority=-1), (PREFILL,), PrefillChoice.THERE, False),  # its turn is first
        (make_request("1", BEGINNING[:5]), (PREFILL,), PrefillChoice.THERE, False),  # most of what comes is not its own
        (replace(sharing(2)[1], cache_salt="another"), (PREFILL,), PrefillChoice.THERE, False),
    ],
)
def test_who_waits_for_a_beginning(
    second: Request, candidates: tuple[WorkerRef, ...], choice: PrefillChoice, waits: bool
) -> None:
    driver = Driver(DecodeConfig(), num_blocks=100)
    driver.submit(sharing(1)[0], (PREFILL,), PrefillChoice.THERE)
    driver.step()
    driver.submit(second, candidates, choice)
    driver.step()
    assert [wanted.request.request_id for wanted in driver.wanted] == (["0"] if waits else ["0", "1"])
    finish(driver)


@pytest.mark.parametrize(("own_tokens", "elsewhere"), [(4, []), (5, ["1"])])
def test_a_short_rest_behind_what_is_computed_here_is_computed_here(own_tokens: int, elsewhere: list[str]) -> None:
    driver = Driver(DecodeConfig(step_tokens=6), num_blocks=100)
    first, second = sharing(2, own_tokens=own_tokens)
    driver.submit(first, (PREFILL,), PrefillChoice.HERE)
    driver.step()
    driver.submit(second, (PREFILL,), PrefillChoice.THERE)
    driver.step()
    assert [wanted.request.request_id for wanted in driver.wanted] == elsewhere
    finish(driver)
    computed = sum(account.prefill_tokens for account in driver.accounts.values())
    assert computed == len(BEGINNING) + (1 if elsewhere else 2) * own_tokens  # the fake hand-off says nothing of its tokens


def test_what_a_step_ahead_writes_to_is_kept_when_the_token_before_ends_the_answer() -> None:
    """The token that would have been the first of a block is a stop token; the step behind it has taken the block."""
    for length in range(BLOCK_TOKENS):
        prompt = list(range(100, 105 + length))
        driver = Driver(DecodeConfig(local_prefill="always"), num_blocks=20, overlap=True)
        answer = expected_output(prompt, 0, 4)
        driver.submit(make_request("0", prompt, max_tokens=9, stop=(answer[-1],)))
        driver.submit(make_request("1", prompt[::-1], max_tokens=12))
        while driver.step():
            pass
        driver.assert_idle()
        assert driver.outputs["0"][0] == answer[: answer.index(answer[-1])]
        assert_right(driver, driver.prompts["1"])
