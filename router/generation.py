"""One call of a client from its validated requests to text deltas, the same for every front end.

    requests --AnswerCache--> token chunks --ChoiceText--> deltas       usage and waterfall are there when the deltas are over

The requests of a call (one per prompt) run side by side and their deltas interleave. A request whose choices have all finished,
perhaps early by a stop string, is closed at once, which cancels its stream at the worker. The call's metrics are counted here.

It does not know JSON, SSE or the public gRPC messages.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing
from dataclasses import dataclass

from common.clock import Clock
from common.errors import NoWorkerAvailable, PdserveError, RequestCancelled
from common.lifecycle import Waterfall
from common.metrics import RouterMetrics
from common.types import TokenLogprob
from router.cache.answers import AnswerCache
from router.cache.control import CacheControl
from router.cache.flight import TokenSource
from router.cache.report import CacheReport, headers_of, result_of
from router.choice_text import choice_text
from router.dispatch import Admission, DispatchEvent, broken_off
from router.observe.cost import NOTHING, CostSplit, Ledger
from router.streaming import ChoiceDelta
from router.validate import ValidCall

_QUEUED_EVENTS = 64  # of a call with several prompts, while the client is slow


@dataclass(frozen=True, slots=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, slots=True)
class Timings:
    """The waterfall of a call's first request, and who served it."""

    waterfall: Waterfall
    decode_worker: str  # "" = none: the answer was there already, or another request's
    cache: str  # what the cache did
    cached_tokens: int
    retries: int


class InFlight:
    """Calls in progress, by model, and the door that a drain closes; after that it waits for `idle`."""

    def __init__(self) -> None:
        self.by_model: Counter[str] = Counter()
        self.closed = False
        self.idle = asyncio.Event()
        self.idle.set()

    def close(self) -> None:
        self.closed = True

    def check_open(self) -> None:
        """Raises NoWorkerAvailable once the door is closed."""
        if self.closed:
            raise NoWorkerAvailable("the router is shutting down", retry_after_s=1.0)

    def enter(self, model: str) -> None:
        self.check_open()
        self.by_model[model] += 1
        self.idle.clear()

    def leave(self, model: str) -> None:
        self.by_model[model] -= 1
        if not any(self.by_model.values()):
            self.idle.set()


