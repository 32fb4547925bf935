"""Placement policies over a trace: the router's part is the product, the workers are simulated.

`Placer` with index, ledger, predictors and policy is fed as in production: by reports of workers (changes of their caches, load,
samples of steps) every 100 ms, and by its own dispatches; how long prompts take it learns from the samples. A simulated worker
computes one prompt at a time, first come, first served, over a cache of blocks, least recently used out first.

A trace has the columns arrival_ms, input_tokens, output_tokens and block512_hash_ids (`"0 14-16"`), or is JSON lines with
timestamp, input_length, output_length and hash_ids; a block is 512 tokens.
"""

from __future__ import annotations

import csv
import heapq
import json
import random
import statistics
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from common.clock import ManualClock
from common.config import PlacementConfig
from common.load import StepSample, WorkerLoad, WorkerReport, WorkerShape, pairs
from common.types import Role, StageTimings, Started, WorkerRef, WorkerState
from router.placement.membership import Prompt, WorkerView
from router.placement.placer import Dispatched, Placer

MODEL = "m"
BLOCK_TOKENS = 512
POLICIES = (
    "predicted",
    "min_ttft",
    "dynamo",
    "weighted",
    "cache_aware",
    "loadaware",
    "aibrix",
    "least_load",
    "round_robin",
    "random",
)
WEIGHT_BASED = ("dynamo", "weighted", "cache_aware", "loadaware", "aibrix")


@dataclass(frozen=True, slots=True)
class TraceRow:
    at_s: float
    input_tokens: int
    output_tokens: int
    blocks: tuple[int, ...]


def read_trace(path: Path, num_requests: int | None) -> list[TraceRow]:
    """Raises ValueError for a file that is no trace."""
    rows: list[TraceRow] = []
    with path.open(newline="", encoding="utf-8") as file:
        if path.suffix == ".jsonl":
            source: Iterator[tuple[float, int, int, tuple[int, ...]]] = (
                (float(row["timestamp"]), int(row["input_length"]), int(row["output_length"]), tuple(row["hash_ids"]))
                for row in map(json.loads, file)
            )
        else:
            source = (
                (
                    float(row["arrival_ms"]),
                    int(row["input_tokens"]),
                    int(row["output_tokens"]),
                    tuple(_expand(row.get("block512_hash_ids") or "")),
                )
                for row in csv.DictReader(file)
            )
        try:
            for arrival_ms, num_input, num_output, blocks in source:
                rows.append(TraceRow(arrival_ms / 1e3, max(1, num_input), num_output, blocks))
                if len(rows) == num_requests:
                    break
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path} is no trace: {error!r}") from error
    if not rows:
        raise ValueError(f"{path} is empty")
    first_s = rows[0].at_s
    return [TraceRow(row.at_s - first_s, row.input_tokens, row.output_tokens, row.blocks) for row in rows]


def _expand(runs: str) -> Iterator[int]:
    """`"0 14-16"` -> 0, 14, 15, 16."""
    for run in runs.split():
        first, _, last = run.partition("-")
        yield from range(int(first), int(last or first) + 1)


@dataclass(frozen=True, slots=True)
class Speed:
    """The truth about a worker: seconds of a prompt."""

    fixed_s: float
    per_token_s: float
    per_pair_s: float

    @classmethod
    def of_rate(cls, tokens_per_s: float) -> Speed:
        """As fast as this on short prompts; attention to 53k tokens costs as much again, as in a dense model of 70B."""
        return cls(0.015, 1.0 / tokens_per_s, 1.0 / tokens_per_s / 53_000)

    def prompt_s(self, new: int, total: int) -> float:
        return self.fixed_s + self.per_token_s * new + self.per_pair_s * pairs(new, total)


