"""The request path: from a validated request to the tokens of exactly one decode worker.

 1. Deadline: the request's whole budget starts here; every wait below ends with it.
 2. Placement (`router.placement`): the decode worker, the prefill candidates, and who of them is to compute the prompt. Nobody
    there: NoWorkerAvailable, or a wait for the workers of a model that slept, or that lost its last one (`router.patience`).
 3. Connect to the decode worker, within the connect timeout.
 4. Open ONE stream, `Decode.Generate(request, prefill candidates)`. Cancelling it cancels everything below it. Events come over
    it or, once there is a feed from that worker (`router.feeds`), over a lane there; then the stream says only how it ended.
 5. Wait for the first tokens. Until then nothing was handed to the caller, so nothing can have reached the client.
 6. A failure that is nobody's fault (worker lost, full, hand-off broken) before the first tokens: suspect the worker if it is
    lost and go back to 2 with the same request, so the same id and seed, avoiding the workers already tried. When there is no
    other worker, a lost one is given the time of a short back-off, or of a new snapshot, to come back. How often workers may
    fail with a request is limited; one that cannot be reached, or has no prefill worker, did not, and there is a wait as in 2.
 7. Hand events on as they come, and keep them (`router.answer`). A worker that is lost from here on takes nothing with it: the
    rest of each unfinished choice is a request of its own, with the tokens so far at the end of its prompt, and goes back to 2;
    it may wait for a worker to come back. Any other failure is raised: exactly one typed error ends the request.
 8. The stream is over when every choice has finished. However it ends, by success, error, cancellation or because the caller
    needs no more, the gRPC streams are cancelled and placement counts the dispatch no longer.

It does not know text, HTTP or the public gRPC face; it sees token ids only.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any

import grpc.aio

from common.clock import Clock
from common.codec import choice_to_wire, chunk_from_wire, request_to_wire, started_from_wire, work_from_wire, worker_ref_to_wire
from common.config import RouterConfig
from common.errors import (
    DeadlineExceeded,
    EngineFailure,
    NoWorkerAvailable,
    PdserveError,
    RequestCancelled,
    WorkerLost,
)
from common.logs import get_logger
from common.metrics import RouterMetrics
from common.rpc import cancel_and_wait, error_from_rpc
from common.tracing.span import Kind, current_span, entered
from common.types import Request, Started, TokenChunk, WorkerRef, WorkerState
from common.wire import worker_pb2
from common.wire.worker_pb2_grpc import DecodeStub
from router.answer import Answer
from router.feeds import Feeds, Lane, News
from router.links import Links
from router.merging import merged
from router.observe.cost import BrokenOff, CostSplit, Ledger, Ledgers
from router.patience import Patience
from router.placement.membership import Placement, Prompt
from router.placement.placer import Dispatched, Placer
from router.registry import Registry

log = get_logger(__name__)

_BACKOFF_FIRST_S, _BACKOFF_LAST_S = 0.05, 1.0
_WAKE_AGAIN_S = 2.0
_UNSTARTED = "the worker sent tokens before it said how it started"


@dataclass(frozen=True, slots=True)
class Admission:
    """How a request got to its first token. Part of the first event."""

    started: Started
    decode_worker: WorkerRef
    dispatched_s: float  # monotonic: when the successful attempt was opened
    retries: int
    queued_s: float = 0.0  # before that, in the router's queue


@dataclass(frozen=True, slots=True)
class DispatchEvent:
    """New tokens of one request. The first event, and only that one, has an admission; every event has chunks."""

    chunks: tuple[TokenChunk, ...]
    admission: Admission | None = None
    moved_to: WorkerRef | None = None  # who goes on with the answer, on the first event from there
    cost: CostSplit | None = None  # with the last tokens that a worker sends for the request, or for the rest of it


@dataclass(slots=True)
class _Journey:
    """What a request and its rests share."""

    deadline_s: float
    migrations_left: int
    waits: bool  # for the successors of lost workers


@dataclass(slots=True)
class _Tries:
    """Of one request, or of the rest of one, to get its first tokens."""

    patience: Patience
    workers: set[WorkerRef] = field(default_factory=set)
    retries: int = 0
    losses: int = 0  # tries that a worker took, and did not bring to the first token

    @property
    def backoff_s(self) -> float:
        return min(_BACKOFF_FIRST_S * 2.0 ** min(self.retries, 10), _BACKOFF_LAST_S)


class Dispatcher:
    """Lives as long as the router. `abort_all` is called once, when a drain has run out of time."""

    def __init__(
        self,
        config: RouterConfig,
        registry: Registry,
        *,
        cluster_token: str,
        clock: Clock,
        metrics: RouterMetrics,
        feeds: Feeds | None = None,
    ) -> None:
        """Without `feeds` every event comes over its request's own stream."""
        self._feeds = feeds
        self._config = config
        self._registry = registry
        self._clock = clock
        self._metrics = metrics
        self._links = Links(cluster_token=cluster_token, connect_timeout_s=config.connect_timeout_s)
        self._active: set[_Attempt] = set()
        self._tidied = registry.view
        self._ended: PdserveError | None = None
        self.placer = Placer(config.placement, clock=clock)
        self.ledgers = Ledgers()

    async def generate(self, request: Request, *, waits: bool = True) -> AsyncGenerator[DispatchEvent, None]:
        """Events until every choice has finished. Close it (`aclosing`) to cancel. Raises one PdserveError, at most. Without
        `waits` that there is nobody is said at once, for another model can take over; the rest of an answer waits all the same.
        """
        now_s = self._clock.monotonic_s()
        journey = _Journey(now_s + request.timeout_s, self._config.migrations, waits)  # 1
        await self._tidy()
        async with aclosing(self._generate(request, journey)) as events:
            async for event in events:
                yield event

    async def _generate(
        self, request: Request, journey: _Journey, *, is_rest: bool = False
    ) -> AsyncGenerator[DispatchEvent, None]:
        """A request, or the rest of one."""
        tries = _Tries(self._patience(request.model, journey, is_rest))
        prompt = self.placer.prompt_of(request)
        while True:
            placement = await self._place(request, prompt, tries, journey)  # 2
            tries.workers.add(placement.decode)
            answer = Answer(request)
            handed_over = False
            try:
                async with self._attempt(request, prompt, placement, journey.deadline_s, answer) as attempt:
                    event = await attempt.first_tokens(tries.retries)  # 3, 4, 5
                    while True:  # 7
                        answer.add(event.chunks)
                        handed_over = True
                        yield event
                        if answer.finished:
                            return  # 8
                        event = await attempt.next_tokens()
            except PdserveError as error:
                if isinstance(error, WorkerLost):
                    self._registry.suspect(placement.decode)
                failure = error
            if handed_over:
                break
            await self._before_retry(request, failure, attempt, tries, journey)  # 6
            tries.retries += 1
        if not isinstance(failure, WorkerLost) or journey.migrations_left == 0:
            raise failure
        journey.migrations_left -= 1
        self._metrics.migrations_total.labels(request.model).inc()
        rest = answer.rest()
        log.warning("the rest of an answer goes elsewhere", lost=placement.decode.worker_id, choices=len(rest))
        async with aclosing(merged([self._generate(one, journey, is_rest=True) for one in rest])) as events:
            async for event in events:
                moved_to = event.moved_to if event.admission is None else event.admission.decode_worker
                yield DispatchEvent(event.chunks, moved_to=moved_to, cost=event.cost)

    def _patience(self, model: str, journey: _Journey, is_rest: bool) -> Patience:
        return Patience(
            model,
            self._registry,
            self._clock,
            wait_s=self._config.migration_wait_s,
            deadline_s=journey.deadline_s,
            is_rest=is_rest,
            waits=journey.waits,
        )

    async def _place(self, request: Request, prompt: Prompt, tries: _Tries, journey: _Journey) -> Placement:
        told = False
        while True:
            if self._ended is not None:
                raise self._ended
            self.placer.sync(self._registry.view.workers)
            try:
                return self.placer.place(request.model, prompt, tries.workers | self._registry.suspects())
            except NoWorkerAvailable:
                asleep = self._registry.wake(request.model)
                left_s = journey.deadline_s - self._clock.monotonic_s() if asleep else tries.patience.left_s()
                if left_s <= 0:
                    raise
                if not told:
                    log.info("waits for a worker", model=request.model, at_most_s=round(left_s, 1))
                    told = True
            await self._registry.wait_changed(min(left_s, _WAKE_AGAIN_S) if asleep else left_s)

    def _attempt(self, request: Request, prompt: Prompt, placement: Placement, deadline_s: float, answer: Answer) -> _Attempt:
        dispatched = self.placer.open(placement, request.model, prompt)
        self._metrics.placed(request.model, placement.choice.value)
        account = _Account(answer, self.ledgers.of(request.model))
        return _Attempt(
            request,
            placement,
            deadline_s,
            self._links,
            dispatched,
            self._clock,
            self._metrics,
            self._active,
            account,
            self._feeds,
        )

    async def _before_retry(
        self, request: Request, failure: PdserveError, attempt: _Attempt, tries: _Tries, journey: _Journey
    ) -> None:
        """Raises the failure if it is final; else returns when the next attempt is due."""
        left_s = journey.deadline_s - self._clock.monotonic_s()
        nobody = isinstance(failure, NoWorkerAvailable) or not attempt.reached
        if not nobody:
            tries.losses += 1
            tries.patience.found()
        if isinstance(failure, NoWorkerAvailable) and self._registry.wake(request.model):  # a part of its workers is there
            patient = left_s > 0
        else:
            unheard = not attempt.reached or bool(attempt.placement.prefill)  # it was to be there, says the manager
            patient = tries.patience.left_s(nobody=nobody, unheard=unheard) > 0
        spent = (tries.retries if nobody else tries.losses - 1) >= self._config.first_token_retries
        if not failure.retryable or (spent and not patient) or self._ended is not None:
            raise failure
        self.placer.sync(self._registry.view.workers)
        elsewhere = next((ref for ref in self.placer.decode_workers(request.model) if ref not in tries.workers), None)
        if elsewhere is None:
            if not isinstance(failure, WorkerLost | NoWorkerAvailable) and not patient:
                raise failure  # a worker that is full is not helped by asking it again at once; one that drains has a successor
            await self._registry.wait_changed(min(tries.backoff_s, max(0.0, left_s)))
            elsewhere = attempt.worker
        self._metrics.retries_total.labels(request.model, failure.code).inc()
        again = nobody and elsewhere == attempt.worker and tries.retries > 0  # said already
        tell = log.debug if again else log.warning
        tell("dispatch tried again", reason=failure.code, worker=attempt.worker.worker_id, next=elsewhere.worker_id)

    async def _tidy(self) -> None:
        """Forgets workers that are gone; once per snapshot."""
        view = self._registry.view
        if view is not self._tidied:
            self._tidied = view
            self.placer.sync(view.workers)
            await self._links.keep_only(view.refs())
            if self._feeds is not None:
                self._feeds.keep_only(view.refs())

    def leave_lost(self) -> None:
        """Ends the streams to workers that the manager has given up: a host that vanished does not end them itself."""
        view = self._registry.view
        serving = {worker.ref for worker in view.workers if worker.state in (WorkerState.READY, WorkerState.DRAINING)}
        for attempt in tuple(self._active):
            if attempt.worker not in serving:
                attempt.abort(WorkerLost("the worker was given up"))

    def abort_all(self) -> None:
        """Ends every stream, and every wait for a worker, with NoWorkerAvailable: the router goes away."""
        self._ended = NoWorkerAvailable("the router is shutting down", retry_after_s=1.0)
        for attempt in tuple(self._active):
            attempt.abort(self._ended)
        self._registry.stir()

    async def close(self) -> None:
        if self._feeds is not None:
            await self._feeds.close()
        await self._links.close()


