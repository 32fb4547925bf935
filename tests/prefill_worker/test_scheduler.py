"""The prefill scheduler against rules it must keep: every prompt token once and in order, budgets, pins, no leak."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from common.blocks import root_hash
from common.clock import ManualClock
from common.config import PrefillConfig
from common.engine.batch import ForwardResult, SliceResult
from common.engine.block_manager import BlockManager
from common.load import WorkerLoad
from common.types import KVLayout, Request, SampledToken, SamplingParams
from prefill_worker.scheduler import LayersComputed, PrefillScheduler, PromptComputed

BLOCK_TOKENS = 4
LAYOUT = KVLayout("m", "t", 1, 1, 8, BLOCK_TOKENS, "float32", True)


def make_request(name: str, length: int, *, first: int = 100, choices: int = 1) -> Request:
    return Request(name, "m", tuple(range(first, first + length)), SamplingParams(max_tokens=4, seed=1), choices)


class Driver:
    def __init__(self, config: PrefillConfig, num_blocks: int) -> None:
        self.clock = ManualClock()
        self.blocks = BlockManager(num_blocks, BLOCK_TOKENS, lambda salt: root_hash(LAYOUT.fingerprint, salt))
        self.scheduler = PrefillScheduler(config, LAYOUT, self.blocks, self.clock)
        self.computed: dict[str, list[int]] = {}
        self.done: dict[str, PromptComputed] = {}
        self.chunks: dict[str, list[int]] = {}

    def step(self) -> int:
        """Computes one step; the number of tokens in it."""
        plan = self.scheduler.schedule()
        results = []
        for (prompt, count), item in zip(plan.prompts, plan.batch.slices, strict=True):
            name = prompt.request.request_id
            assert len(item.token_ids) == count
            assert len(item.block_table) == -(-(item.start + count) // BLOCK_TOKENS)
            known = self.computed.setdefault(name, list(prompt.request.prompt_token_ids[: item.start]))
            assert len(known) == item.start, "a token was left out or computed twice"
            known.extend(item.token_ids)
            results.append(SliceResult(tuple(SampledToken(7) for _ in item.samples)))
        self.clock.advance(1.0)
        if plan.batch.slices:
            for layer in range(LAYOUT.num_layers):
                self.scheduler.layers_computed(plan, layer, layer + 1)
            self.scheduler.complete(plan, ForwardResult(tuple(results)))
        for event in self.scheduler.take_events():
            if isinstance(event, LayersComputed):
                self.chunks.setdefault(event.request_id, []).append(event.num_tokens)
            else:
                self.done[event.request_id] = event
        return plan.batch.num_tokens


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_every_prompt_is_computed_in_order_within_the_budget(data: st.DataObject) -> None:
    config = PrefillConfig(chunk_tokens=data.draw(st.integers(1, 20)), max_running=data.draw(st.integers(1, 4)))
    driver = Driver(config, num_blocks=data.draw(st.integers(10, 30)))
    requests: dict[str, Request] = {}
    released: set[str] = set()
    for _ in range(data.draw(st.integers(3, 30))):
        action = data.draw(st.sampled_from(["submit", "step", "step", "stop", "release"]))
        if action == "submit":
            name = str(len(requests))
            # Some share a prefix with all others, some have their own.
            first = 100 if data.draw(st.booleans()) else 1000 * (len(requests) + 1)
            requests[name] = make_request(name, data.draw(st.integers(1, 40)), first=first, choices=data.draw(st.integers(1, 3)))
            driver.scheduler.submit(requests[name])
        elif action == "step":
            assert driver.step() <= config.chunk_tokens
        elif requests:
            name = data.draw(st.sampled_from(sorted(requests)))
            if action == "stop":
                driver.scheduler.stop(name)
            else:
                driver.scheduler.release(name)
            released.add(name)
        driver.blocks.check_integrity()
    for _ in range(3000):
        driver.step()
        for name in list(driver.done):
            driver.scheduler.release(name)
        for name in released:
            driver.scheduler.release(name)
        if driver.scheduler.is_idle:
            break
    assert driver.blocks.num_used == 0
    driver.blocks.check_integrity()
    for name, request in requests.items():
        if name in released:
            continue
        assert driver.computed[name] == list(request.prompt_token_ids)
        assert len(driver.done[name].first_tokens) == request.num_choices
        assert driver.chunks[name] == sorted(set(driver.chunks[name]))
        assert driver.chunks[name][-1] == request.num_prompt_tokens


def test_the_oldest_gets_the_budget_and_short_ones_share_the_rest() -> None:
    driver = Driver(PrefillConfig(chunk_tokens=10), num_blocks=64)
    for name, length, first in (("long", 13, 100), ("short", 3, 1000), ("next", 9, 2000)):
        driver.scheduler.submit(make_request(name, length, first=first))
    plan = driver.scheduler.schedule()
    assert [(prompt.request.request_id, count) for prompt, count in plan.prompts] == [("long", 10)]
    driver.step()
    plan = driver.scheduler.schedule()
    assert [(prompt.request.request_id, count) for prompt, count in plan.prompts] == [("long", 3), ("short", 3), ("next", 4)]


def test_blocks_are_held_until_released_and_cached_after() -> None:
    driver = Driver(PrefillConfig(chunk_tokens=64), num_blocks=4)
    driver.scheduler.submit(make_request("a", 13))
    driver.step()
    assert "a" in driver.done
    driver.scheduler.submit(make_request("b", 9, first=500))
    assert driver.step() == 0, "blocks that are still being read were given to another prompt"
    driver.scheduler.release("a")
    assert driver.step() == 9
    driver.scheduler.release("b")
    assert driver.blocks.num_used == 0
    assert driver.blocks.num_cached > 0


def test_cached_blocks_are_reported_at_once_and_not_computed_again() -> None:
    driver = Driver(PrefillConfig(chunk_tokens=4), num_blocks=32)
    driver.scheduler.submit(make_request("a", 17))
    while "a" not in driver.done:
        driver.step()
    driver.scheduler.release("a")
    driver.scheduler.submit(make_request("b", 17))
    assert driver.step() == 1
    assert driver.chunks["b"] == [16, 17]
    assert driver.done["b"].cached_tokens == 16


def test_queue_and_compute_time_are_told_apart() -> None:
    driver = Driver(PrefillConfig(chunk_tokens=4, max_running=1), num_blocks=64)
    driver.scheduler.submit(make_request("a", 8))
    driver.scheduler.submit(make_request("b", 8, first=500))
    while "a" not in driver.done:
        driver.step()
    while "b" not in driver.done:
        driver.step()
    assert (driver.done["a"].queue_s, driver.done["a"].prefill_s) == (0.0, 2.0)
    assert (driver.done["b"].queue_s, driver.done["b"].prefill_s) == (2.0, 2.0)


def test_load_is_what_is_left_to_compute_without_what_is_cached() -> None:
    driver = Driver(PrefillConfig(chunk_tokens=8, max_running=1), num_blocks=64)
    for name, length, dispatch_id in (("a", 21, 7), ("b", 10, 0)):
        driver.scheduler.submit(replace(make_request(name, length, first=100 * length), dispatch_id=dispatch_id))
    assert driver.scheduler.load() == WorkerLoad(
        waiting=2, queued_tokens=31, queued_pairs=21 * 21 / 2 + 10 * 10 / 2, blocks_free=64
    )
    assert driver.scheduler.open_dispatches() == driver.scheduler.take_dispatches() == (7,)
    assert driver.scheduler.take_dispatches() == ()
    driver.step()
    load = driver.scheduler.load()
    assert (load.running, load.waiting, load.queued_tokens, load.queued_pairs) == (1, 1, 23, 13 * (21 - 6.5) + 50)
    while driver.step():
        pass
    for name in ("a", "b"):
        driver.scheduler.release(name)
    driver.scheduler.submit(make_request("again", 21, first=2100))
    cached = 21 // BLOCK_TOKENS * BLOCK_TOKENS
    assert driver.scheduler.load().queued_tokens == 21 - cached
    driver.step()
    assert driver.scheduler.load().queued_tokens == 0


def test_prompts_share_the_time_of_the_steps_by_their_tokens() -> None:
    driver = Driver(PrefillConfig(chunk_tokens=8, max_running=4), num_blocks=40)
    for name, length in (("a", 20), ("b", 6), ("c", 11)):
        driver.scheduler.submit(make_request(name, length, first=1000 * (ord(name) - 90)))
    steps = 0
    while driver.step():
        steps += 1
    assert sum(done.work_s for done in driver.done.values()) == steps == driver.scheduler.totals.prefill_s
    # Steps of 8, 8, 4 + 4, 2 + 6, 5 tokens; each takes a second.
    assert driver.done["a"].work_s == 2.5
    assert driver.done["b"].work_s == 0.75
