"""What early refusal and fair turns are worth: the router's own queue and forecast before simulated workers, in virtual time.

    python -m benchmarks.admission --json

*Goodput*: requests whose first token comes within the promise, per second, as a share of the requests per second that the
same workers serve when they always have something to do. Offered: 110, 120 and 130 % of that, with and without early refusal;
without, clients wait as long as it takes.

*Fairness*: two tenants that both ask for more than their half, one ten times as often and with longer requests. The most that
one is served ahead of the other, over any stretch of time, against the bound of virtual token counters; and what first come,
first served and one request each in turn come to.

A simulated worker batches continuously: one token per running sequence and step, prompts in what is left of the step's budget,
first come, first served. A step takes a fixed time and a time per token. Nothing here is measured; the same seed gives the same
figures.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from common.config import AdmissionConfig
from router.admission.bands import Band
from router.admission.desk import Desk
from router.admission.forecast import Room
from router.admission.queue import FairQueue, Item

POOL_TOKENS, MAX_RUNNING, STEP_TOKENS = 16_384, 32, 256
STEP_S, TOKEN_S = 0.012, 0.00025
EXPECTED_OUTPUT_TOKENS = 256  # what clients give as max_tokens
TTFT_SLO_S = 3.0


Row = dict[str, float | str]


@dataclass(frozen=True, slots=True)
class Work:
    arrives_s: float
    prompt_tokens: int
    output_tokens: int
    tenant: str = "a"


@dataclass(slots=True)
class _Sequence:
    serial: int
    work: Work
    left_to_compute: int
    generated: int = 0


@dataclass
class Worker:
    """Prefill and decode in one place: what matters here is that time to the first token grows with what waits."""

    waiting: deque[_Sequence] = field(default_factory=deque)
    running: list[_Sequence] = field(default_factory=list)

    @property
    def idle(self) -> bool:
        return not self.running and not self.waiting

    def give(self, serial: int, work: Work) -> None:
        self.waiting.append(_Sequence(serial, work, work.prompt_tokens))

    def step(self) -> tuple[float, list[_Sequence], list[_Sequence], list[_Sequence]]:
        """Its duration; whose first token it brought, whose later ones, and who has ended."""
        while self.waiting and len(self.running) < MAX_RUNNING:
            self.running.append(self.waiting.popleft())
        budget = STEP_TOKENS
        first: list[_Sequence] = []
        later: list[_Sequence] = []
        for one in self.running:
            if not one.left_to_compute:
                budget -= 1
                one.generated += 1
                later.append(one)
        for one in self.running:
            if one.left_to_compute and budget > 0:
                computed = min(budget, one.left_to_compute)
                budget -= computed
                one.left_to_compute -= computed
                if not one.left_to_compute:
                    one.generated = 1
                    first.append(one)
        ended = [one for one in self.running if one.generated >= one.work.output_tokens]
        self.running = [one for one in self.running if one.generated < one.work.output_tokens]
        return STEP_S + TOKEN_S * (STEP_TOKENS - budget), first, later, ended


@dataclass
class Outcome:
    ttft_s: list[float] = field(default_factory=list)
    refused: int = 0
    waited_before_refusal_s: float = 0.0
    ended_s: float = 0.0
    predicted: list[tuple[float, float]] = field(default_factory=list)


def serve(traffic: Sequence[Work], config: AdmissionConfig) -> Outcome:
    """All of it, through the product's desk, until nothing is left."""
    desk, worker, outcome = Desk(config), Worker(), Outcome()
    room = Room(POOL_TOKENS * config.room_pools, MAX_RUNNING * config.room_batches)
    works = list(traffic)
    foreseen: dict[int, float | None] = {}
    now_s, arrived = 0.0, 0

    def turn() -> None:
        for granted in desk.turn(now_s, room).granted:
            worker.give(granted.item.serial, works[granted.item.serial])

    while arrived < len(works) or not worker.idle:
        if worker.idle and works[arrived].arrives_s > now_s:
            now_s = works[arrived].arrives_s
        while arrived < len(works) and works[arrived].arrives_s <= now_s:
            work = works[arrived]
            item = _item(arrived, work, work.arrives_s)
            foreseen[arrived] = desk.predicted_ttft_s(item, None)
            if desk.arrive(item, max(work.arrives_s, now_s), room, None).refusal is not None:
                outcome.refused += 1
            arrived += 1
            turn()
        duration_s, first, later, ended = worker.step()
        now_s += duration_s
        for one in first:
            desk.started(one.serial, 0, now_s)
            ttft_s = now_s - one.work.arrives_s
            outcome.ttft_s.append(ttft_s)
            prediction = foreseen[one.serial]
            if prediction:
                outcome.predicted.append((prediction, ttft_s))
        for one in (*first, *later):
            desk.generated(one.serial, 1)
        for one in ended:
            desk.finished(one.serial, now_s)
        turn()
    outcome.ended_s = now_s
    return outcome


