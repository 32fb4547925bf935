"""What one step of the engine costs on this CPU: native kernels against torch, in the same process, in turns.

    python -m benchmarks.decode_step [--model smollm2-135m] [--dtype bfloat16] [--weights int8] [--kv-dtype int8] [--threads 1] \\
        [--batches 1,2,4,8,16] [--contexts 200,1000] [--prompts 512] [--blocks 5] [--json out.json]

A decode step computes one token of each sequence, up to the logits; a prompt step computes that many tokens of one sequence.
KV is random, since values do not change the time. Per cell, torch and native take turns (T N N T) for so many blocks of steps;
the table gives the medians over all steps and the median, over blocks, of the ratio of medians. `GB/s` is what a step has to read
at least (weights, KV) over its time. `cpu` is the time that the computing thread was on a core: where others compute, that is the
figure to look at, for one thread. The load average is noted.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from common.blocks import num_blocks
from common.config import EngineConfig
from common.engine.batch import ScheduledBatch, SequenceSlice
from common.engine.block_matrix import BLOCK, BlockKind
from common.engine.engine import Engine, build_engine
from common.engine.kv_pool import FIRST_BLOCK, KVPool
from common.engine.quantisation import GROUP
from common.engine.rounded_rows import round_rows
from common.model_store import pull

KINDS = ("torch", "native")


@dataclass(frozen=True)
class Cell:
    what: str
    rows: int
    context: int
    torch_ms: float
    native_ms: float
    torch_cpu_ms: float
    native_cpu_ms: float
    ratio: float  # torch over native
    native_gigabytes_per_s: float


def main() -> None:
    options = parser().parse_args()
    path = Path(options.model) if Path(options.model).exists() else pull(options.model).path
    longest = max([*options.contexts, *options.prompts]) + 1
    most_sequences = max(options.batches)
    engines = {
        kind: build_engine(
            path,
            EngineConfig(
                device="cpu",
                dtype=options.dtype,
                kernels=kind,
                weights=options.weights,
                kv_dtype=options.kv_dtype,
                kv_pool_tokens=most_sequences * (longest + 16),
            ),
            threads=options.threads,
            model_digest="m",
            tokenizer_digest="t",
        )
        for kind in KINDS
    }
    for engine in engines.values():
        fill(engine.pool)
    load_before = os.getloadavg()[0]
    cells = []
    for context in options.contexts:
        for batch in options.batches:
            steps = {kind: decode_step(engine, batch, context) for kind, engine in engines.items()}
            cells.append(measure("decode", batch, context, steps, path, engines["native"], options))
            show(cells[-1])
    for tokens in options.prompts:
        steps = {kind: prompt_step(engine, tokens) for kind, engine in engines.items()}
        cells.append(measure("prompt", tokens, 0, steps, path, engines["native"], options))
        show(cells[-1])
    load_after = os.getloadavg()[0]
    dtype = engines["native"].layout.dtype
    settings = f"threads {options.threads}, {engines['native'].dtype}, KV {dtype}, weights {options.weights}"
    print(f"{settings}; load average {load_before:.2f} before, {load_after:.2f} after")
    if options.json:
        result = {
            "threads": options.threads,
            "dtype": str(engines["native"].dtype).removeprefix("torch."),
            "kv_dtype": dtype,
            "weights": options.weights,
            "load_average": [load_before, load_after],
            "cells": [asdict(cell) for cell in cells],
        }
        options.json.write_text(json.dumps(result, indent=2) + "\n")


def parser() -> argparse.ArgumentParser:
    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(",") if part]

    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--model", default="smollm2-135m")
    result.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"])
    result.add_argument("--weights", default="model", choices=["model", "int8", "int4", "file"])
    result.add_argument("--kv-dtype", default="model", choices=["model", "int8"])
    result.add_argument("--threads", type=int, default=1)
    result.add_argument("--batches", type=numbers, default=[1, 2, 4, 8, 16])
    result.add_argument("--contexts", type=numbers, default=[200, 1000])
    result.add_argument("--prompts", type=numbers, default=[32, 512])
    result.add_argument("--blocks", type=int, default=5)
    result.add_argument("--json", type=Path)
    return result


def fill(pool: KVPool) -> None:
    """With random values, a block at a time."""
    for block in range(FIRST_BLOCK, pool.num_blocks):
        values = torch.randn(*pool.tensor.shape[1:-1], pool.layout.head_dim)
        pool.tensor[block] = round_rows(values) if pool.layout.is_rounded else values


def decode_step(engine: Engine, batch: int, context: int) -> Callable[[], object]:
    blocks = num_blocks(context + 1, engine.layout.block_tokens)
    tables = [range(1 + i * blocks, 1 + (i + 1) * blocks) for i in range(batch)]
    step = ScheduledBatch(tuple(SequenceSlice([17 + i], context, table) for i, table in enumerate(tables)))
    return lambda: engine.runner.compute_logits(step)


def prompt_step(engine: Engine, tokens: int) -> Callable[[], object]:
    table = range(1, 1 + num_blocks(tokens, engine.layout.block_tokens))
    step = ScheduledBatch((SequenceSlice([i % 1000 for i in range(tokens)], 0, table),))
    return lambda: engine.runner.compute_logits(step)


def measure(
    what: str,
    rows: int,
    context: int,
    steps: dict[str, Callable[[], object]],
    path: Path,
    engine: Engine,
    options: argparse.Namespace,
) -> Cell:
    times_ms: dict[str, list[float]] = {kind: [] for kind in KINDS}
    cpu_ms: dict[str, list[float]] = {kind: [] for kind in KINDS}
    ratios = []
    for block in range(options.blocks + 1):
        in_block: dict[str, list[float]] = {kind: [] for kind in KINDS}
        for kind in (*KINDS, *reversed(KINDS)):
            for _ in range(1 if rows > 64 else 4):
                started, cpu_started = time.perf_counter(), time.thread_time()
                steps[kind]()
                in_block[kind].append(1e3 * (time.perf_counter() - started))
                if block:
                    cpu_ms[kind].append(1e3 * (time.thread_time() - cpu_started))
        if block:  # the first one warms up
            ratios.append(statistics.median(in_block["torch"]) / statistics.median(in_block["native"]))
            for kind in KINDS:
                times_ms[kind] += in_block[kind]
    native_ms = statistics.median(times_ms["native"])
    return Cell(
        what,
        rows,
        context,
        statistics.median(times_ms["torch"]),
        native_ms,
        statistics.median(cpu_ms["torch"]),
        statistics.median(cpu_ms["native"]),
        statistics.median(ratios),
        least_bytes(path, engine, rows, context, options.weights) / native_ms / 1e6,
    )


def least_bytes(path: Path, engine: Engine, rows: int, context: int, weights_as: str) -> float:
    kv = rows * context * engine.layout.block_bytes // engine.layout.block_tokens
    if weights_as == "file":  # norms and what else is small are in it, too
        return path.stat().st_size + kv
    architecture = engine.architecture
    shapes = {name: shape for name, shape in architecture.tensor_shapes().items() if len(shape) == 2}
    ends = {"model.embed_tokens.weight", "lm_head.weight"} & shapes.keys()
    in_layers = sum(shape[0] * shape[1] for name, shape in shapes.items() if name not in ends)
    in_head = architecture.vocab_size * architecture.hidden_size
    in_eight_bits = 1 + 4 / GROUP
    bytes_per_weight = {
        "model": (engine.dtype.itemsize, engine.dtype.itemsize),
        "int8": (in_eight_bits, in_eight_bits),
        "int4": (BlockKind.Q4_MINIMA.block_bytes / BLOCK, in_eight_bits),
    }
    of_layers, of_head = bytes_per_weight[weights_as]
    return in_layers * of_layers + in_head * of_head + kv


def show(cell: Cell) -> None:
    print(
        f"{cell.what} rows {cell.rows:4d} context {cell.context:5d}"
        f"   torch {cell.torch_ms:7.2f} ms (cpu {cell.torch_cpu_ms:7.2f})"
        f"   native {cell.native_ms:7.2f} ms (cpu {cell.native_cpu_ms:7.2f})"
        f"   ratio {cell.ratio:5.2f}   {cell.native_gigabytes_per_s:5.1f} GB/s",
        flush=True,
    )


if __name__ == "__main__":
    main()
