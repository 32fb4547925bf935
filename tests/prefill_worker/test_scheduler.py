"""The prefill scheduler against rules it must keep: each prompt its own text, budgets, borders, bounded waiting, no leak."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.blocks import root_hash
from common.clock import ManualClock
from common.config import PrefillConfig
from common.engine.batch import ForwardResult, SliceResult
from common.engine.block_manager import BlockManager
from common.errors import DeadlineExceeded
from common.load import WorkerLoad
from common.types import KVLayout, Request, SampledToken, SamplingParams
from prefill_worker.scheduler import LayersComputed, PrefillScheduler, PromptComputed, PromptFailed, StepPlan

BLOCK_TOKENS = 4
LAYOUT = KVLayout("m", "t", 1, 1, 8, BLOCK_TOKENS, "float32", True)


def make_request(name: str, length: int, *, first: int = 100, choices: int = 1) -> Request:
    return Request(name, "m", tuple(range(first, first + length)), SamplingParams(max_tokens=4, seed=1), choices)


class Driver:
    """Computes what is scheduled, in a pool where each place knows which text it holds: that which was last written there."""

    def __init__(self, config: PrefillConfig, num_blocks: int, *, ahead: bool = False) -> None:
        """`ahead`: a step is over when the one behind it was planned, as in a pipeline."""
        self.ahead = ahead
        self.under_way: list[tuple[StepPlan, ForwardResult]] = []
        self.config = config
        self.clock = ManualClock()
        self.blocks = BlockManager(num_blocks, BLOCK_TOKENS, lambda salt: root_hash(LAYOUT.fingerprint, salt))
        self.scheduler = PrefillScheduler(config, LAYOUT, self.blocks, self.clock)
        self.done: dict[str, PromptComputed] = {}
        self.failed: dict[str, PromptFailed] = {}
        self.chunks: dict[str, list[int]] = {}
        self.steps: list[dict[str, int]] = []
        self.times_computed: Counter[tuple[int, ...]] = Counter()  # of each full block, by all the text up to its end
        self._prompts: dict[str, tuple[int, ...]] = {}
        self._pool: dict[tuple[int, int], int] = {}
        self._announced: dict[str, set[tuple[int, int]]] = {}  # of those that are not released: blocks, and positions in the text

    def submit(self, request: Request) -> None:
        self._prompts[request.request_id] = request.prompt_token_ids
        self.scheduler.submit(request)

    def release(self, name: str) -> None:
        self._announced.pop(name, None)
        self.scheduler.release(name)

    def check_announced(self) -> None:
        """Tokens that were said to be computed may be read from where they were, until the prompt is released: all of them, for
        blocks of the peer's may be smaller."""
        for name, places in self._announced.items():
            tokens = self._prompts[name]
            for block, position in places:
                assert self.blocks.num_references(block), "a block that may still be read was given back"
                assert self._pool[block, position % BLOCK_TOKENS] == hash(tokens[: position + 1])

    def step(self) -> int:
        """Computes one step; the number of tokens in it."""
        plan = self.scheduler.schedule()
        self._take_events()
        results = []
        names = [prompt.request.request_id for prompt, _ in plan.prompts]
        assert len(set(names)) == len(names), "two chunks of a prompt in one step"
        for (prompt, count), item in zip(plan.prompts, plan.batch.slices, strict=True):
            tokens = prompt.request.prompt_token_ids
            end = item.start + count
            assert tuple(item.token_ids) == tokens[item.start : end]
            assert end % self.config.chunk_tokens == 0 or end == len(tokens), "a chunk ends where none should"
            assert end // self.config.chunk_tokens - item.start // self.config.chunk_tokens <= 1
            assert len(item.block_table) == -(-end // BLOCK_TOKENS)
            assert self._holds(item.block_table, tokens[: item.start]), "other text is in KV"
            for position in range(item.start, end):
                block = item.block_table[position // BLOCK_TOKENS]
                self._pool[block, position % BLOCK_TOKENS] = hash(tokens[: position + 1])
                if (position + 1) % BLOCK_TOKENS == 0:
                    self.times_computed[tokens[: position + 1]] += 1
            results.append(SliceResult(tuple(SampledToken(7) for _ in item.samples)))
        self.clock.advance(1.0)
        if plan.batch.slices:
            self.steps.append({prompt.request.request_id: count for prompt, count in plan.prompts})
            self.under_way.append((plan, ForwardResult(tuple(results))))
        was_under_way = bool(self.under_way)
        while len(self.under_way) > (1 if self.ahead and plan.batch.slices else 0):
            self._end_step(*self.under_way.pop(0))
        self._take_events()
        return plan.batch.num_tokens or int(was_under_way)

    def _end_step(self, plan: StepPlan, result: ForwardResult) -> None:
        for (prompt, count), item in zip(plan.prompts, plan.batch.slices, strict=True):
            tokens = prompt.request.prompt_token_ids
            for position in range(item.start, item.start + count):
                place = item.block_table[position // BLOCK_TOKENS], position % BLOCK_TOKENS
                assert self._pool[place] == hash(tokens[: position + 1]), "a block was given away while a step wrote to it"
        for layer in range(LAYOUT.num_layers):
            self.scheduler.layers_computed(plan, layer, layer + 1)
        self._take_events()
        self.scheduler.complete(plan, result)

    def _holds(self, blocks: Sequence[int], tokens: tuple[int, ...]) -> bool:
        return all(
            self._pool.get((blocks[position // BLOCK_TOKENS], position % BLOCK_TOKENS)) == hash(tokens[: position + 1])
            for position in range(len(tokens))
        )

    def _take_events(self) -> None:
        for event in self.scheduler.take_events():
            match event:
                case LayersComputed():
                    tokens = self._prompts[event.request_id]
                    places = ((event.blocks[position // BLOCK_TOKENS], position) for position in range(event.num_tokens))
                    self._announced.setdefault(event.request_id, set()).update(places)
                    final = (
                        event.num_tokens if event.num_tokens == len(tokens) else event.num_tokens // BLOCK_TOKENS * BLOCK_TOKENS
                    )
                    assert self._holds(event.blocks, tokens[:final]), "other text is handed off"
                    self.chunks.setdefault(event.request_id, []).append(event.num_tokens)
                case PromptComputed():
                    self.done[event.request_id] = event
                case PromptFailed():
                    self.failed[event.request_id] = event


def configs(data: st.DataObject, *, aligned: bool = False) -> PrefillConfig:
    chunk_tokens = data.draw(st.sampled_from([4, 8, 12] if aligned else [1, 3, 4, 7, 8, 20]))
    return PrefillConfig(
        chunk_tokens=chunk_tokens,
        step_tokens=data.draw(st.sampled_from([None, 1, chunk_tokens + 3, 3 * chunk_tokens])),
        max_running=data.draw(st.integers(1, 4)),
        oldest_first_every=data.draw(st.integers(1, 5)),
    )


def any_request(data: st.DataObject, name: str, *, shared: bool = True) -> Request:
    """Some share a prefix with others."""
    length = data.draw(st.integers(1, 40))
    own = 1000 * (int(name) + 1)
    common = data.draw(st.integers(0, length)) if shared else 0
    tokens = (*range(100, 100 + common), *range(own, own + length - common))
    sampling = SamplingParams(max_tokens=4, seed=1, prompt_logprobs=data.draw(st.sampled_from([None, None, None, 1])))
    return Request(name, "m", tokens, sampling, data.draw(st.integers(1, 3)), priority=data.draw(st.integers(0, 2)))


@pytest.mark.parametrize("ahead", [False, True], ids=["one by one", "ahead"])
@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_every_prompt_is_computed_within_budget_and_blocks(ahead: bool, data: st.DataObject) -> None:
    """Whatever comes, is stopped and is given back: each prompt reads and hands off its own text, and no block is lost."""
    driver = Driver(configs(data), num_blocks=data.draw(st.integers(10, 30)), ahead=ahead)
    requests: dict[str, Request] = {}
    released: set[str] = set()
    for _ in range(data.draw(st.integers(3, 30))):
        action = data.draw(st.sampled_from(["submit", "submit", "step", "step", "stop", "release"]))
        if action == "submit":
            name = str(len(requests))
            requests[name] = any_request(data, name)
            driver.submit(requests[name])
        elif action == "step":
            if driver.step() > driver.config.shared_tokens:
                assert len(driver.steps[-1]) == 1, "prompts share a step that is too long"
            assert driver.scheduler.num_running <= driver.config.max_running
        elif requests:
            name = data.draw(st.sampled_from(sorted(requests)))
            if action == "stop":
                driver.scheduler.stop(name)
            else:
                driver.release(name)
            released.add(name)
        driver.check_announced()
        driver.blocks.check_integrity()
    for _ in range(3000):
        driver.step()
        driver.check_announced()
        for name in (*driver.done, *released):
            driver.release(name)
        if driver.scheduler.is_idle:
            break
    assert driver.blocks.num_used == 0
    driver.blocks.check_integrity()
    for name in requests.keys() - released:
        assert len(driver.done[name].first_tokens) == requests[name].num_choices
        assert driver.chunks[name] == sorted(set(driver.chunks[name]))
        assert driver.chunks[name][-1] == requests[name].num_prompt_tokens


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_prompt_waits_for_those_before_it_and_no_longer(data: st.DataObject) -> None:
    """With room for all: steps until it is computed against the chunks of it and of what was there when it came. Later ones, of
    any band and length, cost it the promised share of steps and no more."""
    config = configs(data).model_copy(update={"max_running": 100})
    driver = Driver(config, num_blocks=2000)
    came: dict[str, tuple[int, int]] = {}  # in which step, and by which step it is to be computed
    chunks: dict[str, int] = {}
    for _ in range(data.draw(st.integers(2, 40))):
        if data.draw(st.booleans()):
            name = str(len(chunks))
            request = any_request(data, name)
            chunks[name] = -(-request.num_prompt_tokens // config.chunk_tokens)
            ahead = sum(count for other, count in chunks.items() if other not in driver.done)
            came[name] = (len(driver.steps), len(driver.steps) + config.oldest_first_every * ahead)
            driver.submit(request)
        else:
            driver.step()
            late = [name for name, (_, by) in came.items() if name not in driver.done and len(driver.steps) >= by]
            assert not late
    while driver.step():
        late = [name for name, (_, by) in came.items() if name not in driver.done and len(driver.steps) >= by]
        assert not late
    assert driver.done.keys() == chunks.keys()


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_the_most_urgent_waits_for_one_chunk_of_the_oldest_at_most(data: st.DataObject) -> None:
    config = configs(data).model_copy(update={"max_running": 100})
    if config.oldest_first_every == 1:
        config = config.model_copy(update={"oldest_first_every": 2})
    driver = Driver(config, num_blocks=2000)
    left: dict[str, tuple[int, int, int]] = {}  # band, tokens, arrival of those that are not yet computed
    passed_over: str | None = None
    for _ in range(data.draw(st.integers(2, 60))):
        if data.draw(st.integers(0, 2)) == 0:
            name = str(len(driver.chunks) + len(left) + 1000 * len(driver.steps))
            request = any_request(data, name, shared=False)
            left[name] = (request.priority, request.num_prompt_tokens, len(left) + 100 * len(driver.steps))
            driver.submit(request)
        elif left:
            most_urgent = min(left, key=lambda name: left[name])
            oldest = min(left, key=lambda name: left[name][2])
            driver.step()
            step = driver.steps[-1]
            if most_urgent in step:
                passed_over = None
            else:
                assert next(iter(step)) == oldest
                assert most_urgent != passed_over, "passed over twice"
                passed_over = most_urgent
            for name, count in step.items():
                band, tokens, arrival = left.pop(name)
                if tokens > count:
                    left[name] = (band, tokens - count, arrival)


@pytest.mark.parametrize("ahead", [False, True], ids=["one by one", "ahead"])
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_no_block_is_computed_twice(ahead: bool, data: st.DataObject) -> None:
    """With room for all, and chunks of whole blocks. But for the last one of a prompt that it fills, for its last token is
    computed in any case, and those of which log-probabilities are wanted."""
    driver = Driver(configs(data, aligned=True).model_copy(update={"max_running": 100}), num_blocks=2000, ahead=ahead)
    anyway: set[tuple[int, ...]] = set()
    count = 0
    for _ in range(data.draw(st.integers(2, 30))):
        if data.draw(st.booleans()):
            request = any_request(data, str(count))
            tokens = request.prompt_token_ids
            if request.sampling.prompt_logprobs is not None:
                anyway.update(tokens[:end] for end in range(len(tokens) + 1))
            anyway.add(tokens)
            driver.submit(request)
            count += 1
        else:
            driver.step()
    while driver.step():
        pass
    assert len(driver.done) == count
    assert {tokens for tokens, times in driver.times_computed.items() if times > 1} <= anyway


def test_short_prompts_share_a_step_and_a_long_one_goes_on_after_them() -> None:
    driver = Driver(PrefillConfig(chunk_tokens=10, step_tokens=20, oldest_first_every=3), num_blocks=64)
    for name, length, first in (("long", 53, 100), ("short", 3, 1000), ("next", 9, 2000), ("other", 9, 3000)):
        driver.submit(make_request(name, length, first=first))
    while driver.step():
        pass
    assert driver.steps == [
        {"short": 3, "next": 9},  # a whole chunk of "other" has no room beside them, and chunks are not cut
        {"other": 9, "long": 10},
        {"long": 10},
        {"long": 10},
        {"long": 10},
        {"long": 10},
        {"long": 3},
    ]


def test_chunks_end_where_they_always_do_whatever_was_cached() -> None:
    driver = Driver(PrefillConfig(chunk_tokens=8, step_tokens=1), num_blocks=64)
    driver.submit(make_request("a", 5))
    driver.submit(make_request("b", 20))
    driver.submit(make_request("c", 20))
    while driver.step():
        pass
    # Of "b" four tokens were there, of "c" all but its last block, which is computed for what follows it.
    assert driver.steps == [{"a": 5}, {"b": 4}, {"b": 8}, {"b": 4}, {"c": 4}]


def test_how_long_shared_steps_are() -> None:
    config = PrefillConfig()
    assert (config.on("cpu").shared_tokens, config.on("cuda").shared_tokens) == (128, config.chunk_tokens)
    assert PrefillConfig(chunk_tokens=16).on("cpu").shared_tokens == 16
    assert PrefillConfig(step_tokens=700).on("cpu").shared_tokens == 700


def test_bands_come_first_but_not_for_ever() -> None:
    driver = Driver(PrefillConfig(chunk_tokens=8, oldest_first_every=3), num_blocks=64)
    driver.submit(replace(make_request("low", 16, first=5000), priority=2))
    for index in range(4):
        driver.submit(make_request(f"high {index}", 8, first=1000 * index))
    while driver.step():
        pass
    assert [list(step) for step in driver.steps] == [["high 0"], ["high 1"], ["low"], ["high 2"], ["high 3"], ["low"]]


def test_a_prompt_waits_for_the_blocks_of_another() -> None:
    """Of four with one beginning, the first computes it; the others take it from there, in the step after its last chunk."""
    driver = Driver(PrefillConfig(chunk_tokens=8, step_tokens=64), num_blocks=64)
    for name in "abcd":
        own = 1000 * ord(name)
        driver.submit(Request(name, "m", (*range(16), *range(own, own + 3)), SamplingParams(max_tokens=4, seed=1)))
    while driver.step():
        pass
    assert driver.steps == [{"a": 8}, {"a": 8}, {"a": 3, "b": 3, "c": 3, "d": 3}]
    assert [driver.done[name].cached_tokens for name in "abcd"] == [0, 16, 16, 16]


def test_a_prompt_in_progress_takes_what_a_more_urgent_one_computed_meanwhile() -> None:
    driver = Driver(PrefillConfig(chunk_tokens=8), num_blocks=64)
    driver.submit(replace(make_request("low", 40), priority=1))
    driver.step()
    driver.submit(make_request("high", 33))
    while driver.step():
        pass
    assert driver.steps == [{"low": 8}, {"high": 8}, {"high": 8}, {"high": 8}, {"high": 1}, {"low": 8}]
    assert driver.done["low"].cached_tokens == 24


def test_a_prompt_whose_time_is_over_is_ended_before_a_step() -> None:
    driver = Driver(PrefillConfig(chunk_tokens=4), num_blocks=64)
    driver.submit(replace(make_request("begun", 12), timeout_s=1.5))
    driver.submit(replace(make_request("waiting", 30, first=500), timeout_s=2.0))
    driver.submit(replace(make_request("patient", 5, first=900), timeout_s=60.0))
    while driver.step():
        pass
    assert driver.steps == [{"patient": 4}, {"patient": 1}]
    for name in ("begun", "waiting"):
        assert type(driver.failed[name].error) is DeadlineExceeded
        driver.scheduler.release(name)
    driver.scheduler.release("patient")
    assert driver.scheduler.is_idle
    assert driver.blocks.num_used == 0


def test_a_large_prompt_gets_its_blocks_though_small_ones_keep_coming() -> None:
    """Its turn comes, and from then on nobody else is given blocks until it has its own."""
    driver = Driver(PrefillConfig(chunk_tokens=8, oldest_first_every=4), num_blocks=8)
    held = deque()
    for index in range(40):
        if index == 2:
            driver.submit(make_request("large", 32, first=90_000))
        if "large" in driver.done:
            break
        driver.submit(make_request(f"small {index}", 8, first=1000 * index))
        driver.step()
        held.extend(name for name in driver.done if name not in held)
        if len(held) > 3:
            driver.scheduler.release(held.popleft())
    assert "large" in driver.done


def test_blocks_are_held_until_released_and_cached_after() -> None:
    driver = Driver(PrefillConfig(chunk_tokens=64), num_blocks=4)
    driver.submit(make_request("a", 13))
    driver.step()
    assert "a" in driver.done
    driver.submit(make_request("b", 9, first=500))
    assert driver.step() == 0, "blocks that are still being read were given to another prompt"
    driver.scheduler.release("a")
    assert driver.step() == 9
    driver.scheduler.release("b")
    assert driver.blocks.num_used == 0
    assert driver.blocks.num_cached > 0


def test_cached_blocks_are_reported_at_once_and_not_computed_again() -> None:
    driver = Driver(PrefillConfig(chunk_tokens=4), num_blocks=32)
    driver.submit(make_request("a", 17))
    while "a" not in driver.done:
        driver.step()
    driver.scheduler.release("a")
    driver.submit(make_request("b", 17))
    assert driver.step() == 1
    assert driver.chunks["b"] == [16, 17]
    assert driver.done["b"].cached_tokens == 16


def test_queue_and_compute_time_are_told_apart() -> None:
    driver = Driver(PrefillConfig(chunk_tokens=4, max_running=1), num_blocks=64)
    driver.submit(make_request("a", 8))
    driver.submit(make_request("b", 8, first=500))
    while "a" not in driver.done:
        driver.step()
    while "b" not in driver.done:
        driver.step()
    assert (driver.done["a"].queue_s, driver.done["a"].prefill_s) == (0.0, 2.0)
    assert (driver.done["b"].queue_s, driver.done["b"].prefill_s) == (2.0, 2.0)


def test_what_comes_while_a_step_computes_has_waited_for_that_step() -> None:
    driver = Driver(PrefillConfig(chunk_tokens=8), num_blocks=64)
    driver.clock.advance(10.0)
    request = make_request("a", 8)
    driver._prompts["a"] = request.prompt_token_ids
    driver.scheduler.submit(request, received_s=7.0)
    while "a" not in driver.done:
        driver.step()
    assert (driver.done["a"].queue_s, driver.done["a"].prefill_s) == (3.0, 1.0)


def test_load_is_what_is_left_to_compute_without_what_is_cached() -> None:
    driver = Driver(PrefillConfig(chunk_tokens=8, max_running=1), num_blocks=64)
    for name, length, dispatch_id in (("a", 21, 7), ("b", 10, 0)):
        driver.submit(replace(make_request(name, length, first=100 * length), dispatch_id=dispatch_id))
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
    driver.submit(make_request("again", 21, first=2100))
    cached = 21 // BLOCK_TOKENS * BLOCK_TOKENS
    assert driver.scheduler.load().queued_tokens == 21 - cached
    driver.step()
    assert driver.scheduler.load().queued_tokens == 0


def test_prompts_share_the_time_of_the_steps_by_their_tokens() -> None:
    driver = Driver(PrefillConfig(chunk_tokens=8, max_running=4), num_blocks=40)
    for name, length in (("a", 20), ("b", 4), ("c", 4)):
        driver.submit(make_request(name, length, first=1000 * (ord(name) - 90)))
    steps = 0
    while driver.step():
        steps += 1
    assert sum(done.work_s for done in driver.done.values()) == steps == driver.scheduler.totals.prefill_s
    # Steps of 4 + 4, 8, 8, 4 tokens; each takes a second.
    assert driver.done["a"].work_s == 3.0
    assert driver.done["b"].work_s == driver.done["c"].work_s == 0.5


def test_the_next_chunk_is_planned_behind_the_one_under_way() -> None:
    """And the next prompt behind the last chunk; what was given up meanwhile says nothing, and its blocks are nobody's until the
    step is over."""
    driver = Driver(PrefillConfig(chunk_tokens=4), num_blocks=8, ahead=True)
    driver.submit(make_request("a", 12))
    driver.submit(make_request("b", 18, first=500))
    for _ in range(4):
        driver.step()
    assert driver.steps == [{"a": 4}, {"a": 4}, {"a": 4}, {"b": 4}]
    assert list(driver.done) == ["a"]
    driver.release("a")
    driver.step()
    assert driver.steps[-1] == {"b": 4}
    driver.release("b")
    driver.submit(make_request("c", 29, first=900))
    assert driver.blocks.num_used > 0
    driver.step()
    assert driver.chunks["b"] == [4]
    assert driver.steps[-1] == {"b": 4}, "c was given blocks that a step writes to"
    driver.step()
    assert driver.steps[-1] == {"c": 4}
    assert "b" not in driver.done
