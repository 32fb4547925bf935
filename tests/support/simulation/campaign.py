"""Many seeds, one after the other or in several processes; and what to do with one that fails: replay it, boil it down.

run(first, count) -> Report: how requests ended, what failed        smallest(scenario) -> what still fails of it
"""

from __future__ import annotations

import multiprocessing
import os
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field

from support.simulation.scenario import Scenario, draw_scenario
from support.simulation.world import Verdict, simulate, simulated_rpc

CHUNK = 200
MAX_SHRINKING_RUNS = 400
SHOWN = 10  # failures


@dataclass
class Report:
    seeds: int = 0
    endings: Counter[str] = field(default_factory=Counter)
    points: Counter[str] = field(default_factory=Counter)
    failures: dict[int, list[str]] = field(default_factory=dict)  # seed -> complaints
    stale_fetches: int = 0
    history: int = 0
    virtual_s: float = 0.0
    longest_drain_s: float = 0.0
    turns: int = 0

    def add(self, verdict: Verdict) -> None:
        self.seeds += 1
        self.endings.update(ending.how or "never" for ending in verdict.endings)
        self.points.update({point.value: count for point, count in verdict.points.items()})
        self.stale_fetches += verdict.stale_fetches
        if not verdict.ok:
            self.failures[verdict.scenario.seed] = verdict.complaints
        self.history ^= hash((verdict.scenario.seed, verdict.history))
        self.virtual_s += verdict.virtual_s
        self.longest_drain_s = max(self.longest_drain_s, verdict.drained_s)
        self.turns += verdict.num_turns

    def merge(self, other: Report) -> None:
        self.seeds += other.seeds
        self.endings.update(other.endings)
        self.points.update(other.points)
        self.stale_fetches += other.stale_fetches
        self.failures.update(other.failures)
        self.history ^= other.history
        self.virtual_s += other.virtual_s
        self.longest_drain_s = max(self.longest_drain_s, other.longest_drain_s)
        self.turns += other.turns

    def text(self) -> str:
        endings = ", ".join(f"{how} {count}" for how, count in self.endings.most_common())
        points = ", ".join(f"{point} {count}" for point, count in sorted(self.points.items()))
        lines = [
            f"{self.seeds} seeds, {sum(self.endings.values())} requests, {self.virtual_s:.0f} s of virtual time",
            f"history {self.history:x}",
            f"endings: {endings}",
            f"passed: {points}",
            f"sources that were given up and fetched with other bytes in them: {self.stale_fetches}",
            f"longest return of what was lent, after the last request: {self.longest_drain_s:.3f} s",
            f"failures: {len(self.failures)}",
        ]
        for seed, complaints in sorted(self.failures.items())[:SHOWN]:
            lines += [f"  seed {seed}: {complaints[0]}", f"    {replay_command(seed)}"]
        return "\n".join(lines)


def replay_command(seed: int) -> str:
    return f"python tests/simulation/run.py --replay {seed}"


def run(seeds: Iterable[int]) -> Report:
    report = Report()
    with simulated_rpc():
        for seed in seeds:
            report.add(simulate(draw_scenario(seed)))
    return report


def run_in_processes(first: int, count: int, processes: int) -> Report:
    chunks = [range(start, min(start + CHUNK, first + count)) for start in range(first, first + count, CHUNK)]
    report = Report()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        for part in pool.map(run, chunks):
            report.merge(part)
    return report


def first_failure(seeds: Iterable[int]) -> Verdict | None:
    with simulated_rpc():
        for seed in seeds:
            verdict = simulate(draw_scenario(seed))
            if not verdict.ok:
                return verdict
    return None


def smallest(scenario: Scenario, say: Callable[[str], None] = lambda _: None) -> Scenario:
    """Leaves out what can be left out, one thing at a time, as long as anything still fails."""
    runs = 0
    with simulated_rpc():
        again = True
        while again:
            again = False
            for what, smaller in scenario.smaller():
                runs += 1
                if runs > MAX_SHRINKING_RUNS:
                    return scenario
                if not simulate(smaller).ok:
                    say(f"fails as well {what}")
                    scenario, again = smaller, True
                    break
    return scenario
