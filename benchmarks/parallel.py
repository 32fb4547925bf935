"""What ranks gain and cost on this machine: steps of groups against steps of one process, in turns.

    python -m benchmarks.parallel [--model smollm2-135m] [--degrees 1x1,2x1,1x2] [--dtype bfloat16] [--kernels auto] [--threads 1]
        [--batches 1,8,32] [--prompts 128,512] [--context 200] [--micro-batches 0,64] [--run 0] [--blocks 5] [--json out.json]

A degree is TENSORxPIPELINE. Each runs as it does in a worker: rank 0 here, the others as processes, `--threads` each. A decode
step computes one token of each sequence up to the logits; a prompt step so many tokens of one sequence. Per cell all engines take
turns, in an order that turns round with every block; the table has the median of each, and the median over blocks of the first
engine's time over its own (`gain`: 2 would be perfect for two ranks). `idle` is the share of the ranks' time in which their
processes did not compute, by the kernel's account. A degree with stages runs once per value of `--micro-batches`, the least
tokens of a part of a step; 0 = steps are never cut, so that only one stage works at a time: the difference is the bubble that the
parts fill. With two stages and 512 tokens these are 1, 2 and 4 parts, whose bubbles are 1/2, 1/3 and 1/5 of the time on paper:

    python -m benchmarks.parallel --degrees 1x1,2x1,1x2 --batches "" --prompts 512 --micro-batches 0,256,128

With `--run N` a turn is N steps in a row instead of one, and a cell has the time of one of them, drawing included: tokens of
the same sequences, or one prompt after the other. Degrees with stages run once with each step read before the next is launched,
so that the pipeline runs empty in between, and once `kept full`: the next step is launched behind the one under way, as workers
do. `idle` tells the bubbles of the two apart. Tokens have to be the same, or the run fails:

    python -m benchmarks.parallel --degrees 1x1,1x2 --batches 8,32 --prompts 128,512 --micro-batches 64 --run 16
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from common.blocks import num_blocks
from common.config import EngineConfig, ParallelConfig
from common.engine.batch import SampleSpec, ScheduledBatch, SequenceSlice
from common.engine.engine import Engine, build_engine
from common.engine.in_flight_step import InFlightStep, placeholder_of
from common.engine.parallel.micro_batches import num_micro_batches
from common.errors import EngineFailure
from common.model_store import pull
from kvtransfer.region import PoolMemory

_UNCUT = 1_000_000
_FULL = ", kept full"


@dataclass(frozen=True)
class Cell:
    what: str
    rows: int
    degree: str
    step_ms: float
    gain: float  # of the first degree's time over this one's, median over blocks
    parts: int  # of a step, which follow each other through the stages
    idle: float  # share of the ranks' time


def main() -> None:
    options = parser().parse_args()
    path = Path(options.model) if Path(options.model).exists() else pull(options.model).path
    longest = max([options.context + options.run + 1, *options.prompts])
    config = EngineConfig(
        device="cpu",
        dtype=options.dtype,
        kernels=options.kernels,
        kv_pool_tokens=max(options.batches, default=1) * (longest + 16),
        rank_timeout_s=60.0,
    )
    chosen = degrees(options)
    engines = {name: build(path, config, parallel, options.threads) for name, parallel in chosen.items()}
    groups = {name: Group(parallel, engines[name]) for name, parallel in chosen.items()}
    try:
        load_before = os.getloadavg()[0]
        cells: list[Cell] = []
        if options.run:
            for batch in options.batches:
                cells += measure_runs(
                    "decode", batch, lambda engine, rows: decode_run(engine, rows, options), engines, groups, options
                )
            for tokens in options.prompts:
                cells += measure_runs(
                    "prompt", tokens, lambda engine, rows: prompt_run(engine, rows, options), engines, groups, options
                )
            options.batches = options.prompts = []
        for batch in options.batches:
            cells += measure(
                "decode",
                batch,
                {name: decode(engine, batch, options.context) for name, engine in engines.items()},
                groups,
                options,
            )
        for tokens in options.prompts:
            cells += measure(
                "prompt", tokens, {name: prompt(engine, tokens) for name, engine in engines.items()}, groups, options
            )
        load = [load_before, os.getloadavg()[0]]
        print(f"threads {options.threads} a rank, {config.dtype}, kernels {config.kernels}; load {load[0]:.2f}, {load[1]:.2f}")
        if options.json:
            options.json.write_text(
                json.dumps({"load_average": load, "cells": [asdict(cell) for cell in cells]}, indent=2) + "\n"
            )
    finally:
        for engine in engines.values():
            engine.close()


class Group:
    """The processes of one engine."""

    def __init__(self, parallel: ParallelConfig, engine: Engine) -> None:
        self.parallel = parallel
        self._others = () if engine.group is None else tuple(engine.group.pids)

    def computed_s(self) -> float:
        """That its processes have computed so far, this one included."""
        others = sum(
            int(account.read_text().split()[0])
            for pid in self._others
            for account in Path(f"/proc/{pid}/task").glob("*/schedstat")
        )
        return time.process_time() + others / 1e9

    def parts(self, rows: int, *, goes_on: bool) -> int:
        return num_micro_batches(rows, self.parallel.pipeline_parallel, self.parallel.micro_batch_tokens, goes_on=goes_on)


def parser() -> argparse.ArgumentParser:
    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(",") if part]

    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--model", default="smollm2-135m")
    result.add_argument("--degrees", default="1x1,2x1,1x2")
    result.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"])
    result.add_argument("--kernels", default="auto", choices=["auto", "torch", "native"])
    result.add_argument("--threads", type=int, default=1)
    result.add_argument("--batches", type=numbers, default=[1, 8, 32])
    result.add_argument("--prompts", type=numbers, default=[128, 512])
    result.add_argument("--context", type=int, default=200)
    result.add_argument("--micro-batches", type=numbers, default=[0, 64])
    result.add_argument("--run", type=int, default=0)
    result.add_argument("--blocks", type=int, default=5)
    result.add_argument("--json", type=Path)
    return result


def degrees(options: argparse.Namespace) -> dict[str, ParallelConfig]:
    found: dict[str, ParallelConfig] = {}
    for text in options.degrees.split(","):
        tensor, pipeline = (int(part) for part in text.split("x"))
        for least in options.micro_batches if pipeline > 1 else [0]:
            name = f"{text}, parts of {least}" if pipeline > 1 and least else text
            found[name] = ParallelConfig(tensor_parallel=tensor, pipeline_parallel=pipeline, micro_batch_tokens=least or _UNCUT)
    return found


def build(path: Path, config: EngineConfig, parallel: ParallelConfig, threads: int) -> Engine:
    memory = PoolMemory(touch=True) if parallel.num_ranks > 1 else None
    engine = build_engine(
        path, config, threads=threads, model_digest="m", tokenizer_digest="t", memory=memory, parallel=parallel, name="benchmark"
    )
    engine.pool.tensor[1:].normal_()
    return engine


def decode(engine: Engine, batch: int, context: int) -> Callable[[], object]:
    blocks = num_blocks(context + 1, engine.layout.block_tokens)
    tables = [range(1 + i * blocks, 1 + (i + 1) * blocks) for i in range(batch)]
    step = ScheduledBatch(tuple(SequenceSlice([17 + i], context, table) for i, table in enumerate(tables)))
    return lambda: engine.runner.compute_logits(step)


def prompt(engine: Engine, tokens: int) -> Callable[[], object]:
    table = range(1, 1 + num_blocks(tokens, engine.layout.block_tokens))
    step = ScheduledBatch((SequenceSlice([token % 1000 for token in range(tokens)], 0, table),))
    return lambda: engine.runner.compute_logits(step)


Run = Callable[[bool], list[list[int]]]
"""Computes steps in a row, each launched behind the one before or not, and gives the tokens of each."""


def decode_run(engine: Engine, batch: int, options: argparse.Namespace) -> Run:
    context = options.context
    blocks = num_blocks(context + options.run + 1, engine.layout.block_tokens)
    tables = [range(1 + i * blocks, 1 + (i + 1) * blocks) for i in range(batch)]

    def step(number: int, tokens: list[int] | None) -> ScheduledBatch:
        place = context + number
        drawn = [placeholder_of(i) if tokens is None else tokens[i] for i in range(batch)]
        return ScheduledBatch(
            tuple(SequenceSlice([token], place, table, (_greedy(place + 1),)) for token, table in zip(drawn, tables, strict=True))
        )

    return lambda ahead: run_steps(engine, step, [17 + i for i in range(batch)], options.run, ahead=ahead)


def prompt_run(engine: Engine, tokens: int, options: argparse.Namespace) -> Run:
    table = range(1, 1 + num_blocks(tokens, engine.layout.block_tokens))
    prompts = [[(token + 7 * number) % 1000 for token in range(tokens)] for number in range(options.run)]

    def step(number: int, _: list[int] | None) -> ScheduledBatch:
        return ScheduledBatch((SequenceSlice(prompts[number], 0, table, (_greedy(tokens),)),))

    return lambda ahead: run_steps(engine, step, [], options.run, ahead=ahead)


def run_steps(
    engine: Engine, step: Callable[[int, list[int] | None], ScheduledBatch], first: list[int], count: int, *, ahead: bool
) -> list[list[int]]:
    """`step` makes the batch of a number; without tokens it begins with those of the step before."""
    found: list[list[int]] = []

    def read(done: InFlightStep) -> None:
        found.append([item.tokens[0].token_id for item in done.collect().slices])

    under_way = engine.runner.launch(step(0, first))
    for number in range(1, count):
        if ahead:
            following = engine.runner.launch(step(number, None))
            read(under_way)
        else:
            read(under_way)
            following = engine.runner.launch(step(number, found[-1]))
        under_way = following
    read(under_way)
    return found


def _greedy(position: int) -> SampleSpec:
    return SampleSpec(position, seed=0, choice=0, temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, logprobs=None)


def measure_runs(
    what: str,
    rows: int,
    make: Callable[[Engine, int], Run],
    engines: dict[str, Engine],
    groups: dict[str, Group],
    options: argparse.Namespace,
) -> list[Cell]:
    turns: dict[str, Callable[[], object]] = {}
    of_turns: dict[str, Group] = {}
    for name, engine in engines.items():
        ways = {name: False, name + _FULL: True} if groups[name].parallel.pipeline_parallel > 1 else {name: False}
        run = make(engine, rows)
        if run(False) != run(True):
            raise EngineFailure(f"{name}: steps behind each other draw other tokens")
        for way, ahead in ways.items():
            turns[way] = partial(run, ahead)
            of_turns[way] = groups[name]
    return measure(what, rows, turns, of_turns, options)


def measure(
    what: str, rows: int, steps: dict[str, Callable[[], object]], groups: dict[str, Group], options: argparse.Namespace
) -> list[Cell]:
    repeats = 1 if options.run else 10 if what == "decode" else 2
    num_steps = options.run or 1
    for step in steps.values():
        step()
    blocks: dict[str, list[float]] = {name: [] for name in steps}
    idle: dict[str, list[float]] = {name: [] for name in steps}
    for block in range(options.blocks):
        names = list(steps) if block % 2 == 0 else list(reversed(steps))
        for name in names:
            times = []
            computed_s = groups[name].computed_s()
            for _ in range(repeats):
                started_s = time.perf_counter()
                steps[name]()
                times.append(time.perf_counter() - started_s)
            blocks[name].append(statistics.median(times) / num_steps)
            computed_s = groups[name].computed_s() - computed_s
            idle[name].append(1 - computed_s / (sum(times) * groups[name].parallel.num_ranks))
    first = next(iter(blocks.values()))
    cells = []
    for name, found in blocks.items():
        gain = statistics.median(alone / mine for alone, mine in zip(first, found, strict=True))
        cell = Cell(
            what,
            rows,
            name,
            statistics.median(found) * 1000,
            gain,
            groups[name].parts(rows, goes_on=what == "decode" and name.endswith(_FULL)),
            statistics.median(idle[name]),
        )
        cells.append(cell)
        print(
            f"{what:7} {rows:5}  {name:34} {cell.step_ms:9.2f} ms   gain {gain:5.2f}   parts {cell.parts}"
            f"   idle {cell.idle:5.2f}",
            flush=True,
        )
    return cells


if __name__ == "__main__":
    main()
