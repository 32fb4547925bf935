"""From outcomes to figures, to a table and to JSON.

    intended        sent            first chunk      chunk  ...   last chunk
       |--- lag ------|                 |-- ITL ------|               |
       |------------- TTFT -------------|                             |
       |------------------------------ E2E ---------------------------|        TPOT = (last - first) / (output tokens - 1)

ITL is the gap between chunks that carry tokens; where a chunk carries several (`tokens_per_chunk` > 1), compare TPOT instead.
Latencies are those of requests that succeeded; attainment and goodput are over all that were submitted: a failure is a miss.
`deadline_attainment` asks more: every token k came by TTFT_slo + k x TPOT_slo, so that a stall in the middle cannot hide.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.load.client import Outcome

PERCENTILES = (50, 90, 99)


@dataclass(frozen=True, slots=True)
class Slo:
    ttft_s: float
    tpot_s: float


def ttft_s(outcome: Outcome) -> float:
    return outcome.events[0][0] - outcome.intended_s


def tpot_s(outcome: Outcome) -> float | None:
    """None for an answer of one token."""
    later_tokens = outcome.output_tokens - 1
    return (outcome.events[-1][0] - outcome.events[0][0]) / later_tokens if later_tokens > 0 else None


def meets(outcome: Outcome, slo: Slo) -> bool:
    if outcome.error is not None:
        return False
    return ttft_s(outcome) <= slo.ttft_s and (tpot_s(outcome) or 0.0) <= slo.tpot_s


def meets_every_deadline(outcome: Outcome, slo: Slo) -> bool:
    """Token k (from 0) is due at TTFT_slo + k x TPOT_slo; the last token of a chunk may come no later than its first is due."""
    if outcome.error is not None:
        return False
    position = 0
    for moment_s, count in outcome.events:
        if moment_s - outcome.intended_s > slo.ttft_s + position * slo.tpot_s:
            return False
        position += count
    return True


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """Linear interpolation between the closest ranks. Empty for no values."""
    if not values:
        return {}
    cuts = statistics.quantiles(values, n=100, method="inclusive") if len(values) > 1 else [values[0]] * 99
    return {"mean": statistics.fmean(values), **{f"p{p}": cuts[p - 1] for p in PERCENTILES}, "max": max(values)}


def summarise(outcomes: Sequence[Outcome], slo: Slo | None) -> dict[str, Any]:
    """The figures of one run, in milliseconds and per second."""
    good = [outcome for outcome in outcomes if outcome.error is None]
    start_s = min(outcome.intended_s for outcome in outcomes)
    duration_s = max(outcome.end_s for outcome in outcomes) - start_s
    output_tokens = sum(outcome.output_tokens for outcome in good)
    prompt_tokens = sum(outcome.usage_prompt_tokens or 0 for outcome in good)
    gaps_s = [
        later - earlier for outcome in good for (earlier, _), (later, _) in zip(outcome.events, outcome.events[1:], strict=False)
    ]
    latencies_s = {
        "ttft_ms": [ttft_s(outcome) for outcome in good],
        "tpot_ms": [value for outcome in good if (value := tpot_s(outcome)) is not None],
        "itl_ms": gaps_s,
        "e2e_ms": [outcome.events[-1][0] - outcome.intended_s for outcome in good],
        "send_lag_ms": [outcome.sent_s - outcome.intended_s for outcome in outcomes],
    }
    errors = Counter(outcome.error for outcome in outcomes if outcome.error is not None)
    figures: dict[str, Any] = {
        "submitted": len(outcomes),
        "succeeded": len(good),
        "errors": {
            kind: {"count": count, "example": next(item.error_detail for item in outcomes if item.error == kind)}
            for kind, count in errors.most_common()
        },
        "shorter_than_asked": sum(outcome.output_tokens < outcome.asked_tokens for outcome in good),
        "duration_s": duration_s,
        "requests_per_s": len(good) / duration_s,
        "output_tokens_per_s": output_tokens / duration_s,
        "total_tokens_per_s": (output_tokens + prompt_tokens) / duration_s,
        "prompt_tokens": prompt_tokens,
        "output_tokens": output_tokens,
        "cached_prompt_tokens": sum(outcome.cached_tokens or 0 for outcome in good),
        "tokens_per_chunk": output_tokens / max(1, sum(len(outcome.events) for outcome in good)),
        **{name: percentiles([value * 1000 for value in values]) for name, values in latencies_s.items()},
    }
    if slo is not None:
        met = sum(meets(outcome, slo) for outcome in outcomes)
        figures["slo"] = {
            "ttft_ms": slo.ttft_s * 1000,
            "tpot_ms": slo.tpot_s * 1000,
            "attainment": met / len(outcomes),
            "deadline_attainment": sum(meets_every_deadline(outcome, slo) for outcome in outcomes) / len(outcomes),
            "goodput_requests_per_s": met / duration_s,
        }
    return figures


def row(outcome: Outcome, start_s: float) -> dict[str, Any]:
    """One request as plain data; times in seconds after the start of the run."""
    return {
        "index": outcome.index,
        "intended_s": outcome.intended_s - start_s,
        "sent_s": outcome.sent_s - start_s,
        "chunks": [(moment_s - start_s, count) for moment_s, count in outcome.events],
        "end_s": outcome.end_s - start_s,
        "prompt_tokens": outcome.usage_prompt_tokens,
        "output_tokens": outcome.output_tokens,
        "asked_tokens": outcome.asked_tokens,
        "cached_tokens": outcome.cached_tokens,
        "finish_reason": outcome.finish_reason,
        "error": outcome.error,
    }


def table(figures: dict[str, Any]) -> str:
    lines = [
        f"requests   {figures['succeeded']} of {figures['submitted']} succeeded in {figures['duration_s']:.2f} s"
        f" ({figures['requests_per_s']:.2f}/s)",
        f"tokens     {figures['output_tokens_per_s']:.1f} output/s, {figures['total_tokens_per_s']:.1f} total/s,"
        f" {figures['cached_prompt_tokens']} of {figures['prompt_tokens']} prompt tokens cached,"
        f" {figures['tokens_per_chunk']:.2f} per chunk",
        "",
        f"{'ms':<12}" + "".join(f"{name:>11}" for name in ("mean", *(f"p{p}" for p in PERCENTILES), "max")),
    ]
    names = {"ttft_ms": "TTFT", "tpot_ms": "TPOT", "itl_ms": "ITL", "e2e_ms": "E2E", "send_lag_ms": "send lag"}
    for key, name in names.items():
        if figures[key]:
            lines.append(f"{name:<12}" + "".join(f"{value:>11.2f}" for value in figures[key].values()))
    if slo := figures.get("slo"):
        lines += [
            "",
            f"goodput    {slo['goodput_requests_per_s']:.2f} requests/s within"
            f" TTFT {slo['ttft_ms']:g} ms and TPOT {slo['tpot_ms']:g} ms",
            f"attainment {slo['attainment']:.1%}; with every token in time {slo['deadline_attainment']:.1%}",
        ]
    lines += [f"error      {kind}: {item['count']} x   {item['example'][:100]}" for kind, item in figures["errors"].items()]
    if figures["shorter_than_asked"]:
        lines.append(f"note       {figures['shorter_than_asked']} answers were shorter than asked: rates compare unequal work")
    return "\n".join(lines)
