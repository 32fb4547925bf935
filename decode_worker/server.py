"""The decode worker: a gRPC server that turns each `Decode.Generate` stream into work for the engine and, if need be, a hand-off.

The life of a Generate:
  1. the request is checked and submitted to the engine's thread, with the prefill workers that the router proposes
  2. the scheduler reserves blocks and decides where the prompt is prefilled
  3. remote: the hand-off has it computed elsewhere and verifies what arrives (`handoff.fetch`); the engine hears of it
  4. the engine generates; its outputs are sent on as they come, one message per step at most
However the stream ends, the request is gone from the engine and the hand-off when it has: an unfinished one is aborted.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace

import grpc.aio

from common.clock import SystemClock
from common.codec import chunk_to_wire, request_from_wire, started_to_wire, worker_ref_from_wire
from common.engine.core import Core
from common.engine.host import WorkerHost
from common.engine.loop import EngineLoop
from common.errors import DeadlineExceeded, EngineFailure, PdserveError, StartupError
from common.logs import bind_request, get_logger
from common.rpc import typed_errors
from common.types import Request, WorkerRef
from common.wire import worker_pb2, worker_pb2_grpc
from common.worker import WorkerSpec
from decode_worker.handoff import DecodeHandoff, PoolMemory
from decode_worker.scheduler import DecodeScheduler, Event, Failed, Output, RemotePrefill, RemotePrefillWanted

_log = get_logger(__name__)


class _Stream:
    """One Generate in progress: what the engine has for it, and the hand-off that runs for it."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.news: asyncio.Queue[Output | PdserveError] = asyncio.Queue()
        self.fetch: asyncio.Task[None] | None = None


