"""Measures tilings of the attention kernels on a GPU, and says which entry of the table is fastest.

    python -m benchmarks.tune_kernels [--heads 32 --kv-heads 8 --head-dim 128] [--kernel split] [--write]

For each kernel and each workload every candidate is timed with events, the best of several runs; the winner is the one with the
least sum of ratios to the best. `--write` puts winners into `common/engine/triton_kernels/configurations.py`. A candidate that
does not fit, or that is not right to within rounding, is left out and named. Needs a GPU that nothing else uses.
"""

from __future__ import annotations

import argparse
import itertools
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from common.engine.attention import Span
from common.engine.attention.paged import PagedAttention
from common.engine.kv_pool import FIRST_BLOCK, KVPool
from common.engine.triton_kernels import configurations
from common.engine.triton_kernels.configurations import TILINGS, Tiling
from common.types import KVLayout

RUNS, WARM_UP = 20, 3
# (sequences, earlier tokens, new tokens)
WORKLOADS = {
    "split": ((1, 1024, 1), (1, 8192, 1), (8, 4096, 1), (32, 1024, 1), (32, 4096, 1), (128, 4096, 1)),
    "exact": ((1, 8192, 1), (32, 4096, 1), (1, 0, 2048)),
    "prefill": ((1, 0, 2048), (1, 0, 8192), (1, 8192, 2048)),
}
TOLERANCE = 2e-2


def candidates(kernel: str) -> Iterator[Tiling]:
    rows = {"split": (16,), "exact": (16, 64), "prefill": (64, 128)}[kernel]
    for query_rows, kv_tile, warps, stages in itertools.product(rows, (16, 32, 64, 128), (2, 4, 8), (2, 3, 4, 5, 6)):
        if configurations.EXACT_SPLIT_TOKENS % kv_tile == 0:
            yield Tiling(query_rows, kv_tile, warps, stages)


class Workload:
    def __init__(self, shape: tuple[int, int, int], sequences: int, earlier: int, new: int) -> None:
        heads, kv_heads, head_dim = shape
        device = torch.device("cuda")
        blocks = -(-(earlier + new) // 16)
        layout = KVLayout("m", "t", 1, kv_heads, head_dim, 16, "bfloat16", exact=False)
        self.pool = KVPool(layout, FIRST_BLOCK + sequences * blocks, device)
        self.pool.tensor[FIRST_BLOCK:].normal_()
        self.tables = (torch.randperm(sequences * blocks, device=device) + FIRST_BLOCK).view(sequences, blocks)
        self.spans = [Span(i * new, new, earlier) for i in range(sequences)]
        self.queries = torch.randn(sequences * new, heads, head_dim, device=device, dtype=torch.bfloat16)
        self.heads = heads

    def call(self, *, exact: bool) -> Callable[[], torch.Tensor]:
        plan = PagedAttention(self.pool, self.heads, exact=exact).plan(self.tables, self.spans)
        return lambda: plan.attend(0, self.queries)


def microseconds(call: Callable[[], torch.Tensor]) -> float:
    for _ in range(WARM_UP):
        call()
    times: list[float] = []
    for _ in range(RUNS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1000)
    return min(times)


def tune(kernel: str, shape: tuple[int, int, int]) -> Tiling:
    entry = next(key for key in sorted(TILINGS) if key[0] == kernel and key[1] == 2 and key[2] >= shape[2])
    before = TILINGS[entry]
    times: dict[Tiling, list[float]] = {}
    for sequences, earlier, new in WORKLOADS[kernel]:
        workload = Workload(shape, sequences, earlier, new)
        expected = workload.call(exact=kernel == "exact")()
        for candidate in {before: None, **dict.fromkeys(candidates(kernel))}:
            TILINGS[entry] = candidate
            try:
                call = workload.call(exact=kernel == "exact")
                furthest = float((call() - expected).abs().max())
                took = microseconds(call) if furthest <= TOLERANCE else float("inf")
            except RuntimeError as error:  # out of shared memory, or of registers
                print(f"  {candidate}: {type(error).__name__}")
                took = float("inf")
            times.setdefault(candidate, []).append(took)
        TILINGS[entry] = before
        best = min(took[-1] for took in times.values())
        print(f"{kernel} {sequences} x {earlier} + {new}: {best:.1f} us at best, {times[before][-1]:.1f} us by the table")
    bests = [min(column) for column in zip(*times.values(), strict=True)]
    winner = min(times, key=lambda one: sum(took / best for took, best in zip(times[one], bests, strict=True)))
    print(f"{entry}: {before} -> {winner}")
    return winner


def write(kernel: str, head_dim: int, winner: Tiling) -> None:
    path = Path(configurations.__file__)
    width = min(key[2] for key in TILINGS if key[:2] == (kernel, 2) and key[2] >= head_dim)
    pattern = re.compile(rf'    \("{kernel}", 2, {width}\): Tiling\([^)]*\),')
    path.write_text(pattern.sub(f'    ("{kernel}", 2, {width}): {winner!r},', path.read_text(encoding="utf-8")), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--kernel", choices=tuple(WORKLOADS), action="append")
    parser.add_argument("--write", action="store_true", help="put the winners into the table")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no CUDA device here")
    for kernel in options.kernel or WORKLOADS:
        winner = tune(kernel, (options.heads, options.kv_heads, options.head_dim))
        if options.write:
            write(kernel, options.head_dim, winner)


if __name__ == "__main__":
    main()
