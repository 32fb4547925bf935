"""The order of what waits, step by step, and what tenants are owed of it in the long run."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.admission.bands import Band
from router.admission.queue import FairQueue, Item

INTERACTIVE, BATCH, BACKGROUND = Band
PROMPT_COST, OUTPUT_COST = 1.0, 2.0
serials = itertools.count()


def item(
    tenant: str = "a",
    band: Band = INTERACTIVE,
    *,
    prompt: int = 10,
    output: int = 10,
    weight: float = 1.0,
    arrived_s: float = 0.0,
    deadline_s: float = 100.0,
) -> Item:
    return Item(
        serial=next(serials),
        tenant=tenant,
        weight=weight,
        band=band,
        prompt_tokens=prompt,
        room_tokens=prompt + output,
        sequences=1,
        arrived_s=arrived_s,
        deadline_s=deadline_s,
    )


def fair_queue(*items: Item, overdue_s: float = 60.0, overdue_every: int = 0) -> FairQueue:
    queue = FairQueue(prompt_cost=PROMPT_COST, output_cost=OUTPUT_COST, overdue_s=overdue_s, overdue_every=overdue_every)
    for one in items:
        queue.push(one)
    return queue


def served(queue: FairQueue, now_s: float = 0.0) -> list[Item]:
    """All, in the order in which they go."""
    order = []
    while (head := queue.head(now_s)) is not None:
        queue.take(head, now_s)
        order.append(head)
    return order


# -- one rule at a time ------------------------------------------------------------------------------------------------


def test_a_higher_band_goes_first_whenever_it_came() -> None:
    low, middle, high = item(band=BACKGROUND), item(band=BATCH), item(band=INTERACTIVE)
    assert served(fair_queue(low, middle, high)) == [high, middle, low]


def test_of_one_tenant_the_nearest_deadline_goes_first_then_who_came_first() -> None:
    first, second, urgent = item(deadline_s=9), item(deadline_s=9), item(deadline_s=3)
    assert served(fair_queue(first, second, urgent)) == [urgent, first, second]


def test_the_least_served_tenant_goes_first() -> None:
    mine = [item("a", prompt=30), item("a", prompt=30)]
    other = [item("b", prompt=10) for _ in range(4)]
    # 0:0 -> a; 30:0 -> b, b, b; 30:30 -> a (who waits longer); 60:30 -> b
    order = served(fair_queue(*mine, *other))
    assert [one.tenant for one in order] == ["a", "b", "b", "b", "a", "b"]


def test_a_weight_of_three_is_three_times_the_service() -> None:
    heavy = [item("a", prompt=10, weight=3.0) for _ in range(30)]
    light = [item("b", prompt=10) for _ in range(30)]
    first = served(fair_queue(*heavy, *light))[:20]
    assert [one.tenant for one in first].count("a") == 15


def test_generated_tokens_count_and_cached_ones_do_not() -> None:
    a, b = item("a", prompt=10), item("b", prompt=10)
    queue = fair_queue(a, item("a"), b, item("b"))
    queue.take(a, 0.0)
    queue.take(b, 0.0)
    queue.served(a, output_tokens=1)  # 12 : 10
    assert queue.head(0.0).tenant == "b"  # type: ignore[union-attr]
    queue.served(b, output_tokens=2)  # 12 : 14
    assert queue.head(0.0).tenant == "a"  # type: ignore[union-attr]
    queue.served(b, prompt_tokens=-8)  # 12 : 6
    assert queue.head(0.0).tenant == "b"  # type: ignore[union-attr]
    assert queue.gap(INTERACTIVE) == 6


@pytest.mark.parametrize("others_wait", [True, False])
def test_idling_saves_nothing_up(others_wait: bool) -> None:
    busy = [item("a", prompt=100) for _ in range(5)]
    queue = fair_queue(*busy)
    for _ in range(4 if others_wait else 5):
        queue.take(queue.head(0.0), 0.0)  # type: ignore[arg-type]
    for _ in range(6):
        queue.push(item("b", prompt=100))
        queue.push(item("a", prompt=100))
    turns = [one.tenant for one in served(queue)][:8]
    assert turns.count("b") <= 5, "the one that was away is served its past"


def test_counters_are_of_their_band() -> None:
    queue = fair_queue(*(item("a", BATCH, prompt=1000) for _ in range(2)))
    assert len(served(queue)) == 2
    queue.push(item("b"))
    queue.push(item("a"))
    first = queue.head(0.0)
    assert first is not None
    assert first.tenant == "b"
    queue.take(first, 0.0)
    assert queue.gap(INTERACTIVE) == 0


def test_what_left_is_not_served() -> None:
    stays, leaves, also = item(deadline_s=5), item(deadline_s=1), item("b")
    queue = fair_queue(stays, leaves, also)
    assert queue.remove(leaves.serial) == leaves
    assert queue.remove(leaves.serial) is None
    assert queue.remove(also.serial) == also
    assert served(queue) == [stays]
    assert queue.all_room_tokens == 0


# -- bands that wait too long ------------------------------------------------------------------------------------------


def test_a_band_that_is_overdue_has_one_dispatch_in_so_many() -> None:
    high = [item(band=INTERACTIVE, arrived_s=100) for _ in range(20)]
    low = [item(band=BACKGROUND) for _ in range(3)]
    queue = fair_queue(*high, *low, overdue_s=60, overdue_every=4)
    bands = [one.band for one in served(queue, now_s=100.0)]
    assert [index for index, band in enumerate(bands) if band is BACKGROUND] == [3, 7, 11]


def test_of_two_overdue_bands_the_older_one_goes() -> None:
    queue = fair_queue(
        *(item() for _ in range(9)),
        item(band=BATCH, arrived_s=5),
        item(band=BACKGROUND, arrived_s=2),
        overdue_s=10,
        overdue_every=2,
    )
    bands = [one.band for one in served(queue, now_s=50.0)]
    assert bands[1] is BACKGROUND
    assert bands[3] is BATCH


def test_without_it_bands_are_strict_for_ever() -> None:
    queue = fair_queue(item(band=BATCH), *(item() for _ in range(50)), overdue_s=1, overdue_every=0)
    assert served(queue, now_s=1e6)[-1].band is BATCH


@given(st.lists(st.sampled_from([INTERACTIVE, INTERACTIVE, BATCH, BACKGROUND]), min_size=1, max_size=60), st.integers(2, 6))
@settings(max_examples=100, deadline=None, derandomize=True, database=None)
def test_whatever_comes_no_band_starves(arrivals: list[Band], every: int) -> None:
    """Interactive requests come as fast as they are served; each of the others goes within `every` dispatches of its turn."""
    queue = fair_queue(*(item(band=band) for band in arrivals), overdue_s=10, overdue_every=every)
    lower = sum(band is not INTERACTIVE for band in arrivals)
    for _ in range(every * (lower + 1)):
        queue.push(item(arrived_s=20))
        head = queue.head(20.0)
        assert head is not None
        lower -= head.band is not INTERACTIVE
        queue.take(head, 20.0)
    assert lower == 0


# -- fairness in the long run ------------------------------------------------------------------------------------------


class Order(Protocol):
    def push(self, item: Item) -> None: ...
    def head(self, now_s: float) -> Item | None: ...
    def take(self, item: Item, now_s: float) -> object: ...
    def served(self, item: Item, *, output_tokens: int) -> None: ...


@dataclass
class FirstComeFirstServed:
    items: deque[Item] = field(default_factory=deque)

    def push(self, item: Item) -> None:
        self.items.append(item)

    def head(self, now_s: float) -> Item | None:
        return self.items[0] if self.items else None

    def take(self, item: Item, now_s: float) -> None:
        self.items.popleft()

    def served(self, item: Item, *, output_tokens: int) -> None: ...


@dataclass
class RoundRobin:
    """One request of each tenant in turn."""

    lines: dict[str, deque[Item]] = field(default_factory=dict)

    def push(self, item: Item) -> None:
        self.lines.setdefault(item.tenant, deque()).append(item)

    def head(self, now_s: float) -> Item | None:
        return next((line[0] for line in self.lines.values() if line), None)

    def take(self, item: Item, now_s: float) -> None:
        line = self.lines.pop(item.tenant)
        line.popleft()
        self.lines[item.tenant] = line

    def served(self, item: Item, *, output_tokens: int) -> None: ...


@dataclass(frozen=True)
class Traffic:
    """Of one tenant: so many requests per step, with these lengths in turn."""

    per_step: int
    lengths: Sequence[tuple[int, int]]  # prompt and output
    weight: float = 1.0


def largest_lead(order: Order, traffic: dict[str, Traffic], *, pool_tokens: int, steps: int, backlog: int = 20) -> float:
    """The most that one of two tenants was served ahead of the other, for their weights, over any stretch of time in which both
    wait: a server with a pool of KV, in which each running request draws one token per step."""
    now_s = 0.0
    running: list[tuple[Item, list[int]]] = []
    used = 0
    service = dict.fromkeys(traffic, 0.0)
    sent = dict.fromkeys(traffic, 0)
    leads: list[float] = []
    waiting = dict.fromkeys(traffic, 0)
    for _ in range(steps):
        now_s += 1
        for name, one in traffic.items():
            for _ in range(one.per_step * (backlog if now_s == 1 else 1)):
                prompt, output = one.lengths[sent[name] % len(one.lengths)]
                order.push(item(name, prompt=prompt, output=output, weight=one.weight, arrived_s=now_s, deadline_s=now_s + 1e9))
                sent[name] += 1
                waiting[name] += 1
        while (head := order.head(now_s)) is not None and used + head.room_tokens <= pool_tokens:
            order.take(head, now_s)
            waiting[head.tenant] -= 1
            used += head.room_tokens
            service[head.tenant] += PROMPT_COST * head.prompt_tokens
            running.append((head, [head.room_tokens - head.prompt_tokens]))
        for one_running, left in running:
            left[0] -= 1
            service[one_running.tenant] += OUTPUT_COST
            order.served(one_running, output_tokens=1)
        used -= sum(one.room_tokens for one, left in running if not left[0])
        running = [(one, left) for one, left in running if left[0]]
        a, b = traffic
        assert waiting[a], f"{a} has to wait all the time"
        assert waiting[b], f"{b} has to wait all the time"
        leads.append(service[a] / traffic[a].weight - service[b] / traffic[b].weight)
    return max(leads) - min(leads)


LOUD = {
    "loud": Traffic(10, [(40, 30), (60, 20)]),
    "quiet": Traffic(1, [(20, 12), (10, 16)]),
}
POOL = 200


def bound(traffic: dict[str, Traffic], pool_tokens: int) -> float:
    longest = max(prompt for one in traffic.values() for prompt, _ in one.lengths)
    least_weight = min(one.weight for one in traffic.values())
    return 2 * max(PROMPT_COST * longest, OUTPUT_COST * pool_tokens) / least_weight


@pytest.mark.parametrize("steps", [300, 1500])
def test_ten_times_as_loud_is_not_more_served(steps: int) -> None:
    assert largest_lead(fair_queue(), LOUD, pool_tokens=POOL, steps=steps) <= bound(LOUD, POOL)


@pytest.mark.parametrize("order", [FirstComeFirstServed, RoundRobin])
def test_who_comes_first_and_who_takes_turns_are_not_fair(order: Callable[[], Order]) -> None:
    assert largest_lead(order(), LOUD, pool_tokens=POOL, steps=1500) > 3 * bound(LOUD, POOL)


lengths = st.lists(st.tuples(st.integers(5, 60), st.integers(5, 40)), min_size=1, max_size=4)


@given(lengths, lengths, st.integers(2, 5), st.sampled_from([(1.0, 1.0), (1.0, 4.0), (2.0, 0.5)]), st.integers(100, 300))
@settings(max_examples=20, deadline=None, derandomize=True, database=None)
def test_for_any_lengths_and_weights_the_bound_holds(
    loud: list[tuple[int, int]], quiet: list[tuple[int, int]], times: int, weights: tuple[float, float], pool_tokens: int
) -> None:
    # Enough for both to wait all the time, whatever is drawn: in a step no more starts than the pool has tokens.
    quiet_rate = pool_tokens // 10
    traffic = {"loud": Traffic(times * quiet_rate, loud, weights[0]), "quiet": Traffic(quiet_rate, quiet, weights[1])}
    assert largest_lead(fair_queue(), traffic, pool_tokens=pool_tokens, steps=40, backlog=2) <= bound(traffic, pool_tokens)
