"""The prefill worker: an engine thread, the hand-off and the runs (`prefill_worker.runs`), behind the gRPC service `Prefill`.

start: model -> engine -> hand-off -> engine thread -> ports       stop: drain -> links -> engine thread, memory

`retire` stops without giving up engine and memory. Its pool lies in shared memory: decode workers on this host fetch from it, and
the next worker in this process may be one of them.
"""

from __future__ import annotations

import grpc.aio

from common.clock import SystemClock
from common.engine.core import Core
from common.engine.host import WorkerHost
from common.engine.line_core import LineCore
from common.engine.loop import EngineLoop
from common.errors import PdserveError, RankLost
from common.logs import bound, get_logger
from common.rpc import typed_errors
from common.tracing.span import within
from common.tracing.tracer import header_of
from common.types import WorkerRef
from common.wire import worker_pb2, worker_pb2_grpc
from common.worker import LoadedModel, WorkerSpec
from prefill_worker.handoff import PoolMemory, PrefillHandoff, region_of_pool
from prefill_worker.runs import PrefillRuns
from prefill_worker.scheduler import Event, PrefillScheduler

_log = get_logger(__name__)


class PrefillWorker(worker_pb2_grpc.PrefillServicer):
    """A `common.worker.WorkerServer`."""

    def __init__(self, spec: WorkerSpec, kept: LoadedModel | None = None) -> None:
        self._spec = spec
        self._kept = kept
        self._clock = SystemClock()

    async def start(self) -> WorkerRef:
        self._host = host = WorkerHost(
            self._spec,
            scheduler=lambda: self._scheduler,
            leases=lambda: self._handoff.leases(),
        )
        self._loaded = await host.load(PoolMemory(touch=False, rank_program="prefill_worker.rank_process"), self._kept)
        engine = self._loaded.engine
        config = self._spec.model.prefill.on(engine.device.type)
        self._scheduler = PrefillScheduler(config, engine.layout, engine.blocks, self._clock)
        core = (Core if engine.degree[1] == 1 else LineCore)(
            engine,
            self._scheduler,
            host.metrics,
            self._clock,
            watcher=self._scheduler,
            layer_groups=config.layer_groups,
            on_step=host.step_done,
        )
        self._loop = EngineLoop[Event](core, name="engine")
        self._handoff = PrefillHandoff(
            self._spec,
            engine.layout,
            region_of_pool(self._loaded.memory, engine.device_memory, engine.pool.layout.block_bytes),
            self._clock,
            ranks=() if engine.group is None else engine.group.beside,
        )
        self._handoff.prepare()
        self._runs = PrefillRuns(
            self._scheduler,
            self._loop,
            self._handoff,
            check=host.check,
            compile_grammar=host.compile_grammar,
            metrics=host.metrics,
            clock=self._clock,
        )
        host.report(self._scheduler, self._loop, step_tokens=max(config.chunk_tokens, config.shared_tokens))
        self._loop.start(deliver=self._runs.deliver, on_failure=self._engine_failed)
        host.watch_ranks(self._loop)
        host.watch_engine(self._loop.sign, self._engine_failed)
        ref = await host.serve(
            lambda server: worker_pb2_grpc.add_PrefillServicer_to_server(self, server), ("pdserve.v1.Prefill",)
        )
        _log.info("ready", worker=ref.worker_id, incarnation=ref.incarnation, address=ref.address)
        return ref

    async def wait_failed(self) -> str:
        return await self._host.wait_failed()

    async def stop(self, grace_s: float) -> None:
        await self._host.stop(grace_s)
        await self._handoff.close()
        await self._runs.wait_given_back()
        await self._loop.stop()
        await self._host.close_engine()
        self._loaded.close()

    async def retire(self) -> LoadedModel:
        await self._host.stop(0.0)
        await self._handoff.close()
        await self._runs.wait_given_back()
        await self._loop.stop()
        self._host.check_fit_for_another()
        return self._loaded

    def _engine_failed(self, error: BaseException) -> None:
        _log.error("the engine failed", error=repr(error))
        self._host.fail(error)
        self._runs.engine_failed(error if isinstance(error, RankLost) else None)

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
            span = self._host.tracer.serve("prefill", header_of(context.invocation_metadata()))
            with self._host.in_flight.entered(), bound(request_id=request.request.request_id), within(span):
                try:
                    reply = await self._runs.run(request)
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

    async def PushProbe(
        self,
        request: worker_pb2.PushProbeRequest,
        context: grpc.aio.ServicerContext[worker_pb2.PushProbeRequest, worker_pb2.PushProbeReply],
    ) -> worker_pb2.PushProbeReply:
        async with typed_errors(context):
            return await self._handoff.push_probe(request)
