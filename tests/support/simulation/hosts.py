"""The processes of a simulated cluster: real control code, wired up as the real servers wire it.

    PrefillProcess   PrefillRuns, PrefillHandoff, KVSender, PrefillScheduler        behind Handshake, Run, Release
    DecodeProcess    DecodeStreams, DecodeHandoff, KVReceiver, DecodeScheduler      behind Generate
    RouterProcess    Dispatcher, Registry

Each has a loop, a clock and, if it is a worker, a watched memory and a stand-in engine. A process that is started again is a new
object; nothing of the old one is left but what others remember.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from contextlib import aclosing
from random import Random
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry

from common.blocks import num_blocks, root_hash
from common.codec import chunk_to_wire, request_from_wire, started_to_wire, worker_ref_from_wire
from common.config import Config, DecodeConfig, ModelConfig, PrefillConfig, RouterConfig, TransferConfig
from common.errors import DeadlineExceeded
from common.metrics import RouterMetrics, WorkerMetrics
from common.types import Request, Role, WorkerRef
from common.wire import worker_pb2
from common.worker import WorkerSpec
from decode_worker.handoff import DecodeHandoff
from decode_worker.prefill_peer import GrpcPrefillPeer
from decode_worker.scheduler import DecodeScheduler
from decode_worker.streams import DecodeStreams
from kvtransfer.receiver import KVReceiver
from kvtransfer.region import BlockRegion
from kvtransfer.sender import KVSender
from prefill_worker.handoff import PrefillHandoff
from prefill_worker.runs import PrefillRuns
from prefill_worker.scheduler import PrefillScheduler
from router.dispatch import Dispatcher
from router.placement.membership import WorkerView
from router.registry import Registry
from support.simulation import rpc
from support.simulation.data_links import SIM_TRANSPORTS
from support.simulation.engine import StandInEngine
from support.simulation.guesses import HalfRight
from support.simulation.network import Point
from support.simulation.pool import Memory, WatchedBlocks
from support.simulation.pool_cut import PoolCut
from support.simulation.sender_links import SimSenderLink
from support.simulation.virtual_loop import ProcessLoop

if TYPE_CHECKING:
    from support.simulation.world import World

MODEL, TOKEN = "stand-in", "simulated-cluster-token"
STEP_S, TOKEN_S = 1e-3, 50e-6


@functools.cache
def _worker_metrics() -> WorkerMetrics:
    def never() -> Any:
        raise AssertionError("nobody scrapes a simulation")

    return WorkerMetrics(CollectorRegistry(), model=MODEL, role="simulated", read=never)


@functools.cache
def _router_metrics() -> RouterMetrics:
    return RouterMetrics(CollectorRegistry())


@functools.cache
def _model(prefill: tuple[int, int, int], decode: tuple[int, int, str]) -> ModelConfig:
    chunk_tokens, prefill_running, layer_groups = prefill
    step_tokens, decode_running, local_prefill = decode
    return ModelConfig(
        name=MODEL,
        source=MODEL,
        prefill=PrefillConfig(chunk_tokens=chunk_tokens, max_running=prefill_running, layer_groups=layer_groups),
        decode=DecodeConfig(
            step_tokens=step_tokens,
            max_running=decode_running,
            local_prefill=local_prefill,  # type: ignore[arg-type]
            local_prefill_tokens=4,
            watermark_blocks=0,
        ),
    )


@functools.cache
def _transfer(transports: tuple[str, ...], ticket_ttl_s: float) -> TransferConfig:
    return TransferConfig(
        transports=transports,  # type: ignore[arg-type]
        ticket_ttl_s=ticket_ttl_s,
        handshake_timeout_s=2.0,
        release_timeout_s=0.5,
    )


@functools.cache
def _router_config() -> tuple[RouterConfig, Config]:
    model = ModelConfig(name=MODEL, source=MODEL)
    return RouterConfig(connect_timeout_s=5.0, migration_wait_s=3.0), Config(models=(model,))


@functools.cache
def _root(fingerprint: bytes, salt: str) -> bytes:
    return root_hash(fingerprint, salt)


class ProcessClock:
    def __init__(self, loop: ProcessLoop) -> None:
        self._loop = loop

    def monotonic_s(self) -> float:
        return self._loop.time()

    def wall_s(self) -> float:
        return self._loop.time()


class Host:
    """A process: what there is in every one."""

    is_worker = False

    def __init__(self, world: World, name: str, incarnation: int, address: str, data_address: str) -> None:
        self.world = world
        self.network = world.network
        self.name = name
        self.data_address = data_address
        self.ref = WorkerRef(name, incarnation, address)
        random = world.random
        self.loop = ProcessLoop(
            world.time,
            f"{name}#{incarnation}",
            world.next_number(),
            offset_s=random.random() * 1e5,
            rate=1.0 + (random.random() - 0.5) * 2e-3,
        )
        self.loop.host = self
        self.clock = ProcessClock(self.loop)
        self.sender_links: dict[SimSenderLink, None] = {}
        self.num_pauses = 0

    async def start(self) -> None:
        """Called once, on its own loop."""


class WorkerProcess(Host):
    is_worker = True
    role: Role
    cut: PoolCut
    handoff: Any
    engine: StandInEngine
    scheduler: Any
    server: rpc.SimServer

    async def stop(self) -> None:
        """As the real server does, when nothing is in progress."""

    def engine_failed(self) -> None:
        """What the control code is told when the engine's thread has raised."""

    def _build_pool(self, cut: PoolCut, size_tokens: int) -> WatchedBlocks:
        """Of so many tokens, and the null block."""
        self.cut = cut
        num_usable = num_blocks(size_tokens, cut.block_tokens)
        self.memory = Memory(self.loop.name, 1 + num_usable, cut.block_bytes, self.network.complain)
        blocks = WatchedBlocks(
            1 + num_usable,
            cut.block_tokens,
            functools.partial(_root, cut.layout.fingerprint),
            prefix_cache=self.world.scenario.prefix_cache,
            first_block=1,
        )
        blocks.memory = self.memory
        self.memory.blocks = self.blocks = blocks
        return blocks

    def _spec(self) -> WorkerSpec:
        scenario = self.world.scenario
        return WorkerSpec(
            worker_id=self.name,
            incarnation=self.ref.incarnation,
            role=self.role,
            model=_model(
                (scenario.chunk_tokens, scenario.max_running, scenario.layer_groups),
                (scenario.step_tokens, scenario.max_running, scenario.local_prefill),
            ),
            model_path=MODEL,
            transfer=_transfer(scenario.transports, scenario.ticket_ttl_s),
            cluster_token=TOKEN,
        )

    def _engine(self, deliver: Callable[[list[Any]], None], *, watched: bool) -> StandInEngine:
        return StandInEngine(
            self.loop,
            self.scheduler,
            self.memory,
            self.cut,
            deliver,
            self.world.random.random,
            step_s=STEP_S,
            token_s=TOKEN_S,
            layer_groups=self.world.scenario.layer_groups if watched else 1,
            watched=watched,
            overlap=self.world.scenario.overlap and not watched,
        )

    def leftovers(self) -> list[str]:
        blocks = self.blocks
        held = {
            "blocks in use": blocks.num_used,
            "blocks in transfer": blocks.num_in_transfer,
            "open transfers": self.handoff.leases().open,
            "prompts or generations in the scheduler": int(not self.scheduler.is_idle),
            "calls being handled": len(self.server.handlers),
            "posts that the engine has not seen": int(not self.engine.idle),
        }
        return [f"{self.loop.name}: {count} {what}" for what, count in held.items() if count]

    def residue(self) -> list[str]:
        """What is left on the loop when `leftovers` are gone: tasks that nobody ends, timers that nobody needs."""
        found = [f"{self.loop.name}: task {task.get_name()} does not end" for task in self.loop.pending_tasks()]
        if self.loop.num_timers:
            found.append(f"{self.loop.name}: {self.loop.num_timers} timers are left")
        self.blocks.check_integrity()
        return found


