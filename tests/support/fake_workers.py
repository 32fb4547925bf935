"""Workers without engine and process: each is a real gRPC server in this process that does what the test tells it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from common.errors import ClusterError, PdserveError, WorkerLost
from common.rpc import RpcServer, start_server
from common.types import WorkerRef
from common.wire.worker_pb2 import DrainReply, DrainRequest, InfoReply, InfoRequest, WorkerPace
from common.wire.worker_pb2_grpc import WorkerServicer, add_WorkerServicer_to_server
from common.worker import WorkerSpec
from deploy.activity import Activity
from deploy.worker_host import WorkerProcess


class FakeWorker(WorkerServicer):
    def __init__(self, spec: WorkerSpec, host: FakeHost) -> None:
        self.spec = spec
        self.may_drain = asyncio.Event()
        self.answers = asyncio.Event()
        self.answers.set()
        self.drains = 0
        self.requests = 0
        self.pace = WorkerPace()
        self.alive = True
        self._host = host
        self._dead: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._server: RpcServer | None = None

    def die(self, reason: str) -> None:
        self.alive = False
        if not self._dead.done():
            self._dead.set_result(reason)

    # -- the process, as the manager holds it --------------------------------------------------------------------------

    async def start(self) -> WorkerRef:
        spec = self.spec
        gate = self._host.gate_of(spec.worker_id)
        waiting = asyncio.ensure_future(gate.wait())
        await asyncio.wait({waiting, self._dead}, return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        error = self._host.start_errors.get(spec.worker_id)
        if error is not None:
            raise error
        if not self.alive:
            raise WorkerLost("the process ended")
        self._server = await start_server(
            lambda server: add_WorkerServicer_to_server(self, server),
            host="127.0.0.1",
            token=spec.cluster_token,
            services=("pdserve.v1.Worker",),
        )
        return WorkerRef(spec.worker_id, spec.incarnation, self._server.address)

    async def ended(self) -> str:
        return await asyncio.shield(self._dead)

    async def activity(self, span_s: float) -> Activity:
        """As the kernel would say: whoever is to answer works, however long the machine lets it wait."""
        return Activity.WORKING if self.answers.is_set() else Activity.STOPPED

    async def become(self, spec: WorkerSpec) -> WorkerRef:
        self._host.journal.append(("become", spec.worker_id, spec.incarnation))
        error = self._host.flip_errors.get(spec.worker_id)
        if error is not None:
            raise error
        server, self._server = self._server, None
        if server is not None:
            await server.stop(0)
        self.spec = spec
        self.may_drain.clear()
        return await self.start()

    async def stop(self, grace_s: float) -> None:
        self._host.journal.append(("stop", self.spec.worker_id, self.spec.incarnation))

    async def kill(self) -> None:
        await self._host.may_bury.wait()
        if self._host.undying:
            self._host.undying -= 1
            raise ClusterError("the process does not die")
        self.die("killed")
        self.answers.set()
        if self._server is not None:
            server, self._server = self._server, None
            await server.stop(0)
        if ("gone", self.spec.worker_id, self.spec.incarnation) not in self._host.journal:
            self._host.journal.append(("gone", self.spec.worker_id, self.spec.incarnation))

    # -- the Worker service --------------------------------------------------------------------------------------------

    async def Info(self, request: InfoRequest, context: Any) -> InfoReply:
        await self.answers.wait()
        spec = self.spec
        return InfoReply(
            worker_id=spec.worker_id,
            incarnation=spec.incarnation,
            pid=4711,
            state="ready",
            blocks_total=8,
            blocks_free=8,
            max_model_tokens=99,
            requests_running=self.requests,
            pace=self.pace,
        )

    async def Drain(self, request: DrainRequest, context: Any) -> DrainReply:
        self.drains += 1
        self._host.journal.append(("drain", self.spec.worker_id, self.spec.incarnation))
        if not self._host.drains_at_once:
            async with asyncio.timeout(request.timeout_s):
                await self.may_drain.wait()
        return DrainReply(drained=True)


@dataclass
class FakeHost:
    """A `deploy.worker_host.WorkerHost`; remembers every worker and what was done to it, in order."""

    workers: list[FakeWorker] = field(default_factory=list)
    journal: list[tuple[str, str, int]] = field(default_factory=list)
    start_errors: dict[str, PdserveError] = field(default_factory=dict)
    may_bury: asyncio.Event = field(default_factory=asyncio.Event)  # set unless a test wants burials to take long
    gates: dict[str, asyncio.Event] = field(default_factory=dict)  # a worker starts only when its gate is open
    flip_errors: dict[str, PdserveError] = field(default_factory=dict)  # by the id that the process would have
    drains_at_once: bool = False
    expected: list[list[int]] = field(default_factory=list)

    undying: int = 0  # so many kills come to nothing
    may_launch: asyncio.Event = field(default_factory=asyncio.Event)  # there is room

    def __post_init__(self) -> None:
        self.may_bury.set()
        self.may_launch.set()

    async def launch(self, spec: WorkerSpec) -> WorkerProcess:
        await self.may_launch.wait()
        alive = [one for one in self.workers if one.alive and one.spec.worker_id == spec.worker_id]
        if alive:
            raise AssertionError(f"{spec.worker_id} was launched while its incarnation {alive[0].spec.incarnation} lives")
        worker = FakeWorker(spec, self)
        self.workers.append(worker)
        self.journal.append(("launch", spec.worker_id, spec.incarnation))
        return worker

    async def expect(self, ranks: Sequence[int]) -> None:
        self.expected.append(sorted(ranks))

    def gate_of(self, worker_id: str) -> asyncio.Event:
        if worker_id not in self.gates:
            self.gates[worker_id] = asyncio.Event()
            self.gates[worker_id].set()
        return self.gates[worker_id]

    def latest(self, worker_id: str) -> FakeWorker:
        return [one for one in self.workers if one.spec.worker_id == worker_id][-1]
