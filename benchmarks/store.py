"""What a look-up in the caches' store costs a request: in the process, in Redis, and in a Redis that is away, hung or slow.

    python -m benchmarks.store [--redis-server PATH] [--lookups 5000] [--concurrency 16]

Starts a Redis server of its own on a Unix socket, with the default budget of a look-up. Each line is one condition: how many
look-ups, what became of them, and their percentiles as the request sees them. `slow` is a proxy that delays answers by 8 ms.
"""

from __future__ import annotations

import argparse
import asyncio
import shutil
import signal
import subprocess
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

from prometheus_client import CollectorRegistry

from common.clock import SystemClock
from common.config import CacheConfig, RedisConfig
from common.metrics import StoreMetrics
from common.rpc import cancel_and_wait
from router.store.base import Store
from router.store.making import make_store

_NAMES = ("tenant:a", "model:m", "tag:t")
_VALUE = bytes(8192)
_DELAY_S = 0.008


async def _look_up(store: Store, count: int, concurrency: int, pace_s: float) -> tuple[list[float], Counter[str]]:
    seconds: list[float] = []
    outcomes: Counter[str] = Counter()

    async def one_after_another(number: int) -> None:
        for _ in range(number):
            start_s = time.perf_counter()
            reading = await store.get(b"question", _NAMES)
            seconds.append(time.perf_counter() - start_s)
            outcomes["found" if reading.value is not None else "absent" if reading.epochs is not None else "away"] += 1
            await asyncio.sleep(pace_s)

    await asyncio.gather(*(one_after_another(count // concurrency) for _ in range(concurrency)))
    return sorted(seconds), outcomes


def _report(condition: str, seconds: list[float], outcomes: Counter[str]) -> None:
    at = {share: 1000 * seconds[min(len(seconds) - 1, int(share * len(seconds)))] for share in (0.5, 0.99, 0.999)}
    shown = ", ".join(f"{count} {name}" for name, count in outcomes.most_common())
    print(f"{condition:<12} p50 {at[0.5]:8.3f} ms   p99 {at[0.99]:8.3f} ms   p99.9 {at[0.999]:8.3f} ms   {shown}")


async def _fill(store: Store) -> None:
    for _ in range(400):
        reading = await store.get(b"question", _NAMES)
        if reading.value is not None:
            return
        if reading.epochs is not None:
            store.put(b"question", _VALUE, ttl_s=600, epochs=reading.epochs)
        await asyncio.sleep(0.02)


async def _proxy(socket: str) -> asyncio.Server:
    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, delay_s: float) -> None:
        with suppress(OSError):
            while data := await reader.read(65_536):
                await asyncio.sleep(delay_s)
                writer.write(data)
                await writer.drain()
        writer.close()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        server_reader, server_writer = await asyncio.open_unix_connection(socket)
        await asyncio.gather(copy(reader, server_writer, 0.0), copy(server_reader, writer, _DELAY_S))

    return await asyncio.start_server(handle, "127.0.0.1", 0)


async def _main(server: subprocess.Popen[bytes], socket: str, lookups: int, concurrency: int) -> None:
    proxy: asyncio.Server | None = None
    tasks: list[asyncio.Task[None]] = []

    def start(url: str | None) -> Store:
        store = make_store(
            CacheConfig(redis=RedisConfig(url=url)),
            cluster_token="benchmark",
            clock=SystemClock(),
            metrics=StoreMetrics(CollectorRegistry()),
        )
        tasks.append(asyncio.create_task(store.run()))
        return store

    async def measure(condition: str, store: Store, pace_s: float = 0.0) -> None:
        _report(condition, *await _look_up(store, lookups, concurrency, pace_s))

    try:
        embedded = start(None)
        await _fill(embedded)
        await measure("in process", embedded)
        redis = start(f"unix://{socket}")
        await _fill(redis)
        await measure("Redis", redis)
        proxy = await _proxy(socket)
        slow = start(f"redis://127.0.0.1:{proxy.sockets[0].getsockname()[1]}")
        await asyncio.sleep(1.0)
        await measure("slow", slow, pace_s=0.01)
        await cancel_and_wait(tasks[-1])
        server.send_signal(signal.SIGSTOP)
        await measure("hung", redis, pace_s=0.01)
        server.send_signal(signal.SIGCONT)
        await _fill(redis)
        server.kill()
        await measure("killed", redis, pace_s=0.01)
    finally:
        for task in tasks:
            await cancel_and_wait(task)
        if proxy is not None:
            proxy.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--redis-server", default=shutil.which("redis-server"), help="the server to start")
    parser.add_argument("--lookups", type=int, default=5000, help="per condition")
    parser.add_argument("--concurrency", type=int, default=16)
    given = parser.parse_args()
    if given.redis_server is None:
        parser.error("no redis-server on the PATH; name one")
    with tempfile.TemporaryDirectory(prefix="pdbench") as folder:
        socket = str(Path(folder) / "s")
        command = [given.redis_server, "--port", "0", "--unixsocket", socket, "--save", "", "--dir", folder]
        server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        try:
            asyncio.run(_main(server, socket, given.lookups, given.concurrency))
        finally:
            server.kill()
            server.wait(timeout=10)


if __name__ == "__main__":
    main()
