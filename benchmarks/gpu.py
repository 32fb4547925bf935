"""What a GPU makes of all this, against what the card can do: one command for each block of checks, each within ten minutes.

    python -m benchmarks.gpu kernels  [--json out.json]      products, attention and draws by themselves       K1 to K6
    python -m benchmarks.gpu engine                          steps of whole models, captured and not           E, Q, X
    python -m benchmarks.gpu grid                            step times over batch, context and chunk          M1
    python -m benchmarks.gpu transfer                        KV from one process to another on the same GPU    T1, T3
    python -m benchmarks.gpu disagg   [--sharing streams]    prefill and decode apart, against two whole engines    D1, D3

    --device cpu        the same code at toy size, to see that it runs; its figures mean nothing

Each block measures the roof first (copying memory, multiplying matrices) and states every figure beside it. Models are random, of
the right shape and made on the device from a seed (`random:llama-3-8b`), so a bare checkout is enough: torch, triton, numpy,
xxhash, prometheus-client and tokenizers are what is imported, and nothing is fetched. With `--model-path` the engine block
compares the greedy tokens of a real model on the device with those of the CPU in fp32; without, those of a random one.

The grid is what a planner or a simulation needs to know of this card: its points are in the file, with the law fitted to them.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from benchmarks.on_gpu.report import Report, show
from benchmarks.on_gpu.roof import measure_roof

BLOCKS = ("kernels", "engine", "grid", "transfer", "disagg")
SHARING = ("turns", "streams", "green", "mps")


def main(arguments: list[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    started_s = time.perf_counter()
    report = Report(options.block, options.device)
    report.roof = measure_roof(options.device)
    match options.block:
        case "kernels":
            from benchmarks.on_gpu.kernels import run_kernels

            run_kernels(report)
        case "engine":
            from benchmarks.on_gpu.engine import run_engine

            run_engine(report, model_path=options.model_path)
        case "grid":
            from benchmarks.on_gpu.engine import run_grid

            run_grid(report)
        case "transfer":
            from benchmarks.on_gpu.transfer import run_transfer

            run_transfer(report)
        case "disagg":
            from benchmarks.on_gpu.disaggregation import run_disaggregation
            from benchmarks.on_gpu.sharing import Sharing

            run_disaggregation(report, None if options.sharing == "compare" else Sharing(options.sharing))
    report.seconds = time.perf_counter() - started_s
    show(report)
    if options.json is not None:
        options.json.write_text(json.dumps(report.as_json(), indent=2) + "\n")


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("block", choices=BLOCKS)
    result.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    result.add_argument("--json", type=Path)
    result.add_argument("--model-path", type=Path, help="engine: a real model to compare greedy tokens with")
    result.add_argument(
        "--sharing",
        choices=("compare", *SHARING),
        default="compare",
        help="disagg: how prefill and decode share the GPU; compare: every way that can be had here",
    )
    return result


if __name__ == "__main__":
    main()
