"""What happens to the requests of one model before their dispatch, as plain data: state and time in, decisions out.

    arrive ─┬─ refused: no place in the queue, or predicted to miss what its band is promised
            └─ waits ─┬─ granted, when the workers have room and it is its turn; takes room until `finished`
                      ├─ put out, for one that has more right to its place
                      ├─ expired: its time is over, nothing was computed for it
                      └─ left

The queue is bounded. When it is full, what is lowest gives way first: the youngest of the lowest band, of the tenant that has
most waiting there. In its own band a newcomer puts somebody out only if that tenant has more waiting, for its weight, than it has
itself.

What goes next is the head of the queue and nothing else: while it does not fit, nobody overtakes it, so that large requests are
not starved. One that is larger than all room there is goes when nothing else is out.

It has no clock, no task and no lock.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass

from common.config import AdmissionConfig
from router.admission.bands import Band
from router.admission.forecast import Room, ServiceRate
from router.admission.queue import FairQueue, Item


class Reason(enum.StrEnum):
    """Why a request was not served."""

    QUEUE_FULL = "queue_full"
    FORECAST = "forecast"
    PUT_OUT = "put_out"
    EXPIRED = "expired"


@dataclass(frozen=True, slots=True)
class Refusal:
    reason: Reason
    retry_after_s: float
    predicted_ttft_s: float | None = None


@dataclass(frozen=True, slots=True)
class Arrival:
    refusal: Refusal | None  # None: it waits
    put_out: tuple[Item, ...] = ()  # they no longer wait


@dataclass(frozen=True, slots=True)
class Granted:
    item: Item
    overdue: bool  # its turn came because its band had waited too long


@dataclass(frozen=True, slots=True)
class Turn:
    granted: tuple[Granted, ...]
    expired: tuple[Item, ...]


@dataclass(slots=True)
class _Out:
    """What was granted and is not finished."""

    item: Item
    started: bool = False  # its first token is there


@dataclass(frozen=True, slots=True)
class _Foreseen:
    """When it arrived."""

    alone: bool  # nobody waited to start before it
    plain_s: float | None


class Desk:
    def __init__(self, config: AdmissionConfig) -> None:
        self._config = config
        self.queue = FairQueue(
            prompt_cost=config.prompt_token_cost,
            output_cost=config.output_token_cost,
            overdue_s=config.overdue_s,
            overdue_every=config.overdue_every,
        )
        self.rate = ServiceRate()
        self._out: dict[int, _Out] = {}
        self._foreseen: dict[int, _Foreseen] = {}  # of those that wait or are out
        self._unstarted_tokens = self._num_unstarted = 0  # of those that are out
        self.tokens_out = 0
        self.sequences_out = 0

    # -- before the dispatch -------------------------------------------------------------------------------------------

    def arrive(self, item: Item, now_s: float, room: Room | None, ttft_s: float | None) -> Arrival:
        """`ttft_s`: forecast of its first token after its dispatch; None takes what was learnt here."""
        alone = not len(self.queue) and not self._num_unstarted
        plain_s = self._plain_ttft_s(item, ttft_s) if self._config.ttft_slo_s else None
        predicted_s = None if plain_s is None else plain_s * self.rate.error
        promised_s = self._config.ttft_slo_s.get(item.band.value)
        # One before which nobody waits is let through, whatever is predicted: if that is out of date, it is how we come to know.
        if promised_s is not None and predicted_s is not None and not alone:
            limit_s = promised_s * (1 + self._config.slo_slack)
            if predicted_s > limit_s:
                return Arrival(Refusal(Reason.FORECAST, predicted_s - limit_s, predicted_s))
        at_once = not len(self.queue) and self._fits(item, room)
        put_out = () if at_once else self._make_place(item)
        if put_out is None:
            return Arrival(Refusal(Reason.QUEUE_FULL, self._drain_s(item), predicted_s))
        self.queue.push(item)
        self._foreseen[item.serial] = _Foreseen(alone, plain_s)
        self._note_waiting(now_s)
        return Arrival(None, put_out)

    def turn(self, now_s: float, room: Room | None) -> Turn:
        """Those whose turn it is; they are out from now on. To be asked after every arrival, end, and change of the workers."""
        granted: list[Granted] = []
        expired: list[Item] = []
        while (item := self.queue.head(now_s)) is not None:
            if item.deadline_s <= now_s:
                self._remove(item.serial)
                expired.append(item)
                continue
            if not self._fits(item, room):
                break
            overdue = self.queue.take(item, now_s)
            self._out[item.serial] = _Out(item)
            self._unstarted_tokens += item.room_tokens
            self._num_unstarted += 1
            self.tokens_out += item.room_tokens
            self.sequences_out += item.sequences
            granted.append(Granted(item, overdue))
        self._note_waiting(now_s)
        return Turn(tuple(granted), tuple(expired))

    def leave(self, serial: int, now_s: float) -> Item | None:
        """One that waits no longer waits: its client left, or its time is over. None: it did not wait."""
        item = self._remove(serial)
        self._note_waiting(now_s)
        return item

    def _remove(self, serial: int) -> Item | None:
        item = self.queue.remove(serial)
        if item is not None:
            del self._foreseen[serial]
        return item

    def _fits(self, item: Item, room: Room | None) -> bool:
        if room is None or not self._out:
            return True
        return self.tokens_out + item.room_tokens <= room.tokens and self.sequences_out + item.sequences <= room.sequences

    def _note_waiting(self, now_s: float) -> None:
        self.rate.waiting(len(self.queue) + self._num_unstarted > 1, now_s)

    # -- after it ------------------------------------------------------------------------------------------------------

    def started(self, serial: int, cached_tokens: int, now_s: float) -> None:
        """The first token is there. Prompt tokens that nobody computed are given back to its tenant."""
        out = self._out[serial]
        if out.started:
            return
        item, foreseen, seconds = out.item, self._foreseen[serial], now_s - out.item.arrived_s
        self._start(out)
        self.rate.started(item.room_tokens, now_s)
        if foreseen.alone:
            self.rate.started_alone(item.prompt_tokens, seconds)
        elif foreseen.plain_s:
            self.rate.happened(foreseen.plain_s, seconds)
        self._note_waiting(now_s)
        self.queue.served(item, prompt_tokens=-min(cached_tokens, item.prompt_tokens))

    def generated(self, serial: int, tokens: int) -> None:
        self.queue.served(self._out[serial].item, output_tokens=tokens)

    def finished(self, serial: int, now_s: float) -> None:
        """However it ended: its room is free."""
        out = self._out.pop(serial)
        del self._foreseen[serial]
        if not out.started:
            self._start(out)
            self._note_waiting(now_s)
        self.tokens_out -= out.item.room_tokens
        self.sequences_out -= out.item.sequences

    def _start(self, out: _Out) -> None:
        out.started = True
        self._unstarted_tokens -= out.item.room_tokens
        self._num_unstarted -= 1

    # -- foresight -----------------------------------------------------------------------------------------------------

    def predicted_ttft_s(self, item: Item, ttft_s: float | None) -> float | None:
        """Of an item that would arrive now; nine in ten are to start sooner. None while too little was seen."""
        plain_s = self._plain_ttft_s(item, ttft_s)
        return None if plain_s is None else plain_s * self.rate.error

    def _plain_ttft_s(self, item: Item, ttft_s: float | None) -> float | None:
        ahead = self.queue.ahead_of(item.band, item.tenant, item.weight)
        rate = self.rate.tokens_per_s
        if ttft_s is not None:  # it includes what the workers have to do; without a rate it is the least that it can be
            return ttft_s if rate is None else ttft_s + ahead / rate
        ahead += self._unstarted_tokens
        if ahead and rate is None:
            return None
        return self.rate.alone_s(item.prompt_tokens) + (ahead / rate if rate else 0.0)

    def _drain_s(self, item: Item) -> float:
        rate = self.rate.tokens_per_s
        return 1.0 if not rate else max(1.0, item.room_tokens / rate)

    # -- bounds --------------------------------------------------------------------------------------------------------

    def _make_place(self, item: Item) -> tuple[Item, ...] | None:
        """Who must go for this one; they have gone. None: it has no right to a place, and nobody has gone."""
        queue = self.queue
        slots = len(queue) + 1 - self._config.max_queued_requests
        tokens = queue.all_room_tokens + item.room_tokens - self._config.max_queued_tokens
        if not len(queue):
            tokens = 0  # one that waits alone may be of any size
        victims: list[Item] = []
        for victim in self._victims(item):
            if slots <= 0 and tokens <= 0:
                break
            victims.append(victim)
            slots -= 1
            tokens -= victim.room_tokens
        if slots > 0 or tokens > 0:
            return None
        for victim in victims:
            self._remove(victim.serial)
        return tuple(victims)

    def _victims(self, item: Item) -> Iterator[Item]:
        """Those that have less right to a place, the least first."""
        for band in self.queue.lowest_first():
            if _RANK[band] <= _RANK[item.band]:
                break
            yield from self.queue.by_length(band)
        mine = (self.queue.line_tokens(item.band, item.tenant) + item.room_tokens) / item.weight
        longest = self.queue.longest_line(item.band)
        if longest is not None and longest.items and next(iter(longest.items.values())).tenant != item.tenant:
            tokens = longest.room_tokens
            for other in reversed(longest.items.values()):
                tokens -= other.room_tokens
                if tokens / other.weight < mine:
                    return
                yield other


_RANK = {band: rank for rank, band in enumerate(Band)}
