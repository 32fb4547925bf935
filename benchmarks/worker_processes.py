"""Workers as plain processes of a benchmark: no Ray, no router, the real worker in each.

    async with worker(spec) as ref: ...      the process has ended when the block is left

A worker's process says where it listens over a pipe and stops when the pipe closes, so that none outlives the benchmark.
"""

from __future__ import annotations

import asyncio
import multiprocessing
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from multiprocessing.connection import Connection

from common.logs import configure_logging
from common.types import WorkerRef
from common.worker import WorkerSpec
from deploy.worker_host import build_worker

START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 10.0


@asynccontextmanager
async def worker(spec: WorkerSpec) -> AsyncIterator[WorkerRef]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_main, args=(spec, theirs), name=spec.worker_id)
    process.start()
    theirs.close()
    try:
        if not await asyncio.to_thread(ours.poll, START_TIMEOUT_S):
            raise TimeoutError(f"{spec.worker_id} did not start")
        yield WorkerRef(spec.worker_id, spec.incarnation, ours.recv())
    finally:
        ours.close()
        await asyncio.to_thread(process.join, STOP_TIMEOUT_S)
        if process.is_alive():
            process.kill()


def _main(spec: WorkerSpec, control: Connection) -> None:
    configure_logging(spec.logging, process=spec.worker_id)
    asyncio.run(_serve(spec, control))


async def _serve(spec: WorkerSpec, control: Connection) -> None:
    server = build_worker(spec)
    ref = await server.start()
    control.send(ref.address)
    await asyncio.to_thread(_wait_until_closed, control)
    await server.stop(0.0)


def _wait_until_closed(control: Connection) -> None:
    try:
        control.recv()
    except EOFError:
        return
