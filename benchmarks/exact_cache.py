"""What an answer from the exact cache costs: a real router in a process of its own, over loopback HTTP, asked the same again.

    python -m benchmarks.exact_cache [--model smollm2-135m] [--requests 3000] [--answer-tokens 64] [--json out.json]

There is no engine: this process plays the manager and a decode worker that answers at once with random tokens, so that misses can
be measured beside hits. The model is needed for its tokenizer and template only. Clients are bare sockets with kept connections,
for a real client library costs more than what is measured. Per kind of request:

    latency        one connection, one request at a time: write to last byte, in milliseconds
    rps            eight connections that never pause
    rps per core   requests per second of CPU time of the router's process during that: what one core would serve

`miss` asks a new question each time, `off` does so of a router whose cache is off, `health` is GET /health, the floor of the HTTP
server. The load generator shares the machine: on two cores, latencies and rps suffer from it; CPU time does not.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import orjson

from benchmarks.lone_router import Manager
from common.codec import chunk_to_wire, request_from_wire, started_to_wire
from common.config import pdserve_home
from common.model_store import resolve
from common.rpc import start_server
from common.tokenizer import Tokenizer
from common.types import FinishReason, StageTimings, Started, TokenChunk
from common.wire import registry_pb2, registry_pb2_grpc, types_pb2, worker_pb2, worker_pb2_grpc

TOKEN = "benchmark"
NAME = "m"
CONNECTIONS = 8
PATIENCE_S = 60.0
SETTLE_REQUESTS = 200


@dataclass(frozen=True)
class Figures:
    kind: str
    requests: int
    p50_ms: float
    p99_ms: float
    rps: float
    rps_per_core: float


class DecodeWorker(worker_pb2_grpc.DecodeServicer):
    """Answers at once, all tokens in eight events."""

    def __init__(self, vocab_size: int, answer_tokens: int) -> None:
        self._random = random.Random(7)
        self._vocab_size, self._answer_tokens = vocab_size, answer_tokens
        self.asked = 0

    async def Generate(self, message: worker_pb2.GenerateRequest, context: Any) -> None:
        self.asked += 1
        request = request_from_wire(message.request)
        ids = [self._random.randrange(100, self._vocab_size - 1000) for _ in range(self._answer_tokens)]
        size = max(1, -(-len(ids) // 8))
        for start in range(0, len(ids), size):
            last = start + size >= len(ids)
            stop = request.sampling.stop_token_ids[0]
            event = worker_pb2.GenerateEvent()
            if start == 0:
                event.started.CopyFrom(started_to_wire(Started(StageTimings(), 0)))
            piece = tuple(ids[start : start + size])
            chunk = TokenChunk(0, piece, finish_reason=FinishReason.STOP if last else None, stop_token_id=stop if last else None)
            event.chunks.append(chunk_to_wire(chunk))
            await context.write(event)


class Connection:
    """One kept HTTP/1.1 connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    async def ask(self, request: bytes) -> tuple[bytes, bytes]:
        """Head and body."""
        self._writer.write(request)
        head = await self._reader.readuntil(b"\r\n\r\n")
        lower = head.lower()
        if b"transfer-encoding: chunked" in lower:
            body = await self._reader.readuntil(b"\r\n0\r\n\r\n")
        else:
            body = await self._reader.readexactly(int(lower.split(b"content-length: ")[1].split(b"\r\n")[0]))
        if not head.startswith(b"HTTP/1.1 200"):
            raise SystemExit(f"the router says {head.splitlines()[0].decode()}: {body[:300].decode()}")
        return head, body


@asynccontextmanager
async def cluster(options: argparse.Namespace, *, cached: bool) -> AsyncIterator[tuple[str, int, DecodeWorker]]:
    """A router's HTTP address and process id, and the worker behind it."""
    path = resolve(options.model, home=options.home).path
    tokenizer = await asyncio.to_thread(Tokenizer.load, path)
    worker = DecodeWorker(tokenizer.vocab_size, options.answer_tokens)
    worker_rpc = await start_server(
        lambda server: worker_pb2_grpc.add_DecodeServicer_to_server(worker, server),
        host="127.0.0.1",
        token=TOKEN,
        services=("pdserve.v1.Decode",),
    )
    info = worker_pb2.InfoReply(
        worker_id="m/decode/0",
        incarnation=1,
        role=types_pb2.ROLE_DECODE,
        model=NAME,
        state="ready",
        address=worker_rpc.address,
        max_model_tokens=8192,
    )
    model = registry_pb2.ModelInfo(name=NAME, path=str(path), context_tokens=8192, layout_fingerprint="f1")
    manager = Manager(registry_pb2.ClusterSnapshot(version=1, cluster="benchmark", models=[model], workers=[info]))
    manager_rpc = await start_server(
        lambda server: registry_pb2_grpc.add_RegistryServicer_to_server(manager, server),
        host="127.0.0.1",
        token=TOKEN,
        services=("pdserve.v1.Registry",),
    )
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "config.json"  # JSON is YAML
        settings = {
            "models": [{"name": NAME, "source": "m"}],
            "router": {"http_port": 0, "grpc_port": 0},
            "cache": {"exact": {"enabled": cached}},
            "logging": {"format": "json", "level": options.log_level},
        }
        config.write_text(json.dumps(settings))
        router = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-m", "router", "--config", str(config), "--manager", manager_rpc.address),
            env={**os.environ, "PDSERVE_CLUSTER_TOKEN": TOKEN},
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
        )
        try:
            async with asyncio.timeout(PATIENCE_S):
                address = await manager.http_address
                await until_ready(address)
            yield address, router.pid, worker
        finally:
            router.send_signal(signal.SIGTERM)
            await router.wait()
    await manager_rpc.stop(0)
    await worker_rpc.stop(0)


