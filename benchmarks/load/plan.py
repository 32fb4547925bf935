"""What to send and when: a list of requests, made before the first is sent and the same for the same seed.

Two sources: a synthetic load (Poisson arrivals, lengths with a given mean and spread, an optional common prefix), and a trace
(a CSV of arrivals and lengths, perhaps with the ids of its prompt blocks). No texts are in traces: token ids are drawn from the
block's id, so that what shared a prefix in the trace shares one here.

    trace    block 512:   |--- id 0 ---|--- id 14 ---|--- id 15 -|          input_tokens = 1300
    here     divisor 16:  |- 32 ids of 0 -|- 32 of 14 -|- 17 of 15 -|       81 tokens

Knows nothing about HTTP and models: a prompt is a tuple of token ids.
"""

from __future__ import annotations

import csv
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

TRACE_BLOCK_TOKENS = 512


@dataclass(frozen=True, slots=True)
class PlannedRequest:
    index: int
    at_s: float  # after the start of the run; a closed loop does not look at it
    prompt_token_ids: tuple[int, ...]
    max_tokens: int


@dataclass(frozen=True, slots=True)
class Lengths:
    """A distribution of token counts: `mean`, or `mean:cv` for a gamma distribution with that coefficient of variation."""

    mean: float
    cv: float = 0.0

    @classmethod
    def parse(cls, text: str) -> Lengths:
        """Raises ValueError."""
        mean, _, cv = text.partition(":")
        lengths = cls(float(mean), float(cv or 0))
        if not (lengths.mean >= 1 and lengths.cv >= 0):
            raise ValueError(f"lengths are mean or mean:cv with mean >= 1 and cv >= 0, not {text!r}")
        return lengths

    def draw(self, source: random.Random) -> int:
        if self.cv == 0:
            return round(self.mean)
        shape = 1 / self.cv**2
        return max(1, round(source.gammavariate(shape, self.mean / shape)))


@dataclass(frozen=True, slots=True)
class TokenIds:
    """Where prompts get their ids from: the half-open range [first, end), by a seed and a name for each piece."""

    first: int
    end: int
    seed: int

    def draw(self, name: str, count: int) -> tuple[int, ...]:
        return tuple(random.Random(f"{self.seed}/{name}").choices(range(self.first, self.end), k=count))


def synthetic(
    *, num_requests: int, rate: float, inputs: Lengths, outputs: Lengths, shared_prefix_tokens: int, ids: TokenIds
) -> list[PlannedRequest]:
    """`rate` in requests per second; the shared prefix is part of the input length, and at most all of it."""
    arrivals, sizes = (random.Random(f"{ids.seed}/{name}") for name in ("arrivals", "sizes"))
    shared = ids.draw("shared prefix", shared_prefix_tokens)
    at_s = 0.0
    plan = []
    for index in range(num_requests):
        num_tokens, max_tokens = inputs.draw(sizes), outputs.draw(sizes)
        own = ids.draw(f"request {index}", max(0, num_tokens - len(shared)))
        plan.append(PlannedRequest(index, at_s, (shared + own)[:num_tokens], max_tokens))
        at_s += arrivals.expovariate(rate)
    return plan


@dataclass(frozen=True, slots=True)
class TraceScale:
    """How to fit a trace of large models on large machines to the model at hand."""

    length_divisor: float = 1.0
    max_input: int | None = None
    max_output: int | None = None
    rate_scale: float = 1.0  # 2 = arrivals come twice as fast

    def tokens(self, count: int, most: int | None) -> int:
        scaled = max(1, round(count / self.length_divisor))
        return scaled if most is None else min(scaled, most)


def from_trace(path: Path, *, num_requests: int | None, scale: TraceScale, ids: TokenIds) -> list[PlannedRequest]:
    """The first `num_requests` rows (None = all). Raises ValueError for a file that is no trace."""
    block_tokens = max(1, round(TRACE_BLOCK_TOKENS / scale.length_divisor))
    plan: list[PlannedRequest] = []
    first_ms: float | None = None
    with path.open(newline="", encoding="utf-8") as file:
        rows = csv.DictReader(file)
        columns = {"arrival_ms", "input_tokens", "output_tokens"}
        if not columns <= set(rows.fieldnames or ()):
            raise ValueError(f"{path} has no columns {', '.join(sorted(columns))}")
        for index, row in enumerate(rows):
            if num_requests is not None and index >= num_requests:
                break
            arrival_ms = float(row["arrival_ms"])
            first_ms = arrival_ms if first_ms is None else first_ms
            num_tokens = scale.tokens(int(row["input_tokens"]), scale.max_input)
            prompt: list[int] = []
            for block in _expand(row.get("block512_hash_ids") or ""):
                if len(prompt) >= num_tokens:
                    break
                prompt += ids.draw(f"block {block}", block_tokens)
            prompt += ids.draw(f"request {index}", max(0, num_tokens - len(prompt)))
            at_s = (arrival_ms - first_ms) / 1000 / scale.rate_scale
            max_tokens = scale.tokens(int(row["output_tokens"]), scale.max_output)
            plan.append(PlannedRequest(index, at_s, tuple(prompt[:num_tokens]), max_tokens))
    return plan


def mean_rate(plan: list[PlannedRequest]) -> float:
    """Requests per second between the first and the last arrival; 0 if that is no time at all."""
    spread_s = plan[-1].at_s - plan[0].at_s if plan else 0.0
    return (len(plan) - 1) / spread_s if spread_s > 0 else 0.0


def _expand(runs: str) -> Iterator[int]:
    """`"0 14-16"` -> 0, 14, 15, 16."""
    for run in runs.split():
        first, _, last = run.partition("-")
        yield from range(int(first), int(last or first) + 1)
