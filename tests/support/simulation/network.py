"""What lies between simulated processes: wires, addresses, and everything that goes wrong with them.

    Wire     an ordered, two-way connection. What was sent arrives later; the end of it arrives at both ends, each at its own time
    Network  who listens where; draws delays; cuts the wires of a process that was killed, and of one that is silent for too long

A wire that is closed delivers what was sent before, then the end. One that is reset loses what is on its way. A killed process
sends nothing any more; what it had sent may still arrive, or not.
"""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any

from support.simulation.virtual_loop import ProcessLoop, VirtualTime

HOP_S = 200e-6  # a message takes between a quarter and all of it, if nothing is wrong
SPIKE_S = 0.2
KEEPALIVE_S = 15.0  # gRPC's: a peer that answers no ping for so long is gone
SOCKET_KEEPALIVE_S = 11.0  # the kernel's, for a peer whose machine is gone


@dataclass
class Disorder:
    """How often things go wrong, as probabilities: per message, per call, per piece."""

    spike: float = 0.0  # a message is late by up to SPIKE_S
    request_lost: float = 0.0
    response_lost: float = 0.0
    duplicated: float = 0.0  # a unary call reaches its handler twice
    black_hole: float = 0.0  # nothing ever comes back
    flipped: float = 0.0  # a piece arrives with a wrong byte
    skipped: float = 0.0  # a piece is announced and was not written, or not fetched
    repeated: float = 0.0  # a frame about pieces comes twice, and the next one of its kind not at all


class Point(enum.Enum):
    """Moments of the protocol that a fault can be tied to."""

    HANDSHAKE = "handshake"
    RUN_SENT = "run sent"
    RUN_ARRIVED = "run arrived"
    RUN_ANSWERED = "run answered"
    OPEN_SENT = "open sent"
    GRANTED = "granted"
    READY_SENT = "ready sent"
    HALF_FETCHED = "half fetched"
    PIECES_WRITTEN = "pieces written"
    CLOSE_SENT = "close sent"
    RELEASE_ARRIVED = "release arrived"
    TOKENS_SENT = "tokens sent"


@dataclass
class Witness:
    """Everything the judge needs to know beyond what a process knows itself."""

    tickets: dict[bytes, Any] = field(default_factory=dict)  # nonce -> support.simulation.rpc.IssuedTicket
    complaints: list[str] = field(default_factory=list)
    points: Counter[Point] = field(default_factory=Counter)
    sealed: set[tuple[bytes, str]] = field(default_factory=set)  # finished transfers: nonce, and name of the decode process
    stale_fetches: int = 0  # readings of sources that were given up, and have other bytes by now


class Wire:
    """Between `a` and `b`, which each have a function to be called once when it has ended for them."""

    __slots__ = ("_cut", "_ended", "_last_s", "_network", "a", "b", "closed", "local", "on_end_a", "on_end_b", "pinged")

    def __init__(self, network: Network, a: ProcessLoop, b: ProcessLoop, *, pinged: bool, local: bool = False) -> None:
        self.a, self.b = a, b
        self.local = local  # both ends are on one machine
        self.pinged = pinged  # by the processes themselves: one that is paused does not answer
        self.on_end_a: Callable[[], None] | None = None
        self.on_end_b: Callable[[], None] | None = None
        self.closed = False  # nothing more can be sent
        self._network = network
        self._last_s = [0.0, 0.0]  # arrival of the last message, towards b and towards a
        self._cut = False  # what is on its way is lost
        self._ended = [False, False]
        network.wires[self] = None

    @property
    def ended_a(self) -> bool:
        return self._ended[0]

    def send(self, sender: ProcessLoop, function: Callable[..., None], *arguments: Any) -> None:
        """Has the other end's process call the function when the message has arrived."""
        if not self.closed:
            self._carry(sender, self._arrive, function, arguments)

    def close(self, side: ProcessLoop) -> None:
        """By one end, in order: the other end hears of it after all that was sent."""
        if not self.closed:
            self.closed = True
            self._ended[0 if side is self.a else 1] = True  # who closes needs no news of it
            self._carry(side, self._end, (self.b if side is self.a else self.a,), ())

    def reset(self) -> None:
        """By the network: what is on its way is lost, and both ends hear of it some time."""
        self.closed = self._cut = True
        for side in (self.a, self.b):
            self._network.time.after(self._network.delay_s(), self._end, (side,), ())

    def died(self, side: ProcessLoop, *, cut: bool, noticed_after_s: float) -> None:
        """The process at one end is gone."""
        self.closed = True
        self._cut = self._cut or cut
        self._ended[0 if side is self.a else 1] = True
        self.delay(side, noticed_after_s)
        self._carry(side, self._end, (self.b if side is self.a else self.a,), ())

    def delay(self, sender: ProcessLoop, delay_s: float) -> None:
        """Nothing more from this end arrives before that time is over."""
        direction = 0 if sender is self.a else 1
        self._last_s[direction] = max(self._last_s[direction], self._network.time.now_s + delay_s)

    def _carry(self, sender: ProcessLoop, arrive: Callable[..., None], what: Any, arguments: tuple[Any, ...]) -> None:
        direction = 0 if sender is self.a else 1
        network = self._network
        arrival_s = max(self._last_s[direction], network.time.now_s + network.delay_s(), network.stalled_until(self))
        self._last_s[direction] = arrival_s
        network.time.at(arrival_s, arrive, what, (direction, *arguments))

    def _arrive(self, function: Callable[..., None], rest: tuple[Any, ...]) -> None:
        direction, *arguments = rest
        receiver = self.b if direction == 0 else self.a
        if not self._cut and not self._ended[1 - direction] and receiver.alive:
            receiver.call_soon(function, *arguments)

    def _end(self, sides: tuple[ProcessLoop], _: tuple[Any, ...]) -> None:
        side = sides[0]
        index = 0 if side is self.a else 1
        if self._ended[index]:
            return
        self._ended[index] = True
        self._network.wires.pop(self, None)
        callback = self.on_end_a if index == 0 else self.on_end_b
        if callback is not None and side.alive:
            side.call_soon(callback)


