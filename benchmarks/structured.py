"""What a grammar costs per token: the same sequences with and without a JSON schema, in one process, in turns.

    python -m benchmarks.structured [--model smollm2-135m] [--dtype float32] [--kernels auto] [--threads 1] [--batches 1,8,32] \\
        [--prompt-tokens 128] [--tokens 64] [--temperature 0] [--blocks 5] [--json out.json]

A run puts so many requests into a decode worker's scheduler, prefills them, and decodes `--tokens` tokens of each; its figure is
the median time of a decode step (schedule, forward pass, draw, account), which is the time per output token. The schema cannot be
finished within the run. Runs take turns (without, with, with, without); the table gives medians over all runs, the median over
blocks of the ratio (of time, and of time on a core), and how long one mask takes by itself. Masks are worked out beside the
forward pass: where no second core is free, their time is added. The load average is noted.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from common.clock import SystemClock
from common.config import DecodeConfig, EngineConfig
from common.engine.engine import Engine, build_engine
from common.engine.grammar import CompiledGrammar, GrammarCompiler, Restriction
from common.model_store import pull
from common.tokenizer import Tokenizer
from common.types import Grammar, GrammarKind, Request, SamplingParams
from decode_worker.scheduler import DecodeScheduler

SCHEMA = {
    "type": "array",
    "minItems": 10_000,
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string"},
            "age": {"type": "integer", "minimum": 0, "maximum": 120},
            "colour": {"enum": ["red", "green", "blue"]},
            "tags": {"type": "array", "items": {"type": "string", "maxLength": 20}, "maxItems": 4},
            "address": {
                "type": "object",
                "properties": {"zip": {"type": "string", "pattern": "^[0-9]{5}$"}},
                "required": ["zip"],
            },
        },
        "required": ["name", "age", "colour", "tags", "address"],
        "additionalProperties": False,
    },
}


@dataclass(frozen=True)
class Cell:
    rows: int
    without_ms: float
    with_ms: float
    ratio: float  # with over without, per block
    cpu_ratio: float  # the same of the time on a core: all threads, so masks are in it
    mask_us: float


class Runs:
    def __init__(self, engine: Engine, tokenizer: Tokenizer, options: argparse.Namespace) -> None:
        self._engine = engine
        self._options = options
        self._compiler = GrammarCompiler(tokenizer, engine.architecture.vocab_size)
        text = "Write a list of people, as JSON. " * options.prompt_tokens
        self._prompt = tuple(tokenizer.encode(text, add_special_tokens=False)[: options.prompt_tokens])
        self._grammar = Grammar(GrammarKind.JSON_SCHEMA, json.dumps(SCHEMA))
        started_s = time.perf_counter()
        self._compiled = self._compiler.compile(self._grammar)
        self.compile_ms = (time.perf_counter() - started_s) * 1e3

    def step_ms(self, rows: int, *, structured: bool) -> tuple[float, float]:
        """The median decode step of one run: as the clock saw it, and on a core, all threads together."""
        options, engine = self._options, self._engine
        config = DecodeConfig(local_prefill="always", step_tokens=512, max_running=rows)
        scheduler = DecodeScheduler(config, engine.layout, engine.blocks, SystemClock())
        compiled: CompiledGrammar | None = self._compiled if structured else None
        for index in range(rows):
            sampling = SamplingParams(
                max_tokens=options.tokens,
                seed=index,
                temperature=options.temperature,
                grammar=self._grammar if structured else None,
            )
            scheduler.submit(Request(f"{index}", "m", (*self._prompt, 300 + index), sampling), (), compiled)
        steps: list[tuple[float, float]] = []
        while not scheduler.is_idle:
            started = time.perf_counter(), time.process_time()
            plan = scheduler.schedule()
            for source, destination in plan.copies:
                engine.pool.copy_block(source, destination)
            scheduler.complete(plan, engine.runner.execute(plan.batch))
            if plan.batch.num_tokens == rows:
                steps.append((time.perf_counter() - started[0], time.process_time() - started[1]))
            scheduler.take_events()
        clock_s, cpu_s = (statistics.median(column) for column in zip(*steps, strict=True))
        return clock_s * 1e3, cpu_s * 1e3

    def mask_us(self) -> float:
        """The median mask of an answer, by itself."""
        state = self._compiled.start()
        times_s = []
        for token_id in self._spelt():
            mask = state.next_mask(Restriction(), num_certain=0)
            started_s = time.perf_counter()
            if mask is None or not mask.allow(token_id):
                break
            times_s.append(time.perf_counter() - started_s)
            state.consume((token_id,))
        return statistics.median(times_s) * 1e6

    def _spelt(self) -> list[int]:
        person = {
            "name": "Ada Lovelace",
            "age": 36,
            "colour": "red",
            "tags": ["mathematics", "poetry"],
            "address": {"zip": "12345"},
        }
        return self._compiler.spell(json.dumps([person] * 4))


def main() -> None:
    options = parser().parse_args()
    path = Path(options.model) if Path(options.model).exists() else pull(options.model).path
    longest = options.prompt_tokens + 1 + options.tokens
    config = EngineConfig(
        device="cpu",
        dtype=options.dtype,
        kernels=options.kernels,
        kv_pool_tokens=max(options.batches) * (longest + 16) + 64,
        prefix_cache=False,
    )
    engine = build_engine(path, config, threads=options.threads, model_digest="m", tokenizer_digest="t")
    runs = Runs(engine, Tokenizer.load(path), options)
    load_before = os.getloadavg()[0]
    cells = []
    for rows in options.batches:
        for structured in (False, True):
            runs.step_ms(rows, structured=structured)  # warms up
        blocks = []
        for _ in range(options.blocks):
            first, second, third, last = (runs.step_ms(rows, structured=structured) for structured in (False, True, True, False))
            blocks.append(((first[0] + last[0]) / 2, (second[0] + third[0]) / 2, first[1] + last[1], second[1] + third[1]))
        cells.append(
            Cell(
                rows,
                statistics.median(block[0] for block in blocks),
                statistics.median(block[1] for block in blocks),
                statistics.median(block[1] / block[0] for block in blocks),
                statistics.median(block[3] / block[2] for block in blocks),
                runs.mask_us(),
            )
        )
        cell = cells[-1]
        print(
            f"rows {cell.rows:3}  without {cell.without_ms:8.2f} ms  with {cell.with_ms:8.2f} ms  "
            f"ratio {cell.ratio:.3f} (cpu {cell.cpu_ratio:.3f})  one mask {cell.mask_us:.0f} us"
        )
    load_after = os.getloadavg()[0]
    print(f"compiled in {runs.compile_ms:.0f} ms; load average {load_before:.2f} before, {load_after:.2f} after")
    if options.json:
        result = {
            "threads": options.threads,
            "dtype": engine.layout.dtype,
            "temperature": options.temperature,
            "compile_ms": runs.compile_ms,
            "load": [load_before, load_after],
            "cells": [asdict(cell) for cell in cells],
        }
        options.json.write_text(json.dumps(result, indent=2) + "\n")


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--model", default="smollm2-135m")
    result.add_argument("--dtype", default="auto")
    result.add_argument("--kernels", default="auto", choices=("auto", "torch", "native"))
    result.add_argument("--threads", type=int, default=1)
    result.add_argument("--batches", type=lambda text: [int(item) for item in text.split(",")], default=[1, 8, 32])
    result.add_argument("--prompt-tokens", type=int, default=128)
    result.add_argument("--tokens", type=int, default=64)
    result.add_argument("--temperature", type=float, default=0.0)
    result.add_argument("--blocks", type=int, default=5)
    result.add_argument("--json", type=Path)
    return result


if __name__ == "__main__":
    main()
