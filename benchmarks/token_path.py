"""What a token costs between decode step and client, in CPU time of each process: a real decode worker, a real router, streams.

    python -m benchmarks.token_path [--model smollm2-135m] [--streams 1,16] [--tokens 128] [--rounds 3] [--json out.json]

This process plays the manager and the clients (`benchmarks.load`). Per number of streams, in milliseconds of CPU per token:

    router          all threads of its process
    worker's loop   the thread that gives tokens out
    worker's rest   its other threads but the one that computes: gRPC's own, and who plans the next step meanwhile
    engine          the thread that computes; not part of a token's way, and there for comparison

CPU time does not depend on who else uses the machine, but for caches: two versions are compared by running both, one after the
other.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import orjson

from benchmarks.load.client import HttpConnections, OpenAIClient, Outcome
from benchmarks.lone_router import NAME, TOKEN, lone_router
from benchmarks.worker_processes import worker
from common.config import DecodeConfig, EngineConfig, LoggingConfig, ModelConfig, SpeculationConfig, TransferConfig, pdserve_home
from common.model_store import resolve
from common.types import Role
from common.worker import WorkerSpec

PROMPT_TOKENS = 32
_MS_PER_NS = 1e-6


@dataclass(frozen=True)
class Figures:
    streams: int
    tokens: int
    router_ms: float
    worker_loop_ms: float
    worker_rest_ms: float
    engine_ms: float
    wall_ms_per_round_token: float


def threads_ns(pid: int) -> dict[int, int]:
    """CPU time of each thread so far."""
    found = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        try:
            found[int(task.name)] = int((task / "schedstat").read_text().split()[0])
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has just ended
    return found


def used_ns(before: dict[int, int], after: dict[int, int]) -> dict[int, int]:
    return {thread: total - before.get(thread, 0) for thread, total in after.items()}


async def ask(client: OpenAIClient, prompt: Sequence[int], tokens: int) -> Outcome:
    body = {
        "model": NAME,
        "prompt": list(prompt),
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    outcome = Outcome(0, time.monotonic(), tokens)
    await client.send("/v1/completions", orjson.dumps(body), outcome)
    if outcome.error is not None:
        raise SystemExit(f"{outcome.error}: {outcome.error_detail}")
    return outcome


async def measured(client: OpenAIClient, router: int, decode: int, streams: int, options: argparse.Namespace) -> Figures:
    rng = random.Random(streams)
    rounds: list[Figures] = []
    for number in range(options.rounds + 1):
        prompts = [[rng.randrange(1000, 40_000) for _ in range(PROMPT_TOKENS)] for _ in range(streams)]
        before, began_s = (threads_ns(router), threads_ns(decode)), time.monotonic()
        outcomes = await asyncio.gather(*(ask(client, prompt, options.tokens) for prompt in prompts))
        seconds = time.monotonic() - began_s
        if number == 0:
            continue  # everything is touched once before it counts
        of_router, of_decode = used_ns(before[0], threads_ns(router)), used_ns(before[1], threads_ns(decode))
        loop_ns = of_decode.pop(decode)
        engine_ns = max(of_decode.values())
        tokens = sum(outcome.output_tokens for outcome in outcomes)
        per_token = _MS_PER_NS / tokens
        rounds.append(
            Figures(
                streams,
                tokens,
                router_ms=sum(of_router.values()) * per_token,
                worker_loop_ms=loop_ns * per_token,
                worker_rest_ms=(sum(of_decode.values()) - engine_ns) * per_token,
                engine_ms=engine_ns * per_token,
                wall_ms_per_round_token=seconds * 1e3 / options.tokens,
            )
        )
    names = ("router_ms", "worker_loop_ms", "worker_rest_ms", "engine_ms", "wall_ms_per_round_token")
    middle = {name: statistics.median(getattr(one, name) for one in rounds) for name in names}
    return replace(rounds[-1], **middle)


async def run(options: argparse.Namespace) -> list[Figures]:
    path = resolve(options.model, home=pdserve_home()).path
    spec = WorkerSpec(
        worker_id="m/decode/0",
        incarnation=1,
        role=Role.DECODE,
        model=ModelConfig(
            name=NAME,
            source=options.model,
            engine=EngineConfig(kv_pool_tokens=8192, weights=options.weights),
            decode=DecodeConfig(local_prefill="always", speculation=SpeculationConfig(method="off")),
        ),
        model_path=str(path),
        transfer=TransferConfig(transports=("shm",)),
        cluster_token=TOKEN,
        logging=LoggingConfig(level="warning"),
    )
    async with worker(spec) as ref, lone_router(path, ref) as router:
        decode = router.worker_pid
        client = OpenAIClient(HttpConnections(f"http://{router.address}", {}), timeout_s=120.0, now=time.monotonic)
        return [await measured(client, router.pid, decode, streams, options) for streams in options.streams]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.token_path", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--weights", default="int8")
    parser.add_argument("--streams", type=lambda text: [int(part) for part in text.split(",")], default=[1, 16])
    parser.add_argument("--tokens", type=int, default=128, help="of each answer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    load = os.getloadavg()[0]
    figures = asyncio.run(run(options))
    print(
        f"{'streams':>8} {'router ms':>10} {'loop ms':>9} {'rest ms':>9} {'engine ms':>10} {'wall ms/step':>13}   CPU per token"
    )
    for one in figures:
        print(
            f"{one.streams:8} {one.router_ms:10.4f} {one.worker_loop_ms:9.4f} {one.worker_rest_ms:9.4f} {one.engine_ms:10.4f} "
            f"{one.wall_ms_per_round_token:13.2f}"
        )
    print(f"load average {load:.1f} before, {os.getloadavg()[0]:.1f} after")
    if options.json is not None:
        about = {"machine": platform.processor() or platform.machine(), "load_average_before": load, "model": options.model}
        options.json.write_text(json.dumps({**about, "figures": [asdict(one) for one in figures]}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
