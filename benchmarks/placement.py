"""What placement is worth: simulations that run the router's own policies, and the time of one decision.

    python -m benchmarks.placement --trace FILE                      all policies at about 60, 90 and 110 % of what they can do
    python -m benchmarks.placement --trace FILE --requests 2000      a small one
    python -m benchmarks.placement --trace FILE --noise 0.2          service times that nobody can predict exactly
    python -m benchmarks.placement --conditional                     prefill here or there, against the better of both
    python -m benchmarks.placement --decisions                       time of one decision at 10 to 1,000 workers

A load is the share of time that the prefill workers are busy under the policy `predicted`, as a run at 60 % has it; the speed of
workers is set for it, so every policy meets the same workers. `--json` prints one object per line instead of tables.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.placing import conditional, policies
from common.clock import ManualClock
from common.config import PlacementConfig
from common.load import StepSample, WorkerLoad, WorkerReport, WorkerShape
from common.types import Role, WorkerRef, WorkerState
from router.placement.membership import Prompt, WorkerView
from router.placement.placer import Placer


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.placement", description="Simulates placement policies.")
    parser.add_argument("--trace", type=Path, help="CSV or JSON lines with arrivals, lengths and block ids")
    parser.add_argument("--requests", type=int, help="only the first so many of the trace (or prompts per cell)")
    parser.add_argument("--workers", type=int, default=8, help="prefill workers")
    parser.add_argument("--blocks", type=int, default=2000, help="blocks of 512 tokens in each worker's cache")
    parser.add_argument("--loads", default="0.6,0.9,1.1")
    parser.add_argument("--policies", default=",".join(policies.POLICIES))
    parser.add_argument("--noise", type=float, default=0.0, help="sigma of a lognormal factor on service times")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--conditional", action="store_true")
    parser.add_argument("--decisions", action="store_true")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args(arguments)
    if not (given.trace or given.conditional or given.decisions):
        parser.error("nothing to do: give --trace, --conditional or --decisions")
    if given.trace:
        try:
            rows = policies.read_trace(given.trace, given.requests)
        except (OSError, ValueError) as error:
            parser.error(str(error))
        _policies(rows, given)
    if given.conditional:
        _conditional(given)
    if given.decisions:
        _decisions(given)
    return 0


def _policies(rows: list[policies.TraceRow], given: argparse.Namespace) -> None:
    share = policies.work_share(rows, num_workers=given.workers, capacity_blocks=given.blocks)
    for load in map(float, given.loads.split(",")):
        rate = share * policies.rate_for(rows, load=load, num_workers=given.workers)
        found = []
        for policy in given.policies.split(","):
            outcome = policies.simulate(
                rows,
                policy=policy,
                rate=rate,
                load=load,
                num_workers=given.workers,
                capacity_blocks=given.blocks,
                noise=given.noise,
                seed=given.seed,
            )
            found.append(outcome.summary())
            _show(found[-1], given, header=len(found) == 1)
        means = {str(one["policy"]): float(one["mean_s"]) for one in found}
        weights = [means[name] for name in policies.WEIGHT_BASED if name in means]
        if "predicted" in means and weights and not given.json:
            against = f"  predicted is {means['predicted'] / min(weights):.2f} of the best weight-based mean"
            if "min_ttft" in means:
                against += f", {means['predicted'] / means['min_ttft']:.2f} of min_ttft"
            sys.stdout.write(f"{against} (load {load}, {rate:.0f} tokens/s per worker)\n\n")


def _conditional(given: argparse.Namespace) -> None:
    rows = []
    for row in conditional.cells(num_prompts=given.requests or 150, seed=given.seed):
        rows.append(row)
        _show(row, given, header=len(rows) == 1)
    for name in conditional.WAYS:
        mean, worst = conditional.over_oracle(rows, name)
        _show({"way": name, "over_oracle": mean, "worst_cell": worst}, given, header=name == "router")


def _decisions(given: argparse.Namespace) -> None:
    for index, num_workers in enumerate((10, 100, 1000)):
        for share, text in ((0.02, "few hold the prompt"), (0.9, "most hold a part of it")):
            _show(decision_time(num_workers, share) | {"prompt": text}, given, header=index == 0 and share == 0.02)


def decision_time(num_workers: int, holding: float, *, num_blocks: int = 256, turns: int = 300) -> dict[str, float | str]:
    """Microseconds of `place`, and of `open` with all that it books, for a prompt of so many blocks."""
    clock, dice = ManualClock(1.0), random.Random(1)
    placer = Placer(PlacementConfig(), clock=clock, draw=dice)
    shape = WorkerShape(16, b"f", 10_000, 512)
    refs = [
        (WorkerRef(f"{role.value}{index:04}", 1, "x"), role)
        for role in (Role.PREFILL, Role.DECODE)
        for index in range(num_workers // 2)
    ]
    placer.sync(tuple(WorkerView(ref, role, "m", WorkerState.READY, 0) for ref, role in refs))
    keys = tuple(range(1, num_blocks + 1))
    for ref, role in refs:
        held = keys[: dice.choice((8, 8, 8, 32, 64, 100, 200, 256))] if dice.random() < holding else ()
        load = WorkerLoad(
            running=4, queued_tokens=dice.randrange(20_000) if role is Role.PREFILL else 0, decoding=dice.randrange(32)
        )
        steps = tuple(StepSample(size, size * size / 2, 0.005 + size * 1e-4) for size in range(100, 1100, 100))
        placer.report(ref, WorkerReport(1, load, shape, registered=held, steps=steps))
    place_s, open_s = [], []
    for turn in range(turns):
        prompt = Prompt(num_blocks * 16 + 7, 100, 1, 16, keys[: num_blocks - turn % 7])
        began_s = time.perf_counter()
        placement = placer.place("m", prompt)
        placed_s = time.perf_counter()
        dispatched = placer.open(placement, "m", prompt)
        place_s.append(placed_s - began_s)
        open_s.append(time.perf_counter() - placed_s)
        dispatched.close()
        clock.advance(0.01)
    return {
        "workers": num_workers,
        "place_p50_us": statistics.median(place_s) * 1e6,
        "place_p99_us": sorted(place_s)[int(turns * 0.99)] * 1e6,
        "open_p50_us": statistics.median(open_s) * 1e6,
    }


def _show(row: dict[str, float | str], given: argparse.Namespace, *, header: bool) -> None:
    if given.json:
        sys.stdout.write(json.dumps(row) + "\n")
        return
    if header:
        sys.stdout.write("  ".join(f"{name:>12}" for name in row) + "\n")
    cells = (f"{value:>12.3f}" if isinstance(value, float) else f"{value:>12}" for value in row.values())
    sys.stdout.write("  ".join(cells) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
