"""A campaign: pools that are scaled, flipped, drained, rolled and left to the autoscaler, minute after minute, under a load
whose kind changes; every answer is checked to the last bit.

Prints one line per order and, at the end, what was served, what was wrong, and how long flips took from drained to ready. Ends
with status 1 if any request failed or got other tokens than it got alone.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.rpc import connect
from common.wire.registry_pb2 import ClusterSnapshot, StatusRequest
from common.wire.registry_pb2_grpc import ControlStub
from deploy.cluster_state import running_state
from support.cluster import RunningCluster, launched
from support.exact_load import ExactLoad, asks
from support.tiny_models import make_tiny_model

AUTOSCALING = {
    "prefill": {"max_replicas": 3},
    "decode": {"max_replicas": 3},
    "max_workers": 4,
    "target_utilization": 0.3,
    "target_ongoing_requests": 2.0,
    "look_back_period_s": 2.0,
    "flip_delay_s": 1.0,
    "upscale_delay_s": 2.0,
    "downscale_delay_s": 15.0,
    "cooldown_s": 1.0,
    "interval_s": 0.5,
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Scaling under load, checked to the last bit.")
    parser.add_argument("--seconds", type=float, default=180.0)
    parser.add_argument("--clients", type=int, default=6)
    parser.add_argument("--model", type=Path, help="folder of a model; the tiny one without it")
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = given.model.expanduser() if given.model else make_tiny_model(folder / "tiny", seed=4)
        model = {
            "name": "tiny",
            "source": str(path),
            "engine": {"dtype": "float32", "exact": True, "kv_pool_tokens": 8192, "threads": 1},
            "decode": {"local_prefill": "never"},
            "autoscaling": AUTOSCALING,
        }
        with launched(folder, model_path=path, name="scaling", settings={"models": [model]}) as cluster:
            return _campaign(cluster, folder, given)


def _campaign(cluster: RunningCluster, folder: Path, given: argparse.Namespace) -> int:
    draw = random.Random(given.seed)
    kinds = {
        "prompts": asks(8, prompt_tokens=400, max_tokens=2, seed=1),
        "outputs": asks(8, prompt_tokens=20, max_tokens=80, seed=2),
    }
    load = ExactLoad(cluster.base_url, "tiny")
    load.expect([ask for wanted in kinds.values() for ask in wanted])
    failed = 0
    flips: dict[int, float] = {}
    ends_s = time.monotonic() + given.seconds
    phase = 0
    while time.monotonic() < ends_s:
        kind = ("prompts", "outputs")[phase % 2]
        by_itself = phase % 4 >= 2
        with load.asking(kinds[kind], clients=given.clients):
            failed += _phase(cluster, draw, by_itself)
        flips |= _flip_times(_snapshot(cluster, folder))
        whose = "autoscaler" if by_itself else "by hand"
        sys.stdout.write(f"load {kind:8} {whose:11} served {load.served}, wrong {len(load.wrong)}\n")
        sys.stdout.flush()
        phase += 1
    took_s = sorted(flips.values())
    sys.stdout.write(f"served {load.served}, wrong {len(load.wrong)}, orders refused {failed}\n")
    if took_s:
        sys.stdout.write(f"flips {len(took_s)}: median {statistics.median(took_s):.2f} s, longest {took_s[-1]:.2f} s\n")
    for text in load.wrong[:5]:
        sys.stdout.write(f"  {text}\n")
    return 1 if load.wrong else 0


def _phase(cluster: RunningCluster, draw: random.Random, by_itself: bool) -> int:
    """Some orders, or time for the autoscaler. How many orders were refused: a race with what the pool does by itself."""
    if by_itself:
        _order(cluster, "autoscaler", "tiny", "--mode", "on")
        time.sleep(20.0)
        _order(cluster, "autoscaler", "tiny", "--mode", "off")
        return 0
    refused = 0
    for _ in range(3):
        workers = [worker for role in ("prefill", "decode") for worker in cluster.workers(role)]
        chosen = draw.choice(workers)
        other = "decode" if chosen["role"] == "prefill" else "prefill"
        orders = (
            ("scale", "tiny", "--prefill", str(draw.randint(1, 2)), "--decode", str(draw.randint(1, 2))),
            ("flip", chosen["worker_id"], other),
            ("drain", chosen["worker_id"]),
            ("roll", "tiny", "--role", draw.choice(("prefill", "decode"))),
        )
        refused += not _order(cluster, *draw.choice(orders))
    return refused


def _order(cluster: RunningCluster, *arguments: str) -> bool:
    started_s = time.monotonic()
    done = cluster.cli(*arguments, "--cluster", cluster.name, timeout_s=300.0)
    sys.stdout.write(f"  {' '.join(arguments)}: {time.monotonic() - started_s:.1f} s {done.stderr.strip()}\n")
    return done.returncode == 0


def _snapshot(cluster: RunningCluster, folder: Path) -> ClusterSnapshot:
    async def ask() -> ClusterSnapshot:
        state = running_state(folder / "home", cluster.name)
        channel = connect(state.manager_address, state.token)
        try:
            snapshot: ClusterSnapshot = await ControlStub(channel).Status(StatusRequest(), timeout=15.0)
            return snapshot
        finally:
            await channel.close(None)

    return asyncio.run(ask())


def _flip_times(snapshot: ClusterSnapshot) -> dict[int, float]:
    """By the number of the event: from the end of the drain to a worker of the other role that is ready."""
    found: dict[int, float] = {}
    begun: dict[str, Any] = {}
    for event in snapshot.events:
        if event.kind == "flipped":
            begun[event.worker_id] = event
        elif event.kind == "ready" and event.worker_id in begun:
            start = begun.pop(event.worker_id)
            found[start.sequence] = event.at_s - start.at_s
    return found