class Network:
    def __init__(self, time: VirtualTime, random: Random, disorder: Disorder) -> None:
        self.time = time
        self.random = random
        self.disorder = disorder
        self.witness = Witness()
        self.wires: dict[Wire, None] = {}
        self.servers: dict[str, Any] = {}  # address -> what serves calls there
        self.data_listeners: dict[str, Any] = {}  # address -> what listens for data links there
        self.next_call_late_s = 0.0
        self.on_point: Callable[[Point, ProcessLoop], None] | None = None
        self.stalls_end_s = 0.0
        self._stalls: dict[tuple[str, str], float] = {}  # names of two processes -> until when

    def chance(self, probability: float) -> bool:
        return probability > 0.0 and self.random.random() < probability

    def delay_s(self) -> float:
        delay_s = HOP_S * (0.25 + 0.75 * self.random.random())
        if self.chance(self.disorder.spike):
            delay_s += SPIKE_S * self.random.random() ** 2
        return delay_s

    def point(self, point: Point, process: ProcessLoop) -> None:
        self.witness.points[point] += 1
        if self.on_point is not None:
            self.on_point(point, process)

    def complain(self, text: str) -> None:
        self.witness.complaints.append(f"at {self.time.now_s * 1e3:.3f} ms: {text}")
        self.time.tell("judge", f"BROKEN: {text}")

    def stall(self, one: str, other: str, until_s: float) -> None:
        self._stalls[one, other] = self._stalls[other, one] = until_s
        self.stalls_end_s = max(self.stalls_end_s, until_s)

    def stalled_until(self, wire: Wire) -> float:
        return self._stalls.get((wire.a.name, wire.b.name), 0.0) if self._stalls else 0.0

    def between(self, process: ProcessLoop) -> list[Wire]:
        return [wire for wire in self.wires if wire.a is process or wire.b is process]

    def killed(self, process: ProcessLoop, *, silently: bool, flushed: bool) -> None:
        """Silently: other workers are not told, unless they are on the same machine; their keepalives find out."""
        for address in [address for address, server in self.servers.items() if server.loop is process]:
            del self.servers[address]
        for address in [address for address, listener in self.data_listeners.items() if listener.loop is process]:
            del self.data_listeners[address]
        for wire in self.between(process):
            noticed_after_s = 0.0
            if silently and not wire.local and wire.a.host.is_worker and wire.b.host.is_worker:
                noticed_after_s = KEEPALIVE_S if wire.pinged else SOCKET_KEEPALIVE_S
            wire.died(process, cut=not flushed and self.random.random() < 0.5, noticed_after_s=noticed_after_s)

    def paused(self, process: ProcessLoop, still: Callable[[], bool]) -> None:
        """A process that does not answer pings loses its calls, on both sides."""

        def give_up() -> None:
            if still():
                for wire in self.between(process):
                    if wire.pinged:
                        wire.reset()

        self.time.after(KEEPALIVE_S, give_up)
