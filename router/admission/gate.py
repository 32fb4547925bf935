"""The way of a request from the router to its dispatch: limits, the queue of its model, its turn; and back when it has ended.

    async with gate.admit(request, standing) as grant:      waits for its turn, or raises one typed error
        ... dispatch grant.request ...                      its timeout is what the queue has left of it
                                                            on the way out its room goes to whoever is next

`generate` does that around a dispatcher. What is decided is the `Desk`'s; this file has the clock, those who wait, and the
metrics. An answer that moves to another worker keeps its grant. It does not know where requests go.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator, AsyncIterator, Iterable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, replace
from typing import Protocol

from common.clock import Clock
from common.config import AdmissionConfig
from common.errors import DeadlineExceeded, NoWorkerAvailable, Overloaded, PdserveError, RateLimited
from common.logs import get_logger
from common.metrics import AdmissionMetrics, QueueReadings
from common.tracing.span import current_span
from common.types import Request
from router.admission.bands import Band
from router.admission.desk import Desk, Reason, Refusal
from router.admission.forecast import Forecast
from router.admission.queue import Item
from router.admission.shared_limits import Limits
from router.admission.tenants import Identity, Standing
from router.dispatch import DispatchEvent

log = get_logger(__name__)

_LEAST_RETRY_S = 1.0


class Dispatch(Protocol):
    def generate(self, request: Request, *, waits: bool = True) -> AsyncGenerator[DispatchEvent, None]: ...


@dataclass(frozen=True, slots=True)
class Lines:
    """A band of a model's queue, and the service that each tenant had in it who waits."""

    model: str
    band: Band
    num_requests: int
    counters: Iterable[tuple[str, float]]  # to be read at once


class Grant:
    """One request that was let through."""

    def __init__(
        self, request: Request, desk: Desk, item: Item, gate: Gate, standing: Standing, *, queued_s: float = 0.0
    ) -> None:
        self.request = request
        self.queued_s = queued_s
        self._desk = desk
        self._item = item
        self._gate = gate
        self._standing = standing

    def note(self, event: DispatchEvent) -> None:
        """What came of it: that is what its tenant was served."""
        chunks = event.chunks
        tokens = len(chunks[0].token_ids) if len(chunks) == 1 else sum(len(chunk.token_ids) for chunk in chunks)
        cached = event.admission.started.cached_tokens if event.admission is not None else None
        self._gate.served(self._desk, self._item, self._standing, tokens, cached)


