"""A decode worker is killed after each token of an answer, and the client must not notice.

    client --- HTTP, SSE ---> router (the real one) ---> decode worker 0 | decode worker 1 ---> prefill worker
                                  ^--- Registry/Watch --- a manager that says what the test says

For each way of generating and each number of tokens: the worker that serves stands still as soon as that many tokens of the first
choice are with gRPC, is killed there, and its next incarnation takes its place while the answer goes on. The oracle is one answer
that nobody disturbed, by a worker of its own that prefills locally and caches nothing.
"""

from __future__ import annotations

import asyncio
import json
from collections import defaultdict
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc.aio
import httpx

from common.config import Config
from common.rpc import connect
from common.types import Role
from common.wire import registry_pb2, worker_pb2, worker_pb2_grpc
from router.server import run
from support.chaos.processes import ENGINE, TOKEN, Times, WorkerProcess, make_order
from support.chaos.steps import DecodeStep
from support.chaos.zygote import Zygote
from support.fake_cluster import FakeManager

PROMPT = [(7 * index) % 370 + 3 for index in range(60)]
NUM_TOKENS = 72  # of every answer: more than the last index that is tried
HALT_TIMEOUT_S = 20.0
QUIET_TIMEOUT_S = 10.0
READY_TIMEOUT_S = 15.0
TIMES = Times(lease_s=1.0, ticket_ttl_s=5.0, handshake_timeout_s=2.0, release_timeout_s=0.4)

WAYS: Mapping[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "seeded": {"temperature": 0.9, "top_p": 0.95, "seed": 7},
    "JSON schema": {
        "temperature": 1.2,
        "seed": 6,
        "structured_outputs": {"json": {"type": "array", "items": {"enum": ["the", "of", 12, None]}, "minItems": 60}},
    },
    "n=2": {"temperature": 0.9, "seed": 8, "n": 2},
    "penalties": {"temperature": 0.7, "seed": 9, "presence_penalty": 0.6, "repetition_penalty": 1.2, "logprobs": 2},
}


@dataclass
class Said:
    """What a client of a streamed completion got, by choice."""

    token_ids: dict[int, list[int]] = field(default_factory=lambda: defaultdict(list))
    text: dict[int, str] = field(default_factory=lambda: defaultdict(str))
    logprobs: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))
    finish: dict[int, str] = field(default_factory=dict)
    error: str = ""
    whole: bool = False  # [DONE] came


@dataclass(frozen=True)
class Kill:
    """One cell of the sweep."""

    way: str
    num_tokens: int
    problems: tuple[str, ...]


