"""The decode worker: an engine thread, the hand-off and the streams (`decode_worker.streams`), behind the gRPC service `Decode`.

start: model, over memory that others can map -> engine -> hand-off -> engine thread -> ports
stop: drain -> engine thread -> links, memory

`retire` stops without giving up engine and memory: what was shared stays mapped by peers until their links end, so it is fit for
another worker only when every transfer into it was closed by its writer, which is what quarantine tells.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from contextlib import aclosing
from typing import Any

import grpc.aio

from common.clock import SystemClock
from common.codec import choice_from_wire, request_from_wire, worker_ref_from_wire
from common.engine.core import Core
from common.engine.grammar import CompiledGrammar
from common.engine.host import Arrivals, WorkerHost
from common.engine.loop import EngineLoop
from common.errors import DeadlineExceeded, PdserveError, RankLost
from common.logs import bound, get_logger
from common.rpc import cancel_and_wait, typed_errors
from common.tracing.span import within
from common.tracing.tracer import header_of
from common.types import PrefillChoice, Request, WorkerRef
from common.wire import worker_pb2, worker_pb2_grpc
from common.worker import LoadedModel, WorkerSpec
from decode_worker.events import Event, Output
from decode_worker.feeds import Feed, Feeds, event_to_wire
from decode_worker.handoff import DecodeHandoff, PoolMemory, region_of_pool
from decode_worker.prefill_peer import GrpcPrefillPeer
from decode_worker.scheduler import DecodeScheduler
from decode_worker.speculation.choice import GuessedModel, create_speculator
from decode_worker.step_ahead import overlaps
from decode_worker.streams import DecodeStreams
from decode_worker.swapper import create_swapper

_log = get_logger(__name__)

_SETTLE_S = 5.0  # for hand-offs that are being given up when the worker retires


class DecodeWorker(worker_pb2_grpc.DecodeServicer):
    """A `common.worker.WorkerServer`."""

    def __init__(self, spec: WorkerSpec, kept: LoadedModel | None = None) -> None:
        self._spec = spec
        self._kept = kept
        self._clock = SystemClock()

    async def start(self) -> WorkerRef:
        spec = self._spec
        self._host = host = WorkerHost(
            spec,
            scheduler=lambda: self._scheduler,
            leases=lambda: self._handoff.leases(),
            arrivals=lambda: Arrivals(self._handoff.num_blocks_arriving, self._handoff.link_uses()),
        )
        self._loaded = await host.load(PoolMemory(touch=True, rank_program="decode_worker.rank_process"), self._kept)
        engine = self._loaded.engine
        region = region_of_pool(self._loaded.memory, engine.device_memory, engine.pool.layout.block_bytes)
        speculator = await asyncio.to_thread(
            create_speculator,
            spec.model.decode.speculation,
            self._clock,
            GuessedModel(spec.model_path, engine, spec.model.engine, spec.threads),
        )
        swapper = self._swapper = await asyncio.to_thread(create_swapper, spec.model.decode, engine)
        self._scheduler = scheduler = DecodeScheduler(
            spec.model.decode,
            engine.layout,
            engine.blocks,
            self._clock,
            speculator,
            None if swapper is None else swapper.swapping,
        )
        overlap = overlaps(spec.model.decode.overlap, engine.device.type, threads=spec.threads, stages=engine.degree[1])
        core = Core(
            engine,
            scheduler,
            host.metrics,
            self._clock,
            on_step=host.step_done,
            before_step=None if swapper is None else swapper.move,
            ahead=scheduler if overlap else None,
        )
        self._loop = loop = EngineLoop[Event](core, name="engine")
        self._handoff = DecodeHandoff(
            spec,
            engine.layout,
            region,
            self._clock,
            connect=lambda ref: GrpcPrefillPeer(ref, spec.cluster_token),
            on_drained=lambda blocks: loop.post(scheduler.drained, blocks),
            ranks=() if engine.group is None else engine.group.beside,
        )
        await self._handoff.start()
        self._feeds = Feeds()
        await self._feeds.start(spec.host)
        self._streams = DecodeStreams(scheduler, loop, self._handoff, metrics=host.metrics, clock=self._clock)
        host.report(scheduler, loop, step_tokens=spec.model.decode.step_tokens, local_prefill=spec.model.decode.local_prefill)
        loop.start(deliver=self._deliver, on_failure=self._engine_failed)
        host.watch_ranks(loop)
        host.watch_engine(loop.sign, self._engine_failed)
        ref = await host.serve(lambda server: worker_pb2_grpc.add_DecodeServicer_to_server(self, server), ("pdserve.v1.Decode",))
        _log.info("ready", worker=ref.worker_id, incarnation=ref.incarnation, address=ref.address)
        return ref

    async def wait_failed(self) -> str:
        return await self._host.wait_failed()

    async def stop(self, grace_s: float) -> None:
        await self._host.stop(grace_s)
        await self._feeds.close()
        await self._loop.stop()
        await self._handoff.close()
        await self._host.close_engine()
        self._loaded.close()

    async def retire(self) -> LoadedModel:
        await self._host.stop(0.0)
        await self._feeds.close()
        await self._handoff.settle(_SETTLE_S)
        await self._loop.stop()  # it has applied what was posted: ended requests are gone, and their blocks are back
        await self._handoff.close()
        self._host.check_fit_for_another()
        if self._swapper is not None:
            await asyncio.to_thread(self._swapper.close)
        return self._loaded

    def _engine_failed(self, error: BaseException) -> None:
        _log.error("the engine failed", error=repr(error))
        self._host.fail(error)
        self._streams.engine_failed(error if isinstance(error, RankLost) else None)

    # -- the Decode service --------------------------------------------------------------------------------------------

    async def Generate(
        self,
        request: worker_pb2.GenerateRequest,
        context: grpc.aio.ServicerContext[worker_pb2.GenerateRequest, worker_pb2.GenerateEvent],
    ) -> None:
        async with typed_errors(context):
            work = request_from_wire(request.request)
            span = self._host.tracer.serve("decode", header_of(context.invocation_metadata()))
            with self._host.in_flight.entered(), bound(request_id=work.request_id), within(span):
                self._host.check(work)
                grammar = await self._host.compile_grammar(work)
                feed = self._feeds.find(request.feed)
                try:
                    # The work has a deadline of its own; this one is for a client that does not take what it asked for.
                    async with asyncio.timeout(work.timeout_s):
                        if feed is None:
                            await self._over_the_stream(request, work, grammar, context)
                        else:
                            await self._over_a_lane(feed, request, work, grammar, context)
                except TimeoutError as error:
                    self._host.metrics.failed(DeadlineExceeded.__name__)
                    raise DeadlineExceeded("the request took longer than its time") from error
                except PdserveError as error:
                    self._host.metrics.failed(error.code)
                    raise

    async def OpenFeed(
        self,
        request: worker_pb2.OpenFeedRequest,
        context: grpc.aio.ServicerContext[worker_pb2.OpenFeedRequest, worker_pb2.OpenFeedReply],
    ) -> worker_pb2.OpenFeedReply:
        return self._feeds.offer()

    async def _over_the_stream(
        self,
        request: worker_pb2.GenerateRequest,
        work: Request,
        grammar: CompiledGrammar | None,
        context: grpc.aio.ServicerContext[worker_pb2.GenerateRequest, worker_pb2.GenerateEvent],
    ) -> None:
        # Writes instead of yielding: a cancelled stream must end its coroutine now, not when a generator is collected.
        candidates, choice = _where_to_prefill(request)
        async with aclosing(self._streams.generate(work, candidates, grammar, choice)) as outputs:
            async for output in outputs:
                if output.done:
                    self._host.count_served()
                await context.write(event_to_wire(output))

    async def _over_a_lane(
        self,
        feed: Feed,
        request: worker_pb2.GenerateRequest,
        work: Request,
        grammar: CompiledGrammar | None,
        context: grpc.aio.ServicerContext[worker_pb2.GenerateRequest, worker_pb2.GenerateEvent],
    ) -> None:
        candidates, choice = _where_to_prefill(request)
        with feed.lane(request.lane, work.first_choice if work.num_choices == 1 else None) as lane:

            def give(output: Output) -> None:
                if output.done:
                    self._host.count_served()
                lane.give(output)

            try:
                await _unless(lane.lost, self._streams.run(work, candidates, give, grammar, choice))
            except PdserveError:
                await context.write(worker_pb2.GenerateEvent(given=lane.given))
                raise
            await context.write(worker_pb2.GenerateEvent(given=lane.given))

    def _deliver(self, events: list[Event]) -> None:
        self._streams.deliver(events)
        self._feeds.flush()

    async def ProbeLinks(
        self,
        request: worker_pb2.ProbeLinksRequest,
        context: grpc.aio.ServicerContext[worker_pb2.ProbeLinksRequest, worker_pb2.ProbeLinksReply],
    ) -> worker_pb2.ProbeLinksReply:
        async with typed_errors(context):
            refs = [worker_ref_from_wire(ref) for ref in request.prefill]
            return worker_pb2.ProbeLinksReply(peers=[await self._handoff.probe(ref) for ref in refs])


def _where_to_prefill(request: worker_pb2.GenerateRequest) -> tuple[tuple[WorkerRef, ...], PrefillChoice]:
    return tuple(worker_ref_from_wire(ref) for ref in request.prefill), choice_from_wire(request.choice)


async def _unless(lost: asyncio.Future[PdserveError], run: Coroutine[None, None, None]) -> None:
    """Runs it to its end, unless the feed is lost first."""
    running = asyncio.create_task(run, name="generate")
    try:
        either: set[asyncio.Future[Any]] = {running, lost}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not running.done():
            raise lost.result()
    finally:
        if not running.done():
            await cancel_and_wait(running)
    running.result()