async def _no_grammar(request: Request) -> None:
    """Simulated clients ask for none."""


class PrefillProcess(WorkerProcess):
    role = Role.PREFILL

    async def start(self) -> None:
        scenario = self.world.scenario
        spec = self._spec()
        blocks = self._build_pool(scenario.prefill_cut, scenario.prefill_tokens)
        layout = self.cut.layout
        region = BlockRegion(self.memory.view, layout.block_bytes, self.memory.num_blocks)
        self.scheduler = PrefillScheduler(spec.model.prefill, layout, blocks, self.clock)
        self.handoff = PrefillHandoff(
            spec, layout, region, self.clock, make_sender=functools.partial(KVSender, transports=SIM_TRANSPORTS)
        )
        self.engine = self._engine(lambda events: self.runs.deliver(events), watched=True)
        self.runs = PrefillRuns(
            self.scheduler,
            self.engine,
            self.handoff,
            check=lambda _: None,
            compile_grammar=_no_grammar,
            metrics=_worker_metrics(),
            clock=self.clock,
        )
        unary = {"Handshake": self._handshake, "Run": self._run, "Release": self._release}
        self.server = rpc.SimServer(self.network, self.loop, unary, {})
        self.network.servers[self.ref.address] = self.server

    def open_for(self, ref: WorkerRef) -> set[bytes]:
        """Nonces of the transfers to that incarnation of a decode worker that may still read their sources."""
        return {
            nonce
            for nonce, outgoing in self.handoff._sender._outgoing.items()
            if (outgoing.ticket.decode_worker_id, outgoing.ticket.decode_incarnation) == (ref.worker_id, ref.incarnation)
        }

    async def _handshake(self, data: bytes) -> bytes:
        self.network.point(Point.HANDSHAKE, self.loop)
        reply = await self.handoff.handshake(worker_pb2.HandshakeRequest.FromString(data))
        return reply.SerializeToString()

    async def _run(self, data: bytes) -> bytes:
        self.network.point(Point.RUN_ARRIVED, self.loop)
        message = worker_pb2.PrefillRequest.FromString(data)
        reply = await self.runs.run(message)
        ticket = message.ticket
        self.network.witness.sealed.add((ticket.nonce, f"{ticket.decode_worker_id}#{ticket.decode_incarnation}"))
        self.network.point(Point.RUN_ANSWERED, self.loop)
        return reply.SerializeToString()

    async def stop(self) -> None:
        await self.handoff.close()
        await self.runs.wait_given_back()

    def engine_failed(self) -> None:
        self.runs.engine_failed()

    async def _release(self, data: bytes) -> bytes:
        self.network.point(Point.RELEASE_ARRIVED, self.loop)
        await self.handoff.release(list(worker_pb2.ReleaseRequest.FromString(data).nonces))
        return worker_pb2.ReleaseReply().SerializeToString()


