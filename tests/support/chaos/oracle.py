"""What every request must say: a worker process of its own that prefills locally, caches nothing, does one thing at a time.

It shares with the workers under test neither process, nor pool, nor hand-off. Answers are kept by prompt and sampling.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from common.codec import chunk_from_wire, request_to_wire
from common.rpc import connect
from common.types import Request, Role
from common.wire import worker_pb2, worker_pb2_grpc
from support.chaos.processes import ENGINE, TOKEN, Times, WorkerProcess, make_order
from support.chaos.zygote import Zygote


class Oracle:
    def __init__(self, worker: WorkerProcess) -> None:
        self._worker = worker
        self._channel = connect(worker.ready.address, TOKEN)
        self._known: dict[tuple[Any, ...], tuple[int, ...]] = {}
        self._one_at_a_time = asyncio.Lock()

    @classmethod
    async def start(cls, zygote: Zygote, model_path: Path) -> Oracle:
        engine = ENGINE.model_copy(update={"prefix_cache": False})
        order = make_order(
            Role.DECODE, 99, 1, model_path, transports=("tcp",), local_prefill="always", times=Times(), engine=engine
        )
        worker = WorkerProcess(zygote, order)
        await worker.wait_ready()
        return cls(worker)

    async def tokens(self, request: Request) -> tuple[int, ...]:
        key = (request.prompt_token_ids, request.sampling)
        async with self._one_at_a_time:
            if key not in self._known:
                said: list[int] = []
                message = worker_pb2.GenerateRequest(request=request_to_wire(request))
                async for event in worker_pb2_grpc.DecodeStub(self._channel).Generate(message, timeout=60):
                    for chunk in map(chunk_from_wire, event.chunks):
                        said.extend(chunk.token_ids)
                self._known[key] = tuple(said)
        return self._known[key]

    async def close(self) -> None:
        await self._channel.close(None)
        await self._worker.end()
