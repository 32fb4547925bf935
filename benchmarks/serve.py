"""Loads any OpenAI-compatible server and reports latencies, throughput and goodput.

    # against a running cluster (`make serve`): 100 requests, 4 users at a time, 128 tokens in, 32 out
    python -m benchmarks.serve --concurrency 4 --num-requests 100 --input-tokens 128 --output-tokens 32

    # open loop: Poisson arrivals at 2/s, lengths that vary, half of the prompt shared by all, goodput against an SLO
    python -m benchmarks.serve --rate 2 --num-requests 200 --input-tokens 256:0.5 --output-tokens 32:0.5 \\
        --shared-prefix-tokens 128 --slo-ttft-ms 1000 --slo-tpot-ms 100 --json run.json

    # a trace, scaled to a small model on a small machine, arrivals stretched to 1 request/s
    python -m benchmarks.serve --trace mooncake.csv --length-divisor 16 --max-input 512 --max-output 64 \\
        --num-requests 300 --rate 1

Prompts: `completions` sends token ids, so the length is what was asked for on any model whose vocabulary holds the range of
`--token-ids`; `chat` sends common words, so the length is approximate (the server's usage is what is reported). Everything drawn
depends on `--seed` alone. `--ignore-eos` is on: the same work on every server.

A trace is a CSV with the columns arrival_ms, input_tokens, output_tokens and perhaps block512_hash_ids ("0 14-27": ids of the
prompt's 512-token blocks; equal id = equal content and prefix).

What the figures mean is written in `load/report.py`, open and closed loop in `load/drive.py`; the rules for keeping a figure in
RESULTS.md. Exit status: 0 if every request succeeded, 1 if some failed, 2 if nothing could be run.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httptools
import orjson
import uvloop

from benchmarks.load import machine, report
from benchmarks.load.client import HttpConnections, OpenAIClient, Outcome
from benchmarks.load.drive import SystemTimer, closed_loop, open_loop
from benchmarks.load.plan import Lengths, PlannedRequest, TokenIds, TraceScale, from_trace, mean_rate, synthetic

# Short common words: one token each, with the space before, in most vocabularies.
# fmt: off
WORDS = (
    "the", "of", "and", "to", "in", "is", "that", "it", "was", "for", "on", "are", "as", "with", "his", "they", "at", "be",
    "this", "from", "have", "or", "by", "one", "had", "not", "but", "what", "all", "were", "when", "we", "there", "can", "an",
    "your", "which", "their", "said", "if", "do", "will", "each", "about", "how", "up", "out", "them", "then", "she", "many",
    "some", "so", "these", "would", "other", "into", "has", "more", "her", "two", "like", "him", "see",
)
# fmt: on
PATHS = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parser().parse_args(arguments)
    try:
        plan = make_plan(options)
        headers = {"Authorization": f"Bearer {options.api_key}"} if options.api_key else {}
        # Answers that a router has kept are not what is measured; a server that does not know the header passes over it.
        connections = HttpConnections(options.base_url, {"Accept": "text/event-stream", "x-cache": "bypass", **headers})
    except (ValueError, OSError) as error:
        parser().error(str(error))
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        try:
            outcome = runner.run(run(options, plan, connections))
        except (OSError, ValueError, httptools.HttpParserError) as error:
            print(f"no model to ask at {options.base_url}: {error}", file=sys.stderr)
            return 2
    outcome["command"] = shlex.join(["python", "-m", "benchmarks.serve", *redacted(arguments)])
    print_report(outcome)
    if options.json:
        options.json.write_bytes(orjson.dumps(outcome, option=orjson.OPT_INDENT_2))
    return 1 if outcome["figures"]["errors"] else 0


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        "benchmarks.serve", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    server = result.add_argument_group("server")
    server.add_argument("--base-url", default="http://127.0.0.1:8000", help="with or without /v1")
    server.add_argument("--model", help="default: the first of /v1/models")
    server.add_argument("--endpoint", choices=tuple(PATHS), default="completions")
    server.add_argument("--api-key", default="", help="left out of every report")
    server.add_argument("--timeout-s", type=float, default=600.0, help="of one request")
    load = result.add_argument_group("load")
    load.add_argument("--rate", type=_positive, help="open loop: requests/s (Poisson; a trace is stretched to it)")
    load.add_argument("--concurrency", type=int, help="closed loop: users")
    load.add_argument("--num-requests", type=int, help="default: 100, or the whole trace")
    load.add_argument("--warmup", type=int, default=2, metavar="N", help="requests sent one by one before, not counted")
    load.add_argument("--seed", type=int, default=0)
    load.add_argument("--input-tokens", type=Lengths.parse, default=Lengths(128), metavar="MEAN[:CV]")
    load.add_argument("--output-tokens", type=Lengths.parse, default=Lengths(32), metavar="MEAN[:CV]")
    load.add_argument("--shared-prefix-tokens", type=int, default=0, help="first tokens of every prompt, the same for all")
    load.add_argument("--token-ids", type=_id_range, default=(1_000, 30_000), metavar="FIRST:END", help="drawn from")
    trace = result.add_argument_group("trace")
    trace.add_argument("--trace", type=Path)
    trace.add_argument("--length-divisor", type=_positive, default=1.0)
    trace.add_argument("--max-input", type=int)
    trace.add_argument("--max-output", type=int)
    trace.add_argument("--rate-scale", type=_positive, default=1.0, help="2 = arrivals come twice as fast")
    body = result.add_argument_group("request body")
    body.add_argument("--temperature", type=float, default=0.0)
    body.add_argument("--ignore-eos", action=argparse.BooleanOptionalAction, default=True)
    body.add_argument("--return-token-ids", action=argparse.BooleanOptionalAction, default=True, help="to count tokens per chunk")
    body.add_argument("--extra-body", type=_json_object, default={}, metavar="JSON", help="merged into every request")
    output = result.add_argument_group("report")
    output.add_argument("--slo-ttft-ms", type=_positive)
    output.add_argument("--slo-tpot-ms", type=_positive)
    output.add_argument("--json", type=Path, metavar="FILE", help="figures, conditions and one row per request")
    return result


def make_plan(options: argparse.Namespace) -> list[PlannedRequest]:
    """Raises ValueError for options that do not go together."""
    if options.rate and options.concurrency:
        raise ValueError("--rate is an open loop, --concurrency a closed one: choose")
    if not (options.rate or options.concurrency or options.trace):
        raise ValueError("say how to load: --rate, --concurrency or --trace")
    if (options.slo_ttft_ms is None) != (options.slo_tpot_ms is None):
        raise ValueError("an SLO has both --slo-ttft-ms and --slo-tpot-ms")
    ids = _ids_of(options)
    if options.trace is None:
        return synthetic(
            num_requests=100 if options.num_requests is None else max(1, options.num_requests),
            rate=options.rate or 1.0,  # a closed loop does not look at arrivals
            inputs=options.input_tokens,
            outputs=options.output_tokens,
            shared_prefix_tokens=options.shared_prefix_tokens,
            ids=ids,
        )
    if options.rate and options.rate_scale != 1.0:
        raise ValueError("--rate and --rate-scale both stretch a trace: choose")
    scale = TraceScale(options.length_divisor, options.max_input, options.max_output, options.rate_scale)
    plan = from_trace(options.trace, num_requests=options.num_requests, scale=scale, ids=ids)
    if not plan:
        raise ValueError(f"{options.trace} has no requests")
    if options.rate and (natural_rate := mean_rate(plan)):
        plan = [dataclasses.replace(item, at_s=item.at_s * natural_rate / options.rate) for item in plan]
    return plan


async def run(options: argparse.Namespace, plan: list[PlannedRequest], connections: HttpConnections) -> dict[str, Any]:
    """Warms up, drives the plan, and gives figures, conditions and rows. Raises OSError or ValueError if no server is there."""
    timer = SystemTimer()
    client = OpenAIClient(connections, timeout_s=options.timeout_s, now=timer.now)
    try:
        model = options.model or await client.first_model()

        async def send(item: PlannedRequest, outcome: Outcome) -> None:
            await client.send(PATHS[options.endpoint], body_of(item, model, options), outcome)

        ids = _ids_of(options)
        warmup = [dataclasses.replace(item, prompt_token_ids=_fresh(item, ids)) for item in plan[: options.warmup]]
        await closed_loop(warmup, send, timer, concurrency=1)
        before = machine.load_average()
        if options.concurrency:
            outcomes = await closed_loop(plan, send, timer, concurrency=options.concurrency)
        else:
            outcomes = await open_loop(plan, send, timer)
    finally:
        await connections.close()
    slo = report.Slo(options.slo_ttft_ms / 1000, options.slo_tpot_ms / 1000) if options.slo_ttft_ms else None
    start_s = min(outcome.intended_s for outcome in outcomes)
    return {
        "machine": {**machine.describe(), "load_average_before": before, "load_average_after": machine.load_average()},
        "model": model,
        "loop": f"closed, {options.concurrency} users" if options.concurrency else f"open, {mean_rate(plan):.3g} requests/s",
        "figures": report.summarise(outcomes, slo),
        "requests": [report.row(outcome, start_s) for outcome in outcomes],
    }


def body_of(item: PlannedRequest, model: str, options: argparse.Namespace) -> bytes:
    body: dict[str, Any] = {
        "model": model,
        "max_tokens": item.max_tokens,
        "temperature": options.temperature,
        "seed": options.seed + item.index,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if options.endpoint == "chat":
        words = " ".join(WORDS[token_id % len(WORDS)] for token_id in item.prompt_token_ids)
        body["messages"] = [{"role": "user", "content": words}]
    else:
        body["prompt"] = item.prompt_token_ids
    if options.ignore_eos:
        body["ignore_eos"] = True
    if options.return_token_ids:
        body["return_token_ids"] = True
    return orjson.dumps({**body, **options.extra_body})


def print_report(outcome: dict[str, Any]) -> None:
    host = outcome["machine"]
    before, after = host["load_average_before"][0], host["load_average_after"][0]
    print(f"command    {outcome['command']}")
    print(f"conditions {outcome['model']}; {outcome['loop']}; commit {host['commit']}; {host['date']}")
    print(f"machine    {host['cpu']}, {host['cores']} cores; load average {before:.2f} before, {after:.2f} after")
    if before > host["cores"]:
        print("warning    the machine was busy before the run began: these figures cannot be compared with others")
    print()
    print(report.table(outcome["figures"]))


def redacted(arguments: Sequence[str]) -> list[str]:
    """The arguments without the key, in both spellings."""
    result = [item if not item.startswith("--api-key=") else "--api-key=***" for item in arguments]
    return ["***" if position and result[position - 1] == "--api-key" else item for position, item in enumerate(result)]


def _ids_of(options: argparse.Namespace) -> TokenIds:
    first, end = options.token_ids
    return TokenIds(first, end, options.seed)


def _fresh(item: PlannedRequest, ids: TokenIds) -> tuple[int, ...]:
    """A prompt of the same length that warms no cache for the run itself."""
    return ids.draw(f"warm-up {item.index}", len(item.prompt_token_ids))


def _positive(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"must be positive, not {text}")
    return value


def _json_object(text: str) -> dict[str, Any]:
    value = orjson.loads(text)
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError("wants a JSON object")
    return value


def _id_range(text: str) -> tuple[int, int]:
    first, _, end = text.partition(":")
    if not int(first) < int(end):
        raise argparse.ArgumentTypeError(f"wants FIRST:END with FIRST < END, not {text}")
    return int(first), int(end)


if __name__ == "__main__":
    sys.exit(main())