class Sweep:
    """Two decode workers, one prefill worker, a router. Made by `running_sweep`."""

    def __init__(self, zygote: Zygote, model_path: Path) -> None:
        self._zygote = zygote
        self._model_path = model_path
        self._incarnation = 0
        self._manager = FakeManager(TOKEN)
        self._expected: dict[str, Said] = {}
        self._channels: dict[str, grpc.aio.Channel] = {}
        self.decode: list[WorkerProcess] = []
        self.client: httpx.AsyncClient

    async def start(self) -> str:
        """The manager's address; a router may watch it."""
        self._prefill = self._fork(Role.PREFILL, 0)
        self.decode = [self._fork(Role.DECODE, index) for index in range(2)]
        await asyncio.gather(*(worker.wait_ready() for worker in (self._prefill, *self.decode)))
        address = await self._manager.start()
        self._publish()
        return address

    async def close(self) -> None:
        for channel in self._channels.values():
            await channel.close(None)
        for worker in (self._prefill, *self.decode):
            await worker.end()
        await self._manager.stop()

    async def kill_after(self, way: str, num_tokens: int) -> Kill:
        expected = await self.expected(way)
        for worker in self.decode:
            await worker.arm(DecodeStep.SOME_TOKENS, "", num_tokens)
        answer = asyncio.ensure_future(self.ask(way))
        problems: list[str] = []
        victim = await self._halted()
        for worker in self.decode:
            if worker is not victim:
                await worker.tell(do="disarm")
        if victim is None:
            problems.append("no worker came so far")
        else:
            await victim.kill()
            index = self.decode.index(victim)
            self.decode[index] = self._fork(Role.DECODE, index)
            await self.decode[index].wait_ready()
            self._publish()
        problems += differences(await answer, expected)
        problems += await self._leaks()
        return Kill(way, num_tokens, tuple(problems))

    async def expected(self, way: str) -> Said:
        """What the undisturbed answer says, computed once by a worker that shares nothing with those under test."""
        if way not in self._expected:
            order = self._order(Role.DECODE, 9, local_prefill="always", prefix_cache=False)
            oracle = WorkerProcess(self._zygote, order)
            await oracle.wait_ready()
            others = self.decode
            self.decode = [oracle]
            self._publish()
            try:
                await self._until_only(oracle)
                self._expected[way] = await self.ask(way)
            finally:
                self.decode = others
                self._publish()
                await self._until_only(*others)
                await oracle.end()
        return self._expected[way]

    async def ask(self, way: str) -> Said:
        body = {
            "model": "tiny",
            "prompt": PROMPT,
            "max_tokens": NUM_TOKENS,
            "ignore_eos": True,
            "stream": True,
            "return_token_ids": True,
            **WAYS[way],
        }
        said = Said()
        # No cache may answer: it is computing that is tried.
        async with self.client.stream("POST", "/v1/completions", json=body, headers={"Cache-Control": "no-store"}) as response:
            if response.status_code != 200:
                said.error = (await response.aread()).decode()
                return said
            async for line in response.aiter_lines():
                if line == "data: [DONE]":
                    said.whole = True
                elif line.startswith("data: "):
                    _add(said, json.loads(line.removeprefix("data: ")))
        return said

    # -- within --------------------------------------------------------------------------------------------------------

    def _fork(self, role: Role, index: int) -> WorkerProcess:
        return WorkerProcess(self._zygote, self._order(role, index))

    def _order(self, role: Role, index: int, *, local_prefill: str = "auto", prefix_cache: bool = True) -> dict[str, Any]:
        self._incarnation += 1
        engine = ENGINE.model_copy(update={"prefix_cache": prefix_cache})
        return make_order(
            role,
            index,
            self._incarnation,
            self._model_path,
            transports=("shm", "tcp"),
            local_prefill=local_prefill,
            times=TIMES,
            engine=engine,
        )

    def _publish(self) -> None:
        workers = [(Role.PREFILL, self._prefill), *((Role.DECODE, worker) for worker in self.decode)]
        self._manager.publish(
            registry_pb2.ClusterSnapshot(
                cluster="sweep",
                models=[
                    registry_pb2.ModelInfo(name="tiny", path=str(self._model_path), context_tokens=512, created_s=1_700_000_000)
                ],
                workers=[
                    worker_pb2.InfoReply(
                        worker_id=worker.ready.worker_id,
                        incarnation=worker.ready.incarnation,
                        role=2 if role is Role.DECODE else 1,
                        model="tiny",
                        state="ready",
                        address=worker.ready.address,
                        max_model_tokens=512,
                    )
                    for role, worker in workers
                ],
            )
        )

    async def _until_only(self, *workers: WorkerProcess) -> None:
        """The router has taken over a snapshot with these decode workers: one of them gets what is asked."""
        async with asyncio.timeout(READY_TIMEOUT_S):
            before = [await self._served(worker) for worker in workers]
            while [await self._served(worker) for worker in workers] == before:
                await self.client.post(
                    "/v1/completions",
                    json={"model": "tiny", "prompt": [5, 6, 7], "max_tokens": 1, "temperature": 0},
                    headers={"Cache-Control": "no-store"},
                )

    async def _served(self, worker: WorkerProcess) -> int:
        return int((await self._info(worker)).requests_served)

    async def _info(self, worker: WorkerProcess) -> worker_pb2.InfoReply:
        address = worker.ready.address
        if address not in self._channels:
            self._channels[address] = connect(address, TOKEN)
        info: worker_pb2.InfoReply = await worker_pb2_grpc.WorkerStub(self._channels[address]).Info(
            worker_pb2.InfoRequest(), timeout=5.0
        )
        return info

    async def _halted(self) -> WorkerProcess | None:
        """The worker that came to the step it was armed for."""
        waits = {asyncio.ensure_future(worker.wait_halted(HALT_TIMEOUT_S)): worker for worker in self.decode}
        done, pending = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for wait in pending:
            wait.cancel()
            with suppress(asyncio.CancelledError):
                await wait
        return next((waits[wait] for wait in done if wait.result()), None)

    async def _leaks(self) -> list[str]:
        clock = asyncio.get_running_loop().time
        deadline_s = clock() + QUIET_TIMEOUT_S
        while True:
            held = []
            for worker in (self._prefill, *self.decode):
                info = await self._info(worker)
                busy = info.leases_open or info.blocks_in_transfer or info.requests_running or info.requests_waiting
                if busy or info.blocks_free != info.blocks_total:
                    held.append(f"{info.worker_id} still holds something")
            if not held or clock() > deadline_s:
                return held
            await asyncio.sleep(0.02)


def differences(said: Said, expected: Said) -> list[str]:
    found = []
    if said.error or not said.whole:
        found.append(f"ended badly: {said.error or 'no [DONE]'}")
    for name in ("token_ids", "text", "logprobs", "finish"):
        if dict(getattr(said, name)) != dict(getattr(expected, name)):
            found.append(f"{name}: {dict(getattr(said, name))}, expected {dict(getattr(expected, name))}")
    return found


def _add(said: Said, event: dict[str, Any]) -> None:
    if "error" in event:
        said.error = json.dumps(event["error"])
    for choice in event.get("choices", ()):
        index = choice["index"]
        said.token_ids[index] += choice.get("token_ids") or []
        said.text[index] += choice.get("text", "")
        if choice.get("logprobs"):
            said.logprobs[index] += choice["logprobs"]["token_logprobs"]
        if choice.get("finish_reason"):
            said.finish[index] = choice["finish_reason"]


@asynccontextmanager
async def running_sweep(zygote: Zygote, model_path: Path) -> AsyncIterator[Sweep]:
    sweep = Sweep(zygote, model_path)
    manager_address = await sweep.start()
    config = Config.model_validate(
        {
            "models": [{"name": "tiny", "source": str(model_path)}],
            "router": {"http_port": 0, "grpc_port": 0},
            "cache": {"exact": {"enabled": False}},  # an answer that is given again says nothing about workers
        }
    )
    stop = asyncio.Event()
    address: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    router = asyncio.create_task(
        run(
            config,
            manager_address=manager_address,
            cluster_token=TOKEN,
            stop=stop,
            on_ready=lambda http, grpc: address.set_result(http),
        )
    )
    try:
        await asyncio.wait({router, address}, timeout=READY_TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED)
        if router.done():
            router.result()
        async with httpx.AsyncClient(base_url=f"http://{address.result()}", trust_env=False, timeout=60.0) as sweep.client:
            async with asyncio.timeout(READY_TIMEOUT_S):
                while (await sweep.client.get("/ready")).status_code != 200:
                    await asyncio.sleep(0.02)
            yield sweep
    finally:
        stop.set()
        await asyncio.wait({router})
        await sweep.close()
    router.result()