class Generation:
    """Made per call; `deltas` is iterated once, inside `aclosing`."""

    def __init__(
        self,
        call: ValidCall,
        *,
        received_s: float,
        source: TokenSource,
        cache: AnswerCache,
        cache_control: CacheControl,
        in_flight: InFlight,
        metrics: RouterMetrics,
        clock: Clock,
    ) -> None:
        self.call = call
        self._received_s = received_s
        self._source = source
        self._cache = cache
        self._cache_control = cache_control
        self._cache_reports = [CacheReport() for _ in call.requests]
        self._in_flight = in_flight
        self._metrics = metrics
        self._clock = clock
        self._choices = [choice_text(call, index) for index in range(call.num_choices)]
        self._admissions: dict[int, Admission] = {}  # by request
        self._first_token_s: float | None = None
        self._last_token_s: dict[int, float] = {}  # by choice
        self._ended_s: float | None = None
        self._moved_to: list[str] = []
        self._finish_reasons: list[str] = []
        self._gaps = metrics.itl_s.of(call.model.name)
        self._cost = NOTHING  # as far as workers have told,
        self._told: set[int] = set()  # of these requests
        self.failure: PdserveError | None = None

    @property
    def usage(self) -> Usage:
        return Usage(
            self.call.num_prompt_tokens,
            sum(choice.num_tokens for choice in self._choices),
            sum(admission.started.cached_tokens for admission in self._admissions.values()),
        )

    @property
    def migrated_to(self) -> tuple[str, ...]:
        """Decode workers that went on with answers after others were lost, in order."""
        return tuple(self._moved_to)

    @property
    def finish_reasons(self) -> tuple[str, ...]:
        """Of the choices that have ended, in order of their ends."""
        return tuple(self._finish_reasons)

    def settle(self, ledger: Ledger) -> CostSplit:
        """What it cost, by what workers told, or by an estimate of what it came to where none did. What nobody computed is
        entered into the ledger here, all else by the dispatcher. Called once, when it is over."""
        cost = self._cost
        for index, admission in self._admissions.items():
            if index in self._told:
                continue
            request = self.call.requests[index]
            choices = self._choices[index * request.num_choices : (index + 1) * request.num_choices]
            num_tokens = sum(choice.num_tokens for choice in choices)
            if admission.decode_worker.worker_id:
                cost += ledger.estimate(broken_off(request.num_prompt_tokens, admission.started, num_tokens))
            else:
                cost += ledger.spared(prompt_tokens=request.num_prompt_tokens, answer_tokens=num_tokens)
        return cost

    @property
    def timings(self) -> Timings | None:
        """None before the first token of the first request."""
        admission = self._admissions.get(0)
        if admission is None or self._first_token_s is None:
            return None
        waterfall = Waterfall(
            router_s=admission.dispatched_s - self._received_s,
            ttft_s=self._first_token_s - self._received_s,
            total_s=(self._ended_s or self._clock.monotonic_s()) - self._received_s,
            num_output_tokens=self._choices[0].num_tokens,
            worker=admission.started.timings,
            queue_s=admission.queued_s,
        )
        cached_tokens = admission.started.cached_tokens
        worker, cache = admission.decode_worker.worker_id, str(self._cache_reports[0].result or "")
        return Timings(waterfall, worker, cache, cached_tokens, admission.retries)

    @property
    def cache_result(self) -> str:
        """What x-cache says; "" if nothing was answered."""
        return str(result_of(self._cache_reports) or "")

    @property
    def cache_headers(self) -> dict[str, str]:
        """What the cache did, as headers of the answer; there from the first delta on."""
        return headers_of(self._cache_reports)

    def prompt_logprobs(self, request: int) -> tuple[TokenLogprob | None, ...]:
        """One per prompt token, the first is None; empty if they were not asked for. There from the first delta on."""
        return self._admissions[request].started.prompt_logprobs

    async def deltas(self) -> AsyncGenerator[ChoiceDelta, None]:
        """Never empty ones, except that the first delta of a choice always comes as soon as its first token exists."""
        model = self.call.model.name
        self._in_flight.enter(model)
        self._metrics.prompt_tokens.labels(model).inc(self.call.num_prompt_tokens)
        ended = False
        try:
            async with aclosing(self._events()) as events:
                async for request, event in events:
                    for delta in self._deltas_of(request, event):
                        yield delta
            ended = True
        except PdserveError as error:
            self.failure, ended = error, not isinstance(error, RequestCancelled)
            raise
        finally:
            self._ended_s = self._clock.monotonic_s()
            self._in_flight.leave(model)
            self._metrics.generation_tokens.labels(model).inc(self.usage.completion_tokens)
            if not ended:
                self._metrics.cancelled_total.labels(model).inc()
            self._observe_latency(model)

    def _events(self) -> AsyncGenerator[tuple[int, DispatchEvent], None]:
        return self._one(0) if len(self.call.requests) == 1 else self._side_by_side()

    async def _one(self, index: int) -> AsyncGenerator[tuple[int, DispatchEvent], None]:
        """The events of one request, until its choices need no more."""
        request = self.call.requests[index]
        mine = self._choices[index * request.num_choices : (index + 1) * request.num_choices]
        events_of = self._cache.events(self.call, index, self._cache_control, self._source, self._cache_reports[index])
        async with aclosing(events_of) as events:
            async for event in events:
                yield index, event
                if all(choice.finished for choice in mine):
                    return

    async def _side_by_side(self) -> AsyncGenerator[tuple[int, DispatchEvent], None]:
        arrived: asyncio.Queue[tuple[int, DispatchEvent] | asyncio.Task[None]] = asyncio.Queue()
        room = asyncio.Semaphore(_QUEUED_EVENTS)  # bounds the events in the queue; the ends of tasks always fit

        async def pump(index: int) -> None:
            async with aclosing(self._one(index)) as events:
                async for item in events:
                    await room.acquire()
                    arrived.put_nowait(item)

        pumps = {asyncio.create_task(pump(index), name=f"prompt {index}") for index in range(len(self.call.requests))}
        for task in pumps:
            task.add_done_callback(arrived.put_nowait)
        running = len(pumps)
        try:
            while running:
                item = await arrived.get()
                if isinstance(item, asyncio.Task):
                    item.result()
                    running -= 1
                else:
                    room.release()
                    yield item
        finally:
            for task in pumps:
                task.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)  # the first error was raised above; one is enough

    def _deltas_of(self, request: int, event: DispatchEvent) -> Iterable[ChoiceDelta]:
        now_s = self._clock.monotonic_s()
        if event.admission is not None:
            self._admissions[request] = event.admission
        if event.moved_to is not None:
            self._moved_to.append(event.moved_to.worker_id)
        if event.cost is not None:
            self._cost = event.cost if self._cost is NOTHING else self._cost + event.cost
            self._told.add(request)
        if self._first_token_s is None:
            self._first_token_s = now_s
            self._metrics.ttft_s.labels(self.call.model.name).observe(now_s - self._received_s)
        for chunk in event.chunks:
            index = request * self.call.requests[request].num_choices + chunk.choice
            choice = self._choices[index]
            if choice.finished:
                continue
            first = index not in self._last_token_s
            if not first:
                self._gaps.observe(now_s - self._last_token_s[index])
            self._last_token_s[index] = now_s
            delta = choice.push(chunk)
            if delta.finish_reason is not None:
                self._metrics.success_total.labels(self.call.model.name, str(delta.finish_reason)).inc()
                self._finish_reasons.append(str(delta.finish_reason))
            if first or not delta.empty:
                yield delta

    def _observe_latency(self, model: str) -> None:
        if not all(choice.finished for choice in self._choices) or self._ended_s is None:
            return
        self._metrics.e2e_s.labels(model).observe(self._ended_s - self._received_s)
        timings = self.timings
        if timings is not None and timings.waterfall.num_output_tokens > 1:
            self._metrics.tpot_s.labels(model).observe(timings.waterfall.tpot_s)