def _item(serial: int, work: Work, now_s: float) -> Item:
    return Item(
        serial=serial,
        tenant=work.tenant,
        weight=1.0,
        band=Band.INTERACTIVE,
        prompt_tokens=work.prompt_tokens,
        room_tokens=work.prompt_tokens + EXPECTED_OUTPUT_TOKENS,
        sequences=1,
        arrived_s=now_s,
        deadline_s=now_s + 1e9,
    )


def poisson(rate_per_s: float, duration_s: float, seed: int) -> list[Work]:
    draw = random.Random(seed)
    works, now_s = [], 0.0
    while (now_s := now_s + draw.expovariate(rate_per_s)) < duration_s:
        prompt = min(4000, max(1, round(draw.lognormvariate(5.2, 0.9))))
        works.append(Work(now_s, prompt, max(1, min(EXPECTED_OUTPUT_TOKENS, round(draw.expovariate(1 / 90))))))
    return works


def capacity_per_s(seed: int) -> float:
    """Requests per second of workers that always have something to do."""
    backlog = [Work(0.0, work.prompt_tokens, work.output_tokens) for work in poisson(10.0, 200.0, seed)]
    config = AdmissionConfig(max_queued_tokens=10**9)
    return len(backlog) / serve(backlog, config).ended_s


