"""Simulates clusters, one per seed, and says what went wrong. Exit code 1 if anything did.

python tests/simulation/run.py                          10,000 seeds on two processes
python tests/simulation/run.py --first 10001 --seeds 990000
python tests/simulation/run.py --replay 4711            the history of one seed
python tests/simulation/run.py --replay 4711 --smallest ... without all that the failure does not need
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent


def main() -> int:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.path[0] = str(HERE.parent)
    sys.path.insert(0, str(HERE.parent.parent))
    from support.simulation import campaign
    from support.simulation.scenario import draw_scenario
    from support.simulation.world import simulate, simulated_rpc

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--first", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=10_000)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--replay", type=int, default=None)
    parser.add_argument("--smallest", action="store_true")
    chosen = parser.parse_args()

    def say(line: str) -> None:
        sys.stdout.write(line + "\n")

    if chosen.replay is not None:
        scenario = draw_scenario(chosen.replay)
        if chosen.smallest:
            scenario = campaign.smallest(scenario, say)
        say(scenario.text())
        with simulated_rpc():
            verdict = simulate(scenario, say)
        for complaint in verdict.complaints:
            say(f"WRONG: {complaint}")
        return 0 if verdict.ok else 1
    started_s = time.perf_counter()
    if chosen.processes > 1:
        report = campaign.run_in_processes(chosen.first, chosen.seeds, chosen.processes)
    else:
        report = campaign.run(range(chosen.first, chosen.first + chosen.seeds))
    say(report.text())
    say(f"{time.perf_counter() - started_s:.1f} s")
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
