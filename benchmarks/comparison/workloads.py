"""The loads that every server gets: what is asked, and which figures come of the answers.

    w1   one stream, 128 tokens in, 128 out                     output tokens/s
    w2   16 streams, 128 / 128                                  output tokens/s
    w3   2,048 / 16, one at a time; w3x4 four at a time         prompt tokens/s until the last first token
    w4   8 streams 64 / 256 decode while 8 prompts of 2,048     99th percentile of the streams' gaps; requests/s within
         tokens arrive, one each second                         5 x TTFT and 3 x TPOT of an unloaded peer
    w4s  the same with one prompt every five seconds            likewise; only where it is asked for
    w5   32 requests that share 1,024 tokens, 64 own / 32       seconds until all have ended
    w6   prompts that begin to copy what they hold, / 128       output tokens/s, one stream

Prompts depend on the block's number alone, so all servers of a block get the same and no block finds an earlier one's prompts in
a prefix cache. Answers are greedy and end where they were asked to.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import orjson

from benchmarks.load.client import Outcome
from benchmarks.load.plan import PlannedRequest, TokenIds
from benchmarks.load.report import Slo, percentiles, tpot_s, ttft_s

_FIRST_ID, _END_ID = 1_000, 30_000
_NUM_STREAMS, _STREAM_TOKENS, _NUM_PROMPTS = 8, 256, 8
_SLO_TTFT, _SLO_TPOT = 5.0, 3.0  # times the unloaded peer's

Figures = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Unloaded:
    """Latencies of the two kinds of request of w4, each alone on an idle server."""

    stream: Slo
    prompt: Slo


@dataclass(frozen=True, slots=True)
class Workload:
    name: str
    what: str
    plan: Callable[[int], list[PlannedRequest]]  # by the block's number
    users: int | None  # of a closed loop; None: each request comes at its own time
    figures: Callable[[Sequence[Outcome], Unloaded | None], Figures]


def workloads(*, quick: bool) -> dict[str, Workload]:
    made = (
        Workload("w1", "one stream, 128/128", lambda block: _plain(block, 1 if quick else 2, 128, 128), 1, _output_rate),
        Workload("w2", "16 streams, 128/128", lambda block: _plain(block, 16, 128, 128), 16, _output_rate),
        Workload("w3", "2,048/16, one at a time", lambda block: _plain(block, 1, 2048, 16), 1, _prompt_rate),
        Workload("w3x4", "2,048/16, four at a time", lambda block: _plain(block, 4, 2048, 16), 4, _prompt_rate),
        Workload("w5", "32 requests that share 1,024 tokens, +64/32", _shared, 32, _wall),
        Workload("w4", "8 streams 64/256, a prompt each second", _mixed, None, _mixed_figures),
        Workload("w4s", "8 streams 64/256, a prompt every 5 s", lambda block: _mixed(block, 5.0, 4), None, _mixed_figures),
        Workload("w6", "one stream that copies, 128 out", lambda block: _copying(block, 1 if quick else 2), 1, _output_rate),
    )  # fmt: skip
    return {one.name: one for one in made}


def alone(kind: str, number: int) -> list[PlannedRequest]:
    """One request of w4 by itself."""
    tokens = 64 if kind == "stream" else 2048
    return [PlannedRequest(0, 0.0, _ids(f"alone {kind} {number}").draw("prompt", tokens), 32 if kind == "stream" else 16)]


def unloaded(streams: Sequence[Outcome], prompts: Sequence[Outcome]) -> Unloaded:
    def median(outcomes: Sequence[Outcome]) -> Slo:
        return Slo(
            percentiles([ttft_s(one) for one in outcomes])["p50"], percentiles([tpot_s(one) or 0.0 for one in outcomes])["p50"]
        )

    return Unloaded(median(streams), median(prompts))


def body_of(item: PlannedRequest, model: str) -> bytes:
    return orjson.dumps(
        {
            "model": model,
            "prompt": item.prompt_token_ids,
            "max_tokens": item.max_tokens,
            "temperature": 0.0,
            "seed": item.index,
            "stream": True,
            "stream_options": {"include_usage": True},
            "ignore_eos": True,
            "return_token_ids": True,
        }
    )


def _ids(name: str) -> TokenIds:
    return TokenIds(_FIRST_ID, _END_ID, random.Random(name).getrandbits(32))


def _plain(block: int, count: int, prompt_tokens: int, output_tokens: int) -> list[PlannedRequest]:
    ids = _ids(f"plain {prompt_tokens} {block}")
    return [PlannedRequest(index, 0.0, ids.draw(f"{index}", prompt_tokens), output_tokens) for index in range(count)]


def _mixed(block: int, every_s: float = 1.0, num_prompts: int = _NUM_PROMPTS) -> list[PlannedRequest]:
    """The streams first, then the prompts, the first of them one second later."""
    ids = _ids(f"mixed {block}")
    streams = [PlannedRequest(index, 0.0, ids.draw(f"{index}", 64), _STREAM_TOKENS) for index in range(_NUM_STREAMS)]
    prompts = [
        PlannedRequest(_NUM_STREAMS + number, 1.0 + every_s * number, ids.draw(f"prompt {number}", 2048), 16)
        for number in range(num_prompts)
    ]
    return streams + prompts


def _shared(block: int) -> list[PlannedRequest]:
    ids = _ids(f"shared {block}")
    prefix = ids.draw("prefix", 1024)
    return [PlannedRequest(index, 0.0, prefix + ids.draw(f"{index}", 64), 32) for index in range(32)]


def _copying(block: int, count: int) -> list[PlannedRequest]:
    """A passage twice, and the beginning of a third time: what a model goes on with is the passage."""
    ids = _ids(f"copying {block}")
    passages = [ids.draw(f"{index}", 160) for index in range(count)]
    return [PlannedRequest(index, 0.0, passage * 2 + passage[:24], 128) for index, passage in enumerate(passages)]


# -- figures ---------------------------------------------------------------------------------------------------------


def _span_s(outcomes: Sequence[Outcome]) -> float:
    return max(one.end_s for one in outcomes) - min(one.intended_s for one in outcomes)


def _output_rate(outcomes: Sequence[Outcome], _: Unloaded | None) -> Figures:
    tpots = [value for one in outcomes if (value := tpot_s(one)) is not None]
    return {
        "output_tokens_per_s": sum(one.output_tokens for one in outcomes) / _span_s(outcomes),
        "tpot_ms": percentiles(tpots)["p50"] * 1e3,
        "ttft_ms": percentiles([ttft_s(one) for one in outcomes])["p50"] * 1e3,
    }


def _prompt_rate(outcomes: Sequence[Outcome], _: Unloaded | None) -> Figures:
    start_s = min(one.intended_s for one in outcomes)
    tokens = sum(one.usage_prompt_tokens or 0 for one in outcomes)
    return {
        "prompt_tokens_per_s": tokens / (max(one.events[0][0] for one in outcomes) - start_s),
        "ttft_ms": percentiles([ttft_s(one) for one in outcomes])["p50"] * 1e3,
    }


def _wall(outcomes: Sequence[Outcome], _: Unloaded | None) -> Figures:
    return {"wall_s": _span_s(outcomes), "cached_prompt_tokens": float(sum(one.cached_tokens or 0 for one in outcomes))}


def _mixed_figures(outcomes: Sequence[Outcome], base: Unloaded | None) -> Figures:
    by_index = sorted(outcomes, key=lambda one: one.index)
    streams, prompts = by_index[:_NUM_STREAMS], by_index[_NUM_STREAMS:]
    first_prompt_s = min(one.intended_s for one in prompts)
    gaps = [
        later - earlier
        for one in streams
        for (earlier, _), (later, _) in itertools.pairwise(one.events)
        if later > first_prompt_s
    ]
    spread = percentiles(gaps)
    figures = {
        "itl_p50_ms": spread["p50"] * 1e3,
        "itl_p99_ms": spread["p99"] * 1e3,
        "tokens_per_chunk": sum(one.output_tokens for one in streams) / sum(len(one.events) for one in streams),
        "prompt_ttft_ms": percentiles([ttft_s(one) for one in prompts])["p50"] * 1e3,
        "stream_tpot_ms": percentiles([tpot_s(one) or 0.0 for one in streams])["p50"] * 1e3,
        "wall_s": _span_s(outcomes),
    }
    if base is not None:
        good = sum(_in_time(one, base.stream) for one in streams) + sum(_in_time(one, base.prompt) for one in prompts)
        figures |= {"goodput_per_s": good / _span_s(outcomes), "attainment": good / len(outcomes)}
    return figures


def _in_time(outcome: Outcome, base: Slo) -> bool:
    return ttft_s(outcome) <= _SLO_TTFT * base.ttft_s and (tpot_s(outcome) or 0.0) <= _SLO_TPOT * base.tpot_s
