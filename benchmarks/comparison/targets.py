"""What is wanted of pdserve against other servers on the same cores: one line a figure, one target for each pair of settings."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from benchmarks.comparison.pairing import Direction, Target

BF16, BEST, SPECULATING, AGGREGATED = "pdserve-bf16", "pdserve-best", "pdserve-speculating", "pdserve-aggregated"
EXACT, BEST_EXACT = "pdserve-bf16-exact", "pdserve-best-exact"
VLLM, LLAMA = "vllm", "llama.cpp"


@dataclass(frozen=True, slots=True)
class Line:
    workload: str
    figure: str
    ours: str
    theirs: str
    target: Target


def _at_least(value: float) -> Target:
    return Target(Direction.AT_LEAST, value)


def _at_most(value: float) -> Target:
    return Target(Direction.AT_MOST, value)


LINES = (
    Line("w1", "output_tokens_per_s", BF16, VLLM, _at_least(1.6)),
    Line("w1", "output_tokens_per_s", BEST, VLLM, _at_least(4.0)),
    Line("w1", "output_tokens_per_s", BEST, LLAMA, _at_least(2.0)),
    Line("w2", "output_tokens_per_s", BF16, VLLM, _at_least(1.1)),
    Line("w2", "output_tokens_per_s", BEST, VLLM, _at_least(2.0)),
    Line("w2", "output_tokens_per_s", BEST, LLAMA, _at_least(6.0)),
    *(
        line
        for workload in ("w3", "w3x4")
        for line in (
            Line(workload, "prompt_tokens_per_s", BF16, VLLM, _at_least(1.0)),
            Line(workload, "prompt_tokens_per_s", BEST, VLLM, _at_least(1.2)),
            Line(workload, "prompt_tokens_per_s", BEST, LLAMA, _at_least(10.0)),
        )
    ),
    Line("w4", "itl_p99_ms", BF16, VLLM, _at_most(0.3)),
    Line("w4", "itl_p99_ms", BEST, VLLM, _at_most(0.15)),
    Line("w4", "goodput_per_s", BF16, VLLM, _at_least(1.3)),
    Line("w4", "goodput_per_s", BEST, VLLM, _at_least(2.0)),
    Line("w5", "wall_s", BF16, VLLM, _at_most(0.9)),
    Line("w5", "wall_s", BEST, VLLM, _at_most(0.6)),
    Line("w5", "wall_s", BEST, LLAMA, _at_most(0.1)),
    Line("w6", "output_tokens_per_s", f"{BF16}-speculating", VLLM, _at_least(2.5)),
    Line("w6", "output_tokens_per_s", SPECULATING, VLLM, _at_least(6.0)),
    Line("w6", "output_tokens_per_s", SPECULATING, LLAMA, _at_least(3.0)),
    # Our own two ways of serving at equal cores: prefill apart from decode, and one worker that does both.
    Line("w4", "itl_p99_ms", BEST, AGGREGATED, _at_most(1.0)),
    Line("w4", "goodput_per_s", BEST, AGGREGATED, _at_least(1.0)),
)
# A load that both can carry in part: where one of the servers has no request within the limits, w4 gives no ratio of goodputs.
SLOWER_LINES = (
    Line("w4s", "goodput_per_s", BF16, VLLM, _at_least(1.3)),
    Line("w4s", "goodput_per_s", BEST, VLLM, _at_least(2.0)),
    Line("w4s", "goodput_per_s", BEST, AGGREGATED, _at_least(1.0)),
    Line("w4s", "itl_p99_ms", BEST, AGGREGATED, _at_most(1.0)),
)
# What exact mode costs.
EXACT_LINES = tuple(
    Line(workload, figure, exact, fast, target)
    for exact, fast in ((EXACT, BF16), (BEST_EXACT, BEST))
    for workload, figure, target in (
        ("w1", "output_tokens_per_s", _at_least(0.85)),
        ("w2", "output_tokens_per_s", _at_least(0.85)),
        ("w3", "prompt_tokens_per_s", _at_least(0.85)),
        ("w3x4", "prompt_tokens_per_s", _at_least(0.85)),
        ("w4", "itl_p99_ms", _at_most(1.15)),
        ("w5", "wall_s", _at_most(1.15)),
    )
)
LEAST_BANDWIDTH_SHARE = 0.6  # of what w1's steps read, of what the machine can read


def servers_of(workload: str, lines: Iterable[Line] = (*LINES, *SLOWER_LINES)) -> tuple[str, ...]:
    """Who takes part, in the order of the table."""
    return tuple(dict.fromkeys(name for line in lines if line.workload == workload for name in (line.ours, line.theirs)))
