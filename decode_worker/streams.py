"""Every `Decode.Generate` of a worker, without the gRPC around it: work for the engine and, if need be, a hand-off.

The life of a stream:
  1. the request is submitted to the engine, with the prefill workers that the router proposes
  2. the scheduler reserves blocks and decides where the prompt is prefilled
  3. remote: the hand-off has it computed elsewhere and verifies what arrives (`handoff.fetch`); the engine hears of it
  4. the engine generates; its outputs are given out as they come, one per step at most: to whoever iterates (`generate`), or by a
     call within the engine's own delivery (`run`), with no task between
However the stream ends, the request is gone from the engine and the hand-off when it has: an unfinished one is aborted.

It knows neither sockets nor threads: the engine is what takes posts and reports events, whatever runs it.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace

from common.clock import Clock
from common.engine.grammar import CompiledGrammar
from common.engine.loop import Inbox
from common.errors import DeadlineExceeded, EngineFailure, PdserveError
from common.logs import get_logger
from common.metrics import WorkerMetrics
from common.tracing.span import Span, current_span, entered
from common.types import PrefillChoice, Request, Started, WorkerRef
from decode_worker.events import Event, Failed, Output, RemotePrefill, RemotePrefillWanted
from decode_worker.handoff import DecodeHandoff
from decode_worker.scheduler import DecodeScheduler

_log = get_logger(__name__)

_TOO_LONG = "the request took longer than its time"


Give = Callable[[Output], None]


class _Stream:
    """One Generate in progress: what the engine has for it, and the hand-off that runs for it."""

    def __init__(self, request: Request, give: Give, started_s: float) -> None:
        self.request = request
        self.give = give
        self.ended: asyncio.Future[PdserveError | None] = asyncio.get_running_loop().create_future()
        self.fetch: asyncio.Task[None] | None = None
        self.span = current_span()
        self.started_s = self.first_token_s = started_s
        self.queue_s = 0.0

    def end(self, error: PdserveError | None = None) -> None:
        """The first end counts."""
        if not self.ended.done():
            self.ended.set_result(error)


class DecodeStreams:
    """One per worker; lives on its asyncio loop."""

    def __init__(
        self, scheduler: DecodeScheduler, inbox: Inbox, handoff: DecodeHandoff, *, metrics: WorkerMetrics, clock: Clock
    ) -> None:
        self._scheduler = scheduler
        self._inbox = inbox
        self._handoff = handoff
        self._metrics = metrics
        self._clock = clock
        self._serial = itertools.count()
        self._streams: dict[str, _Stream] = {}
        self._failure: PdserveError | None = None

    async def run(
        self,
        request: Request,
        candidates: tuple[WorkerRef, ...],
        give: Give,
        grammar: CompiledGrammar | None = None,
        choice: PrefillChoice = PrefillChoice.WORKER,
    ) -> None:
        """Calls `give` with every output, in order, while the engine reports it. Returns after the output that says `done`, or
        raises a PdserveError. Cancelling it aborts the request."""
        async with self._opened(request, candidates, give, grammar, choice) as stream:
            try:
                async with asyncio.timeout(request.timeout_s):
                    error = await stream.ended
            except TimeoutError:
                raise DeadlineExceeded(_TOO_LONG) from None
            if error is not None:
                raise error

    async def generate(
        self,
        request: Request,
        candidates: tuple[WorkerRef, ...],
        grammar: CompiledGrammar | None = None,
        choice: PrefillChoice = PrefillChoice.WORKER,
    ) -> AsyncGenerator[Output, None]:
        """Ends after the output that says `done`, or raises a PdserveError. Closing it aborts the request."""
        deadline_s = self._clock.monotonic_s() + request.timeout_s
        news: asyncio.Queue[Output | None] = asyncio.Queue()  # None: it has ended, and the stream knows how
        async with self._opened(request, candidates, news.put_nowait, grammar, choice) as stream:
            stream.ended.add_done_callback(lambda _: news.put_nowait(None))
            while True:
                try:
                    async with asyncio.timeout(max(0.0, deadline_s - self._clock.monotonic_s())):
                        output = await news.get()
                except TimeoutError:
                    raise DeadlineExceeded(_TOO_LONG) from None
                if output is not None:
                    yield output
                    if output.done:
                        return
                elif (error := stream.ended.result()) is not None:
                    raise error

    @asynccontextmanager
    async def _opened(
        self,
        request: Request,
        candidates: tuple[WorkerRef, ...],
        give: Give,
        grammar: CompiledGrammar | None,
        choice: PrefillChoice,
    ) -> AsyncIterator[_Stream]:
        if self._failure is not None:
            raise self._failure
        # A client may use a request id twice at a time; the engine must not.
        key = f"{request.request_id}#{next(self._serial)}"
        stream = self._streams[key] = _Stream(request, give, self._clock.monotonic_s())
        self._inbox.post(self._scheduler.submit, replace(request, request_id=key), candidates, grammar, choice)
        try:
            yield stream
        finally:
            del self._streams[key]
            # In this order: the engine forgets the request first, so that what the hand-off reports later finds nothing.
            self._inbox.post(self._scheduler.abort, key)
            if stream.fetch is not None:
                stream.fetch.cancel()

    def deliver(self, events: list[Event]) -> None:
        """What the engine reports, in order."""
        for event in events:
            match event:
                case Output():
                    self._tell(event)
                case Failed():
                    stream = self._streams.get(event.request_id)
                    if stream is not None:
                        stream.end(event.error)
                case RemotePrefillWanted():
                    self._start_fetch(event)

    def engine_failed(self, error: PdserveError | None = None) -> None:
        """Nothing can be generated any more: all streams end, and those to come; in `error`, if what happened has a name."""
        self._failure = error or EngineFailure("the decode engine failed")
        for stream in self._streams.values():
            stream.end(self._failure)

    # -- within --------------------------------------------------------------------------------------------------------

    def _tell(self, output: Output) -> None:
        stream = self._streams.get(output.request_id)
        if stream is None or stream.ended.done():
            return
        if output.started is not None:
            stream.first_token_s = self._clock.monotonic_s()
            stream.queue_s = output.started.timings.decode_queue_s
            _trace_start(stream.span, stream.started_s, stream.first_token_s, output.started)
            self._observe_start(output.started)
        for chunk in output.chunks:
            if chunk.finish_reason is not None:
                self._metrics.finished(chunk.finish_reason.value)
        if output.done:
            # Before the last tokens leave: whoever has them may cancel at once, and the request was served all the same.
            stream.span.child("generate", start_s=stream.first_token_s).end()
            self._account(stream)
        stream.give(output)
        if output.done:
            stream.end()

    def _start_fetch(self, wanted: RemotePrefillWanted) -> None:
        key = wanted.request.request_id
        stream = self._streams.get(key)
        if stream is None:
            # Behind the abort that is on its way already; nobody was told of these blocks.
            self._inbox.post(self._scheduler.drained, wanted.blocks)
            return
        scheduler = self._scheduler

        def report(outcome: RemotePrefill | PdserveError) -> None:
            if isinstance(outcome, RemotePrefill):
                self._inbox.post(scheduler.remote_ready, key, outcome)
                return
            if key not in self._streams:
                return  # it has ended, and the engine has heard so
            _log.warning("remote prefill failed", error=outcome.code, reason=outcome.message, prefill=wanted.prefill.worker_id)
            self._metrics.transferred("", outcome.code)
            self._inbox.post(scheduler.remote_failed, key, outcome)

        with entered(stream.span):
            stream.fetch = self._handoff.fetch(replace(wanted, request=stream.request), report)

    def _account(self, stream: _Stream) -> None:
        request, ended_s = stream.request, self._clock.monotonic_s()
        self._metrics.decode_s.observe(ended_s - stream.first_token_s)
        self._metrics.inference_s.observe(max(0.0, ended_s - stream.started_s - stream.queue_s))
        _log.info(
            "served",
            request_id=request.request_id,
            prompt_tokens=request.num_prompt_tokens,
            choices=request.num_choices,
            ttft_ms=round((stream.first_token_s - stream.started_s) * 1e3, 1),
            total_ms=round((ended_s - stream.started_s) * 1e3, 1),
        )

    def _observe_start(self, started: Started) -> None:
        timings, metrics = started.timings, self._metrics
        metrics.queue_s.observe(timings.decode_queue_s)
        if timings.transport:
            metrics.transfer_exposed_s.observe(timings.transfer_exposed_s)
            metrics.transfer_hidden_s.observe(timings.transfer_hidden_s)
            metrics.transfer_bytes.inc(timings.transfer_bytes)
            metrics.transfer_blocks.inc(timings.transfer_blocks)
            metrics.transferred(timings.transport, "ok")
        else:
            metrics.prefill_s.observe(timings.prefill_s)


def _trace_start(span: Span, received_s: float, first_token_s: float, started: Started) -> None:
    """The way to the first token, as far as it was here; what a prefill worker did is told by itself, and by the hand-off."""
    if not span:
        return
    timings = started.timings
    span.event("first token")
    begun_s = received_s + timings.decode_queue_s
    span.child("queue", start_s=received_s).end(at_s=begun_s)
    if not timings.transport:
        computing_s = begun_s + timings.prefill_queue_s
        prefill = span.child("prefill", start_s=computing_s, attributes={"pdserve.cached_tokens": started.cached_tokens})
        prefill.end(at_s=min(computing_s + timings.prefill_s, first_token_s))
