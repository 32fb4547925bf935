"""Prefill here or there: what the router's choice costs, against the better of always here and always there, cell by cell.

A cell is a length of prompts, a share of them that is cached (on the decode worker and on one prefill worker), and a load of
the prefill pool from other prompts. The cost of a way to choose is what clients wait for because of a prompt, all of them
together: its time to the first token, the tokens of others that it holds up on the decode worker, and the other prompts that it
delays in the prefill pool, counted against the same arrivals without it.

The decode worker computes prompts beside its decoding, some tokens of each step; a prefill worker computes one after the other.
The router learns the speeds from reports, as ever.
"""

from __future__ import annotations

import heapq
import random
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from common.clock import ManualClock
from common.config import PlacementConfig
from common.load import StepSample, WorkerLoad, WorkerReport, WorkerShape, pairs
from common.types import PrefillChoice, Role, StageTimings, Started, WorkerRef, WorkerState
from router.placement.membership import Placement, Prompt, WorkerView
from router.placement.placer import Placer

_MODEL, _BLOCK = "m", 16
_A, _B = 0.006, 1.0 / 16_000
_C = _B / 53_000
_HANDOFF_S, _HANDOFF_TOKEN_S = 0.008, 2e-6
_STEP_TOKENS, _CHUNK_TOKENS = 512, 8192
_INTERVAL_S = 0.1
_OTHER_TOKENS = 2000

LENGTHS = (64, 256, 1024, 4096, 16_384)
CACHED = (0.0, 0.5, 0.9)
LOADS = (0.0, 0.6, 0.9)

Choose = Callable[[Placement, int, int], bool]
"""(placement, prompt tokens, cached tokens) -> whether the prompt is computed here."""

WAYS: dict[str, Choose] = {
    "router": lambda placement, total, cached: placement.choice is PrefillChoice.HERE,
    "here": lambda placement, total, cached: True,
    "there": lambda placement, total, cached: False,
    "2048 tokens and 0.7": lambda placement, total, cached: total - cached < 2048 and (total - cached) / total < 0.7,
    "32 tokens": lambda placement, total, cached: total - cached <= 32,
    "256 tokens": lambda placement, total, cached: total - cached <= 256,
}


@dataclass
class _Machine:
    """A queue of work; `free_s` says when it will be through."""

    ref: WorkerRef
    free_s: float = 0.0
    jobs: list[tuple[float, int, int]] = field(default_factory=list)  # end, new tokens, total tokens
    untold: list[int] = field(default_factory=list)
    steps: list[StepSample] = field(default_factory=list)
    sequence: int = 0

    def take(self, now_s: float, service_s: float, new: int, total: int) -> float:
        self.free_s = max(now_s, self.free_s) + service_s
        self.jobs.append((self.free_s, new, total))
        return self.free_s

    def report(self, now_s: float, shape: WorkerShape, decoding: int, kv_tokens: int, keys: tuple[int, ...]) -> WorkerReport:
        self.sequence += 1
        self.jobs = [job for job in self.jobs if job[0] > now_s]
        report = WorkerReport(
            sequence=self.sequence,
            load=WorkerLoad(
                running=decoding,
                queued_tokens=sum(new for _, new, _ in self.jobs),
                queued_pairs=sum(pairs(new, total) for _, new, total in self.jobs),
                decoding=decoding,
                kv_tokens=kv_tokens,
                blocks_free=shape.blocks_total,
            ),
            shape=shape if self.sequence == 1 else None,
            dispatches=tuple(self.untold),
            registered=keys if self.sequence == 1 else (),
            steps=tuple(self.steps),
        )
        self.untold, self.steps = [], []
        return report