@dataclass
class PrefillSim:
    """One prompt at a time, first come, first served; blocks least recently used out first."""

    ref: WorkerRef
    speed: Speed
    capacity_blocks: int
    cache: OrderedDict[int, None] = field(default_factory=OrderedDict)
    queue: list[_Job] = field(default_factory=list)
    running: _Job | None = None
    changes: dict[int, bool] = field(default_factory=dict)
    taken: list[int] = field(default_factory=list)
    steps: list[StepSample] = field(default_factory=list)
    sequence: int = 0
    busy_s: float = 0.0
    ends_s: float = 0.0

    def cached_blocks(self, blocks: Sequence[int]) -> int:
        for position, block in enumerate(blocks):
            if block not in self.cache:
                return position
        return len(blocks)

    def keep(self, blocks: Sequence[int]) -> None:
        for block in reversed(blocks):
            if block not in self.cache:
                self.changes[block] = True
            self.cache[block] = None
            self.cache.move_to_end(block)
        while len(self.cache) > self.capacity_blocks:
            evicted, _ = self.cache.popitem(last=False)
            self.changes[evicted] = False

    def report(self, now_s: float) -> WorkerReport:
        self.sequence += 1
        tokens, work = 0, 0.0
        for job in self.queue:
            tokens += job.expected_new
            work += pairs(job.expected_new, job.row.input_tokens)
        if self.running is not None:  # what is left of it
            share = max(0.0, self.ends_s - now_s) / max(1e-9, self.running.service_s)
            tokens += round(self.running.new * share)
            work += pairs(self.running.new, self.running.row.input_tokens) * share
        whole = self.sequence == 1
        report = WorkerReport(
            sequence=self.sequence,
            load=WorkerLoad(
                running=int(self.running is not None),
                waiting=len(self.queue),
                queued_tokens=tokens,
                queued_pairs=work,
                blocks_free=self.capacity_blocks,
            ),
            shape=WorkerShape(BLOCK_TOKENS, b"simulated", self.capacity_blocks, 1 << 30) if whole else None,
            dispatches=tuple(self.taken),
            registered=tuple(key for key, there in self.changes.items() if there),
            evicted=tuple(key for key, there in self.changes.items() if not there) if not whole else (),
            steps=tuple(self.steps),
        )
        self.changes, self.taken, self.steps = {}, [], []
        return report


@dataclass
class _Job:
    row: TraceRow
    dispatched: Dispatched
    expected_new: int
    new: int = 0
    service_s: float = 0.0


