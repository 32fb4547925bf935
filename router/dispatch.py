"""The request path: from a validated request to the tokens of exactly one decode worker.

 1. Deadline: the request's whole budget starts here; every wait below ends with it.
 2. Placement: the decode worker with the least outstanding work and the prefill candidates, from the last snapshot and the ledger
    of own dispatches. Nobody there: NoWorkerAvailable.
 3. Connect to the decode worker, within the connect timeout.
 4. Open ONE stream, `Decode.Generate(request, prefill candidates)`. Cancelling it cancels everything below it.
 5. Wait for the first tokens. Until then nothing was handed to the caller, so nothing can have reached the client.
 6. A failure that is nobody's fault (worker lost, full, hand-off broken) before the first tokens: suspect the worker if it is
    lost and go back to 2 with the same request, so the same id and seed, avoiding the workers already tried. When there is no
    other worker, a lost one is given the time of a short back-off, or of a new snapshot, to come back.
 7. Hand events on as they come. A failure from here on is raised: exactly one typed error ends the request.
 8. The stream is over when every choice has finished. However it ends, by success, error, cancellation or because the caller
    needs no more, the gRPC stream is cancelled and the ledger entry closed.

It does not know text, HTTP or the public gRPC face; it sees token ids only.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any

import grpc.aio

from common.clock import Clock
from common.codec import chunk_from_wire, request_to_wire, started_from_wire, worker_ref_to_wire
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
from common.rpc import error_from_rpc
from common.types import Request, Started, TokenChunk, WorkerRef
from common.wire import worker_pb2
from common.wire.worker_pb2_grpc import DecodeStub
from router.links import Links
from router.placement import Ledger, LedgerEntry, Placement, place
from router.registry import Registry

log = get_logger(__name__)

_BACKOFF_FIRST_S, _BACKOFF_LAST_S = 0.05, 1.0


@dataclass(frozen=True, slots=True)
class Admission:
    """How a request got to its first token. Part of the first event."""

    started: Started
    decode_worker: WorkerRef
    dispatched_s: float  # monotonic: when the successful attempt was opened
    retries: int


@dataclass(frozen=True, slots=True)
class DispatchEvent:
    """New tokens of one request. The first event, and only that one, has an admission; every event has chunks."""

    chunks: tuple[TokenChunk, ...]
    admission: Admission | None = None


class Dispatcher:
    """Lives as long as the router. `abort_all` is called once, when a drain has run out of time."""

    def __init__(
        self, config: RouterConfig, registry: Registry, *, cluster_token: str, clock: Clock, metrics: RouterMetrics
    ) -> None:
        self._config = config
        self._registry = registry
        self._clock = clock
        self._metrics = metrics
        self._links = Links(cluster_token=cluster_token, connect_timeout_s=config.connect_timeout_s)
        self._active: set[_Attempt] = set()
        self._tidied = registry.view
        self.ledger = Ledger()

    async def generate(self, request: Request) -> AsyncGenerator[DispatchEvent, None]:
        """Events until every choice has finished. Close it (`aclosing`) to cancel. Raises one PdserveError, at most."""
        deadline_s = self._clock.monotonic_s() + request.timeout_s  # 1
        await self._tidy()
        tried: set[WorkerRef] = set()
        retries = 0
        handed_over = False
        while True:
            avoid = tried | self._registry.suspects()
            placement = place(request.model, self._registry.view.workers, self.ledger, avoid)  # 2
            tried.add(placement.decode)
            try:
                async with self._attempt(request, placement, deadline_s) as attempt:
                    first = await attempt.first_tokens(retries)  # 3, 4, 5
                    handed_over = True
                    yield first  # 7
                    while not attempt.finished:
                        yield await attempt.next_tokens()
                    return  # 8
            except PdserveError as error:
                if isinstance(error, WorkerLost):
                    self._registry.suspect(placement.decode)
                if handed_over:
                    raise
                failure = error
            await self._before_retry(request, failure, placement, tried, retries)  # 6
            retries += 1

    def _attempt(self, request: Request, placement: Placement, deadline_s: float) -> _Attempt:
        return _Attempt(request, placement, deadline_s, self._links, self.ledger, self._clock, self._active)

    async def _before_retry(
        self, request: Request, failure: PdserveError, placement: Placement, tried: set[WorkerRef], retries: int
    ) -> None:
        """Raises the failure if it is final; else returns when the next attempt is due."""
        if not failure.retryable or retries >= self._config.first_token_retries:
            raise failure
        untried = [worker for worker in self._registry.view.workers if worker.ref not in tried]
        try:
            elsewhere = place(request.model, untried, self.ledger, ()).decode
        except NoWorkerAvailable:
            if not isinstance(failure, WorkerLost):
                raise failure from None  # a worker that is full is not helped by asking it again at once
            await self._registry.wait_changed(min(_BACKOFF_FIRST_S * 2**retries, _BACKOFF_LAST_S))
            elsewhere = placement.decode
        self._metrics.retries_total.labels(request.model, failure.code).inc()
        log.warning("dispatch tried again", reason=failure.code, worker=placement.decode.worker_id, next=elsewhere.worker_id)

    async def _tidy(self) -> None:
        """Forgets workers that are gone; once per snapshot."""
        view = self._registry.view
        if view is not self._tidied:
            self._tidied = view
            self.ledger.forget_absent(view.refs())
            await self._links.keep_only(view.refs())

    def abort_all(self) -> None:
        """Ends every stream with NoWorkerAvailable: the router goes away."""
        for attempt in tuple(self._active):
            attempt.abort(NoWorkerAvailable("the router is shutting down", retry_after_s=1.0))

    async def close(self) -> None:
        await self._links.close()


class _Attempt:
    """One try of one request at one decode worker: at most one gRPC stream, cancelled on exit whatever happened."""

    def __init__(
        self,
        request: Request,
        placement: Placement,
        deadline_s: float,
        links: Links,
        ledger: Ledger,
        clock: Clock,
        active: set[_Attempt],
    ) -> None:
        self._request = request
        self._placement = placement
        self._deadline_s = deadline_s
        self._links = links
        self._clock = clock
        self._active = active
        self._entry: LedgerEntry = ledger.open(request, placement)
        self._stack = AsyncExitStack()
        self._call: Any = None  # grpc.aio's stub types do not know the calls of intercepted channels
        self._aborted: PdserveError | None = None
        self._unfinished = set(range(request.num_choices))

    @property
    def finished(self) -> bool:
        return not self._unfinished

    async def __aenter__(self) -> _Attempt:
        self._active.add(self)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._active.discard(self)
        self._entry.close()
        if self._call is not None:
            self._call.cancel()
        await self._stack.__aexit__(kind, error, traceback)

    def abort(self, error: PdserveError) -> None:
        self._aborted = error
        if self._call is not None:
            self._call.cancel()

    async def first_tokens(self, retries: int) -> DispatchEvent:
        dispatched_s = self._clock.monotonic_s()
        worker = self._placement.decode
        channel = await self._stack.enter_async_context(self._links.to(worker))
        remaining_s = self._deadline_s - self._clock.monotonic_s()
        if remaining_s <= 0:
            raise DeadlineExceeded("the request's time is over")
        self._call = DecodeStub(channel).Generate(
            worker_pb2.GenerateRequest(
                request=request_to_wire(replace(self._request, timeout_s=remaining_s)),
                prefill=[worker_ref_to_wire(ref) for ref in self._placement.prefill],
            ),
            timeout=remaining_s,
        )
        self._events = aiter(self._call)
        started: Started | None = None
        while True:
            message = await self._read()
            if message.HasField("started"):
                started = started_from_wire(message.started)
            if message.chunks:
                break
        if started is None:
            raise EngineFailure("the worker sent tokens before it said how it started")
        self._entry.prefilled()
        return DispatchEvent(self._chunks(message), Admission(started, worker, dispatched_s, retries))

    async def next_tokens(self) -> DispatchEvent:
        while True:
            message = await self._read()
            if message.chunks:
                return DispatchEvent(self._chunks(message))

    async def _read(self) -> worker_pb2.GenerateEvent:
        if self._aborted is not None:
            raise self._aborted
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

    def _chunks(self, message: worker_pb2.GenerateEvent) -> tuple[TokenChunk, ...]:
        chunks = tuple(chunk_from_wire(chunk) for chunk in message.chunks)
        for chunk in chunks:
            if chunk.choice not in self._unfinished:
                raise EngineFailure("the worker sent tokens for a choice that is finished or was not asked for")
            if chunk.finish_reason is not None:
                self._unfinished.discard(chunk.choice)
        return chunks
