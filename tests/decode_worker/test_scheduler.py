"""The decode scheduler against rules it must keep whatever happens: a fake runner, a random driver, no tensors, no clock."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.blocks import root_hash
from common.clock import ManualClock
from common.config import DecodeConfig
from common.engine.batch import ForwardResult, SliceResult
from common.engine.block_manager import BlockManager
from common.errors import Overloaded, WorkerLost
from common.types import FinishReason, KVLayout, Request, SampledToken, SamplingParams, StageTimings, WorkerRef
from decode_worker.admission import PrefillPlace, choose_place
from decode_worker.scheduler import DecodeScheduler, Failed, Output, RemotePrefill, RemotePrefillWanted, StepPlan

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


class Driver:
    """Runs a scheduler with the fake model; keeps, per block, which tokens were written to it, as real KV would."""

    def __init__(self, config: DecodeConfig, num_blocks: int) -> None:
        self.clock = ManualClock()
        self.blocks = BlockManager(num_blocks, BLOCK_TOKENS, lambda salt: root_hash(LAYOUT.fingerprint, salt))
        self.scheduler = DecodeScheduler(config, LAYOUT, self.blocks, self.clock)
        self.memory: dict[int, list[int]] = {block: [0] * BLOCK_TOKENS for block in range(num_blocks)}
        self.outputs: dict[str, dict[int, list[int]]] = {}
        self.finished: dict[str, dict[int, FinishReason]] = {}
        self.failed: dict[str, Failed] = {}
        self.wanted: list[RemotePrefillWanted] = []
        self.prompts: dict[str, Request] = {}

    def submit(self, request: Request, candidates: tuple[WorkerRef, ...] = ()) -> None:
        self.clock.advance(1.0)
        self.prompts[request.request_id] = request
        self.scheduler.submit(request, candidates)

    def step(self) -> bool:
        plan = self.scheduler.schedule()
        for source, destination in plan.copies:
            self.memory[destination] = list(self.memory[source])
        written: set[tuple[int, int]] = set()
        results = []
        for item in plan.batch.slices:
            context = self._read(item.block_table, item.start) + list(item.token_ids)
            for offset, token in enumerate(item.token_ids):
                place = (item.block_table[(item.start + offset) // BLOCK_TOKENS], (item.start + offset) % BLOCK_TOKENS)
                assert place not in written, "two slices write one slot"
                written.add(place)
                self.memory[place[0]][place[1]] = token
            results.append(SliceResult(tuple(SampledToken(next_token(context, spec.choice)) for spec in item.samples)))
            for spec in item.samples:
                assert spec.position == len(context)
        if plan.batch.slices:
            self.scheduler.complete(plan, ForwardResult(tuple(results)))
        self._take_events()
        return bool(plan.batch.slices)

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


def make_request(
    name: str, prompt: Sequence[int], *, max_tokens: int = 5, choices: int = 1, stop: tuple[int, ...] = ()
) -> Request:
    return Request(name, "m", tuple(prompt), SamplingParams(max_tokens=max_tokens, seed=1, stop_token_ids=stop), choices)


def assert_right(driver: Driver, request: Request) -> None:
    for choice in range(request.num_choices):
        expected = expected_output(request.prompt_token_ids, choice, request.sampling.max_tokens)
        assert driver.outputs[request.request_id][choice] == expected
        assert driver.finished[request.request_id][choice] is FinishReason.LENGTH


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_whatever_happens_outputs_are_right_and_nothing_leaks(data: st.DataObject) -> None:
    """Random prompts (with shared prefixes), choices, remote prefills that succeed, fail or hang, aborts, a small pool."""
    config = DecodeConfig(
        local_prefill=data.draw(st.sampled_from(["auto", "always"])),
        local_prefill_tokens=data.draw(st.integers(0, 6)),
        step_tokens=data.draw(st.integers(1, 12)),
        max_running=data.draw(st.integers(1, 6)),
        watermark_blocks=data.draw(st.integers(0, 2)),
    )
    driver = Driver(config, num_blocks=data.draw(st.integers(12, 40)))
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
            driver.submit(
                make_request(str(number), prompt, max_tokens=data.draw(st.integers(1, 10)), choices=choices), candidates
            )
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


def test_the_youngest_is_preempted_and_everyone_finishes() -> None:
    driver = Driver(DecodeConfig(local_prefill="always", watermark_blocks=0), num_blocks=8)
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


def test_decodes_come_before_prompt_chunks_and_the_budget_holds() -> None:
    driver = Driver(DecodeConfig(local_prefill="always", step_tokens=6), num_blocks=64)
    driver.submit(make_request("a", range(10, 13), max_tokens=30))
    driver.step()
    driver.submit(make_request("b", range(20, 50)))
    plan = driver.scheduler.schedule()
    assert [len(item.token_ids) for item in plan.batch.slices] == [1, 5]
    assert plan.batch.slices[0].samples
    assert not plan.batch.slices[1].samples


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
    ("policy", "uncached", "candidates", "place"),
    [
        ("auto", 33, 1, PrefillPlace.REMOTE),
        ("auto", 32, 1, PrefillPlace.LOCAL),
        ("auto", 5000, 0, PrefillPlace.LOCAL),
        ("always", 5000, 3, PrefillPlace.LOCAL),
        ("never", 1, 1, PrefillPlace.REMOTE),
        ("never", 1, 0, PrefillPlace.NOWHERE),
    ],
)
def test_where_a_prompt_is_prefilled(policy: str, uncached: int, candidates: int, place: PrefillPlace) -> None:
    config = DecodeConfig(local_prefill=policy, local_prefill_tokens=32)
    assert choose_place(config, uncached_tokens=uncached, num_candidates=candidates) is place
