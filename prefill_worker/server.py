"""The prefill worker: a gRPC server that turns `Prefill.Run` into chunks for the engine and blocks for the hand-off.

The life of a Run:
  1. the ticket is checked and its transfer opened; nothing is computed for a ticket that is not good
  2. the prompt is submitted to the engine's thread
  3. after every chunk, blocks that became final are pushed while the engine goes on
  4. when the last block was written, the seal goes back as the reply
However it ends, the engine stops computing this prompt within one step, and its blocks are given back when nobody reads them.
"""

from __future__ import annotations

import asyncio
import itertools
from dataclasses import replace

import grpc.aio

from common.clock import SystemClock
from common.codec import request_from_wire, sampled_token_to_wire, ticket_from_wire, token_logprob_to_wire
from common.engine.core import Core
from common.engine.host import WorkerHost
from common.engine.loop import EngineLoop
from common.errors import DeadlineExceeded, EngineFailure, PdserveError, TicketRefused
from common.logs import bind_request, get_logger
from common.rpc import typed_errors
from common.types import Request, Ticket, WorkerRef
from common.wire import worker_pb2, worker_pb2_grpc
from common.worker import WorkerSpec
from prefill_worker.handoff import PrefillHandoff, Push
from prefill_worker.scheduler import ChunkComputed, Event, PrefillScheduler, PromptComputed

_log = get_logger(__name__)


class PrefillWorker(worker_pb2_grpc.PrefillServicer):
    """A `common.worker.WorkerServer`."""

    def __init__(self, spec: WorkerSpec) -> None:
        self._spec = spec
        self._clock = SystemClock()
        self._serial = itertools.count()
        self._news: dict[str, asyncio.Queue[Event | PdserveError]] = {}
        self._closing: set[asyncio.Task[None]] = set()

    async def start(self) -> WorkerRef:
        self._host = WorkerHost(
            self._spec,
            scheduler=lambda: self._scheduler,
            leases=lambda: self._handoff.num_open,
        )
        engine = await self._host.load(None)
        self._scheduler = PrefillScheduler(self._spec.model.prefill, engine.layout, engine.blocks, self._clock)
        core = Core(engine, self._scheduler, self._host.metrics, self._clock)
        self._handoff = PrefillHandoff(self._spec, engine, self._clock)
        self._loop = EngineLoop[Event](core, name="engine", deliver=self._deliver, on_failure=self._engine_failed)
        self._loop.start()
        ref = await self._host.serve(
            lambda server: worker_pb2_grpc.add_PrefillServicer_to_server(self, server), ("pdserve.v1.Prefill",)
        )
        _log.info("ready", worker=ref.worker_id, incarnation=ref.incarnation, address=ref.address)
        return ref

    async def wait_failed(self) -> None:
        await self._host.wait_failed()

    async def stop(self, grace_s: float) -> None:
        await self._host.stop(grace_s)
        await self._handoff.close()
        if self._closing:
            await asyncio.wait(self._closing)
        await self._loop.stop()

    # -- the Prefill service -------------------------------------------------------------------------------------------

    async def Handshake(
        self,
        request: worker_pb2.HandshakeRequest,
        context: grpc.aio.ServicerContext[worker_pb2.HandshakeRequest, worker_pb2.HandshakeReply],
    ) -> worker_pb2.HandshakeReply:
        async with typed_errors(context):
            return await self._handoff.handshake(request)

    async def Run(
        self,
        request: worker_pb2.PrefillRequest,
        context: grpc.aio.ServicerContext[worker_pb2.PrefillRequest, worker_pb2.PrefillReply],
    ) -> worker_pb2.PrefillReply:
        async with typed_errors(context):
            work, ticket = request_from_wire(request.request), ticket_from_wire(request.ticket)
            with self._host.in_flight.entered(), bind_request(work.request_id):
                try:
                    async with asyncio.timeout(min(work.timeout_s, ticket.ttl_s)):
                        reply = await self._run(work, ticket)
                except TimeoutError as error:
                    raise DeadlineExceeded("the prompt was not computed in time") from error
                except PdserveError as error:
                    self._host.metrics.failed(error.code)
                    raise
                self._host.count_served()
                return reply

    async def Release(
        self,
        request: worker_pb2.ReleaseRequest,
        context: grpc.aio.ServicerContext[worker_pb2.ReleaseRequest, worker_pb2.ReleaseReply],
    ) -> worker_pb2.ReleaseReply:
        async with typed_errors(context):
            await self._handoff.release(list(request.nonces))
            return worker_pb2.ReleaseReply()

    # -- one Run -------------------------------------------------------------------------------------------------------

    async def _run(self, request: Request, ticket: Ticket) -> worker_pb2.PrefillReply:
        self._host.check(request)
        if ticket.request_id != request.request_id or ticket.num_tokens != request.num_prompt_tokens:
            raise TicketRefused("the ticket is for another prompt", param="request_id")
        push = self._handoff.begin(ticket)
        # A client may use a request id twice at a time; the engine must not.
        key = f"{request.request_id}#{next(self._serial)}"
        news: asyncio.Queue[Event | PdserveError] = asyncio.Queue()
        self._news[key] = news
        self._loop.post(self._scheduler.submit, replace(request, request_id=key))
        try:
            computed = await self._push_while_computing(news, push)
            computed_s = self._clock.monotonic_s()
            account = await push.finish()
        finally:
            del self._news[key]
            self._loop.post(self._scheduler.stop, key)
            self._spawn_give_back(push, key)
        metrics = self._host.metrics
        metrics.queue_s.observe(computed.queue_s)
        metrics.prefill_s.observe(computed.prefill_s)
        metrics.transfer_bytes.inc(account.bytes)
        metrics.transfer_blocks.inc(len(account.digests))
        metrics.finished("handed_off")
        return worker_pb2.PrefillReply(
            nonce=ticket.nonce,
            num_tokens=request.num_prompt_tokens,
            digests=[worker_pb2.BlockDigest(logical_block=logical, digest=digest) for logical, digest in account.digests.items()],
            first_tokens=[sampled_token_to_wire(token) for token in computed.first_tokens],
            prompt_logprobs=[token_logprob_to_wire(item) for item in computed.prompt_logprobs],
            cached_tokens=computed.cached_tokens,
            queue_s=computed.queue_s,
            prefill_s=computed.prefill_s,
            tail_s=self._clock.monotonic_s() - computed_s,
            transfer_s=account.transfer_s,
        )

    async def _push_while_computing(self, news: asyncio.Queue[Event | PdserveError], push: Push) -> PromptComputed:
        while True:
            event = await news.get()  # bounded by the ticket's time
            match event:
                case ChunkComputed():
                    await push.computed(event.num_tokens, event.blocks)
                case PromptComputed():
                    return event
                case PdserveError():
                    raise event

    def _spawn_give_back(self, push: Push, key: str) -> None:
        async def give_back() -> None:
            await push.abort()
            self._loop.post(self._scheduler.release, key)

        task = asyncio.get_running_loop().create_task(give_back(), name="give-back")
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    # -- from the engine's thread, on the asyncio loop -----------------------------------------------------------------

    def _deliver(self, events: list[Event]) -> None:
        for event in events:
            news = self._news.get(event.request_id)
            if news is not None:
                news.put_nowait(event)

    def _engine_failed(self, error: BaseException) -> None:
        _log.error("the engine failed", error=repr(error))
        self._host.fail(error)
        for news in self._news.values():
            news.put_nowait(EngineFailure("the prefill engine failed"))
