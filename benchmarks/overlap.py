"""What it gains to plan a decode step while the one before is computed: with it and without, in one process, in turns.

    python -m benchmarks.overlap [--model smollm2-135m] [--batches 1,8,32] [--turns 6] [--threads 1] [--max-tokens 64]
        [--weights int8] [--penalty] [--json out.json]

A worker's core runs on its engine thread, without gRPC: requests are posted, events delivered to an asyncio loop, as in a worker.
All answers of a turn have the same length; nobody guesses. The clock runs from the moment in which all decode until the last
token. Turns go off on on off; tokens must be equal, or the run fails.

First, of turns without overlap: what a step costs the engine's thread, in microseconds of CPU time (medians): `model` is the
runner's call, `schedule` and `account` the scheduler's, `rest` what the loop does between (events, metrics, waking the other
thread). All but the first is the gap that overlap can hide, on a core that has nothing else to do. Then tokens per second with
and without, the median ratio of turns with its bootstrap interval, and the ratio of the process's CPU time, which is what overlap
costs or spares where other work fills the cores. With --penalty every answer has a frequency penalty, so that no step can be
planned ahead: what it costs to ask in vain.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry

from benchmarks.speculation import interval
from common.clock import SystemClock
from common.config import DecodeConfig, EngineConfig
from common.engine.core import Core
from common.engine.engine import Engine, build_engine
from common.engine.loop import EngineLoop
from common.errors import EngineFailure
from common.metrics import WorkerMetrics, WorkerReadings
from common.model_store import pull
from common.types import Request, SamplingParams
from decode_worker.events import Event, Failed, Output
from decode_worker.scheduler import DecodeScheduler

PROMPT_TOKENS = 48


@dataclass
class Turn:
    seconds: float = 0.0
    cpu_s: float = 0.0  # of the process
    num_tokens: int = 0
    steps: int = 0
    steps_ahead: int = 0
    answers: dict[str, list[int]] = field(default_factory=dict)


@dataclass
class Parts:
    """Of steps without overlap, in seconds of the engine's thread: one entry for each step."""

    model: list[float] = field(default_factory=list)
    schedule: list[float] = field(default_factory=list)
    account: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)


@dataclass
class Cell:
    batch: int
    model_us: float
    schedule_us: float
    account_us: float
    rest_us: float
    off_tokens_per_s: float
    on_tokens_per_s: float
    median_ratio: float
    low: float
    high: float
    cpu_ratio: float
    share_ahead: float  # of the steps with overlap
    num_turns: int


def timed(into: list[float], function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any, **named: Any) -> Any:
        started_s = time.thread_time()
        result = function(*arguments, **named)
        into.append(time.thread_time() - started_s)
        return result

    return call


class Bench:
    def __init__(self, engine: Engine, options: argparse.Namespace) -> None:
        self.engine, self.options = engine, options
        self.serial = itertools.count()

    def request(self, index: int, salt: str) -> Request:
        vocab_size = self.engine.architecture.vocab_size
        prompt = tuple(random.Random(index).randrange(vocab_size) for _ in range(PROMPT_TOKENS))
        penalty = 0.1 if self.options.penalty else 0.0
        sampling = SamplingParams(max_tokens=self.options.max_tokens, seed=index, temperature=0.0, frequency_penalty=penalty)
        return Request(str(index), "m", prompt, sampling, cache_salt=salt)

    async def turn(self, batch: int, *, overlap: bool, parts: Parts | None = None) -> Turn:
        engine = self.engine
        config = DecodeConfig(local_prefill="always", max_running=batch)
        scheduler = DecodeScheduler(config, engine.layout, engine.blocks, SystemClock())
        metrics = WorkerMetrics(CollectorRegistry(), model="m", role="decode", read=_nobody_reads)
        core = Core(engine, scheduler, metrics, SystemClock(), ahead=scheduler if overlap else None)
        turn, decoding, started_s, cpu_started_s = Turn(), 0, 0.0, 0.0
        over: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def deliver(events: list[Event]) -> None:
            nonlocal decoding, started_s, cpu_started_s
            for event in events:
                if isinstance(event, Failed):
                    over.set_exception(event.error)
                if isinstance(event, Output):
                    said = [token_id for chunk in event.chunks for token_id in chunk.token_ids]
                    turn.answers.setdefault(event.request_id, []).extend(said)
                    turn.num_tokens += len(said) if decoding == batch else 0
                    decoding += event.started is not None
                    if event.started is not None and decoding == batch:
                        started_s, cpu_started_s = time.perf_counter(), time.process_time()
                    if event.done and all(len(answer) == self.options.max_tokens for answer in turn.answers.values()):
                        turn.seconds, turn.cpu_s = time.perf_counter() - started_s, time.process_time() - cpu_started_s
                        over.set_result(None)

        loop = EngineLoop[Event](core, name="engine")
        salt = f"turn {next(self.serial)}"
        requests = [self.request(index, salt) for index in range(batch)]
        if parts is not None:
            _watch(parts, core, scheduler, engine)
        loop.start(deliver=deliver, on_failure=over.set_exception)
        for request in requests:
            loop.post(scheduler.submit, request, ())
        try:
            await over
        finally:
            await loop.stop()
            if parts is not None:
                del engine.runner.execute  # the class's own again
        turn.steps_ahead = scheduler.totals.steps_ahead
        turn.steps = scheduler.totals.steps_ahead + sum(scheduler.totals.waits.values())
        return turn

    async def cell(self, batch: int) -> Cell:
        parts = Parts()
        await self.turn(batch, overlap=False)
        await self.turn(batch, overlap=True)
        off: list[Turn] = []
        on: list[Turn] = []
        for _ in range(self.options.turns):
            turns = [await self.turn(batch, overlap=overlap) for overlap in (False, True, True, False)]
            if any(turn.answers != turns[0].answers for turn in turns):
                raise EngineFailure("overlap changed an answer")
            off += [turns[0], turns[3]]
            on += [turns[1], turns[2]]
        for _ in range(2):
            await self.turn(batch, overlap=False, parts=parts)
        ratios = [without.seconds / having.seconds for without, having in zip(off, on, strict=True)]
        low, high = interval(ratios)
        model_us, schedule_us, account_us = (
            1e6 * statistics.median(values) for values in (parts.model, parts.schedule, parts.account)
        )
        whole_us = 1e6 * statistics.median(parts.whole)
        return Cell(
            batch=batch,
            model_us=model_us,
            schedule_us=schedule_us,
            account_us=account_us,
            rest_us=whole_us - model_us - schedule_us - account_us,
            off_tokens_per_s=sum(turn.num_tokens for turn in off) / sum(turn.seconds for turn in off),
            on_tokens_per_s=sum(turn.num_tokens for turn in on) / sum(turn.seconds for turn in on),
            median_ratio=statistics.median(ratios),
            low=low,
            high=high,
            cpu_ratio=sum(turn.cpu_s for turn in off) / sum(turn.cpu_s for turn in on),
            share_ahead=sum(turn.steps_ahead for turn in on) / max(1, sum(turn.steps for turn in on)),
            num_turns=len(on),
        )


