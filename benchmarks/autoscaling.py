"""What the autoscaler is worth: its law in virtual time over a day and a night, against the best fixed split of as many workers.

    python -m benchmarks.autoscaling                     a day of 4 hours, 8 workers at most (some minutes)
    python -m benchmarks.autoscaling --hours 0.5         a small one
    python -m benchmarks.autoscaling --json              one object per row

The load: long prompts with short answers by day (documents), short prompts with long answers in the evening (conversation),
little of both at night, with steps between them. Every fixed split is tried on the same arrivals, and the best one is
shown with the autoscaler: the share of requests that kept TTFT and TPOT, and the worker-hours that were used. `flips off` is the
autoscaler that may only add and remove workers.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.pool_simulation import Hardware, Job, Mix, PoolSimulation, arrivals, goodput
from common.config import AutoscalingConfig
from deploy.autoscaler.law import Act

TTFT_S, TPOT_S = 2.0, 0.05


@dataclass(frozen=True, slots=True)
class Row:
    name: str
    goodput: float
    worker_hours: float
    flips: int
    grown: int
    shrunk: int


def day(hours: float, per_s: float) -> Callable[[float], Mix]:
    """Morning to night within `hours`."""
    documents, conversation = (4000, 40), (300, 600)

    def mix_at(at_s: float) -> Mix:
        phase = (at_s / 3600.0 / hours) % 1.0
        swell = 0.75 + 0.25 * math.sin(phase * 8 * math.pi)
        if phase < 0.35:
            return Mix(per_s * swell, *documents)
        if phase < 0.70:
            return Mix(per_s * swell, *conversation)
        return Mix(per_s * 0.15, *(documents if phase < 0.85 else conversation))

    return mix_at


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.autoscaling", description="Simulates the autoscaler.")
    parser.add_argument("--hours", type=float, default=4.0, help="length of the day")
    parser.add_argument("--workers", type=int, default=8, help="most workers of both pools together")
    parser.add_argument("--per-s", type=float, default=4.5, help="requests per second by day")
    parser.add_argument("--start-s", type=float, default=60.0, help="how long a new worker takes to serve")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args(arguments)
    if given.workers < 2 or given.hours <= 0 or given.per_s <= 0:
        parser.error("--workers must be 2 at least, --hours and --per-s above 0")
    until_s = 3600.0 * given.hours
    hardware = Hardware(start_s=given.start_s)
    rows = []
    for prefill in range(1, given.workers):
        jobs = list(arrivals(day(given.hours, given.per_s), until_s, seed=given.seed))
        simulation = PoolSimulation(jobs, prefill=prefill, decode=given.workers - prefill, hardware=hardware)
        simulation.run(until_s)
        rows.append(_row(f"fixed {prefill} + {given.workers - prefill}", simulation, jobs))
    best = max(rows, key=lambda row: row.goodput)
    chosen = [best]
    for name, changes in (
        ("autoscaler", {}),
        ("autoscaler, all workers kept", {"downscale_delay_s": 1e9}),
        ("autoscaler, flips off", {"flip_delay_s": 1e9}),
    ):
        jobs = list(arrivals(day(given.hours, given.per_s), until_s, seed=given.seed))
        simulation = PoolSimulation(
            jobs,
            prefill=given.workers // 2,
            decode=given.workers - given.workers // 2,
            config=_config(given.workers, changes),
            hardware=hardware,
        )
        simulation.run(until_s)
        chosen.append(_row(name, simulation, jobs))
    _print(chosen, len(jobs), as_json=given.json)
    return 0


def _config(workers: int, changes: dict[str, float]) -> AutoscalingConfig:
    pool = {"max_replicas": workers - 1}
    return AutoscalingConfig.model_validate(
        {
            "mode": "on",
            "prefill": pool,
            "decode": pool,
            "max_workers": workers,
            "target_ttft_s": 0.5 * TTFT_S,
            "target_tpot_s": 0.9 * TPOT_S,
            **changes,
        }
    )


def _row(name: str, simulation: PoolSimulation, jobs: Sequence[Job]) -> Row:
    acts = [decision.act for _, decision in simulation.decisions]
    return Row(
        name,
        goodput(jobs, ttft_s=TTFT_S, tpot_s=TPOT_S),
        simulation.worker_s / 3600.0,
        acts.count(Act.FLIP),
        acts.count(Act.GROW),
        acts.count(Act.SHRINK),
    )


def _print(rows: Sequence[Row], num_requests: int, *, as_json: bool) -> None:
    if not as_json:
        sys.stdout.write(f"{num_requests} requests; good: TTFT <= {TTFT_S:g} s and TPOT <= {TPOT_S * 1e3:.0f} ms\n")
        sys.stdout.write(f"{'':30} {'good':>7} {'worker-hours':>13} {'flips':>6} {'grown':>6} {'shrunk':>7}\n")
    for row in rows:
        if as_json:
            sys.stdout.write(json.dumps({name: getattr(row, name) for name in Row.__slots__}) + "\n")
        else:
            sys.stdout.write(
                f"{row.name:30} {row.goodput:7.1%} {row.worker_hours:13.1f} {row.flips:6} {row.grown:6} {row.shrunk:7}\n"
            )


if __name__ == "__main__":
    raise SystemExit(main())