class _Account:
    """What an attempt cost: what its worker says, or else, once it had begun to answer, an estimate."""

    def __init__(self, answer: Answer, ledger: Ledger) -> None:
        self._answer = answer
        self._ledger = ledger
        self._started: Started | None = None
        self._told = False

    def began(self, started: Started) -> None:
        self._started = started

    def told(self, message: worker_pb2.GenerateEvent) -> CostSplit | None:
        if not message.HasField("account"):
            return None
        self._told = True
        return self._ledger.paid(work_from_wire(message.account))

    def close(self) -> None:
        if self._started is not None and not self._told:
            self._ledger.broken_off(broken_off(self._answer.num_prompt_tokens, self._started, self._answer.num_tokens))


def broken_off(prompt_tokens: int, started: Started, generated_tokens: int) -> BrokenOff:
    """An answer as far as it came."""
    return BrokenOff(prompt_tokens, started.cached_tokens, generated_tokens, started.timings.transfer_exposed_s)


class _Attempt:
    """One try of one request at one decode worker: at most one gRPC stream, cancelled on exit whatever happened."""

    def __init__(
        self,
        request: Request,
        placement: Placement,
        deadline_s: float,
        links: Links,
        dispatched: Dispatched,
        clock: Clock,
        metrics: RouterMetrics,
        active: set[_Attempt],
        account: _Account,
        feeds: Feeds | None,
    ) -> None:
        self._feeds = feeds
        self._lane: Lane | None = None
        self._watching: asyncio.Task[None] | None = None
        self._account = account
        self._span = current_span().child(
            "dispatch",
            kind=Kind.CLIENT,
            attributes={"pdserve.decode_worker": placement.decode.worker_id, "pdserve.placement": placement.choice.value},
        )
        self._request = request
        self._placement = placement
        self._deadline_s = deadline_s
        self._links = links
        self._clock = clock
        self._active = active
        self._dispatched = dispatched
        self._metrics = metrics
        self._stack = AsyncExitStack()
        self._call: Any = None  # grpc.aio's stub types do not know the calls of intercepted channels
        self._aborted: PdserveError | None = None
        self.reached = False

    @property
    def placement(self) -> Placement:
        return self._placement

    @property
    def worker(self) -> WorkerRef:
        return self._placement.decode

    async def __aenter__(self) -> _Attempt:
        self._active.add(self)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._active.discard(self)
        self._dispatched.close()
        self._account.close()
        self._span.end(error="" if kind is None or kind is GeneratorExit else kind.__name__)
        if self._lane is not None:
            self._lane.close()
        if self._call is not None:
            self._call.cancel()
        if self._watching is not None:
            await cancel_and_wait(self._watching)
        await self._stack.__aexit__(kind, error, traceback)

    def abort(self, error: PdserveError) -> None:
        self._aborted = error
        if self._lane is not None:
            self._lane.end(error, at_once=True)
        if self._call is not None:
            self._call.cancel()

    async def first_tokens(self, retries: int) -> DispatchEvent:
        dispatched_s = self._clock.monotonic_s()
        worker = self._placement.decode
        if dispatched_s >= self._deadline_s:
            raise DeadlineExceeded("the request's time is over")
        try:
            async with asyncio.timeout(max(0.0, self._deadline_s - dispatched_s)):
                channel = await self._stack.enter_async_context(self._links.to(worker))
        except TimeoutError:
            raise DeadlineExceeded("the request's time is over") from None
        self.reached = True
        remaining_s = max(0.001, self._deadline_s - self._clock.monotonic_s())
        lane = self._lane = None if self._feeds is None else self._feeds.lane(worker, channel)
        with entered(self._span):
            self._call = DecodeStub(channel).Generate(
                worker_pb2.GenerateRequest(
                    request=request_to_wire(
                        replace(self._request, timeout_s=remaining_s, dispatch_id=self._dispatched.dispatch_id)
                    ),
                    prefill=[worker_ref_to_wire(ref) for ref in self._placement.prefill],
                    choice=choice_to_wire(self._placement.choice),
                    feed=0 if lane is None else lane.feed_number,
                    lane=0 if lane is None else lane.number,
                ),
                timeout=remaining_s,
            )
        self._events = aiter(self._call)
        if lane is not None:
            self._watching = asyncio.create_task(self._watch(lane), name="watch a stream")
        started: Started | None = None
        while True:
            message = await self._read()
            if isinstance(message, tuple):
                raise EngineFailure(_UNSTARTED)
            if message.HasField("started"):
                started = started_from_wire(message.started)
            if message.chunks:
                break
        if started is None:
            raise EngineFailure(_UNSTARTED)
        self._dispatched.started(started)
        self._account.began(started)
        self._span.event("first token")
        if self._placement.ttft_s is not None:
            taken_s = self._clock.monotonic_s() - dispatched_s
            self._metrics.forecast(self._request.model, predicted_s=self._placement.ttft_s, taken_s=taken_s)
        return DispatchEvent(
            _chunks(message), Admission(started, worker, dispatched_s, retries), cost=self._account.told(message)
        )

    async def next_tokens(self) -> DispatchEvent:
        while True:
            news = await self._read()
            if isinstance(news, tuple):
                return DispatchEvent((TokenChunk(self._request.first_choice, news),))
            if news.chunks:
                return DispatchEvent(_chunks(news), cost=self._account.told(news))

    async def _read(self) -> News:
        if self._aborted is not None:
            raise self._aborted
        return await (self._from_stream() if self._lane is None else self._lane.next())

    async def _watch(self, lane: Lane) -> None:
        """The stream of a request whose events come over a lane: how it ends, and, from a worker that does not use lanes, all."""
        try:
            while True:
                message = await self._from_stream()
                if message.HasField("given"):
                    lane.expect(message.given)
                else:
                    lane.push(message)
        except PdserveError as error:
            lane.end(error)

    async def _from_stream(self) -> worker_pb2.GenerateEvent:
        try:
            message: worker_pb2.GenerateEvent = await anext(self._events)
        except StopAsyncIteration:
            raise WorkerLost("the worker ended the stream before the answer was complete") from None
        except grpc.aio.AioRpcError as error:
            failure = error_from_rpc(error)
            if isinstance(failure, RequestCancelled):  # not by us: the worker is being stopped
                failure = WorkerLost("the worker gave the request up")
            raise failure from None
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            # Nobody cancelled this task: it is the call that was cancelled, by `abort` or from the other side.
            raise self._aborted or WorkerLost("the worker gave the request up") from None
        return message


def _chunks(message: worker_pb2.GenerateEvent) -> tuple[TokenChunk, ...]:
    return tuple(chunk_from_wire(chunk) for chunk in message.chunks)