def _watch(parts: Parts, core: Core[Any, Event], scheduler: DecodeScheduler, engine: Engine) -> None:
    """Times the calls of steps, and how far they are apart."""
    engine.runner.execute = timed(parts.model, engine.runner.execute)  # type: ignore[method-assign]
    scheduler.schedule = timed(parts.schedule, scheduler.schedule)  # type: ignore[method-assign]
    scheduler.complete = timed(parts.account, scheduler.complete)  # type: ignore[method-assign]
    schedule, last_s = core.schedule, 0.0

    def begin() -> bool:
        nonlocal last_s
        now_s = time.thread_time()
        if last_s:
            parts.whole.append(now_s - last_s)
        last_s = now_s
        return schedule()

    core.schedule = begin  # type: ignore[method-assign]


def _nobody_reads() -> WorkerReadings:
    raise EngineFailure("nobody scrapes a benchmark")


def show(cell: Cell) -> None:
    print(
        f"batch {cell.batch:2d}   step: model {cell.model_us:7.0f} us, schedule {cell.schedule_us:5.0f}, account"
        f" {cell.account_us:5.0f}, rest {cell.rest_us:5.0f}   off {cell.off_tokens_per_s:7.1f} tok/s   on"
        f" {cell.on_tokens_per_s:7.1f} tok/s   ratio {cell.median_ratio:.3f} ({cell.low:.3f} to {cell.high:.3f})"
        f"   cpu {cell.cpu_ratio:.3f}   ahead {cell.share_ahead:.0%}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"])
    parser.add_argument("--kernels", default="native", choices=["torch", "native"])
    parser.add_argument("--weights", default="model", choices=["model", "int8"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batches", type=lambda text: [int(part) for part in text.split(",")], default=[1, 8, 32])
    parser.add_argument("--turns", type=int, default=6, help="how often a batch takes its four turns")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--penalty", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    path = Path(options.model) if Path(options.model).exists() else pull(options.model).path
    config = EngineConfig(
        device="cpu",
        dtype=options.dtype,
        kernels=options.kernels,
        weights=options.weights,
        prefix_cache=False,
        kv_pool_tokens=(PROMPT_TOKENS + options.max_tokens + 32) * max(options.batches),
    )
    engine = build_engine(path, config, threads=options.threads, model_digest="m", tokenizer_digest="t")
    bench = Bench(engine, options)
    load_before = os.getloadavg()[0]
    cells = []
    for batch in options.batches:
        cells.append(asyncio.run(bench.cell(batch)))
        show(cells[-1])
    load_after = os.getloadavg()[0]
    print(f"threads {options.threads}, {engine.layout.dtype}; load average {load_before:.2f} before, {load_after:.2f} after")
    if options.json is not None:
        result = {
            "model": options.model,
            "threads": options.threads,
            "load_average": [load_before, load_after],
            "cells": [asdict(cell) for cell in cells],
        }
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
