"""The order of what waits, as plain data: bands, in them tenants, in them requests.

    band       the highest one that has anything; while a lower one has something overdue, one dispatch in so many is for that one
    tenant     the one that was served least, for its weight: virtual token counters (VTC, arXiv 2401.00588), per band and tenant
    request    the one whose deadline comes first

A counter is charged a prompt at dispatch and generated tokens as they come, divided by the tenant's weight. A tenant that comes
back starts where the least served one that waits is, so that idling saves nothing up. Of two tenants that wait all the time,
neither is served more than `2 * max(prompt cost * longest prompt, output cost * tokens in flight)` ahead of the other, whatever
the two send.

Nothing here has a clock, or knows what a worker is: `head` says who is next, `take` takes it out.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field

from router.admission.bands import Band

_HIGHER = {band: tuple(Band)[:rank] for rank, band in enumerate(Band)}


@dataclass(frozen=True, slots=True)
class Item:
    """A request that waits, as far as its place in the order is concerned."""

    serial: int  # grows with arrival; names the item
    tenant: str
    weight: float
    band: Band
    prompt_tokens: int
    room_tokens: int  # that it will take from a worker: prompt and expected output
    sequences: int
    arrived_s: float
    deadline_s: float


@dataclass(slots=True)
class Line:
    """One tenant's items in one band."""

    items: OrderedDict[int, Item] = field(default_factory=OrderedDict)  # in order of arrival
    by_deadline: list[tuple[float, int]] = field(default_factory=list)  # a heap; may hold what is gone
    room_tokens: int = 0
    weight: float = 1.0
    counter: float = 0.0  # service that it had in this band, per weight

    def push(self, item: Item) -> None:
        self.items[item.serial] = item
        self.weight = item.weight
        self.room_tokens += item.room_tokens
        heapq.heappush(self.by_deadline, (item.deadline_s, item.serial))

    def first(self) -> Item:
        while self.by_deadline[0][1] not in self.items:
            heapq.heappop(self.by_deadline)
        return self.items[self.by_deadline[0][1]]

    def remove(self, serial: int) -> Item:
        item = self.items.pop(serial)
        self.room_tokens -= item.room_tokens
        if not self.items:
            self.by_deadline.clear()
        return item


@dataclass(slots=True)
class _BandQueue:
    lines: dict[str, Line] = field(default_factory=dict)  # of every tenant that ever waited: its counter stays
    waiting: dict[str, Line] = field(default_factory=dict)  # those with items
    items: OrderedDict[int, Item] = field(default_factory=OrderedDict)  # of all tenants, in order of arrival
    room_tokens: int = 0
    last: Line = field(default_factory=Line)  # of the tenant that left the queue empty

    def least_served(self) -> Line:
        return min(self.waiting.values(), key=lambda line: line.counter)


