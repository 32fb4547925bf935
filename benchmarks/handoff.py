"""How much of a prompt's KV transfer a client waits for: groups of layers leave while later layers compute, against whole chunks.

    python -m benchmarks.handoff [--prompt-tokens 1024] [--blocks 6] [--transport shm] [--prefill-block-tokens 32] [--json F]

One decode worker and two prefill workers that differ in `prefill.layer_groups` alone, each a process of its own with one thread.
Prompts are random, so no prefix is cached; the two take turns in ABBA order. From the worker's own stamps, per request:

    exposed = last layer of the last chunk computed, until every block was verified on the decode side
    total   = time during which blocks were being written, hidden or not

With `--prefill-block-tokens` the prefill workers' blocks are not as the decode worker's (of 16), so KV is cut anew on its way,
which counts as writing.

What is reported is medians, and the median of the paired ratios of time to first token with its bootstrap interval.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import statistics
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.worker_processes import worker
from common.codec import request_to_wire, started_from_wire, worker_ref_to_wire
from common.config import DecodeConfig, EngineConfig, LoggingConfig, ModelConfig, PrefillConfig, TransferConfig, pdserve_home
from common.model_store import resolve
from common.rpc import connect
from common.types import Request, Role, SamplingParams, StageTimings, WorkerRef
from common.wire import worker_pb2, worker_pb2_grpc
from common.worker import WorkerSpec

TOKEN = "benchmark"
WARM_UPS = 2  # per variant: connections, first touches of memory
BOOTSTRAPS = 2000


@dataclass(frozen=True)
class Sample:
    ttft_s: float
    timings: StageTimings

    @property
    def total_s(self) -> float:
        return self.timings.transfer_exposed_s + self.timings.transfer_hidden_s

    @property
    def exposed_share(self) -> float:
        return self.timings.transfer_exposed_s / self.total_s


def spec_of(role: Role, index: int, path: Path, layer_groups: int, options: argparse.Namespace) -> WorkerSpec:
    return WorkerSpec(
        worker_id=f"m/{role.value}/{index}",
        incarnation=1,
        role=role,
        model=ModelConfig(
            name="m",
            source=options.model,
            engine=EngineConfig(kv_pool_tokens=8192, prefix_cache=False),
            prefill=PrefillConfig(
                layer_groups=layer_groups, chunk_tokens=options.chunk_tokens, block_tokens=options.prefill_block_tokens
            ),
            decode=DecodeConfig(local_prefill="never"),
        ),
        model_path=str(path),
        transfer=TransferConfig(transports=(options.transport,)),
        cluster_token=TOKEN,
        logging=LoggingConfig(level="warning"),
    )


async def measure(stub: worker_pb2_grpc.DecodeStub, prefill: WorkerRef, prompt: Sequence[int]) -> Sample:
    request = Request("benchmark", "m", tuple(prompt), SamplingParams(max_tokens=1, seed=0), 1, timeout_s=120.0)
    message = worker_pb2.GenerateRequest(request=request_to_wire(request), prefill=[worker_ref_to_wire(prefill)])
    sent_s = time.perf_counter()
    timings, ttft_s = StageTimings(), 0.0
    async for event in stub.Generate(message, timeout=120):
        if event.HasField("started"):
            ttft_s = time.perf_counter() - sent_s
            timings = started_from_wire(event.started).timings
    return Sample(ttft_s, timings)


async def run(options: argparse.Namespace) -> dict[str, list[Sample]]:
    path = resolve(options.model, home=pdserve_home()).path
    rng = random.Random(options.seed)
    samples: dict[str, list[Sample]] = {"whole chunks": [], "layer groups": []}
    async with AsyncExitStack() as stack:
        decode = await stack.enter_async_context(worker(spec_of(Role.DECODE, 0, path, 1, options)))
        prefills = {
            "whole chunks": await stack.enter_async_context(worker(spec_of(Role.PREFILL, 0, path, 1, options))),
            "layer groups": await stack.enter_async_context(
                worker(spec_of(Role.PREFILL, 1, path, options.layer_groups, options))
            ),
        }
        channel = connect(decode.address, TOKEN)
        stack.push_async_callback(channel.close, None)
        stub = worker_pb2_grpc.DecodeStub(channel)

        def prompt() -> list[int]:
            return [rng.randrange(100, 40_000) for _ in range(options.prompt_tokens)]

        for _ in range(WARM_UPS):
            for prefill in prefills.values():
                await measure(stub, prefill, prompt())
        for block in range(options.blocks):
            names = list(prefills)
            order = (names, names[::-1]) if block % 2 == 0 else (names[::-1], names)
            for name in (*order[0], *order[1]):
                samples[name].append(await measure(stub, prefills[name], prompt()))
    return samples


def interval(ratios: Sequence[float]) -> tuple[float, float]:
    rng = random.Random(0)
    medians = sorted(statistics.median(rng.choices(ratios, k=len(ratios))) for _ in range(BOOTSTRAPS))
    return medians[int(0.025 * BOOTSTRAPS)], medians[int(0.975 * BOOTSTRAPS)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--prompt-tokens", type=int, default=1024)
    parser.add_argument("--chunk-tokens", type=int, default=512)
    parser.add_argument("--layer-groups", type=int, default=PrefillConfig().layer_groups)
    parser.add_argument("--transport", choices=("shm", "tcp", "tcp_int8", "nixl"), default="shm")
    parser.add_argument("--prefill-block-tokens", type=int)
    parser.add_argument("--blocks", type=int, default=6, help="ABBA blocks, four requests each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    load_before = os.getloadavg()[0]
    samples = asyncio.run(run(options))
    load_after = os.getloadavg()[0]

    print(f"{options.model}, {options.prompt_tokens} tokens in chunks of {options.chunk_tokens}, {options.transport}")
    print(f"{platform.machine()}, {os.cpu_count()} cores, load average {load_before:.2f} before, {load_after:.2f} after")
    print(f"{'':14}{'TTFT ms':>10}{'MiB':>8}{'total ms':>10}{'exposed ms':>12}{'exposed share':>15}")
    for name, taken in samples.items():
        middle = {
            "ttft": statistics.median(sample.ttft_s for sample in taken) * 1e3,
            "total": statistics.median(sample.total_s for sample in taken) * 1e3,
            "exposed": statistics.median(sample.timings.transfer_exposed_s for sample in taken) * 1e3,
            "share": statistics.median(sample.exposed_share for sample in taken),
        }
        mebibytes = taken[0].timings.transfer_bytes / 2**20
        print(
            f"{name:14}{middle['ttft']:10.1f}{mebibytes:8.1f}{middle['total']:10.1f}{middle['exposed']:12.2f}{middle['share']:15.1%}"
        )
    ratios = [b.ttft_s / a.ttft_s for a, b in zip(samples["whole chunks"], samples["layer groups"], strict=True)]
    low, high = interval(ratios)
    print(f"TTFT, layer groups / whole chunks: {statistics.median(ratios):.3f} (95 % {low:.3f} to {high:.3f}), n={len(ratios)}")
    if options.json is not None:
        result = {name: [asdict(sample) for sample in taken] for name, taken in samples.items()}
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
