"""A router as a process of a benchmark, in front of one decode worker: this process plays the manager, and there is no Ray.

async with lone_router(model_path, worker) as router: ...      the router has ended when the block is left
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.rpc import connect, start_server
from common.types import WorkerRef
from common.wire import registry_pb2, registry_pb2_grpc, worker_pb2, worker_pb2_grpc

TOKEN = "benchmark"
NAME = "m"
_PATIENCE_S = 60.0


@dataclass(frozen=True)
class LoneRouter:
    address: str  # HTTP
    pid: int
    worker_pid: int


class Manager(registry_pb2_grpc.RegistryServicer):
    """Tells the router of one model and one worker, and learns where it listens."""

    def __init__(self, snapshot: registry_pb2.ClusterSnapshot) -> None:
        self._snapshot = snapshot
        self.http_address: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def Watch(self, request: registry_pb2.WatchRequest, context: Any) -> None:
        await context.write(self._snapshot)
        if not self.http_address.done():
            self.http_address.set_result(request.http_address)
        await asyncio.Event().wait()


@asynccontextmanager
async def lone_router(
    model_path: Path, worker: WorkerRef, *, settings: dict[str, Any] | None = None
) -> AsyncIterator[LoneRouter]:
    """`settings` are the router's, beside its ports."""
    channel = connect(worker.address, TOKEN)
    info = await worker_pb2_grpc.WorkerStub(channel).Info(worker_pb2.InfoRequest(), timeout=_PATIENCE_S)
    await channel.close(None)
    model = registry_pb2.ModelInfo(
        name=NAME, path=str(model_path), context_tokens=8192, layout_fingerprint=info.layout_fingerprint
    )
    manager = Manager(registry_pb2.ClusterSnapshot(version=1, cluster="benchmark", models=[model], workers=[info]))
    manager_rpc = await start_server(
        lambda server: registry_pb2_grpc.add_RegistryServicer_to_server(manager, server),
        host="127.0.0.1",
        token=TOKEN,
        services=("pdserve.v1.Registry",),
    )
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "config.json"  # JSON is YAML
        given = {
            "models": [{"name": NAME, "source": "m"}],
            "router": {"http_port": 0, "grpc_port": 0, **(settings or {})},
            "logging": {"level": "warning"},
        }
        config.write_text(json.dumps(given))
        router = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-m", "router", "--config", str(config), "--manager", manager_rpc.address),
            env={**os.environ, "PDSERVE_CLUSTER_TOKEN": TOKEN},
        )
        try:
            async with asyncio.timeout(_PATIENCE_S):
                address = await manager.http_address
                await _until_ready(address)
            yield LoneRouter(address, router.pid, info.pid)
        finally:
            router.send_signal(signal.SIGTERM)
            await router.wait()
    await manager_rpc.stop(0)


async def _until_ready(address: str) -> None:
    """Returns when the router knows its worker."""
    host, _, port = address.rpartition(":")
    while True:
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(f"GET /ready HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n\r\n".encode())
        answer = await reader.read()
        writer.close()
        if answer.startswith(b"HTTP/1.1 200"):
            return
        await asyncio.sleep(0.05)
