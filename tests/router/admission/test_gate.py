"""The gate with real tasks: turns, cancellation at any moment, limits, and what its metrics say."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from common.clock import Clock, ManualClock, SystemClock
from common.codec import request_from_wire, request_to_wire
from common.config import AdmissionConfig, LimitsConfig
from common.errors import DeadlineExceeded, EngineFailure, NoWorkerAvailable, Overloaded, PdserveError, RateLimited
from common.metrics import AdmissionMetrics
from common.types import FinishReason, Request, SamplingParams, StageTimings, Started, TokenChunk, WorkerRef
from router.admission.bands import Band
from router.admission.forecast import Room
from router.admission.gate import Gate
from router.admission.shared_limits import Limits
from router.admission.tenants import Identity, Standing, Tenant
from router.dispatch import Admission, DispatchEvent

WORKER = WorkerRef("tiny/decode/0", 1, "127.0.0.1:9")


@dataclass
class Workers:
    """A dispatcher whose answers go on when the test says so."""

    cached_tokens: int = 0
    fail: PdserveError | None = None
    requests: list[Request] = field(default_factory=list)
    may_go_on: dict[str, asyncio.Event] = field(default_factory=dict)
    closed: list[str] = field(default_factory=list)

    def let(self, name: str) -> asyncio.Event:
        return self.may_go_on.setdefault(name, asyncio.Event())

    async def generate(self, request: Request, *, waits: bool = True) -> AsyncGenerator[DispatchEvent, None]:
        self.requests.append(request)
        try:
            if self.fail is not None:
                raise self.fail
            admission = Admission(Started(StageTimings(), self.cached_tokens), WORKER, 0.0, 0)
            yield DispatchEvent((TokenChunk(0, (1, 2)),), admission)
            await self.let(request.request_id).wait()
            yield DispatchEvent((TokenChunk(0, (3,), finish_reason=FinishReason.LENGTH),))
        finally:
            self.closed.append(request.request_id)

    @property
    def names(self) -> list[str]:
        return [request.request_id for request in self.requests]


@dataclass
class Forecast:
    tokens: float | None = 20.0
    foreseen_s: float | None = None

    def room(self, model: str) -> Room | None:
        return None if self.tokens is None else Room(self.tokens, 1000)

    def ttft_s(self, request: Request) -> float | None:
        return self.foreseen_s


@dataclass
class Rig:
    workers: Workers
    forecast: Forecast
    gate: Gate
    prometheus: CollectorRegistry
    limits: Limits

    def start(self, name: str, band: Band = Band.INTERACTIVE, **more: Any) -> asyncio.Task[int]:
        return asyncio.create_task(self.generate(name, band, **more), name=name)

    async def generate(
        self, name: str, band: Band = Band.INTERACTIVE, *, tenant: str = "a", timeout_s: float = 60.0, limits: Any = None
    ) -> int:
        request = Request(name, "tiny", tuple(range(10)), SamplingParams(max_tokens=10, seed=1), timeout_s=timeout_s)
        count = 0
        async with aclosing(self.gate.generate(request, standing(band, tenant, limits))) as events:
            async for event in events:
                count += sum(len(chunk.token_ids) for chunk in event.chunks)
        return count

    def metric(self, name: str, **labels: str) -> float | None:
        return self.prometheus.get_sample_value(name, labels)


def standing(band: Band, tenant: str, limits: Any = None) -> Standing:
    given = LimitsConfig.model_validate(limits or {})
    return Standing(Identity(Tenant(tenant, tenant, 1.0, tuple(Band), given, LimitsConfig(), False, ""), "k"), band)


def rig(*, clock: Clock | None = None, **config: Any) -> Rig:
    prometheus, workers, forecast = CollectorRegistry(), Workers(), Forecast()
    clock = clock or SystemClock()
    limits = Limits(None, namespace="", clock=clock)
    gate = Gate(
        AdmissionConfig.model_validate(config),
        dispatch=workers,
        forecast=forecast,
        limits=limits,
        metrics=AdmissionMetrics(prometheus),
        clock=clock,
    )
    return Rig(workers, forecast, gate, prometheus, limits)


async def settled() -> None:
    """Every task has gone as far as it can."""
    for _ in range(20):
        await asyncio.sleep(0)


def assert_nothing_is_left(one: Rig) -> None:
    for desk in one.gate._desks.values():
        assert (len(desk.queue), desk.tokens_out, desk.sequences_out) == (0, 0, 0)
        assert not desk._foreseen
        assert not desk._num_unstarted
    assert not one.gate._waiting
    assert sorted(one.workers.closed) == sorted(one.workers.names)


async def test_a_request_goes_at_once_while_there_is_room() -> None:
    one = rig()
    one.workers.let("r").set()
    assert await one.generate("r") == 3
    assert one.metric("pdserve_queue_seconds_count", band="interactive") == 1
    assert one.metric("pdserve_tenant_service_tokens_total", tenant="a", kind="prompt") == 10
    assert one.metric("pdserve_tenant_service_tokens_total", tenant="a", kind="generated") == 3
    assert_nothing_is_left(one)


async def test_turns_go_by_band_and_fairness_not_by_arrival() -> None:
    one = rig()
    tasks = [one.start("first")]
    await settled()
    for name, band, tenant in (
        ("low", Band.BACKGROUND, "a"),
        ("a1", Band.INTERACTIVE, "a"),
        ("a2", Band.INTERACTIVE, "a"),
        ("b1", Band.INTERACTIVE, "b"),
    ):
        tasks.append(one.start(name, band, tenant=tenant))
        await settled()
    assert one.workers.names == ["first"]
    assert one.metric("pdserve_queue_requests", model_name="tiny", band="interactive") == 3
    assert one.metric("pdserve_queue_tokens", model_name="tiny", band="background") == 20
    for name in ("first", "a1", "b1", "a2", "low"):
        one.workers.let(name).set()
    assert await asyncio.gather(*tasks) == [3] * 5
    assert one.workers.names == ["first", "b1", "a1", "a2", "low"]
    assert_nothing_is_left(one)


async def test_what_the_queue_took_is_not_left_for_the_worker() -> None:
    clock = ManualClock(100.0)
    one = rig(clock=clock)
    first, second = one.start("first"), one.start("second", timeout_s=30.0)
    await settled()
    clock.advance(12.0)
    one.workers.let("first").set()
    one.workers.let("second").set()
    await asyncio.gather(first, second)
    assert one.workers.requests[0].timeout_s == 60.0
    assert one.workers.requests[1].timeout_s == pytest.approx(18.0)


async def test_workers_are_told_the_band() -> None:
    one = rig()
    tasks = [one.start(band, band) for band in Band]
    for band in Band:
        one.workers.let(band).set()
    await asyncio.gather(*tasks)
    found = [(request.request_id, request.priority) for request in one.workers.requests]
    assert found == [(Band.INTERACTIVE, 0), (Band.BATCH, 1), (Band.BACKGROUND, 2)]
    for request in one.workers.requests:
        assert request_from_wire(request_to_wire(request)) == request


async def test_an_expired_request_is_never_dispatched() -> None:
    one = rig()
    first, second = one.start("first"), one.start("second", timeout_s=0.02)
    with pytest.raises(DeadlineExceeded):
        await second
    one.workers.let("first").set()
    await first
    assert one.workers.names == ["first"]
    assert one.metric("pdserve_rejected_total", reason="expired", band="interactive") == 1
    assert_nothing_is_left(one)


async def test_one_that_expired_unnoticed_is_dropped_in_its_turn() -> None:
    clock = ManualClock()
    one = rig(clock=clock)
    first, second, third = one.start("first"), one.start("second", timeout_s=30.0), one.start("third")
    await settled()
    clock.advance(30.0)
    for name in ("first", "third"):
        one.workers.let(name).set()
    await asyncio.gather(first, third)
    with pytest.raises(DeadlineExceeded):
        await second
    assert one.workers.names == ["first", "third"]
    assert_nothing_is_left(one)


async def test_a_client_that_leaves_the_queue_is_forgotten() -> None:
    one = rig()
    first, second, third = one.start("first"), one.start("second"), one.start("third")
    await settled()
    second.cancel()
    with pytest.raises(asyncio.CancelledError):
        await second
    one.workers.let("first").set()
    one.workers.let("third").set()
    await asyncio.gather(first, third)
    assert one.workers.names == ["first", "third"]
    assert_nothing_is_left(one)


async def test_one_that_leaves_in_the_instant_of_its_turn_takes_no_room_along() -> None:
    one = rig()
    first, second, third = one.start("first"), one.start("second"), one.start("third")
    await settled()
    first.cancel()
    await asyncio.sleep(0)  # the room of the first has gone to the second, whose task has not run yet
    assert one.gate._desks["tiny"].tokens_out == 20
    assert one.workers.names == ["first"]
    second.cancel()
    one.workers.let("third").set()
    assert await third == 3
    assert one.workers.names == ["first", "third"]
    assert {type(found) for found in await asyncio.gather(first, second, return_exceptions=True)} == {asyncio.CancelledError}
    assert_nothing_is_left(one)


async def test_a_failed_dispatch_gives_its_room_back() -> None:
    one = rig()
    one.workers.fail = EngineFailure("planted")
    for name in ("first", "second"):
        with pytest.raises(EngineFailure):
            await one.generate(name)
    assert_nothing_is_left(one)


async def test_workers_that_come_are_room() -> None:
    one = rig()
    tasks = [one.start(name) for name in ("first", "second", "third")]
    await settled()
    one.forecast.tokens = 40.0
    one.gate.workers_changed()
    await settled()
    assert one.workers.names == ["first", "second"]
    one.forecast.tokens = None  # the last one has gone: the dispatcher will say so
    one.gate.workers_changed()
    await settled()
    assert one.workers.names == ["first", "second", "third"]
    for name in one.workers.names:
        one.workers.let(name).set()
    await asyncio.gather(*tasks)
    assert_nothing_is_left(one)


async def test_a_full_queue_refuses_and_puts_out() -> None:
    one = rig(max_queued_requests=1)
    first, low = one.start("first"), one.start("low", Band.BATCH)
    await settled()
    with pytest.raises(Overloaded) as refused:
        await one.generate("also low", Band.BATCH)
    assert refused.value.retry_after_s is not None
    assert refused.value.retry_after_s >= 1
    high = one.start("high")
    with pytest.raises(Overloaded):
        await low
    for name in ("first", "high"):
        one.workers.let(name).set()
    await asyncio.gather(first, high)
    assert one.metric("pdserve_rejected_total", reason="queue_full", band="batch") == 1
    assert one.metric("pdserve_rejected_total", reason="put_out", band="batch") == 1
    assert_nothing_is_left(one)


async def test_what_will_be_late_is_refused_before_any_work() -> None:
    one = rig(ttft_slo_s={"interactive": 1.0}, slo_slack=0.5)
    first, second = one.start("first"), one.start("second")
    await settled()
    one.forecast.foreseen_s = 1.6
    with pytest.raises(Overloaded, match=r"1\.6 s") as refused:
        await one.generate("third")
    assert refused.value.retry_after_s == 1.0
    assert one.workers.names == ["first"]
    assert one.metric("pdserve_rejected_total", reason="forecast", band="interactive") == 1
    assert one.gate._desks["tiny"].queue.num_items(Band.INTERACTIVE) == 1
    other = one.start("of a band without a promise", Band.BATCH)
    await settled()
    for name in ("first", "second", "of a band without a promise"):
        one.workers.let(name).set()
    assert await asyncio.gather(first, second, other) == [3, 3, 3]
    assert_nothing_is_left(one)


async def test_limits_hold_from_the_queue_to_the_last_token() -> None:
    one = rig()
    limits = {"max_concurrent": 2}
    first, second = one.start("first", limits=limits), one.start("second", limits=limits)
    await settled()
    with pytest.raises(RateLimited) as refused:
        await one.generate("third", limits=limits)
    assert refused.value.param == "max_concurrent"
    second.cancel()
    await settled()
    one.workers.let("first").set()
    await first
    one.workers.let("third").set()
    assert await one.generate("third", limits=limits) == 3
    with pytest.raises(asyncio.CancelledError):
        await second


async def test_tokens_are_counted_as_they_come_and_given_back_if_nothing_was_computed() -> None:
    clock = ManualClock()
    one = rig(clock=clock)
    limits = {"tokens_per_minute": 30}
    first, second = one.start("first", limits=limits), one.start("second", limits=limits)
    await settled()  # 10 and 10 for prompts, 2 for an answer
    who = standing(Band.INTERACTIVE, "a", limits).identity
    assert one.limits.headers(who)["x-ratelimit-remaining-tokens"] == "8"
    second.cancel()
    await settled()
    assert one.limits.headers(who)["x-ratelimit-remaining-tokens"] == "18"
    one.workers.let("first").set()
    await first
    assert one.limits.headers(who)["x-ratelimit-remaining-tokens"] == "17"
    with pytest.raises(asyncio.CancelledError):
        await second


async def test_cached_tokens_are_not_charged_to_the_queue() -> None:
    one = rig()
    one.workers.cached_tokens = 9
    first = one.start("first")
    await settled()
    other = [one.start("a", tenant="a"), one.start("b", tenant="b")]
    await settled()
    # "a" was served one prompt token and two of an answer: 1 + 2 * 2. Both came while the queue was empty: it is its counter.
    assert one.gate._desks["tiny"].queue._bands[Band.INTERACTIVE].lines["a"].counter == 5.0
    for name in ("first", "a", "b"):
        one.workers.let(name).set()
    await asyncio.gather(first, *other)
    assert one.metric("pdserve_tenant_service_tokens_total", tenant="a", kind="cached") == 18


async def test_when_the_router_goes_away_nobody_waits_on() -> None:
    one = rig()
    first, second = one.start("first"), one.start("second")
    await settled()
    one.gate.abort_all()
    with pytest.raises(NoWorkerAvailable):
        await second
    with pytest.raises(NoWorkerAvailable):
        await one.generate("third")
    one.workers.let("first").set()
    assert await first == 3
    assert_nothing_is_left(one)


async def test_models_wait_for_themselves() -> None:
    one = rig()
    first = one.start("first")
    await settled()
    request = Request("other", "large", (1,), SamplingParams(max_tokens=1, seed=1))
    one.workers.let("other").set()
    async with aclosing(one.gate.generate(request, standing(Band.BATCH, "a"))) as events:
        assert [event async for event in events]
    one.workers.let("first").set()
    await first


def test_labels_of_tenants_are_bounded() -> None:
    prometheus = CollectorRegistry()
    metrics = AdmissionMetrics(prometheus)
    for index in range(500):
        metrics.serve(f"tenant{index}", "prompt", 1)
    lines = [line for line in generate_latest(prometheus).decode().splitlines() if "tenant_service_tokens_total{" in line]
    assert len(lines) == AdmissionMetrics.MAX_TENANTS + 1
    assert prometheus.get_sample_value("pdserve_tenant_service_tokens_total", {"tenant": "others", "kind": "prompt"}) == 436


@pytest.mark.parametrize("seed", range(20))
async def test_whatever_happens_each_request_ends_once_and_nothing_is_left(seed: int) -> None:
    draw = random.Random(seed)
    one = rig(max_queued_requests=6, max_queued_tokens=200, overdue_s=0.001, overdue_every=3)
    one.forecast.tokens = draw.choice([20.0, 60.0])
    tasks: list[asyncio.Task[int]] = []
    for index in range(60):
        name = f"r{index}"
        if draw.random() < 0.6:
            one.workers.let(name).set()
        timeout_s = draw.choice([60.0, 60.0, 0.002])
        tasks.append(one.start(name, draw.choice(list(Band)), tenant=draw.choice("abc"), timeout_s=timeout_s))
        for _ in range(draw.randrange(3)):
            await asyncio.sleep(0)
        if draw.random() < 0.3:
            draw.choice(tasks).cancel()
        if draw.random() < 0.3:
            one.workers.let(f"r{draw.randrange(index + 1)}").set()
        if draw.random() < 0.1:
            one.forecast.tokens = draw.choice([20.0, 60.0, None])
            one.gate.workers_changed()
    await asyncio.sleep(0.005)
    for index in range(60):
        one.workers.let(f"r{index}").set()
    found = await asyncio.gather(*tasks, return_exceptions=True)
    assert {type(each) for each in found} <= {int, asyncio.CancelledError, Overloaded, DeadlineExceeded}
    assert any(each == 3 for each in found)
    assert len(set(one.workers.names)) == len(one.workers.names)
    assert_nothing_is_left(one)
