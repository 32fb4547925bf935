"""The policies that others have published, each a pure function over the same candidates: costs out, the lowest wins.

They rank the workers of one role and know nothing of the other, so they leave it to the decode worker where a prompt is computed.
The formulas are written from their descriptions; where versions of a project differ, the comment says which one this is. Of equal
ones the least recently used worker is taken. `predicted` and `min_ttft` look at both roles: `router.placement.predicted`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from router.placement.membership import Prompt
from router.placement.worker import Worker


@dataclass(frozen=True, slots=True)
class Candidate:
    worker: Worker
    cached_tokens: int


Policy = Callable[[Sequence[Candidate], Prompt, Callable[[], float]], list[float]]
"""`draw` gives a number in [0, 1). One cost per candidate."""


def least_load(candidates: Sequence[Candidate], prompt: Prompt, draw: Callable[[], float]) -> list[float]:
    """Fewest outstanding tokens, prompts and answers together."""
    return [float(one.worker.queued_tokens + one.worker.kv_tokens) for one in candidates]


def round_robin(candidates: Sequence[Candidate], prompt: Prompt, draw: Callable[[], float]) -> list[float]:
    return [float(one.worker.last_used) for one in candidates]


def random(candidates: Sequence[Candidate], prompt: Prompt, draw: Callable[[], float]) -> list[float]:
    return [draw() for _ in candidates]


def cache_aware(candidates: Sequence[Candidate], prompt: Prompt, draw: Callable[[], float]) -> list[float]:
    """SGLang's gateway, with the defaults of its configuration type (threshold 0.5, imbalance by more than 32 and by more than
    1.1 times): the least loaded one when loads are out of balance; else the best match if it covers more than the threshold of
    the prompt; else the least loaded one."""
    loads = [one.worker.requests for one in candidates]
    out_of_balance = max(loads) - min(loads) > 32 and max(loads) > 1.1 * min(loads)
    best = max(one.cached_tokens for one in candidates) / prompt.num_tokens
    if out_of_balance or best <= 0.5:
        return [float(load) for load in loads]
    return [-float(one.cached_tokens) for one in candidates]


def weighted(candidates: Sequence[Candidate], prompt: Prompt, draw: Callable[[], float]) -> list[float]:
    """llm-d's scorers with the weights 2 : 2 : 3: shortest queue, least KV in use, longest cached prefix; each from 0 to 1."""
    queues = [one.worker.waiting for one in candidates]
    low, high = min(queues), max(queues)
    return [
        -(
            2.0 * ((high - queue) / (high - low) if high > low else 1.0)
            + 2.0 * (1.0 - one.worker.kv_usage)
            + 3.0 * one.cached_tokens / prompt.num_tokens
        )
        for one, queue in zip(candidates, queues, strict=True)
    ]


def dynamo(candidates: Sequence[Candidate], prompt: Prompt, draw: Callable[[], float]) -> list[float]:
    """Dynamo's KV router with overlap weight 1 and temperature 0: blocks of prompts that would be queued there, this one without
    its cached part included, and blocks in use by decoding."""
    block = max(1, prompt.block_tokens)
    return [
        (one.worker.queued_tokens + prompt.num_tokens - one.cached_tokens) / block + one.worker.kv_tokens / block
        for one in candidates
    ]


def aibrix(candidates: Sequence[Candidate], prompt: Prompt, draw: Callable[[], float]) -> list[float]:
    """AIBrix' prefix-cache routing as its documentation has it (imbalance 16, 2 standard deviations): fewest requests when out of
    balance; else the best match among workers with at most mean + 2 sigma requests; else fewest requests."""
    loads = [one.worker.requests for one in candidates]
    mean = sum(loads) / len(loads)
    limit = mean + 2.0 * (sum((load - mean) ** 2 for load in loads) / len(loads)) ** 0.5
    holders = [one for one, load in zip(candidates, loads, strict=True) if one.cached_tokens and load <= limit]
    if max(loads) - min(loads) > 16 or not holders:
        return [float(load) for load in loads]
    # Equal matches: fewest requests. Who may not be taken comes behind all others.
    return [
        -float(one.cached_tokens) + 1e-3 * load if load <= limit else 1e9 + load
        for one, load in zip(candidates, loads, strict=True)
    ]


def loadaware(candidates: Sequence[Candidate], prompt: Prompt, draw: Callable[[], float]) -> list[float]:
    """production-stack's load-aware cache routing, beta 1: share of the prompt that is cached, less the load above the mean."""
    loads = [one.worker.requests for one in candidates]
    mean = sum(loads) / len(loads)
    return [
        -(one.cached_tokens / prompt.num_tokens - (load - mean) / max(1.0, mean))
        for one, load in zip(candidates, loads, strict=True)
    ]


POLICIES: Mapping[str, Policy] = {
    "least_load": least_load,
    "round_robin": round_robin,
    "random": random,
    "cache_aware": cache_aware,
    "weighted": weighted,
    "dynamo": dynamo,
    "aibrix": aibrix,
    "loadaware": loadaware,
}
