"""Real worker processes, proxies between them, an oracle, and the four questions that are asked after every fault.

    client --- Generate ---> [proxy] ---> decode worker --- Handshake, Run, Release ---> [proxy] ---> prefill worker
                                               ^------------- KV over shm, nixl, tcp ---- [tcp proxy] ---+

1. Did each request end, in time, in the tokens of the oracle, or in one typed error after a prefix of them?
2. Is every block of every survivor free, no lease open, nothing running?
3. Was a transfer used although its content was touched?
4. Do later requests get the right tokens, by the same way?
"""

from __future__ import annotations

import asyncio
import enum
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc.aio

from common.codec import chunk_from_wire, request_to_wire, worker_ref_to_wire
from common.errors import PdserveError, RequestCancelled
from common.rpc import connect, error_from_rpc
from common.types import Request, Role, SamplingParams, WorkerRef
from common.wire import worker_pb2, worker_pb2_grpc
from support.chaos.oracle import Oracle
from support.chaos.processes import TOKEN, Times, WorkerProcess, make_order
from support.chaos.rpc_fault_proxy import RpcFaultProxy
from support.chaos.tcp_fault_proxy import TcpFaultProxy
from support.chaos.zygote import Zygote

QUIET_TIMEOUT_S = 12.0


class Ending(enum.Enum):
    EXACT = "exact"
    WRONG = "WRONG"  # other tokens than the oracle's, however it ended
    HUNG = "HUNG"  # no end within the deadline
    ERROR = "error"  # typed
    UNTYPED = "UNTYPED"  # something else was raised


@dataclass(frozen=True)
class Outcome:
    request_id: str
    ending: Ending
    error: str = ""
    prefill_worker: str = ""
    seconds: float = 0.0
    detail: str = ""

    @property
    def label(self) -> str:
        return self.error if self.ending is Ending.ERROR else self.ending.value


UNTYPED_CODES = frozenset({"EngineFailure", "PdserveError"})
"""What `error_from_rpc` makes of a status that nobody meant."""