async def until_ready(address: str) -> None:
    while True:
        connection = await connect(address)
        try:
            await connection.ask(get(address, "/ready"))
            return
        except SystemExit:
            await asyncio.sleep(0.05)


async def connect(address: str) -> Connection:
    host, _, port = address.rpartition(":")
    return Connection(*await asyncio.open_connection(host, int(port), limit=2**22))


def get(address: str, path: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nhost: {address}\r\n\r\n".encode()


def chat(address: str, text: str, *, stream: bool) -> bytes:
    messages = [{"role": "system", "content": "You answer questions about a city."}, {"role": "user", "content": text}]
    body = orjson.dumps({"model": NAME, "messages": messages, "temperature": 0, "stream": stream})
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: {address}\r\ncontent-type: application/json\r\n"
    return head.encode() + f"content-length: {len(body)}\r\n\r\n".encode() + body


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def measured(
    kind: str, address: str, pid: int, count: int, request: Callable[[int], bytes], expected: bytes | None
) -> Figures:
    """`request(i)` is the i-th request; every head must hold `expected`."""
    connection = await connect(address)

    async def ask(over: Connection, index: int) -> None:
        head, _ = await over.ask(request(index))
        if expected is not None and expected not in head:
            raise SystemExit(f"{kind}: not {expected.decode()}: {head.decode()}")

    for index in range(SETTLE_REQUESTS):
        await ask(connection, index)
    latencies_ms = []
    for index in range(SETTLE_REQUESTS, SETTLE_REQUESTS + count):
        began_s = time.perf_counter()
        await ask(connection, index)
        latencies_ms.append(1000 * (time.perf_counter() - began_s))
    numbers = iter(range(SETTLE_REQUESTS + count, SETTLE_REQUESTS + 2 * count))

    async def keep_asking(over: Connection) -> None:
        for index in numbers:
            await ask(over, index)

    connections = [await connect(address) for _ in range(CONNECTIONS)]
    began_s, began_cpu_s = time.perf_counter(), cpu_s(pid)
    await asyncio.gather(*map(keep_asking, connections))
    elapsed_s, used_s = time.perf_counter() - began_s, cpu_s(pid) - began_cpu_s
    p99_ms = statistics.quantiles(latencies_ms, n=100)[98]
    return Figures(kind, count, statistics.median(latencies_ms), p99_ms, count / elapsed_s, count / max(used_s, 1e-9))


async def run(options: argparse.Namespace) -> list[Figures]:
    figures: list[Figures] = []
    count, misses = options.requests, max(200, options.requests // 5)
    async with cluster(options, cached=True) as (address, pid, worker):
        same, streamed = chat(address, "Where is the market?", stream=False), chat(address, "Where is the market?", stream=True)
        await (await connect(address)).ask(same)
        figures.append(await measured("hit, at once", address, pid, count, lambda index: same, b"x-cache: hit-exact"))
        figures.append(await measured("hit, streamed", address, pid, count, lambda index: streamed, b"x-cache: hit-exact"))
        if worker.asked != 1:
            raise SystemExit(f"the worker was asked {worker.asked} times")
        figures.append(await measured("miss", address, pid, misses, new_question(address), b"x-cache: miss"))
        figures.append(await measured("health", address, pid, count, lambda index: get(address, "/health"), None))
    async with cluster(options, cached=False) as (address, pid, _):
        figures.append(await measured("off", address, pid, misses, new_question(address), b"x-cache: ineligible"))
    return figures


def new_question(address: str) -> Callable[[int], bytes]:
    return lambda index: chat(address, f"Where is number {index}?", stream=False)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.exact_cache", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m", help="whose tokenizer and template are used")
    parser.add_argument("--home", type=Path, default=pdserve_home(), help="where models are")
    parser.add_argument("--requests", type=int, default=3000, help="of each kind of hit, per part")
    parser.add_argument("--answer-tokens", type=int, default=64)
    parser.add_argument("--log-level", default="info", help="of the router; its log goes nowhere")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args(arguments)
    load = os.getloadavg()[0]
    figures = asyncio.run(run(options))
    print(f"{'':<14} {'p50 ms':>8} {'p99 ms':>8} {'rps':>8} {'rps per core':>13}")
    for one in figures:
        print(f"{one.kind:<14} {one.p50_ms:8.2f} {one.p99_ms:8.2f} {one.rps:8.0f} {one.rps_per_core:13.0f}")
    print(f"load average {load:.1f} before, {os.getloadavg()[0]:.1f} after")
    if options.json is not None:
        about = {"machine": platform.processor() or platform.machine(), "cores": os.cpu_count(), "load_average_before": load}
        given = {"model": options.model, "answer_tokens": options.answer_tokens}
        options.json.write_text(json.dumps({**about, **given, "figures": [asdict(one) for one in figures]}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