def overload(duration_s: float, seed: int, loads: Sequence[float] = (0.8, 1.1, 1.2, 1.3)) -> list[Row]:
    capacity = capacity_per_s(seed)
    rows: list[Row] = []
    for load in loads:
        for refusing in (True, False):
            promise = {"ttft_slo_s": {"interactive": TTFT_SLO_S}, "slo_slack": 0.0} if refusing else {}
            config = AdmissionConfig.model_validate({"max_queued_tokens": 10**9, "max_queued_requests": 10**6, **promise})
            traffic = poisson(load * capacity, duration_s, seed + 1)
            outcome = serve(traffic, config)
            good = sum(ttft_s <= TTFT_SLO_S for ttft_s in outcome.ttft_s)
            served = sorted(outcome.ttft_s)
            late = [actual / predicted for predicted, actual in outcome.predicted]
            rows.append(
                {
                    "load": load,
                    "early_refusal": refusing,
                    "capacity_per_s": round(capacity, 3),
                    "goodput": round(good / duration_s / capacity, 3),
                    "possible": round(min(1.0, load), 3),
                    "refused_share": round(outcome.refused / len(traffic), 3),
                    "kept_of_served": round(good / max(1, len(served)), 3),
                    "ttft_p50_s": round(served[len(served) // 2], 2),
                    "ttft_p99_s": round(served[int(0.99 * len(served))], 2),
                    "ttft_over_prediction_p50": round(sorted(late)[len(late) // 2], 2) if late else 0.0,
                }
            )
    return rows


# -- fairness ----------------------------------------------------------------------------------------------------------


class Order(Protocol):
    def push(self, item: Item) -> None: ...
    def head(self, now_s: float) -> Item | None: ...
    def take(self, item: Item, now_s: float) -> object: ...
    def served(self, item: Item, *, prompt_tokens: int = 0, output_tokens: int = 0) -> None: ...


class _FirstCome:
    def __init__(self) -> None:
        self._items: deque[Item] = deque()

    def push(self, item: Item) -> None:
        self._items.append(item)

    def head(self, now_s: float) -> Item | None:
        return self._items[0] if self._items else None

    def take(self, item: Item, now_s: float) -> None:
        self._items.popleft()

    def served(self, item: Item, *, prompt_tokens: int = 0, output_tokens: int = 0) -> None:
        """All the same to it."""


class _InTurn(_FirstCome):
    def __init__(self) -> None:
        self._lines: dict[str, deque[Item]] = {}

    def push(self, item: Item) -> None:
        self._lines.setdefault(item.tenant, deque()).append(item)

    def head(self, now_s: float) -> Item | None:
        return next((line[0] for line in self._lines.values() if line), None)

    def take(self, item: Item, now_s: float) -> None:
        line = self._lines.pop(item.tenant)
        line.popleft()
        self._lines[item.tenant] = line


def _counters() -> FairQueue:
    config = AdmissionConfig()
    return FairQueue(prompt_cost=config.prompt_token_cost, output_cost=config.output_token_cost, overdue_s=60.0, overdue_every=0)


def fairness(num_steps: int, seed: int) -> list[Row]:
    config = AdmissionConfig()
    rows: list[Row] = []
    orders: dict[str, Callable[[], Order]] = {"counters": _counters, "first come": _FirstCome, "in turn": _InTurn}
    for name, make in orders.items():
        order, worker, draw = make(), Worker(), random.Random(seed)
        items: list[Item] = []
        works: list[Work] = []
        out_tokens = longest = 0
        service = {"loud": 0.0, "quiet": 0.0}
        leads: list[float] = []
        for step in range(num_steps):
            for tenant, count in (("loud", 10), ("quiet", 1)):
                for _ in range(count * (50 if step == 0 else 1)):
                    prompt = draw.randint(200, 600) if tenant == "loud" else draw.randint(50, 200)
                    works.append(Work(0.0, prompt, draw.randint(20, 200) if tenant == "loud" else draw.randint(20, 60), tenant))
                    items.append(_item(len(items), works[-1], float(step)))
                    order.push(items[-1])
                    longest = max(longest, prompt)
            while (head := order.head(step)) is not None and out_tokens + head.room_tokens <= POOL_TOKENS:
                order.take(head, step)
                out_tokens += head.room_tokens
                service[head.tenant] += config.prompt_token_cost * head.prompt_tokens
                worker.give(head.serial, works[head.serial])
            _, first, later, ended = worker.step()
            for one in (*first, *later):
                service[one.work.tenant] += config.output_token_cost
                order.served(items[one.serial], output_tokens=1)
            out_tokens -= sum(items[one.serial].room_tokens for one in ended)
            leads.append(service["loud"] - service["quiet"])
        bound = 2 * max(config.prompt_token_cost * longest, config.output_token_cost * POOL_TOKENS)
        rows.append(
            {
                "order": name,
                "largest_lead_tokens": round(max(leads) - min(leads)),
                "bound_tokens": round(bound),
                "within": max(leads) - min(leads) <= bound,
                "share_of_quiet": round(service["quiet"] / sum(service.values()), 3),
            }
        )
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.admission", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=600.0, help="of virtual time, for each load")
    parser.add_argument("--steps", type=int, default=6000, help="of the simulated worker, for fairness")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    given = parser.parse_args(arguments)
    found = {"overload": overload(given.seconds, given.seed), "fairness": fairness(given.steps, given.seed)}
    if given.json:
        sys.stdout.write(json.dumps(found) + "\n")
        return 0
    for title, rows in found.items():
        names = list(rows[0])
        sys.stdout.write(f"{title}\n  {'  '.join(names)}\n")
        for row in rows:
            sys.stdout.write("  " + "  ".join(str(row[name]).rjust(len(name)) for name in names) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