class Rig:
    """One decode worker, some prefill workers, proxies. Made by `running_rig`."""

    def __init__(
        self,
        zygote: Zygote,
        oracle: Oracle,
        model_path: Path,
        *,
        transport: str,
        local_prefill: str,
        num_prefill: int,
        times: Times,
        proxied: bool,
        prefill_block_tokens: int | None = None,
        fences: bool = True,
        sabotage: bool = False,
    ) -> None:
        self.transport = transport
        self.local_prefill = local_prefill
        self.fences = fences
        self.times = times
        self.decode: WorkerProcess
        self.prefill: list[WorkerProcess] = []
        self.front: RpcFaultProxy | None = None
        self.between: list[RpcFaultProxy] = []
        self.data = TcpFaultProxy()
        self._zygote, self.oracle, self._model_path = zygote, oracle, model_path
        self._num_prefill = num_prefill
        self._proxied = proxied
        self._prefill_block_tokens = prefill_block_tokens
        self._sabotage = sabotage
        self._incarnation = itertools.count(1)
        self._serial = itertools.count()
        self._channels: dict[str, grpc.aio.Channel] = {}

    # -- processes -----------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        if self._proxied:
            await self.data.start()
        self.decode = self._fork(Role.DECODE, 0)
        self.prefill = [self._fork(Role.PREFILL, index) for index in range(self._num_prefill)]
        await asyncio.gather(*(worker.wait_ready() for worker in (self.decode, *self.prefill)))
        await self._place_proxies()

    async def respawn(self, worker: WorkerProcess) -> WorkerProcess:
        """The next incarnation in place of a worker, which is killed if it lives."""
        await worker.kill()
        if worker is self.decode:
            self.decode = fresh = self._fork(Role.DECODE, 0)
        else:
            index = self.prefill.index(worker)
            self.prefill[index] = fresh = self._fork(Role.PREFILL, index)
        await fresh.wait_ready()
        await self._place_proxies()
        return fresh

    async def close(self) -> None:
        await self._remove_proxies()
        for channel in self._channels.values():
            await channel.close(None)
        for worker in (*self.prefill, self.decode):
            await worker.end()
        await self.data.close()

    def _fork(self, role: Role, index: int) -> WorkerProcess:
        order = make_order(
            role,
            index,
            next(self._incarnation),
            self._model_path,
            transports=(self.transport,),
            local_prefill=self.local_prefill,
            times=self.times,
            prefill_block_tokens=self._prefill_block_tokens,
            fences=self.fences,
            sabotage=self._sabotage,
        )
        return WorkerProcess(self._zygote, order)

    async def _place_proxies(self) -> None:
        if not self._proxied:
            return
        await self._remove_proxies()
        self.front = RpcFaultProxy(self.decode.ready.address)
        await self.front.start()
        for worker in self.prefill:
            proxy = RpcFaultProxy(worker.ready.address, rewrite=self._through_data_proxy)
            await proxy.start()
            self.between.append(proxy)

    async def _remove_proxies(self) -> None:
        between, self.between = self.between, []
        for proxy in (*between, *([self.front] if self.front is not None else [])):
            await proxy.close()
        self.front = None

    def _through_data_proxy(self, method: str, request: bytes) -> bytes:
        if method != "Handshake":
            return request
        message = worker_pb2.HandshakeRequest.FromString(request)
        for offer in message.offers:
            if offer.kind == "tcp":
                self.data.target, offer.address = offer.address, self.data.address
        return message.SerializeToString()

    @property
    def prefill_refs(self) -> list[WorkerRef]:
        refs = [worker.ready for worker in self.prefill]
        if not self._proxied:
            return refs
        return [WorkerRef(ref.worker_id, ref.incarnation, proxy.address) for ref, proxy in zip(refs, self.between, strict=True)]

    # -- requests ------------------------------------------------------------------------------------------------------

    def request(
        self, prompt: Sequence[int], *, max_tokens: int = 6, timeout_s: float = 10.0, seed: int = 0, salt: str | None = None
    ) -> Request:
        """`seed` 0 is greedy. A salt of its own keeps it from finding earlier ones' KV in the prefix cache."""
        serial = next(self._serial)
        return Request(
            request_id=f"r{serial}",
            model="tiny",
            prompt_token_ids=tuple(prompt),
            sampling=SamplingParams(max_tokens=max_tokens, seed=seed, temperature=0.8 if seed else 0.0),
            num_choices=1,
            cache_salt=f"s{serial}" if salt is None else salt,
            timeout_s=timeout_s,
        )

    async def ask(
        self,
        request: Request,
        *,
        started: asyncio.Event | None = None,
        deadline_s: float = 20.0,
        refs: Sequence[WorkerRef] | None = None,
    ) -> Outcome:
        """Sends a request and judges what becomes of it. `started` is set by its first token."""
        expected = await self.oracle.tokens(request)
        said: list[int] = []
        prefill_worker = ""
        finished = False
        clock = asyncio.get_running_loop().time
        begun_s = clock()
        address = self.front.address if self.front is not None else self.decode.ready.address
        message = worker_pb2.GenerateRequest(
            request=request_to_wire(request),
            prefill=[worker_ref_to_wire(ref) for ref in (self.prefill_refs if refs is None else refs)],
        )
        call = worker_pb2_grpc.DecodeStub(self._channel(address)).Generate(message, timeout=request.timeout_s + 1.0)

        def outcome(ending: Ending, error: str = "", detail: str = "") -> Outcome:
            if tuple(said) != expected[: len(said)] or (ending is Ending.EXACT and tuple(said) != expected):
                ending, detail = Ending.WRONG, f"said {said}, expected {list(expected)}; {error} {detail}"
            return Outcome(request.request_id, ending, error, prefill_worker, clock() - begun_s, detail)

        try:
            async with asyncio.timeout(deadline_s):
                async for event in call:
                    if event.HasField("started"):
                        prefill_worker = event.started.timings.prefill_worker
                    for chunk in map(chunk_from_wire, event.chunks):
                        said.extend(chunk.token_ids)
                        finished = finished or chunk.finish_reason is not None
                    if said and started is not None:
                        started.set()
        except TimeoutError:
            call.cancel()
            return outcome(Ending.HUNG, detail=f"no end within {deadline_s} s")
        except asyncio.CancelledError:
            call.cancel()
            if asyncio.current_task() is not None and asyncio.current_task().cancelling():  # type: ignore[union-attr]
                raise
            return outcome(Ending.ERROR, RequestCancelled.__name__)
        except grpc.aio.AioRpcError as raw:
            error = error_from_rpc(raw)
            typed = isinstance(error, PdserveError) and error.code not in UNTYPED_CODES
            return outcome(Ending.ERROR if typed else Ending.UNTYPED, error.code, error.message)
        if not finished:
            return outcome(Ending.UNTYPED, "NoEnd", "the stream ended without a finish reason")
        return outcome(Ending.EXACT)

    def _channel(self, address: str) -> grpc.aio.Channel:
        if address not in self._channels:
            self._channels[address] = connect(address, TOKEN)
        return self._channels[address]

    # -- the other questions -------------------------------------------------------------------------------------------

    async def info(self, worker: WorkerProcess, timeout_s: float = 3.0) -> worker_pb2.InfoReply:
        stub = worker_pb2_grpc.WorkerStub(self._channel(worker.ready.address))
        reply: worker_pb2.InfoReply = await stub.Info(worker_pb2.InfoRequest(), timeout=timeout_s)
        return reply

    async def leaks(self, *workers: WorkerProcess, timeout_s: float = QUIET_TIMEOUT_S) -> list[str]:
        """What the workers (all that live, if none are named) still hold after a while; empty is as it should be."""
        asked = workers or tuple(worker for worker in (self.decode, *self.prefill) if worker.alive)
        clock = asyncio.get_running_loop().time
        deadline_s = clock() + timeout_s
        while True:
            left = []
            for worker in asked:
                try:
                    left += _held(await self.info(worker))
                except grpc.aio.AioRpcError as error:
                    left.append(f"{worker.order['worker_id']}: {error.code().name}")
            if not left or clock() > deadline_s:
                return left
            await asyncio.sleep(0.02)

    async def footprint(self) -> dict[tuple[int, str], int]:
        """Descriptors, tasks and threads of every worker that lives, by its pid."""
        found = {}
        for worker in (self.decode, *self.prefill):
            report = await worker.tell(do="footprint")
            found.update({(worker.pid, name): count for name, count in report.items()})
        return found

    async def transfers(self) -> tuple[list[dict[str, Any]], dict[str, str]]:
        """What the decode worker says of its transfers since last time, and what was planted in both workers (by nonce)."""
        report = await self.decode.tell(do="report")
        planted = dict(report["injected"])
        for worker in self.prefill:
            planted.update(dict((await worker.tell(do="report"))["injected"]))
        return report["transfers"], planted


