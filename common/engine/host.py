"""What both kinds of worker are around their engine: built, measured, reachable, drained.

    prepare -> load the model in a thread -> (the worker wires its core) -> serve -> drain -> stop

One per worker process (or several in a test), on one asyncio loop. The host owns the engine, the metrics, the gRPC server with
the `Worker` service, and the count of requests in flight. It does not know what the requests are, nor how KV travels.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import grpc.aio
from prometheus_client import CollectorRegistry

from common.clock import SystemClock
from common.codec import pace_to_wire, report_to_wire, role_to_wire
from common.config import pdserve_home
from common.engine.automata import require
from common.engine.core import SchedulerTotals
from common.engine.cores import Cores, OwnCores, SharedCores
from common.engine.engine import Engine, build_engine
from common.engine.grammar import CompiledGrammar, GrammarCompiler
from common.engine.hang_watch import HangWatch
from common.engine.loop import Inbox
from common.engine.pace import Pace
from common.engine.pool_memory import PoolMemory
from common.engine.reporter import Reporter, ReportingScheduler
from common.errors import EngineFailure, InvalidRequest, ModelNotFound, PdserveError, StartupError, WorkerLost
from common.in_flight import InFlight
from common.load import WorkerShape
from common.logs import get_logger
from common.loopback import is_loopback
from common.metrics import LeaseReadings, WorkerMetrics, WorkerReadings, start_metrics_server
from common.model_store import resolve
from common.rpc import RpcServer, start_server, typed_errors
from common.tokenizer import Tokenizer
from common.tracing.tracer import make_tracer
from common.types import Request, WorkerRef, WorkerState
from common.wire import worker_pb2, worker_pb2_grpc
from common.worker import LoadedModel, WorkerSpec

_log = get_logger(__name__)
_COMPILE_S = (
    5.0  # the router gives a new grammar less, but the model's tokens may be more work than its bytes, and the machine busy
)

MemoryType = TypeVar("MemoryType", bound="Memory")


class Memory(PoolMemory, Protocol):
    """What an engine's KV pool lies in."""

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class LoadedEngine(Generic[MemoryType]):
    """A `common.worker.LoadedModel`: what one worker of a process leaves to the next, whatever its role."""

    engine: Engine
    grammars: GrammarCompiler
    memory: MemoryType

    def close(self) -> None:
        self.engine.close()
        self.memory.close()