def cost_of(
    choose: Choose | None,
    *,
    length: int,
    cached_share: float,
    load: float,
    decoding: int = 16,
    num_prefill: int = 4,
    num_prompts: int = 150,
    seed: int = 1,
) -> tuple[float, float]:
    """Seconds of waiting per prompt, and the share computed here. Without `choose`, the other prompts' waiting alone."""
    clock = ManualClock()
    placer = Placer(PlacementConfig(), clock=clock, draw=random.Random(seed))
    dice = random.Random(seed)
    decode = _Machine(WorkerRef("d", 1, "d"))
    prefill = [_Machine(WorkerRef(f"p{index}", 1, f"p{index}")) for index in range(num_prefill)]
    views = [WorkerView(decode.ref, Role.DECODE, _MODEL, WorkerState.READY, 0)]
    views += [WorkerView(one.ref, Role.PREFILL, _MODEL, WorkerState.READY, 0) for one in prefill]
    placer.sync(tuple(views))
    cached = int(length * cached_share) // _BLOCK * _BLOCK
    keys = tuple(range(1, cached // _BLOCK + 1))
    other = Prompt(_OTHER_TOKENS, block_tokens=_BLOCK, keys=())
    kv_tokens = decoding * 1000
    decode_step_s = _A + _B * decoding + _C * kv_tokens
    decode_shape = WorkerShape(_BLOCK, b"f", 1 << 20, _STEP_TOKENS)
    prefill_shape = WorkerShape(_BLOCK, b"f", 1 << 20, _CHUNK_TOKENS)

    def prefill_s(new: int, total: int) -> float:
        return _A * -(-new // _CHUNK_TOKENS) + _B * new + _C * pairs(new, total)

    # Arrivals of both kinds, the same for every way to choose.
    gap_s = 8.0 * max(prefill_s(length, length), 0.02)  # 3 % of the pool: what is measured hardly loads it
    arrivals: list[tuple[float, int, Prompt]] = []
    at_s = 5.0
    for number in range(num_prompts):
        at_s += dice.expovariate(1.0 / gap_s)
        own_keys = (number + 1) << 20
        own = tuple(range(own_keys, own_keys + length // _BLOCK - len(keys)))
        arrivals.append((at_s, number, Prompt(length, block_tokens=_BLOCK, keys=(*keys, *own))))
    end_s, at_s = at_s, 0.0
    if load:
        others_gap_s = prefill_s(_OTHER_TOKENS, _OTHER_TOKENS) / load / num_prefill
        while (at_s := at_s + dice.expovariate(1.0 / others_gap_s)) < end_s:
            arrivals.append((at_s, num_prompts + len(arrivals), other))
    if choose is None:
        arrivals = [arrival for arrival in arrivals if arrival[2] is other]
    events: list[tuple[float, int, object]] = [(at_s, number, one) for at_s, number, one in arrivals]
    heapq.heapify(events)
    reports = iter(range(-1, -10_000_000, -1))
    heapq.heappush(events, (0.0, next(reports), None))
    waited_s, here, left = 0.0, 0, len(arrivals)
    while left:
        now_s, _, subject = heapq.heappop(events)
        clock.advance(max(0.0, now_s - clock.monotonic_s()))
        if subject is None:
            if now_s < 5.0:  # what was served before
                size = dice.choice((100, 500, 2000))
                for machine in prefill:
                    machine.steps.append(StepSample(size, pairs(size, size), prefill_s(size, size)))
                for beside in (0, 100, 400):
                    tokens = decoding + beside
                    seen = kv_tokens + pairs(beside, beside)
                    decode.steps.append(StepSample(tokens, seen, _A + _B * tokens + _C * seen))
                travelled = dice.choice((64, 1024, 4096))
                placer.fleet.handoff(_MODEL).learn(travelled, _HANDOFF_S + _HANDOFF_TOKEN_S * travelled)
            placer.report(decode.ref, decode.report(now_s, decode_shape, decoding, kv_tokens, keys))
            for index, machine in enumerate(prefill):
                held = keys if index == 0 else ()
                placer.report(machine.ref, machine.report(now_s, prefill_shape, 0, 0, held))
            heapq.heappush(events, (now_s + max(_INTERVAL_S, gap_s / 10), next(reports), None))
        elif isinstance(subject, Prompt):
            left -= 1
            placement = placer.place(_MODEL, subject)
            dispatched = placer.open(placement, _MODEL, subject)
            if subject is not other and choose is not None and choose(placement, length, cached):
                new = length - cached
                chunks = -(-new // (_STEP_TOKENS - decoding))
                added_s = _B * new + _C * pairs(new, length)
                waited_s += decode.take(now_s, chunks * decode_step_s + added_s, new, length) - now_s + decoding * added_s
                decode.untold.append(dispatched.dispatch_id)
                here += 1
            else:
                machine = next(one for one in prefill if one.ref == placement.prefill[0])
                new = subject.num_tokens - (cached if machine is prefill[0] and subject is not other else 0)
                waited_s += machine.take(now_s, prefill_s(new, subject.num_tokens), new, subject.num_tokens) - now_s
                if subject is not other:
                    waited_s += _HANDOFF_S + _HANDOFF_TOKEN_S * (length - cached)
                machine.untold.append(dispatched.dispatch_id)
            dispatched.started(Started(StageTimings(), 0))
            dispatched.close()
    return waited_s / num_prompts, here / num_prompts


def cells(*, num_prompts: int, seed: int = 1) -> Iterator[dict[str, float | str]]:
    """Every cell with the cost of every way; `oracle` is the better of always here and always there."""
    for length in LENGTHS:
        for cached_share in CACHED:
            for load in LOADS:
                row: dict[str, float | str] = {"length": length, "cached": cached_share, "load": load}
                alone_s, _ = cost_of(
                    None, length=length, cached_share=cached_share, load=load, num_prompts=num_prompts, seed=seed
                )
                for name, choose in WAYS.items():
                    total_s, here = cost_of(
                        choose, length=length, cached_share=cached_share, load=load, num_prompts=num_prompts, seed=seed
                    )
                    row[name] = total_s - alone_s
                    if name == "router":
                        row["here_share"] = here
                row["oracle"] = min(float(row["here"]), float(row["there"]))
                yield row


def over_oracle(rows: list[dict[str, float | str]], name: str) -> tuple[float, float]:
    """How much more a way costs than the oracle: over all cells together, and in the worst cell."""
    ratios = [float(row[name]) / float(row["oracle"]) for row in rows]
    return statistics.geometric_mean(ratios), max(ratios)