def _held(info: worker_pb2.InfoReply) -> list[str]:
    found = []
    if info.blocks_free != info.blocks_total:
        found.append(f"{info.blocks_total - info.blocks_free} blocks")
    for name in ("blocks_in_transfer", "leases_open", "requests_running", "requests_waiting"):
        if getattr(info, name):
            found.append(f"{getattr(info, name)} {name}")
    return [f"{info.worker_id}: {', '.join(found)}"] if found else []


@asynccontextmanager
async def running_rig(
    zygote: Zygote,
    oracle: Oracle,
    model_path: Path,
    *,
    transport: str,
    local_prefill: str,
    num_prefill: int = 1,
    times: Times | None = None,
    proxied: bool = False,
    prefill_block_tokens: int | None = None,
    fences: bool = True,
    sabotage: bool = False,
) -> AsyncIterator[Rig]:
    """`prefill_block_tokens`: None = as the decode worker's, else KV is cut anew on its way. `fences`: whether the decode worker
    can shut out a writer by itself, as it can over every link that two workers have on one host without a GPU."""
    rig = Rig(
        zygote,
        oracle,
        model_path,
        transport=transport,
        local_prefill=local_prefill,
        num_prefill=num_prefill,
        times=times or Times(),
        proxied=proxied,
        prefill_block_tokens=prefill_block_tokens,
        fences=fences,
        sabotage=sabotage,
    )
    await rig.start()
    try:
        yield rig
    finally:
        await rig.close()


async def until(condition: Callable[[], Awaitable[bool]], timeout_s: float) -> bool:
    clock = asyncio.get_running_loop().time
    deadline_s = clock() + timeout_s
    while not await condition():
        if clock() > deadline_s:
            return False
        await asyncio.sleep(0.02)
    return True