@dataclass
class Outcome:
    policy: str
    load: float
    ttft_s: list[float] = field(default_factory=list)
    hit_tokens: int = 0
    prompt_tokens: int = 0
    busy: float = 0.0
    decision_us: float = 0.0

    def summary(self) -> dict[str, float | str]:
        ordered = sorted(self.ttft_s)
        return {
            "policy": self.policy,
            "load": self.load,
            "mean_s": statistics.fmean(ordered),
            "p50_s": ordered[len(ordered) // 2],
            "p90_s": ordered[int(len(ordered) * 0.9)],
            "p99_s": ordered[int(len(ordered) * 0.99)],
            "within_10_s": sum(value <= 10 for value in ordered) / len(ordered),
            "hit": self.hit_tokens / self.prompt_tokens,
            "busy": self.busy,
            "decision_us": self.decision_us,
        }


def simulate(
    rows: Sequence[TraceRow],
    *,
    policy: str,
    rate: float,
    load: float = 0.0,
    num_workers: int = 8,
    capacity_blocks: int = 2000,
    noise: float = 0.0,
    externality: float | None = None,
    seed: int = 1,
    interval_s: float = 0.1,
) -> Outcome:
    """One policy over one trace. `rate` in tokens per second and worker; `noise` is the sigma of a lognormal factor."""
    settings = {"policy": policy} if externality is None else {"policy": policy, "externality": externality}
    clock = ManualClock()
    placer = Placer(PlacementConfig.model_validate(settings), clock=clock, draw=random.Random(seed))
    dice = random.Random(seed + 1)
    speed = Speed.of_rate(rate)
    decode = WorkerRef("d", 1, "d")
    workers = [PrefillSim(WorkerRef(f"p{index:03}", 1, f"p{index}"), speed, capacity_blocks) for index in range(num_workers)]
    by_ref = {worker.ref: worker for worker in workers}
    views = [WorkerView(decode, Role.DECODE, MODEL, WorkerState.READY, 0)]
    views += [WorkerView(worker.ref, Role.PREFILL, MODEL, WorkerState.READY, 0) for worker in workers]
    placer.sync(tuple(views))
    outcome = Outcome(policy, load, prompt_tokens=sum(row.input_tokens for row in rows))
    # (time, order, kind, subject): a report of a worker, the end of a prompt, or an arrival
    events: list[tuple[float, int, int, object]] = []
    counter = 0

    def push(at_s: float, kind: int, subject: object) -> None:
        nonlocal counter
        counter += 1
        heapq.heappush(events, (at_s, counter, kind, subject))

    arrivals = iter(rows)
    left = len(rows)

    def next_arrival() -> None:
        row = next(arrivals, None)
        if row is not None:
            push(row.at_s, 2, row)

    def start(worker: PrefillSim, now_s: float) -> None:
        job = worker.running = worker.queue.pop(0)
        total = job.row.input_tokens
        hit = min(worker.cached_blocks(job.row.blocks) * BLOCK_TOKENS, (total - 1) // BLOCK_TOKENS * BLOCK_TOKENS)
        job.new = total - hit
        outcome.hit_tokens += hit
        job.service_s = speed.prompt_s(job.new, total) * (dice.lognormvariate(0.0, noise) if noise else 1.0)
        worker.busy_s += job.service_s
        worker.ends_s = now_s + job.service_s
        push(worker.ends_s, 1, worker)

    for index, worker in enumerate(workers):
        push(interval_s * index / num_workers, 0, worker)
    next_arrival()
    decided_s = 0.0
    while left:
        now_s, _, kind, subject = heapq.heappop(events)
        clock.advance(now_s - clock.monotonic_s())
        if kind == 0 and isinstance(subject, PrefillSim):
            placer.report(subject.ref, subject.report(now_s))
            push(now_s + interval_s, 0, subject)
        elif kind == 1 and isinstance(subject, PrefillSim) and subject.running is not None:
            job, subject.running = subject.running, None
            total = job.row.input_tokens
            subject.steps.append(StepSample(job.new, pairs(job.new, total), job.service_s))
            subject.keep(job.row.blocks[: total // BLOCK_TOKENS])
            outcome.ttft_s.append(now_s - job.row.at_s)
            job.dispatched.started(Started(StageTimings(), 0))
            job.dispatched.close()
            left -= 1
            if subject.queue:
                start(subject, now_s)
        elif isinstance(subject, TraceRow):
            prompt = Prompt(
                num_tokens=subject.input_tokens,
                output_tokens=0,
                block_tokens=BLOCK_TOKENS,
                keys=subject.blocks[: subject.input_tokens // BLOCK_TOKENS],
            )
            began_s = time.perf_counter()
            placement = placer.place(MODEL, prompt)
            dispatched = placer.open(placement, MODEL, prompt)
            decided_s += time.perf_counter() - began_s
            worker = by_ref[placement.prefill[0]]
            worker.taken.append(dispatched.dispatch_id)
            new = subject.input_tokens - min(worker.cached_blocks(prompt.keys) * BLOCK_TOKENS, subject.input_tokens - 1)
            worker.queue.append(_Job(subject, dispatched, expected_new=new))
            if worker.running is None:
                start(worker, now_s)
            next_arrival()
    outcome.busy = sum(worker.busy_s for worker in workers) / (num_workers * clock.monotonic_s())
    outcome.decision_us = decided_s / len(rows) * 1e6
    return outcome


def rate_for(rows: Sequence[TraceRow], *, load: float, num_workers: int, cached: float = 0.25) -> float:
    """Tokens per second of a worker at which so many are busy for this share of the trace's time, if so much were cached."""
    tokens = work = 0.0
    for row in rows:
        new = row.input_tokens * (1.0 - cached)
        tokens += new
        work += pairs(round(new), row.input_tokens)
    unit = Speed.of_rate(1.0)
    available_s = load * num_workers * rows[-1].at_s - unit.fixed_s * len(rows)
    return (unit.per_token_s * tokens + unit.per_pair_s * work) / max(1e-9, available_s)


def work_share(rows: Sequence[TraceRow], *, num_workers: int, capacity_blocks: int) -> float:
    """Of the work that `rate_for` reckons with, what the policy `predicted` leaves to be done when there is time enough."""
    load = 0.6
    rate = rate_for(rows, load=load, num_workers=num_workers)
    found = simulate(rows, policy="predicted", rate=rate, num_workers=num_workers, capacity_blocks=capacity_blocks)
    return found.busy / load
