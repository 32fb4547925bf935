"""How well placement foretells the time to the first token, of real workers and real models.

    python -m benchmarks.forecast [--models smollm2-135m,gemma3-270m] [--requests 200] [--users 3] [--json F]

Per model one prefill and one decode worker, each a process of its own, and what a router has around its dispatcher, in this
process. A few users ask in a closed loop: prompts of mixed lengths, some of which continue an earlier one, and short answers, so
there is waiting, there are hits in the prefix caches, and prompts are computed here and there. What counts is
|predicted - taken| / taken of the requests after the first ones, by which the predictors learn; the forecast is the one that the
dispatch was decided by, and the time is the dispatcher's own. The models are measured one after the other.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from pathlib import Path

from prometheus_client import CollectorRegistry

from benchmarks.worker_processes import worker
from common.clock import SystemClock
from common.config import Config, EngineConfig, LoggingConfig, ModelConfig, RouterConfig, TransferConfig, pdserve_home
from common.metrics import RouterMetrics
from common.model_store import resolve
from common.rpc import cancel_and_wait
from common.types import Request, Role, SamplingParams
from common.wire import registry_pb2, types_pb2, worker_pb2
from common.worker import WorkerSpec
from router.dispatch import Dispatcher
from router.placement.watching import Watching
from router.registry import Registry

TOKEN = "benchmark"
LENGTHS = (32, 64, 128, 256, 512, 900)
OUTPUT_TOKENS = (2, 16, 48)
LEARNING_SHARE = 0.3  # of the requests, at the beginning
GOES_ON = 0.4  # share of prompts that continue an earlier one
MOST_TOKENS = 1800
ROLES = {Role.PREFILL: types_pb2.ROLE_PREFILL, Role.DECODE: types_pb2.ROLE_DECODE}


class Recorded(RouterMetrics):
    """Keeps the forecasts that the dispatcher tells."""

    def __init__(self) -> None:
        super().__init__(CollectorRegistry())
        self.pairs: list[tuple[float, float]] = []

    def forecast(self, model: str, *, predicted_s: float, taken_s: float) -> None:
        self.pairs.append((predicted_s, taken_s))


@asynccontextmanager
async def dispatcher_over(model: str, metrics: Recorded) -> AsyncIterator[Dispatcher]:
    path = resolve(model, home=pdserve_home()).path
    served = ModelConfig(name=model, source=model, engine=EngineConfig(kv_pool_tokens=16_384))
    config, clock = RouterConfig(), SystemClock()
    async with AsyncExitStack() as stack:
        infos = []
        for role in (Role.PREFILL, Role.DECODE):
            spec = WorkerSpec(
                worker_id=f"{model}/{role.value}/0",
                incarnation=1,
                role=role,
                model=served,
                model_path=str(path),
                transfer=TransferConfig(),
                cluster_token=TOKEN,
                logging=LoggingConfig(level="warning"),
            )
            ref = await stack.enter_async_context(worker(spec))
            infos.append(
                worker_pb2.InfoReply(
                    worker_id=ref.worker_id, incarnation=1, role=ROLES[role], model=model, state="ready", address=ref.address
                )
            )
        registry = Registry(Config(models=(served,)), manager_address="", cluster_token=TOKEN, clock=clock)
        dispatcher = Dispatcher(config, registry, cluster_token=TOKEN, clock=clock, metrics=metrics)
        stack.push_async_callback(dispatcher.close)
        watching = Watching(
            config.placement,
            registry,
            dispatcher.placer,
            cluster_token=TOKEN,
            connect_timeout_s=config.connect_timeout_s,
            router_id="benchmark",
            metrics=metrics,
        )
        registry.apply(registry_pb2.ClusterSnapshot(models=[registry_pb2.ModelInfo(name=model)], workers=infos))
        stack.push_async_callback(cancel_and_wait, asyncio.create_task(watching.run()))
        yield dispatcher


async def measure(model: str, options: argparse.Namespace) -> dict[str, float]:
    dice, metrics = random.Random(options.seed), Recorded()
    left = iter(range(options.requests))
    earlier: list[tuple[int, ...]] = []

    def prompt() -> tuple[int, ...]:
        new = tuple(dice.randrange(100, 40_000) for _ in range(dice.choice(LENGTHS)))
        before = dice.choice(earlier) if earlier and dice.random() < GOES_ON else ()
        earlier.append((*before, *new)[:MOST_TOKENS])
        return earlier[-1]

    async def user(dispatcher: Dispatcher) -> None:
        for number in left:
            sampling = SamplingParams(max_tokens=dice.choice(OUTPUT_TOKENS), seed=number)
            request = Request(f"r{number}", model, prompt(), sampling, timeout_s=120.0)
            async with aclosing(dispatcher.generate(request)) as events:
                async for _ in events:
                    continue

    async with dispatcher_over(model, metrics) as dispatcher, asyncio.TaskGroup() as users:
        for _ in range(options.users):
            users.create_task(user(dispatcher))
    judged = metrics.pairs[int(LEARNING_SHARE * options.requests) :]
    if not judged:
        return {"judged": 0.0}
    errors = sorted(abs(predicted - taken) / taken for predicted, taken in judged)
    return {
        "judged": float(len(errors)),
        "median_error": statistics.median(errors),
        "p90_error": errors[int(0.9 * len(errors))],
        "median_ratio": statistics.median(predicted / taken for predicted, taken in judged),
        "median_ttft_s": statistics.median(taken for _, taken in judged),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="smollm2-135m,gemma3-270m")
    parser.add_argument("--requests", type=int, default=200, help="per model")
    parser.add_argument("--users", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found = {}
    for model in options.models.split(","):
        before = os.getloadavg()[0]
        found[model] = asyncio.run(measure(model, options))
        figures = "  ".join(f"{name} {value:.3f}" for name, value in found[model].items())
        print(f"{model}: {figures}  (load average {before:.1f} before, {os.getloadavg()[0]:.1f} after)", flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