class DecodeWorker(worker_pb2_grpc.DecodeServicer):
    """A `common.worker.WorkerServer`."""

    def __init__(self, spec: WorkerSpec) -> None:
        self._spec = spec
        self._clock = SystemClock()
        self._serial = itertools.count()
        self._streams: dict[str, _Stream] = {}

    async def start(self) -> WorkerRef:
        self._host = WorkerHost(
            self._spec,
            scheduler=lambda: self._scheduler,
            leases=lambda: self._handoff.num_open,
        )
        memory = PoolMemory()
        engine = await self._host.load(memory.allocate)
        if memory.region is None:
            raise StartupError("the engine did not take the shared memory for its pool")
        self._scheduler = DecodeScheduler(self._spec.model.decode, engine.layout, engine.blocks, self._clock)
        core = Core(engine, self._scheduler, self._host.metrics, self._clock)
        self._loop = EngineLoop[Event](core, name="engine", deliver=self._deliver, on_failure=self._engine_failed)
        self._handoff = DecodeHandoff(self._spec, engine, memory.region, self._clock, self._drained)
        await self._handoff.start()
        self._loop.start()
        ref = await self._host.serve(
            lambda server: worker_pb2_grpc.add_DecodeServicer_to_server(self, server), ("pdserve.v1.Decode",)
        )
        _log.info("ready", worker=ref.worker_id, incarnation=ref.incarnation, address=ref.address)
        return ref

    async def wait_failed(self) -> None:
        await self._host.wait_failed()

    async def stop(self, grace_s: float) -> None:
        await self._host.stop(grace_s)
        await self._loop.stop()
        await self._handoff.close()

    # -- the Decode service --------------------------------------------------------------------------------------------

    async def Generate(
        self,
        request: worker_pb2.GenerateRequest,
        context: grpc.aio.ServicerContext[worker_pb2.GenerateRequest, worker_pb2.GenerateEvent],
    ) -> None:
        # Writes instead of yielding: a cancelled stream must end this coroutine now, not when a generator is collected.
        async with typed_errors(context):
            work = request_from_wire(request.request)
            candidates = tuple(worker_ref_from_wire(ref) for ref in request.prefill)
            with self._host.in_flight.entered(), bind_request(work.request_id):
                self._host.check(work)
                try:
                    async with asyncio.timeout(work.timeout_s), aclosing(self._generate(work, candidates)) as outputs:
                        async for output in outputs:
                            await context.write(
                                worker_pb2.GenerateEvent(
                                    started=started_to_wire(output.started) if output.started is not None else None,
                                    chunks=[chunk_to_wire(chunk) for chunk in output.chunks],
                                )
                            )
                except TimeoutError as error:
                    raise DeadlineExceeded("the request took longer than its time") from error
                except PdserveError as error:
                    self._host.metrics.failed(error.code)
                    raise

    async def _generate(self, request: Request, candidates: tuple[WorkerRef, ...]) -> AsyncGenerator[Output, None]:
        if self._host.failed:
            raise EngineFailure("the decode engine failed")
        # A client may use a request id twice at a time; the engine must not.
        key = f"{request.request_id}#{next(self._serial)}"
        stream = self._streams[key] = _Stream(request)
        self._loop.post(self._scheduler.submit, replace(request, request_id=key), candidates)
        started_s = first_token_s = self._clock.monotonic_s()
        try:
            while True:
                news = await stream.news.get()  # bounded by the request's time
                if isinstance(news, PdserveError):
                    raise news
                if news.started is not None:
                    first_token_s = self._clock.monotonic_s()
                    self._observe_start(news)
                for chunk in news.chunks:
                    if chunk.finish_reason is not None:
                        self._host.metrics.finished(chunk.finish_reason.value)
                if news.done:
                    # Before the last tokens leave: whoever has them may cancel at once, and the request was served all the same.
                    self._account(request, first_token_s - started_s, self._clock.monotonic_s() - started_s)
                yield news
                if news.done:
                    break
        finally:
            del self._streams[key]
            # In this order: the engine forgets the request first, so that what the hand-off reports later finds nothing.
            self._loop.post(self._scheduler.abort, key)
            if stream.fetch is not None:
                stream.fetch.cancel()

    def _account(self, request: Request, ttft_s: float, total_s: float) -> None:
        self._host.count_served()
        self._host.metrics.decode_s.observe(total_s - ttft_s)
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
        timings, metrics = news.started.timings, self._host.metrics
        metrics.queue_s.observe(timings.decode_queue_s)
        if timings.transport:
            metrics.transfer_exposed_s.observe(timings.transfer_exposed_s)
            metrics.transfer_bytes.inc(timings.transfer_bytes)
            metrics.transfer_blocks.inc(timings.transfer_blocks)
            metrics.transferred(timings.transport, "ok")
        else:
            metrics.prefill_s.observe(timings.prefill_s)

    # -- the hand-off --------------------------------------------------------------------------------------------------

    def _start_fetch(self, wanted: RemotePrefillWanted) -> None:
        key = wanted.request.request_id
        stream = self._streams.get(key)
        if stream is None:
            self._drained(wanted.blocks)  # behind the abort that is on its way already; nobody was told of these blocks
            return
        scheduler = self._scheduler

        def report(outcome: RemotePrefill | PdserveError) -> None:
            if isinstance(outcome, RemotePrefill):
                self._loop.post(scheduler.remote_ready, key, outcome)
                return
            _log.warning("remote prefill failed", error=outcome.code, reason=outcome.message, prefill=wanted.prefill.worker_id)
            self._host.metrics.transferred("", outcome.code)
            self._loop.post(scheduler.remote_failed, key, outcome)

        stream.fetch = self._handoff.fetch(replace(wanted, request=stream.request), report)

    def _drained(self, blocks: tuple[int, ...]) -> None:
        self._loop.post(self._scheduler.drained, blocks)

    # -- from the engine's thread, on the asyncio loop -----------------------------------------------------------------

    def _deliver(self, events: list[Event]) -> None:
        for event in events:
            match event:
                case Output():
                    self._tell(event.request_id, event)
                case Failed():
                    self._tell(event.request_id, event.error)
                case RemotePrefillWanted():
                    self._start_fetch(event)

    def _tell(self, key: str, news: Output | PdserveError) -> None:
        stream = self._streams.get(key)
        if stream is not None:
            stream.news.put_nowait(news)

    def _engine_failed(self, error: BaseException) -> None:
        _log.error("the engine failed", error=repr(error))
        self._host.fail(error)
        for stream in self._streams.values():
            stream.news.put_nowait(EngineFailure("the decode engine failed"))
