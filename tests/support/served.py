"""Real workers behind a real router in one process, without Ray: what a client of HTTP meets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx

from common.config import Config
from common.wire import registry_pb2
from router.server import run
from support.fake_cluster import FakeManager
from support.plain_http import NO_CERTIFICATES
from support.workers import TOKEN, Workers


@asynccontextmanager
async def served(
    workers: Workers, model_path: Path, *, name: str = "tiny", tracing: dict[str, Any] | None = None, **router: Any
) -> AsyncIterator[str]:
    """The router's base URL."""
    manager = FakeManager(token=TOKEN)
    address = await manager.start()
    infos = [await workers.info(ref.address) for ref in (workers.decode_ref, *workers.prefill_refs)]
    model = registry_pb2.ModelInfo(name=name, path=str(model_path), context_tokens=infos[0].max_model_tokens, created_s=1)
    manager.publish(registry_pb2.ClusterSnapshot(cluster="test", models=[model], workers=infos))
    config = Config.model_validate(
        {
            "models": [{"name": name, "source": str(model_path)}],
            "router": {"http_port": 0, "grpc_port": 0, **router},
            "tracing": tracing or {},
        }
    )
    stop = asyncio.Event()
    ready: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    task = asyncio.create_task(
        run(
            config,
            manager_address=address,
            cluster_token=TOKEN,
            stop=stop,
            on_ready=lambda http, _: ready.set_result(f"http://{http}"),
            drain_grace_s=1.0,
        )
    )
    try:
        await asyncio.wait({ready, task}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            task.result()
        url = ready.result()
        async with httpx.AsyncClient(base_url=url, trust_env=False, verify=NO_CERTIFICATES) as client, asyncio.timeout(120):
            # The model is known once the tokenizer is there as well.
            while (await client.get("/tokenizer_info")).status_code != 200:
                await asyncio.sleep(0.01)
        yield url
    finally:
        stop.set()
        await asyncio.wait({task})
        await manager.stop()
