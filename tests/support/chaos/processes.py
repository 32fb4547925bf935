"""Worker processes as a test holds them: forked, told what to do, brought to a step, stopped, killed, buried.

WorkerProcess(zygote, make_order(...)) -> wait_ready -> tell, arm, wait_halted, go_on, stop, resume -> kill | end
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.config import DecodeConfig, EngineConfig, ModelConfig, PrefillConfig
from common.errors import ClusterError
from common.types import Role, WorkerRef
from support.chaos.steps import TOKENS_BEFORE_STEP, Step
from support.chaos.zygote import Zygote

TOKEN = "chaos-cluster-token"
START_TIMEOUT_S = 60.0
ORDER_TIMEOUT_S = 20.0
ENGINE = EngineConfig(dtype="float32", exact=True, block_tokens=8, kv_pool_tokens=1536)


@dataclass(frozen=True)
class Times:
    """All waits of the workers under test, short: what is tested is that they end, not how long they are."""

    lease_s: float = 1.0
    ticket_ttl_s: float = 3.0
    handshake_timeout_s: float = 1.5
    release_timeout_s: float = 0.4


class WorkerProcess:
    """One forked worker as the test sees it."""

    def __init__(self, zygote: Zygote, order: dict[str, Any]) -> None:
        self.order = order
        self.ref: WorkerRef | None = None
        self._zygote = zygote
        control, theirs_control = socket.socketpair()
        halts, theirs_halts = socket.socketpair()
        self.pid = zygote.fork(order, theirs_control, theirs_halts)
        theirs_control.close()
        theirs_halts.close()
        self._control, self._halts = control, halts
        self._lock = asyncio.Lock()
        self._alive = True
        self._stopped = False
        self._halts.setblocking(False)

    @property
    def alive(self) -> bool:
        return self._alive

    @property
    def ready(self) -> WorkerRef:
        if self.ref is None:
            raise ClusterError("the worker is not ready")
        return self.ref

    async def wait_ready(self) -> WorkerRef:
        self._reader, self._writer = await asyncio.open_connection(sock=self._control)
        async with asyncio.timeout(START_TIMEOUT_S):
            line = await self._reader.readline()
        answer = json.loads(line) if line else {"failed": "the process ended"}
        if "ready" not in answer:
            await self.kill()
            raise ClusterError(f"{self.order['worker_id']}: {answer['failed']}")
        self.ref = WorkerRef(self.order["worker_id"], self.order["incarnation"], answer["ready"])
        return self.ref

    async def tell(self, **command: Any) -> dict[str, Any]:
        async with self._lock, asyncio.timeout(ORDER_TIMEOUT_S):
            self._writer.write(json.dumps(command).encode() + b"\n")
            line = await self._reader.readline()
        if not line:
            raise ClusterError(f"{self.order['worker_id']} has ended")
        answer: dict[str, Any] = json.loads(line)
        return answer

    async def arm(self, step: Step, request_id: str, num_tokens: int = TOKENS_BEFORE_STEP) -> None:
        await self.tell(do="arm", step=step.value, request_id=request_id, num_tokens=num_tokens)

    async def wait_halted(self, timeout_s: float) -> bool:
        """Whether the process came to the armed step in time; it stands still then."""
        try:
            async with asyncio.timeout(timeout_s):
                return bool(await asyncio.get_running_loop().sock_recv(self._halts, 4096))
        except TimeoutError:
            return False

    def go_on(self) -> None:
        self._halts.send(b"g")

    def stop(self) -> None:
        os.kill(self.pid, signal.SIGSTOP)
        self._stopped = True

    def resume(self) -> None:
        os.kill(self.pid, signal.SIGCONT)
        self._stopped = False

    async def kill(self) -> int:
        """SIGKILL; returns when the process is gone."""
        if not self._alive:
            return 0
        self._alive = False
        os.kill(self.pid, signal.SIGKILL)
        return await self._gone()

    async def end(self) -> int:
        """Asks it to stop in order; its exit code."""
        if not self._alive:
            return 0
        self._alive = False
        try:
            await self.tell(do="stop")
        except (ClusterError, TimeoutError):
            os.kill(self.pid, signal.SIGKILL)
        return await self._gone()

    async def _gone(self) -> int:
        if hasattr(self, "_reader"):
            with suppress(ConnectionError):
                async with asyncio.timeout(ORDER_TIMEOUT_S):
                    await self._reader.read()  # to the end: the process has let go of everything
        code = await asyncio.to_thread(self._zygote.reap, self.pid)
        if hasattr(self, "_writer"):
            self._writer.close()
            with suppress(ConnectionError):
                await self._writer.wait_closed()
        else:
            self._control.close()
        self._halts.close()
        return code


def make_order(
    role: Role,
    index: int,
    incarnation: int,
    model_path: Path,
    *,
    transports: Sequence[str],
    local_prefill: str = "auto",
    times: Times,
    engine: EngineConfig = ENGINE,
    prefill_block_tokens: int | None = None,
    fences: bool = True,
    sabotage: bool = False,
) -> dict[str, Any]:
    model = ModelConfig(
        name="tiny",
        source=str(model_path),
        engine=engine,
        prefill=PrefillConfig(chunk_tokens=24, layer_groups=2, block_tokens=prefill_block_tokens),
        decode=DecodeConfig(local_prefill=local_prefill, local_prefill_tokens=0),  # type: ignore[arg-type]
    )
    return {
        "role": role.value,
        "worker_id": f"tiny/{role.value}/{index}",
        "incarnation": incarnation,
        "model": model.model_dump(mode="json"),
        "model_path": str(model_path),
        "transfer": {
            "transports": list(transports),
            "ticket_ttl_s": times.ticket_ttl_s,
            "handshake_timeout_s": times.handshake_timeout_s,
            "release_timeout_s": times.release_timeout_s,
            "lease_s": times.lease_s,
        },
        "cluster_token": TOKEN,
        "fences": fences,
        "sabotage": sabotage,
    }