class DecodeProcess(WorkerProcess):
    role = Role.DECODE

    async def start(self) -> None:
        scenario = self.world.scenario
        spec = self._spec()
        blocks = self._build_pool(scenario.decode_cut, scenario.decode_tokens)
        layout = self.cut.layout
        region = BlockRegion(self.memory.view, layout.block_bytes, self.memory.num_blocks)
        self.guesses: HalfRight | None = None
        if scenario.guesses:
            random = Random(f"{scenario.seed} {self.loop.name}")
            self.guesses = HalfRight(scenario.requests, random, lambda text: self.network.complain(f"{self.loop.name}: {text}"))
        self.scheduler = DecodeScheduler(spec.model.decode, layout, blocks, self.clock, self.guesses)
        self.engine = self._engine(lambda events: self.streams.deliver(events), watched=False)
        options: dict[str, Any] = {"credit_bytes": 0} if scenario.narrow_window else {}
        self.handoff = DecodeHandoff(
            spec,
            layout,
            region,
            self.clock,
            connect=lambda ref: GrpcPrefillPeer(ref, TOKEN),
            on_drained=lambda drained: self.engine.post(self.scheduler.drained, drained),
            make_receiver=functools.partial(KVReceiver, transports=SIM_TRANSPORTS, **options),
        )
        await self.handoff.start()
        self.streams = DecodeStreams(self.scheduler, self.engine, self.handoff, metrics=_worker_metrics(), clock=self.clock)
        self.server = rpc.SimServer(self.network, self.loop, {}, {"Generate": self._generate})
        self.network.servers[self.ref.address] = self.server

    def leftovers(self) -> list[str]:
        kept = 0 if self.guesses is None else self.guesses.num_alive
        return [*super().leftovers(), *([f"{self.loop.name}: {kept} choices that are guessed for"] if kept else [])]

    async def stop(self) -> None:
        await self.handoff.close()

    def engine_failed(self) -> None:
        self.streams.engine_failed()

    async def _generate(self, data: bytes, send: rpc.Send) -> None:
        message = worker_pb2.GenerateRequest.FromString(data)
        work = request_from_wire(message.request)
        candidates = tuple(worker_ref_from_wire(ref) for ref in message.prefill)
        try:
            async with asyncio.timeout(work.timeout_s), aclosing(self.streams.generate(work, candidates)) as outputs:
                async for output in outputs:
                    event = worker_pb2.GenerateEvent(
                        started=started_to_wire(output.started) if output.started is not None else None,
                        chunks=[chunk_to_wire(chunk) for chunk in output.chunks],
                    )
                    send(event.SerializeToString())
                    self.network.point(Point.TOKENS_SENT, self.loop)
        except TimeoutError as error:
            raise DeadlineExceeded("the request took longer than its time") from error


class RouterProcess(Host):
    @property
    def view(self) -> tuple[WorkerView, ...]:
        return self.registry.view.workers if hasattr(self, "registry") else ()

    async def start(self) -> None:
        config, whole = _router_config()
        self.registry = Registry(whole, manager_address="", cluster_token=TOKEN, clock=self.clock)
        self.dispatcher = Dispatcher(config, self.registry, cluster_token=TOKEN, clock=self.clock, metrics=_router_metrics())
