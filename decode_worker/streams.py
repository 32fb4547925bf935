"""Every `Decode.Generate` of a worker, without the gRPC around it: work for the engine and, if need be, a hand-off.

The life of a stream:
  1. the request is submitted to the engine, with the prefill workers that the router proposes
  2. the scheduler reserves blocks and decides where the prompt is prefilled
  3. remote: the hand-off has it computed elsewhere and verifies what arrives (`handoff.fetch`); the engine hears of it
  4. the engine generates; its outputs are given out as they come, one per step at most
However the stream ends, the request is gone from the engine and the hand-off when it has: an unfinished one is aborted.

It knows neither sockets nor threads: the engine is what takes posts and reports events, whatever runs it.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator
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


class _Stream:
    """One Generate in progress: what the engine has for it, and the hand-off that runs for it."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.news: asyncio.Queue[Output | PdserveError] = asyncio.Queue()
        self.fetch: asyncio.Task[None] | None = None
        self.span = current_span()


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

    async def generate(
        self,
        request: Request,
        candidates: tuple[WorkerRef, ...],
        grammar: CompiledGrammar | None = None,
        choice: PrefillChoice = PrefillChoice.WORKER,
    ) -> AsyncGenerator[Output, None]:
        """Ends after the output that says `done`, or raises a PdserveError. Closing it aborts the request."""
        if self._failure is not None:
            raise self._failure
        deadline_s = self._clock.monotonic_s() + request.timeout_s
        # A client may use a request id twice at a time; the engine must not.
        key = f"{request.request_id}#{next(self._serial)}"
        stream = self._streams[key] = _Stream(request)
        self._inbox.post(self._scheduler.submit, replace(request, request_id=key), candidates, grammar, choice)
        started_s = first_token_s = self._clock.monotonic_s()
        queue_s = 0.0
        try:
            while True:
                news = await self._next(stream, deadline_s)
                if news.started is not None:
                    first_token_s = self._clock.monotonic_s()
                    queue_s = news.started.timings.decode_queue_s
                    _trace_start(stream.span, started_s, first_token_s, news.started)
                    self._observe_start(news)
                for chunk in news.chunks:
                    if chunk.finish_reason is not None:
                        self._metrics.finished(chunk.finish_reason.value)
                if news.done:
                    # Before the last tokens leave: whoever has them may cancel at once, and the request was served all the same.
                    stream.span.child("generate", start_s=first_token_s).end()
                    self._account(request, queue_s, first_token_s - started_s, self._clock.monotonic_s() - started_s)
                yield news
                if news.done:
                    break
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
                    self._tell(event.request_id, event)
                case Failed():
                    self._tell(event.request_id, event.error)
                case RemotePrefillWanted():
                    self._start_fetch(event)

    def engine_failed(self, error: PdserveError | None = None) -> None:
        """Nothing can be generated any more: all streams end, and those to come; in `error`, if what happened has a name."""
        self._failure = error or EngineFailure("the decode engine failed")
        for stream in self._streams.values():
            stream.news.put_nowait(self._failure)

    # -- within --------------------------------------------------------------------------------------------------------

    async def _next(self, stream: _Stream, deadline_s: float) -> Output:
        try:
            async with asyncio.timeout(max(0.0, deadline_s - self._clock.monotonic_s())):
                news = await stream.news.get()
        except TimeoutError as error:
            raise DeadlineExceeded("the request took longer than its time") from error
        if isinstance(news, PdserveError):
            raise news
        return news

    def _tell(self, key: str, news: Output | PdserveError) -> None:
        stream = self._streams.get(key)
        if stream is not None:
            stream.news.put_nowait(news)

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

    def _account(self, request: Request, queue_s: float, ttft_s: float, total_s: float) -> None:
        self._metrics.decode_s.observe(total_s - ttft_s)
        self._metrics.inference_s.observe(max(0.0, total_s - queue_s))
        _log.info(
            "served",
            prompt_tokens=request.num_prompt_tokens,
            choices=request.num_choices,
            ttft_ms=round(ttft_s * 1e3, 1),
            total_ms=round(total_s * 1e3, 1),
        )

    def _observe_start(self, news: Output) -> None:
        if news.started is None:
            return
        timings, metrics = news.started.timings, self._metrics
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
