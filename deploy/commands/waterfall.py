"""A request's time to first token as bars: one line per stage, each starting where the last one ended.

router            ▏                          0.4 ms
prefill queue     ▏                          0.1
prefill            ███████████████████      41.3
transfer exposed                      █      1.2
"""

from __future__ import annotations

from typing import Any

from rich.console import Console

_WIDTH = 44


def draw(timings: dict[str, Any], console: Console) -> None:
    """`timings` as the router sends it with the last event of an answer."""

    def line(text: str, style: str = "dim") -> None:
        console.print(text, style=style, markup=False, soft_wrap=True)

    stages: dict[str, float] = timings["stages_ms"]
    total_ms = sum(stages.values())
    start_ms = 0.0
    for name, duration_ms in stages.items():
        line(f"  {name:<17} {_bar(start_ms, duration_ms, total_ms)} {duration_ms:8.1f} ms")
        start_ms += duration_ms
    line(f"  {'first token':<17} {' ' * _WIDTH} {timings['ttft_ms']:8.1f} ms", style="default")
    line(f"  {'per token after':<17} {' ' * _WIDTH} {timings['tpot_ms']:8.1f} ms", style="default")
    if timings["decode_worker"] is None:
        line(f"  no worker was asked: {timings['cache']}")
    elif timings["transport"]:
        mib = timings["transfer_bytes"] / 2**20
        road = f"{timings['prefill_worker']} -> {timings['decode_worker']} over {timings['transport']}"
        load = f"{timings['transfer_blocks']} blocks, {mib:.1f} MiB, {timings['transfer_hidden_ms']:.1f} ms of it hidden"
        line(f"  {road}: {load}; {timings['cached_tokens']} tokens cached")
    else:
        line(f"  prefilled on {timings['decode_worker']}; {timings['cached_tokens']} tokens cached")


def _bar(start: float, length: float, total: float) -> str:
    if total <= 0:
        return " " * _WIDTH
    first = min(_WIDTH - 1, round(start / total * _WIDTH))
    cells = min(_WIDTH - first, round(length / total * _WIDTH))
    mark = "█" * cells if cells else "▏"
    return (" " * first + mark).ljust(_WIDTH)