class FairQueue:
    """One per model."""

    def __init__(self, *, prompt_cost: float, output_cost: float, overdue_s: float, overdue_every: int) -> None:
        self._prompt_cost = prompt_cost
        self._output_cost = output_cost
        self._overdue_s = overdue_s
        self._overdue_every = overdue_every
        self._since_overdue = 0  # dispatches since one that went to an overdue band
        self._bands = {band: _BandQueue() for band in Band}
        self._band_of: dict[int, Band] = {}

    def __len__(self) -> int:
        return len(self._band_of)

    def __contains__(self, serial: int) -> bool:
        return serial in self._band_of

    # -- in and out ----------------------------------------------------------------------------------------------------

    def push(self, item: Item) -> None:
        queue = self._bands[item.band]
        line = queue.lines.setdefault(item.tenant, Line())
        if item.tenant not in queue.waiting:
            floor = (queue.least_served() if queue.waiting else queue.last).counter
            line.counter = max(line.counter, floor)
            queue.waiting[item.tenant] = line
        line.push(item)
        queue.items[item.serial] = item
        queue.room_tokens += item.room_tokens
        self._band_of[item.serial] = item.band

    def remove(self, serial: int) -> Item | None:
        """Takes it out unserved; None if it is not here."""
        band = self._band_of.pop(serial, None)
        if band is None:
            return None
        queue = self._bands[band]
        item = queue.items.pop(serial)
        line = queue.waiting[item.tenant]
        line.remove(serial)
        queue.room_tokens -= item.room_tokens
        if not line.items:
            del queue.waiting[item.tenant]
            if not queue.waiting:
                queue.last = line
        return item

    def head(self, now_s: float) -> Item | None:
        """Who is next."""
        band = self._next_band(now_s)
        return None if band is None else self._bands[band].least_served().first()

    def take(self, item: Item, now_s: float) -> bool:
        """Takes the head out, and charges its prompt. Whether it was served because its band was overdue."""
        overdue = item.band is not self._highest()
        line = self._bands[item.band].lines[item.tenant]
        line.counter += self._prompt_cost * item.prompt_tokens / item.weight
        self.remove(item.serial)
        self._since_overdue = 0 if overdue else self._since_overdue + 1
        return overdue

    def _highest(self) -> Band | None:
        return next((band for band, queue in self._bands.items() if queue.items), None)

    def _next_band(self, now_s: float) -> Band | None:
        highest = self._highest()
        if highest is None or not self._overdue_every or self._since_overdue + 1 < self._overdue_every:
            return highest
        late = [
            (oldest.arrived_s, band)
            for band in Band
            if band is not highest and (oldest := self.oldest(band)) is not None and now_s - oldest.arrived_s >= self._overdue_s
        ]
        return min(late, key=lambda one: one[0])[1] if late else highest

    # -- service -------------------------------------------------------------------------------------------------------

    def served(self, item: Item, *, prompt_tokens: int = 0, output_tokens: int = 0) -> None:
        """After its dispatch; fewer than no prompt tokens give back what was charged and found in a cache."""
        cost = self._prompt_cost * prompt_tokens + self._output_cost * output_tokens
        self._bands[item.band].lines[item.tenant].counter += cost / item.weight

    def gap(self, band: Band) -> float:
        """Between the most and the least served of those that wait."""
        counters = [line.counter for line in self._bands[band].waiting.values()]
        return max(counters) - min(counters) if counters else 0.0

    def counters(self, band: Band) -> Iterator[tuple[str, float]]:
        """Service of every tenant that waits."""
        return ((name, line.counter) for name, line in self._bands[band].waiting.items())

    # -- what waits ----------------------------------------------------------------------------------------------------

    def oldest(self, band: Band) -> Item | None:
        items = self._bands[band].items
        return next(iter(items.values())) if items else None

    def num_items(self, band: Band) -> int:
        return len(self._bands[band].items)

    def room_tokens(self, band: Band) -> int:
        return self._bands[band].room_tokens

    @property
    def all_room_tokens(self) -> int:
        return sum(queue.room_tokens for queue in self._bands.values())

    def ahead_of(self, band: Band, tenant: str, weight: float) -> float:
        """Tokens that go before a new item of this tenant: those of higher bands, and of its own what is served while its share
        of the band brings its own line to an end."""
        higher = sum(self._bands[other].room_tokens for other in _HIGHER[band])
        queue = self._bands[band]
        line = queue.waiting.get(tenant)
        own = line.room_tokens if line is not None else 0
        weights = sum(other.weight for name, other in queue.waiting.items() if name != tenant) + weight
        largest = max((one.room_tokens / max(1, len(one.items)) for one in queue.waiting.values()), default=0.0)
        shared = own * weights / weight + largest * (len(queue.waiting) - (line is not None))
        return higher + min(float(queue.room_tokens), shared)

    def lowest_first(self) -> Iterator[Band]:
        return (band for band in reversed(Band) if self._bands[band].items)

    def by_length(self, band: Band) -> Iterator[Item]:
        """All of a band, those first that are the youngest of whoever has most waiting for its weight, as if each was gone."""
        left = {name: (line.room_tokens, reversed(line.items.values())) for name, line in self._bands[band].waiting.items()}
        lines = [(-line.room_tokens / line.weight, name) for name, line in self._bands[band].waiting.items()]
        heapq.heapify(lines)
        while lines:
            _, name = heapq.heappop(lines)
            tokens, items = left[name]
            item = next(items, None)
            if item is not None:
                tokens -= item.room_tokens
                left[name] = (tokens, items)
                heapq.heappush(lines, (-tokens / item.weight, name))
                yield item

    def longest_line(self, band: Band) -> Line | None:
        """Of the tenant that has most waiting for its weight."""
        lines = self._bands[band].waiting.values()
        return max(lines, key=lambda line: line.room_tokens / line.weight, default=None)

    def line_tokens(self, band: Band, tenant: str) -> int:
        line = self._bands[band].waiting.get(tenant)
        return line.room_tokens if line is not None else 0