class SchedulerReadings(Protocol):
    """What the host reports of a scheduler."""

    totals: SchedulerTotals

    @property
    def num_running(self) -> int: ...

    @property
    def num_waiting(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Arrivals:
    """What a decode worker says of the KV that others send to it."""

    blocks_arriving: int = 0
    links: tuple[worker_pb2.LinkUse, ...] = ()


class WorkerHost(worker_pb2_grpc.WorkerServicer):
    def __init__(
        self,
        spec: WorkerSpec,
        *,
        scheduler: Callable[[], SchedulerReadings],
        leases: Callable[[], LeaseReadings],
        arrivals: Callable[[], Arrivals] = Arrivals,
    ) -> None:
        """The callables give the worker's live state; they are called only after `load`: `arrivals` on the loop, the others from
        any thread."""
        self.spec = spec
        self._arrivals = arrivals
        self._started_s = 0.0  # wall clock
        self.in_flight = InFlight()
        self.registry = CollectorRegistry()
        self.metrics = WorkerMetrics(self.registry, model=spec.model.name, role=spec.role.value, read=self._read)
        self.tracer = make_tracer(
            spec.tracing, service=f"pdserve-{spec.role.value}", instance=spec.worker_id, clock=SystemClock()
        )
        self._scheduler, self._leases = scheduler, leases
        self._served = 0
        self._rpc: RpcServer | None = None
        self._metrics_address = ""
        self._stop_metrics: Callable[[], None] | None = None
        self._failure: asyncio.Future[BaseException] = asyncio.get_running_loop().create_future()
        self._engine: Engine | None = None
        self._reporter: Reporter | None = None
        self._pace: Pace | None = None
        self._grammars: GrammarCompiler | None = None
        self._compiling = ThreadPoolExecutor(2, thread_name_prefix="compile grammar")
        self._not_serving: asyncio.Task[None] | None = None
        self._hang_watch: HangWatch | None = None

    @property
    def engine(self) -> Engine:
        if self._engine is None:
            raise EngineFailure("the engine is not loaded yet")
        return self._engine

    async def load(self, memory: MemoryType, kept: LoadedModel | None = None) -> LoadedEngine[MemoryType]:
        """Builds the engine in a thread, its pool in `memory`, or takes over what the last worker in this process kept. Raises a
        StartupError."""
        spec = self.spec
        if not is_loopback(spec.host) and not spec.trusted_network:  # every port of a worker is in the clear
            raise StartupError(f"a worker listens on {spec.host} only if the network is trusted", param="host")
        if kept is not None:
            if not isinstance(kept, LoadedEngine) or not isinstance(kept.memory, type(memory)):
                raise StartupError("what the last worker in this process kept is no engine")
            if kept.engine.is_for(spec.engine, spec.parallel):
                self._engine, self._grammars = kept.engine, kept.grammars
                return kept
            await asyncio.to_thread(kept.close)  # the other role has other ranks, or other blocks
        require(spec.engine.grammars)
        path = Path(spec.model_path)
        tokenizer = await asyncio.to_thread(Tokenizer.load, path)

        def build() -> Engine:
            return build_engine(
                path,
                spec.engine,
                threads=spec.threads,
                model_digest=resolve(spec.model_path, home=pdserve_home()).digest(),
                tokenizer_digest=tokenizer.digest,
                memory=memory,
                parallel=spec.parallel,
                cores=_cores_of(spec),
                name=f"{spec.worker_id}#{spec.incarnation}",
                announce=lambda text: _log.warning(text, worker=spec.worker_id),
            )

        self._engine = await asyncio.to_thread(build)
        self._grammars = GrammarCompiler(tokenizer, self._engine.architecture.vocab_size, spec.engine.grammars)
        if spec.engine.grammars == "xgrammar":  # loading it takes seconds, longer than a grammar may take
            await asyncio.to_thread(self._grammars.prepare)
        return LoadedEngine(self._engine, self._grammars, memory)

    def check_fit_for_another(self) -> None:
        """Once everything has been stopped: whether another worker may use this engine. Raises WorkerLost."""
        blocks = self.engine.blocks
        blocks.tell(None)
        if self.failed:
            raise WorkerLost("the engine failed")
        if blocks.num_used or blocks.num_in_transfer:
            raise WorkerLost(f"{blocks.num_used} blocks are still used, {blocks.num_in_transfer} may still be written to")

    def report(self, scheduler: ReportingScheduler, inbox: Inbox, *, step_tokens: int, local_prefill: str = "auto") -> None:
        """Lets routers watch this worker. Called between `load` and `serve`."""
        layout, blocks = self.engine.layout, self.engine.blocks
        shape = WorkerShape(
            block_tokens=layout.block_tokens,
            layout_fingerprint=layout.fingerprint,
            blocks_total=blocks.num_total,
            step_tokens=step_tokens,
            local_prefill=local_prefill,
            prefix_cache=blocks.prefix_cache,
        )
        self._reporter = Reporter(scheduler, blocks, inbox, shape)
        self._pace = Pace(scheduler, SystemClock())

    def step_done(self, tokens: int, pairs: float, seconds: float) -> None:
        """For the engine's core, on its thread."""
        if self._reporter is not None:
            self._reporter.step_done(tokens, pairs, seconds)
        if self._pace is not None:
            self._pace.step_done(seconds)

    async def serve(self, register: Callable[[grpc.aio.Server], None], services: Sequence[str]) -> WorkerRef:
        """Opens the ports; from here on requests come in."""

        def register_all(server: grpc.aio.Server) -> None:
            worker_pb2_grpc.add_WorkerServicer_to_server(self, server)
            register(server)

        self._metrics_address, self._stop_metrics = start_metrics_server(
            self.registry, self.spec.host, cluster_token=self.spec.cluster_token
        )
        self._rpc = await start_server(
            register_all,
            host=self.spec.host,
            token=self.spec.cluster_token,
            services=(*services, "pdserve.v1.Worker"),
        )
        self._started_s = SystemClock().wall_s()
        if self.failed:  # while the ports were being opened
            await self._rpc.set_serving(False)
        return WorkerRef(self.spec.worker_id, self.spec.incarnation, self._rpc.address)

    def check(self, request: Request) -> None:
        """Refuses what this worker cannot hold, before any work starts. The router checked the same from what we reported."""
        if request.model != self.spec.model.name:
            raise ModelNotFound(f"this worker serves {self.spec.model.name!r}", param="model")
        most = self.engine.max_model_tokens
        if request.num_prompt_tokens - request.num_resumed_tokens + request.sampling.max_tokens > most:
            raise InvalidRequest(f"prompt and max_tokens together exceed {most} tokens", param="max_tokens")
        vocab_size, sampling = self.engine.architecture.vocab_size, request.sampling
        biased = tuple(token_id for token_id, _ in sampling.logit_bias)
        named = {
            "prompt_token_ids": request.prompt_token_ids,
            "logit_bias": biased,
            "allowed_token_ids": sampling.allowed_token_ids,
        }
        for param, token_ids in named.items():
            if max(token_ids, default=0) >= vocab_size:
                raise InvalidRequest("a token id is outside the vocabulary", param=param)
        if not sampling.leaves_a_token(vocab_size):
            raise InvalidRequest("all tokens that may come are banned", param="sampling")

    async def compile_grammar(self, request: Request) -> CompiledGrammar | None:
        """The request's grammar over the model's tokens, ready for the engine; None if it has none. Raises InvalidRequest."""
        grammar, compiler = request.sampling.grammar, self._grammars
        if grammar is None:
            return None
        if compiler is None:
            raise EngineFailure("the engine is not loaded yet")
        found = compiler.cached(grammar)
        if found is not None:
            self.metrics.grammar("cached")
            return found
        outcome, started_s = "refused", time.monotonic()
        try:
            # What takes too long ends by its own limits, in a thread that nobody waits for any more.
            async with asyncio.timeout(_COMPILE_S):
                compiled = await asyncio.get_running_loop().run_in_executor(self._compiling, compiler.compile, grammar)
            outcome = "compiled"
            return compiled
        except TimeoutError:
            raise InvalidRequest(f"the grammar takes more than {_COMPILE_S:g} s to compile", param="grammar") from None
        finally:
            self.metrics.grammar(outcome, time.monotonic() - started_s)

    def watch_ranks(self, inbox: Inbox) -> None:
        """Has the engine's thread fail when one of the engine's other processes is lost, also while it has nothing to do."""

        def fail(error: PdserveError) -> None:
            raise error

        if self.engine.group is not None:
            self.engine.group.watch(lambda error: inbox.post(fail, error))

    def watch_engine(
        self, sign: Callable[[], int | None], on_hang: Callable[[PdserveError], None], hang_s: float | None = None
    ) -> None:
        """Has it called once if the engine's thread hangs (`common.engine.hang_watch`), until `stop`. `hang_s`: other than the
        configured time."""
        if self._hang_watch is not None:
            self._hang_watch.close()
        self._hang_watch = HangWatch(sign, self.spec.engine.hang_s if hang_s is None else hang_s, on_hang)

    async def close_engine(self) -> None:
        """After the engine's thread has ended, and also where it never began."""
        if self._engine is not None:
            await asyncio.to_thread(self._engine.close)

    def count_served(self) -> None:
        self._served += 1

    def fail(self, error: BaseException) -> None:
        """The engine raised: nothing can be served any more."""
        self.in_flight.close()
        if self._reporter is not None:
            self._reporter.close()
        if not self._failure.done():
            self._failure.set_result(error)
            if self._rpc is not None:
                self._not_serving = asyncio.get_running_loop().create_task(self._rpc.set_serving(False), name="not serving")

    @property
    def failed(self) -> bool:
        return self._failure.done()

    async def wait_failed(self) -> str:
        """Why the engine can compute no more."""
        error = await asyncio.shield(self._failure)
        return f"{error.code}: {error.message}" if isinstance(error, PdserveError) else type(error).__name__

    async def drain(self, timeout_s: float) -> bool:
        """Lets nobody in any more; whether all were through within the time."""
        self.in_flight.close()
        if self._rpc is not None:
            await self._rpc.set_serving(False)
        return await self.in_flight.wait_idle(timeout_s)

    async def stop(self, grace_s: float) -> None:
        await self.drain(grace_s)
        if self._hang_watch is not None:
            self._hang_watch.close()
        if self._reporter is not None:
            self._reporter.close()
        if self._not_serving is not None:
            await self._not_serving
        if self._rpc is not None:
            await self._rpc.stop(0.0)
        self._compiling.shutdown(wait=False, cancel_futures=True)
        if self._stop_metrics is not None:
            await asyncio.to_thread(self._stop_metrics)
        await self.tracer.close()

    # -- the Worker service --------------------------------------------------------------------------------------------

    async def Info(
        self, request: worker_pb2.InfoRequest, context: grpc.aio.ServicerContext[worker_pb2.InfoRequest, worker_pb2.InfoReply]
    ) -> worker_pb2.InfoReply:
        return self.info()

    async def Drain(
        self, request: worker_pb2.DrainRequest, context: grpc.aio.ServicerContext[worker_pb2.DrainRequest, worker_pb2.DrainReply]
    ) -> worker_pb2.DrainReply:
        return worker_pb2.DrainReply(drained=await self.drain(request.timeout_s))

    async def Watch(
        self,
        request: worker_pb2.WatchLoadRequest,
        context: grpc.aio.ServicerContext[worker_pb2.WatchLoadRequest, worker_pb2.WorkerReport],
    ) -> None:
        async with typed_errors(context):
            if self._reporter is None:
                raise EngineFailure("this worker has no reports")
            async with aclosing(self._reporter.watch(request.interval_s)) as reports:
                async for report in reports:
                    await context.write(report_to_wire(report))

    def info(self) -> worker_pb2.InfoReply:
        spec, engine, blocks, scheduler = self.spec, self.engine, self.engine.blocks, self._scheduler()
        state = WorkerState.FAILED if self.failed else WorkerState.READY if self.in_flight.is_open else WorkerState.DRAINING
        totals, arrivals = scheduler.totals, self._arrivals()
        return worker_pb2.InfoReply(
            worker_id=spec.worker_id,
            incarnation=spec.incarnation,
            role=role_to_wire(spec.role),
            model=spec.model.name,
            pid=os.getpid(),
            state=state.value,
            address=self._rpc.address if self._rpc is not None else "",
            metrics_address=self._metrics_address,
            blocks_total=blocks.num_total,
            blocks_free=blocks.num_free + blocks.num_cached,
            blocks_in_transfer=blocks.num_in_transfer,
            leases_open=self._leases().open,
            requests_running=scheduler.num_running,
            requests_waiting=scheduler.num_waiting,
            max_model_tokens=engine.max_model_tokens,
            requests_served=self._served,
            device=str(engine.device),
            dtype=engine.layout.dtype,
            block_tokens=engine.layout.block_tokens,
            exact=engine.layout.exact,
            layout_fingerprint=engine.layout.fingerprint.hex(),
            tensor_parallel=spec.parallel.tensor_parallel,
            pipeline_parallel=spec.parallel.pipeline_parallel,
            rank_pids=engine.group.pids if engine.group is not None else (),
            started_s=self._started_s,
            blocks_cached=blocks.num_cached,
            blocks_arriving=arrivals.blocks_arriving,
            preemptions=totals.preemptions,
            prefix_queries=totals.prefix_queries,
            prefix_hits=totals.prefix_hits,
            drafted_tokens=totals.drafted_tokens,
            accepted_tokens=totals.accepted_tokens,
            links=arrivals.links,
            pace=None if self._pace is None else pace_to_wire(self._pace.read()),
        )

    def _read(self) -> WorkerReadings:
        blocks, scheduler = self.engine.blocks, self._scheduler()
        totals = scheduler.totals
        return WorkerReadings(
            requests_running=scheduler.num_running,
            requests_waiting=scheduler.num_waiting,
            blocks_total=blocks.num_total,
            blocks_free=blocks.num_free,
            blocks_cached=blocks.num_cached,
            blocks_used=blocks.num_used,
            blocks_in_transfer=blocks.num_in_transfer,
            leases=self._leases(),
            block_tokens=self.engine.layout.block_tokens,
            computed_tokens=totals.computed_tokens,
            generated_tokens=totals.generated_tokens,
            preemptions=totals.preemptions,
            prefix_queries=totals.prefix_queries,
            prefix_hits=totals.prefix_hits,
            drafted_tokens=totals.drafted_tokens,
            accepted_tokens=totals.accepted_tokens,
            steps_by_accepted=tuple(totals.steps_by_accepted),
            guesses_by_author=dict(totals.guesses_by_author),
            ranks=self.spec.parallel.num_ranks,
            work_s={"prefill": totals.prefill_s, "decode": totals.decode_s, "wasted": totals.wasted_s},
            masks=self.engine.runner.mask_readings,
            steps_ahead=totals.steps_ahead,
            waits=dict(totals.waits),
            surplus_rows=totals.surplus_rows,
            swapped_out=totals.swapped_out,
            swapped_in=totals.swapped_in,
        )


def _cores_of(spec: WorkerSpec) -> Cores:
    """Raises StartupError."""
    if spec.cores_file and spec.parallel.num_ranks == 1:
        return SharedCores(Path(spec.cores_file), len(os.sched_getaffinity(0)))
    return OwnCores(spec.threads)