class Gate:
    """One per router; lives on its loop. `abort_all` is called once, when a drain has run out of time."""

    def __init__(
        self,
        config: AdmissionConfig,
        *,
        dispatch: Dispatch,
        forecast: Forecast,
        limits: Limits,
        metrics: AdmissionMetrics,
        clock: Clock,
    ) -> None:
        self._config = config
        self._dispatch = dispatch
        self._forecast = forecast
        self._limits = limits
        self._metrics = metrics
        self._clock = clock
        self._serials = itertools.count()
        self._desks: dict[str, Desk] = {}
        self._waiting: dict[int, asyncio.Future[PdserveError | None]] = {}  # None = its turn
        self._closed: PdserveError | None = None
        metrics.read_queues_from(self.readings)

    async def generate(self, request: Request, standing: Standing, *, waits: bool = True) -> AsyncGenerator[DispatchEvent, None]:
        """As the dispatcher's, once it is this request's turn. Close it (`aclosing`) to cancel."""
        async with (
            self.admit(request, standing) as grant,
            aclosing(self._dispatch.generate(grant.request, waits=waits)) as events,
        ):
            async for event in events:
                grant.note(event)
                if event.admission is not None:
                    event = replace(event, admission=replace(event.admission, queued_s=grant.queued_s))
                yield event

    @asynccontextmanager
    async def admit(self, request: Request, standing: Standing) -> AsyncIterator[Grant]:
        """Raises RateLimited, Overloaded or DeadlineExceeded; NoWorkerAvailable when the router goes away."""
        identity = standing.identity
        await self._check_limits(identity, request.num_prompt_tokens, standing.band)
        now_s = self._clock.monotonic_s()
        item = self._item(request, standing, now_s)
        desk = self._desk(request.model)
        dispatched = False
        try:
            waiting = current_span().child("queue", start_s=now_s, attributes={"pdserve.band": item.band})
            try:
                await self._turn(desk, item, request)
            finally:
                waiting.end()
            dispatched = True
            granted_s = self._clock.monotonic_s()
            left_s = item.deadline_s - granted_s
            self._metrics.queued(item.band, granted_s - now_s)
            self._metrics.serve(identity.tenant.label, "prompt", request.num_prompt_tokens)
            ranked = replace(request, timeout_s=left_s, priority=standing.band.rank)
            yield Grant(ranked, desk, item, self, standing, queued_s=granted_s - now_s)
        finally:
            ended_s = self._clock.monotonic_s()
            self._limits.leave(identity)
            if dispatched:
                desk.finished(item.serial, ended_s)
                self._pump(request.model)
            else:
                self._limits.spend(identity, -request.num_prompt_tokens)

    def served(self, desk: Desk, item: Item, standing: Standing, tokens: int, cached_tokens: int | None) -> None:
        """Of a grant: new tokens; `cached_tokens` comes with the first of them."""
        identity = standing.identity
        label = identity.tenant.label
        if cached_tokens is not None:
            desk.started(item.serial, cached_tokens, self._clock.monotonic_s())
            self._metrics.serve(label, "cached", min(cached_tokens, item.prompt_tokens))
        if tokens:
            desk.generated(item.serial, tokens)
            self._metrics.serve(label, "generated", tokens)
            self._limits.spend(identity, tokens)

    def workers_changed(self) -> None:
        """There may be more room."""
        for model, desk in self._desks.items():
            if len(desk.queue):
                self._pump(model)

    def abort_all(self) -> None:
        """Ends the waiting of all, and of those to come, with NoWorkerAvailable: the router goes away."""
        self._closed = NoWorkerAvailable("the router is shutting down", retry_after_s=1.0)
        for serial in tuple(self._waiting):
            self._tell(serial, self._closed)

    # -- a turn --------------------------------------------------------------------------------------------------------

    async def _turn(self, desk: Desk, item: Item, request: Request) -> None:
        """Returns when the item was granted; if it raises, the item is neither waiting nor out."""
        if self._closed is not None:
            raise self._closed
        model = request.model
        news: asyncio.Future[PdserveError | None] = asyncio.get_running_loop().create_future()
        self._waiting[item.serial] = news
        try:
            ttft_s = self._forecast.ttft_s(request) if self._config.ttft_slo_s else None
            arrival = desk.arrive(item, item.arrived_s, self._forecast.room(model), ttft_s)
            if arrival.refusal is not None:
                raise self._refused(item.band, arrival.refusal)
            for other in arrival.put_out:
                gone = Refusal(Reason.PUT_OUT, _LEAST_RETRY_S)
                self._tell(other.serial, self._refused(other.band, gone))
            self._pump(model)
            if not news.done():
                try:
                    async with asyncio.timeout(item.deadline_s - item.arrived_s):
                        await asyncio.shield(news)
                except TimeoutError:
                    if not news.done():
                        raise self._expired(item) from None
            error = news.result()
            if error is not None:
                raise error
        except BaseException:
            # Cancelled, most likely: it may have been granted in the same instant.
            if desk.leave(item.serial, self._clock.monotonic_s()) is None and news.done() and news.result() is None:
                desk.finished(item.serial, self._clock.monotonic_s())
            self._pump(model)
            raise
        finally:
            del self._waiting[item.serial]

    def _pump(self, model: str) -> None:
        desk = self._desks[model]
        if not len(desk.queue):
            return
        turn = desk.turn(self._clock.monotonic_s(), self._forecast.room(model))
        for item in turn.expired:
            self._tell(item.serial, self._expired(item))
        for granted in turn.granted:
            if granted.overdue:
                self._metrics.overdue_total.labels(granted.item.band).inc()
            self._tell(granted.item.serial, None)

    def _tell(self, serial: int, news: PdserveError | None) -> None:
        future = self._waiting[serial]
        if not future.done():
            future.set_result(news)

    def _item(self, request: Request, standing: Standing, now_s: float) -> Item:
        tenant = standing.identity.tenant
        output = min(request.sampling.max_tokens, self._config.expected_output_tokens)
        return Item(
            serial=next(self._serials),
            tenant=tenant.name,
            weight=tenant.weight,
            band=standing.band,
            prompt_tokens=request.num_prompt_tokens,
            room_tokens=request.num_prompt_tokens + request.num_choices * output,
            sequences=request.num_choices,
            arrived_s=now_s,
            deadline_s=now_s + request.timeout_s,
        )

    def _desk(self, model: str) -> Desk:
        if model not in self._desks:
            self._desks[model] = Desk(self._config)
        return self._desks[model]

    # -- refusals ------------------------------------------------------------------------------------------------------

    async def _check_limits(self, identity: Identity, prompt_tokens: int, band: Band) -> None:
        reached = await self._limits.enter(identity, prompt_tokens)
        if reached is not None:
            self._metrics.rejected_total.labels(reached.limit, band).inc()
            whose = "this key" if reached.of_key else "this tenant"
            message = f"{whose} has reached its {reached.limit}"
            raise RateLimited(message, param=reached.limit, retry_after_s=max(_LEAST_RETRY_S, reached.retry_after_s))

    def _refused(self, band: Band, refusal: Refusal) -> Overloaded:
        self._metrics.rejected_total.labels(refusal.reason, band).inc()
        match refusal.reason:
            case Reason.FORECAST:
                message = f"the first token would take {refusal.predicted_ttft_s or 0.0:.1f} s, longer than {band} is promised"
            case Reason.PUT_OUT:
                message = "the queue is full, and another had more right to the place"
            case _:
                message = "the queue is full"
        return Overloaded(message, retry_after_s=max(_LEAST_RETRY_S, refusal.retry_after_s))

    def _expired(self, item: Item) -> DeadlineExceeded:
        self._metrics.rejected_total.labels(Reason.EXPIRED, item.band).inc()
        return DeadlineExceeded("the request's time was over before a worker had room for it")

    # -- metrics -------------------------------------------------------------------------------------------------------

    def readings(self) -> Iterable[QueueReadings]:
        now_s = self._clock.monotonic_s()
        for model, desk in self._desks.items():
            for band in Band:
                oldest = desk.queue.oldest(band)
                yield QueueReadings(
                    model=model,
                    band=band,
                    requests=desk.queue.num_items(band),
                    tokens=desk.queue.room_tokens(band),
                    oldest_s=0.0 if oldest is None else now_s - oldest.arrived_s,
                    gap_tokens=desk.queue.gap(band),
                )

    def lines(self) -> Iterable[Lines]:
        """Who waits now, where anybody ever did."""
        for model, desk in self._desks.items():
            for band in Band:
                yield Lines(model, band, desk.queue.num_items(band), desk.queue.counters(band))


class Admitted:
    """A dispatcher for the requests of one call, behind the gate."""

    def __init__(self, gate: Gate, standing: Standing, *, waits: bool = True) -> None:
        """`waits`: for the successors of lost workers."""
        self._gate = gate
        self._standing = standing
        self._waits = waits

    @property
    def lane(self) -> str:
        return self._standing.band

    def generate(self, request: Request) -> AsyncGenerator[DispatchEvent, None]:
        return self._gate.generate(request, self._standing, waits=self._waits)

    def in_background(self) -> Admitted:
        return Admitted(self._gate, replace(self._standing, band=Band.BACKGROUND), waits=self._waits)
