"""What the cache asks of its neighbours, and when: a source, a store and a semantic cache that write down what they are asked."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from common.clock import ManualClock
from common.config import CacheConfig
from common.errors import NoWorkerAvailable, Overloaded, PdserveError, WorkerLost
from common.metrics import RouterMetrics
from common.types import FinishReason, Request, StageTimings, Started, TokenChunk, WorkerRef
from router.cache.answers import AnswerCache
from router.cache.control import CacheControl
from router.cache.entry import Entry, EntryChoice, encode
from router.cache.report import CacheReport, CacheResult, headers_of
from router.cache.semantic_port import FreshAnswer, Question, SemanticHit
from router.dispatch import Admission, DispatchEvent
from router.sampling_class import SamplingClass
from router.store.base import AWAY, Epoch, Epochs, Reading
from router.validate import ValidCall
from support.cache_calls import Calls

TOKENS = (5, 6, 7)


class Source:
    def __init__(self, finish: FinishReason = FinishReason.STOP) -> None:
        self.asked: list[Request] = []
        self.failures: list[PdserveError] = []
        self.finish = finish
        self.tokens = TOKENS
        self.lane = "interactive"
        self.hold: asyncio.Event | None = None
        self.closing: asyncio.Event | None = None  # ending takes until it is set

    async def generate(self, request: Request) -> AsyncGenerator[DispatchEvent, None]:
        self.asked.append(request)
        admission = Admission(Started(StageTimings(), 1), WorkerRef("w", 1, "a"), 0.0, 0)
        try:
            yield DispatchEvent((TokenChunk(0, self.tokens[:2]),), admission)
            if self.hold is not None:
                await self.hold.wait()
            if self.failures:
                raise self.failures.pop(0)
            yield DispatchEvent((TokenChunk(0, self.tokens[2:], finish_reason=self.finish),))
        finally:
            if self.closing is not None:
                await self.closing.wait()


class RecordingStore:
    """In memory; `known` false is a store that is away."""

    def __init__(self) -> None:
        self.values: dict[bytes, tuple[bytes, Epochs]] = {}
        self.ttls_s: list[float] = []
        self.reads = 0
        self.known = True
        self.counter = 0

    def _now(self, names: Sequence[str]) -> Epochs:
        return Epochs(tuple((name, Epoch(self.counter, b"i")) for name in sorted(names)))

    async def get(self, key: bytes, names: Sequence[str]) -> Reading:
        self.reads += 1
        value, epochs = self.values.get(key, (None, None))
        now = self._now(names)
        return Reading(value if epochs == now else None, now) if self.known else AWAY

    def put(self, key: bytes, value: bytes, *, ttl_s: float, epochs: Epochs) -> None:
        self.values[key] = (value, epochs)
        self.ttls_s.append(ttl_s)

    def damage(self, value: bytes) -> None:
        self.values = {key: (value, epochs) for key, (_, epochs) in self.values.items()}


class Semantics:
    def __init__(self, *kinds: SamplingClass) -> None:
        self.kinds = kinds
        self.found: list[Question] = []
        self.learned: list[tuple[Question, FreshAnswer]] = []
        self.unused: list[bytes] = []
        self.hit: SemanticHit | None = None

    def covers(self, sampling: SamplingClass) -> bool:
        return sampling in self.kinds

    async def find(self, question: Question) -> SemanticHit | None:
        self.found.append(question)
        return self.hit

    def learn(self, question: Question, answer: FreshAnswer) -> None:
        self.learned.append((question, answer))

    def unusable(self, question: Question, hit: SemanticHit) -> None:
        self.unused.append(hit.key)

    async def feedback(self, hit_id: str, *, ok: bool, tenant: str) -> bool:
        return False

    async def run(self) -> None:
        await asyncio.Event().wait()

    async def close(self) -> None:
        """Nothing was opened."""


class Bench:
    def __init__(self, calls: Calls, *kinds: SamplingClass, **exact: Any) -> None:
        self.calls, self.clock = calls, ManualClock(1000.0)
        self.source, self.store, self.semantics = Source(), RecordingStore(), Semantics(*kinds)
        self.draining = False
        self.cache = AnswerCache(
            CacheConfig.model_validate({"exact": exact}),
            store=self.store,  # type: ignore[arg-type]  # what else a store can do is not asked of it
            semantics=self.semantics,
            clock=self.clock,
            metrics=RouterMetrics(CollectorRegistry()),
            draining=lambda: self.draining,
        )

    async def chat(self, text: str = "hi", **more: Any) -> ValidCall:
        return await self.calls.chat({"messages": [{"role": "user", "content": text}], "temperature": 0, **more})

    async def ask(self, call: ValidCall, control: CacheControl | None = None) -> tuple[CacheReport, list[DispatchEvent]]:
        report = CacheReport()
        async with aclosing(self.cache.events(call, 0, control or CacheControl(), self.source, report)) as events:
            return report, [event async for event in events]

    async def result(self, call: ValidCall, **control: Any) -> CacheResult | None:
        report, events = await self.ask(call, CacheControl(**control))
        assert [token for event in events for chunk in event.chunks for token in chunk.token_ids] == list(TOKENS)
        assert [event.admission is not None for event in events] == [True] + [False] * (len(events) - 1)
        return report.result


async def test_while_the_store_is_away_nothing_is_kept_or_shared(calls: Calls) -> None:
    bench = Bench(calls, SamplingClass.GREEDY)
    bench.store.known = False
    for _ in range(2):
        assert await bench.result(await bench.chat()) is CacheResult.MISS
    assert (bench.store.values, bench.semantics.found, bench.semantics.learned) == ({}, [], [])
    sharing = await listeners(bench, 2)
    assert len(bench.source.asked) == 4  # nor is anything shared
    assert bench.source.hold is not None
    bench.source.hold.set()
    await asyncio.gather(*sharing)


async def test_an_answer_begun_before_an_invalidation_is_never_given(calls: Calls) -> None:
    bench = Bench(calls)
    call = await bench.chat()
    bench.source.hold = asyncio.Event()
    events = bench.cache.events(call, 0, CacheControl(), bench.source, CacheReport())
    await anext(events)
    bench.store.counter += 1  # invalidated while it is being made
    joining = bench.cache.events(call, 0, CacheControl(), bench.source, report := CacheReport())
    await anext(joining)
    assert report.result is CacheResult.MISS  # nor is it joined
    await joining.aclose()
    bench.source.hold.set()
    rest = [event async for event in events]
    assert rest[-1].chunks[-1].finish_reason is FinishReason.STOP
    assert len(bench.store.values) == 1
    assert await bench.result(call) is CacheResult.MISS
    assert await bench.result(call) is CacheResult.HIT_EXACT
    await events.aclose()


async def test_an_answer_that_is_being_given_up_is_not_joined(calls: Calls) -> None:
    bench = Bench(calls)
    (leaving,) = await listeners(bench, 1)
    bench.source.closing = asyncio.Event()
    leaving.cancel()
    for _ in range(20):
        await asyncio.sleep(0)
    assert not leaving.done()  # its worker takes its time to stop
    bench.source.hold = None
    joining = asyncio.create_task(bench.result(await bench.chat()))
    for _ in range(20):
        await asyncio.sleep(0)
    bench.source.closing.set()
    assert await joining is CacheResult.MISS
    assert len(bench.source.asked) == 2
    await asyncio.wait([leaving])


async def test_what_one_client_does_not_want_kept_is_kept_for_another(calls: Calls) -> None:
    bench = Bench(calls)
    call = await bench.chat()
    bench.source.hold = asyncio.Event()
    private = asyncio.create_task(bench.result(call, store=False))
    for _ in range(20):
        await asyncio.sleep(0)
    public = asyncio.create_task(bench.result(call))
    for _ in range(20):
        await asyncio.sleep(0)
    bench.source.hold.set()
    assert await asyncio.gather(private, public) == [CacheResult.MISS, CacheResult.MISS]
    assert await bench.result(call) is CacheResult.HIT_EXACT


async def test_nobody_waits_with_what_is_less_urgent(calls: Calls) -> None:
    bench = Bench(calls)
    (batch,) = await listeners(bench, 1)
    hold, bench.source.hold = bench.source.hold, None
    bench.source.lane = "batch"
    assert await bench.result(await bench.chat()) is CacheResult.MISS
    assert hold is not None
    hold.set()
    assert await batch is CacheResult.MISS


async def test_followers_had_no_worker(calls: Calls) -> None:
    bench = Bench(calls)
    call = await bench.chat()
    bench.source.hold = asyncio.Event()
    asking = [asyncio.create_task(bench.ask(call)) for _ in range(2)]
    for _ in range(20):
        await asyncio.sleep(0)
    bench.clock.advance(3.0)
    bench.source.hold.set()
    admissions = [events[0].admission for _, events in await asyncio.gather(*asking)]
    assert [admission and admission.decode_worker.worker_id for admission in admissions] == ["w", ""]
    assert [admission and admission.started.cached_tokens for admission in admissions] == [1, call.num_prompt_tokens]


async def test_what_is_stored_says_how_long_and_what_it_depends_on(calls: Calls) -> None:
    bench = Bench(calls, ttl_s=77)
    await bench.result(await bench.chat(), tags=("a",))
    assert bench.store.ttls_s == [77]
    ((_, epochs),) = bench.store.values.values()
    assert epochs.names == ("model:tiny", "model:tiny@t", "tag:a@t", "tenant:t")


async def test_the_age_of_an_answer_counts_from_when_it_was_made(calls: Calls) -> None:
    bench = Bench(calls)
    call = await bench.chat()
    await bench.result(call)
    for seconds in (10.0, 5.0):
        bench.clock.advance(seconds)
        report, _ = await bench.ask(call)
    assert headers_of([report])["Age"] == "15"
    assert await bench.result(call, max_age_s=15) is CacheResult.HIT_EXACT
    assert await bench.result(call, max_age_s=14) is CacheResult.MISS
    assert await bench.result(call, max_age_s=14) is CacheResult.HIT_EXACT  # the new one took its place


@pytest.mark.parametrize("damage", [b"", b"{}", b"\xff", b'{"version":2,"created_s":1,"choices":[]}', b"[1]"])
async def test_what_cannot_be_read_is_no_answer(calls: Calls, damage: bytes) -> None:
    bench = Bench(calls)
    call = await bench.chat()
    await bench.result(call)
    bench.store.damage(damage)
    assert await bench.result(call) is CacheResult.MISS
    assert await bench.result(call) is CacheResult.HIT_EXACT


async def test_an_entry_with_more_or_fewer_choices_is_no_answer(calls: Calls) -> None:
    bench = Bench(calls)
    call = await bench.chat()
    await bench.result(call)
    choice = EntryChoice(tokens=list(TOKENS), finish=FinishReason.STOP, needed_tokens=4)
    for choices in ([choice, choice], []):
        bench.store.damage(encode(Entry(created_s=bench.clock.wall_s(), choices=choices)))
        assert await bench.result(call) is CacheResult.MISS


# -- promotion -----------------------------------------------------------------------------------------------------------


async def listeners(bench: Bench, number: int) -> list[asyncio.Task[CacheResult | None]]:
    call = await bench.chat()
    bench.source.hold = asyncio.Event()
    tasks = [asyncio.create_task(bench.result(call)) for _ in range(number)]
    for _ in range(20):
        await asyncio.sleep(0)
    return tasks


async def test_followers_of_a_flight_that_failed_begin_it_anew_a_few_times(calls: Calls) -> None:
    bench = Bench(calls)
    tasks = await listeners(bench, 6)
    assert len(bench.source.asked) == 1
    bench.source.failures = [WorkerLost("gone"), WorkerLost("gone")]
    assert bench.source.hold is not None
    bench.source.hold.set()
    ended = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(end) for end in ended[:2]] == [WorkerLost] * 2  # who began a flight gets its failure
    assert ended[2:] == [CacheResult.COALESCED] * 4
    assert len(bench.source.asked) == 3


async def test_after_that_the_failure_is_everybodys(calls: Calls) -> None:
    bench = Bench(calls)
    tasks = await listeners(bench, 6)
    bench.source.failures = [WorkerLost("gone")] * 9
    assert bench.source.hold is not None
    bench.source.hold.set()
    ended = await asyncio.gather(*tasks, return_exceptions=True)
    assert {type(end) for end in ended} == {WorkerLost}
    assert len(bench.source.asked) == 3


@pytest.mark.parametrize("failure", [NoWorkerAvailable("none"), Overloaded("full")])
async def test_where_there_was_no_room_nobody_tries_again(calls: Calls, failure: PdserveError) -> None:
    bench = Bench(calls)
    tasks = await listeners(bench, 3)
    bench.source.failures = [failure]
    assert bench.source.hold is not None
    bench.source.hold.set()
    ended = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(end) for end in ended] == [type(failure)] * 3
    assert len(bench.source.asked) == 1


async def test_while_the_router_goes_away_nothing_is_begun(calls: Calls) -> None:
    bench = Bench(calls)
    tasks = await listeners(bench, 3)
    bench.source.failures, bench.draining = [WorkerLost("gone")], True
    assert bench.source.hold is not None
    bench.source.hold.set()
    ended = await asyncio.gather(*tasks, return_exceptions=True)
    assert {type(end) for end in ended} == {WorkerLost}
    assert len(bench.source.asked) == 1


async def test_another_answer_after_a_failure_is_not_spliced(calls: Calls) -> None:
    bench = Bench(calls)
    tasks = await listeners(bench, 2)
    bench.source.failures, bench.source.tokens = [WorkerLost("gone")], (5, 9, 7)
    assert bench.source.hold is not None
    bench.source.hold.set()
    ended = await asyncio.gather(*tasks, return_exceptions=True)
    assert {type(end) for end in ended} == {WorkerLost}


# -- the semantic cache --------------------------------------------------------------------------------------------------


async def test_a_similar_question_is_answered_by_the_same_way(calls: Calls) -> None:
    bench = Bench(calls, SamplingClass.GREEDY)
    await bench.result(await bench.chat("what is  it?"))
    (first,), ((learned, answer),) = bench.semantics.found, bench.semantics.learned
    assert learned is first
    assert (first.text, first.tenant, first.model, first.num_earlier_messages) == ("what is it?", "t", "tiny", 0)
    tokenizer = (await bench.chat()).model.tokenizer
    assert answer.text == tokenizer.decode(TOKENS)
    assert (answer.num_tokens, answer.finish_reason) == (3, FinishReason.STOP)
    assert answer.key in bench.store.values
    bench.semantics.hit = SemanticHit(answer.key, 0.91, "pair-1")
    other = await bench.chat("what is that?")
    report, events = await bench.ask(other)
    assert headers_of([report]) == {"x-cache": "hit-semantic", "x-cache-id": "pair-1", "x-cache-score": "0.9100", "Age": "0"}
    assert [chunk.token_ids for event in events for chunk in event.chunks] == [TOKENS]
    assert events[0].admission is not None
    assert events[0].admission.started.cached_tokens == other.num_prompt_tokens
    assert bench.semantics.found[1].scope == first.scope
    assert len(bench.source.asked) == 1
    assert await bench.result(await bench.chat("what is that?", max_tokens=3)) is CacheResult.MISS  # it does not fit
    bench.store.values.clear()
    assert await bench.result(await bench.chat("and now?")) is CacheResult.MISS


async def test_an_exact_hit_does_not_ask_for_similar_ones(calls: Calls) -> None:
    bench = Bench(calls, SamplingClass.GREEDY)
    call = await bench.chat()
    assert [await bench.result(call) for _ in range(2)] == [CacheResult.MISS, CacheResult.HIT_EXACT]
    assert (len(bench.semantics.found), len(bench.semantics.learned)) == (1, 1)


async def test_unset_sampling_may_be_answered_by_similarity_and_never_as_equal(calls: Calls) -> None:
    bench = Bench(calls, SamplingClass.UNSET)
    call = await bench.chat(temperature=None)
    assert [await bench.result(call) for _ in range(2)] == [CacheResult.MISS] * 2
    assert len(bench.source.asked) == len(bench.semantics.learned) == 2
    bench.semantics.hit = SemanticHit(bench.semantics.learned[0][1].key, 1.0, "p")
    assert await bench.result(call) is CacheResult.HIT_SEMANTIC
    assert await bench.result(await bench.chat()) is CacheResult.MISS  # greedy: not covered, so not asked
    assert len(bench.semantics.found) == 3


@pytest.mark.parametrize("control", [{"bypass": True}, {"store": False}])
async def test_what_is_not_kept_is_not_learned(calls: Calls, control: dict[str, bool]) -> None:
    bench = Bench(calls, SamplingClass.GREEDY)
    await bench.result(await bench.chat(), **control)
    assert not bench.semantics.learned


@pytest.mark.parametrize(
    "more",
    [
        {"n": 2},
        {"logprobs": True},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        {"messages": [{"role": "user", "content": ""}]},
    ],
)
async def test_what_has_no_question_is_not_asked(calls: Calls, more: dict[str, Any]) -> None:
    bench = Bench(calls, SamplingClass.GREEDY)
    call = await bench.chat(**more)
    report = CacheReport()
    async with aclosing(bench.cache.events(call, 0, CacheControl(), bench.source, report)) as events:
        await anext(events)
    assert report.result is CacheResult.MISS
    assert not bench.semantics.found


async def test_the_scope_of_a_question_is_everything_but_its_text(calls: Calls) -> None:
    bench = Bench(calls, SamplingClass.GREEDY)
    system, user = {"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}
    scopes = []
    for messages in (
        [user],
        [system, user],
        [{**system, "content": "be long"}, user],
        [user, {"role": "assistant", "content": "x"}, user],
    ):
        for text in ("one", "other"):
            await bench.ask(await bench.chat(messages=[*messages[:-1], {"role": "user", "content": text}]))
        one, other = bench.semantics.found[-2:]
        assert one.scope == other.scope
        assert (one.text, other.text, one.num_earlier_messages) == ("one", "other", len(messages) - 1)
        scopes.append(one.scope)
    assert len(set(scopes)) == len(scopes)
    for call in (
        await bench.chat("one", frequency_penalty=1),
        replace(await bench.chat("one"), model=replace((await bench.chat()).model, fingerprint="g")),
    ):
        await bench.ask(call)
        assert bench.semantics.found[-1].scope not in scopes
