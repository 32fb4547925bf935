"""How soon what a hand-off holds is free again: after a cancel, and after either of the two workers was killed in the middle; and
how soon the next prompt is begun when the one before it is not wanted any more.

    python -m benchmarks.release [--prompt-tokens 1500] [--times 5] [--transport shm] [--prefill-block-tokens 32] [--json F]

A decode and a prefill worker, each a process of its own, are in the middle of a hand-off: the prompt is being computed, its first
chunks are on their way or have arrived. Then the client cancels, or SIGKILL comes. Reported is the time from then until each
worker that lives has every block, lease and request back, as it says itself, asked every few milliseconds; median and longest.
The goals: a cancel frees within a second, a crashed peer within five.

`next begun`: the prefill worker takes one prompt at a time and another waits; the first one's client leaves. From then until the
other's first chunk was begun, at the latest: its first token, less the computing of its own. The goal: when the chunk under way
has ended, so within one chunk. Exit code 1 if a goal is missed.
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
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import grpc.aio

from benchmarks.worker_processes import worker
from common.codec import request_to_wire, started_from_wire, worker_ref_to_wire
from common.config import DecodeConfig, EngineConfig, LoggingConfig, ModelConfig, PrefillConfig, TransferConfig, pdserve_home
from common.model_store import resolve
from common.rpc import connect
from common.types import Request, Role, SamplingParams, WorkerRef
from common.wire import worker_pb2, worker_pb2_grpc
from common.worker import WorkerSpec

TOKEN = "benchmark"
LOOK_S = 0.005
PATIENCE_S = 30.0
CHUNK_TOKENS = 64
BEHIND_TOKENS = 4 * CHUNK_TOKENS
GOALS_S = {"cancel": 1.0, "decode worker killed": 5.0, "prefill worker killed": 5.0}
NEXT_GOAL_CHUNKS = 1.0


def spec_of(role: Role, path: Path, options: argparse.Namespace, prefill_running: int) -> WorkerSpec:
    return WorkerSpec(
        worker_id=f"m/{role.value}/0",
        incarnation=1,
        role=role,
        model=ModelConfig(
            name="m",
            source=options.model,
            engine=EngineConfig(kv_pool_tokens=8192, prefix_cache=False),
            prefill=PrefillConfig(
                chunk_tokens=CHUNK_TOKENS, block_tokens=options.prefill_block_tokens, max_running=prefill_running
            ),
            decode=DecodeConfig(local_prefill="never"),
        ),
        model_path=str(path),
        transfer=TransferConfig(transports=(options.transport,)),
        cluster_token=TOKEN,
        logging=LoggingConfig(level="error"),
    )


class Observed:
    """A worker, as it describes itself."""

    def __init__(self, ref: WorkerRef) -> None:
        self.ref = ref
        self.channel = connect(ref.address, TOKEN)
        self._stub = worker_pb2_grpc.WorkerStub(self.channel)

    async def info(self) -> worker_pb2.InfoReply:
        reply: worker_pb2.InfoReply = await self._stub.Info(worker_pb2.InfoRequest(), timeout=PATIENCE_S)
        return reply

    async def until_free(self, since_s: float) -> float:
        async with asyncio.timeout(PATIENCE_S):
            while True:
                info = await self.info()
                held = info.blocks_total - info.blocks_free + info.blocks_in_transfer + info.leases_open
                if not held + info.requests_running + info.requests_waiting:
                    return time.perf_counter() - since_s
                await asyncio.sleep(LOOK_S)

    async def until_busy(self) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while not (await self.info()).leases_open:  # noqa: ASYNC110 - another process has no event for us
                await asyncio.sleep(LOOK_S)


@asynccontextmanager
async def two_workers(
    path: Path, options: argparse.Namespace, *, prefill_running: int
) -> AsyncIterator[tuple[Observed, Observed]]:
    async with AsyncExitStack() as stack:
        decode, prefill = [
            Observed(await stack.enter_async_context(worker(spec_of(role, path, options, prefill_running))))
            for role in (Role.DECODE, Role.PREFILL)
        ]
        for one in (decode, prefill):
            stack.push_async_callback(one.channel.close, None)
        yield decode, prefill


def generate(decode: Observed, prefill: Observed, name: str, prompt: tuple[int, ...]) -> Any:
    request = Request(name, "m", prompt, SamplingParams(max_tokens=4, seed=0), 1, timeout_s=PATIENCE_S)
    message = worker_pb2.GenerateRequest(request=request_to_wire(request), prefill=[worker_ref_to_wire(prefill.ref)])
    return worker_pb2_grpc.DecodeStub(decode.channel).Generate(message, timeout=PATIENCE_S)


async def next_begun(number: int, path: Path, options: argparse.Namespace) -> tuple[float, float]:
    """Seconds until the prompt behind an abandoned one was begun, at the latest; and seconds of one of its chunks."""
    rng = random.Random(number)
    prompt = tuple(rng.randrange(100, 40_000) for _ in range(options.prompt_tokens))
    async with two_workers(path, options, prefill_running=1) as (decode, prefill):
        abandoned = generate(decode, prefill, "abandoned", prompt)
        reading = asyncio.ensure_future(abandoned.read())
        await prefill.until_busy()
        behind = generate(decode, prefill, "behind", prompt[:BEHIND_TOKENS])
        first_event = asyncio.ensure_future(behind.read())
        await asyncio.sleep(options.into_s)
        if reading.done() or not (await prefill.info()).requests_waiting:
            raise SystemExit("nobody waits behind a prompt in progress; give it a longer one")
        since_s = time.perf_counter()
        abandoned.cancel()
        timings = started_from_wire((await first_event).started).timings
        begun_s = time.perf_counter() - timings.prefill_s - since_s
        await asyncio.wait({reading})
        return begun_s, timings.prefill_s * CHUNK_TOKENS / BEHIND_TOKENS


async def once(case: str, number: int, path: Path, options: argparse.Namespace) -> dict[str, float]:
    """Seconds until each survivor was free."""
    rng = random.Random(number)
    prompt = tuple(rng.randrange(100, 40_000) for _ in range(options.prompt_tokens))
    async with two_workers(path, options, prefill_running=PrefillConfig().max_running) as (decode, prefill):
        call = generate(decode, prefill, "release", prompt)
        reading = asyncio.ensure_future(call.read())
        await prefill.until_busy()
        await asyncio.sleep(options.into_s)  # so that some chunks have left
        survivors = {"decode": decode, "prefill": prefill}
        since_s = time.perf_counter()
        if case == "cancel":
            call.cancel()
        else:
            victim = survivors.pop(case.split()[0])
            os.kill((await victim.info()).pid, signal.SIGKILL)
            since_s = time.perf_counter()
        freed_s = dict(
            zip(survivors, await asyncio.gather(*(one.until_free(since_s) for one in survivors.values())), strict=True)
        )
        await asyncio.wait({reading})
        if reading.cancelled() or isinstance(reading.exception(), grpc.aio.AioRpcError):
            return freed_s
        raise SystemExit(f"{case}: the request was not in the middle of its hand-off any more; give it a longer prompt")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--prompt-tokens", type=int, default=1500)
    parser.add_argument("--prefill-block-tokens", type=int, help="other than the decode worker's: KV is cut anew")
    parser.add_argument("--transport", choices=("shm", "tcp", "nixl"), default="shm")
    parser.add_argument("--into-s", type=float, default=0.3, help="how long into the hand-off it happens")
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    path = resolve(options.model, home=pdserve_home()).path
    results = {case: [asyncio.run(once(case, number, path, options)) for number in range(options.times)] for case in GOALS_S}
    behind = [asyncio.run(next_begun(number, path, options)) for number in range(options.times)]

    print(f"{options.model}, {options.prompt_tokens} tokens, {options.transport}; {platform.machine()}, {os.cpu_count()} cores")
    missed = False
    for case, freed in results.items():
        for side in freed[0]:
            taken = [one[side] for one in freed]
            met = max(taken) <= GOALS_S[case]
            missed = missed or not met
            print(
                f"  {case:24} {side:8} free after {statistics.median(taken) * 1e3:7.1f} ms, at most {max(taken) * 1e3:7.1f} ms"
                f"   goal {GOALS_S[case]:g} s: {'met' if met else 'MISSED'}"
            )
    longest = max(begun_s / chunk_s for begun_s, chunk_s in behind)
    met = longest <= NEXT_GOAL_CHUNKS
    missed = missed or not met
    begun_s, chunk_s = (statistics.median(column) for column in zip(*behind, strict=True))
    print(
        f"  {'next begun':24} {'prefill':8} begun after {begun_s * 1e3:6.1f} ms where a chunk takes {chunk_s * 1e3:.1f},"
        f" at most {longest:.2f} chunks   goal {NEXT_GOAL_CHUNKS:g}: {'met' if met else 'MISSED'}"
    )
    if options.json is not None:
        options.json.write_text(json.dumps({**results, "next begun": behind}, indent=2) + "\n")
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
