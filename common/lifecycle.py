"""The phases of a request inside a decode worker, their legal transitions, and the stamps that timings are made of.

    RECEIVED -> QUEUED -> RESERVED -> PREFILLING -> VERIFIED -> DECODING -> FINISHED
                  ^          |            |  |                     ^
                  +----------+------------+  +------ (local) ------+
                  (the remote prefill failed)
    any phase but the last three -> FAILED | CANCELLED

Preemption is not in here: it happens to single sequences of a request that is DECODING, and the request does not notice.

`Waterfall` joins the decode worker's `StageTimings` with the router's own stamps, so that the parts add up to the TTFT.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from common.clock import Clock
from common.errors import IllegalTransition
from common.types import StageTimings


class Phase(enum.Enum):
    RECEIVED = "received"
    QUEUED = "queued"  # waits for blocks
    RESERVED = "reserved"  # holds blocks for the whole prompt
    PREFILLING = "prefilling"  # somebody computes the prompt
    VERIFIED = "verified"  # remote KV arrived and checks out
    DECODING = "decoding"
    FINISHED = "finished"
    FAILED = "failed"
    CANCELLED = "cancelled"


TERMINAL = frozenset({Phase.FINISHED, Phase.FAILED, Phase.CANCELLED})

_ENDS = {Phase.FAILED, Phase.CANCELLED}
TRANSITIONS: dict[Phase, frozenset[Phase]] = {
    Phase.RECEIVED: frozenset({Phase.QUEUED, *_ENDS}),
    Phase.QUEUED: frozenset({Phase.RESERVED, *_ENDS}),
    Phase.RESERVED: frozenset({Phase.PREFILLING, Phase.QUEUED, *_ENDS}),
    Phase.PREFILLING: frozenset({Phase.VERIFIED, Phase.DECODING, Phase.QUEUED, *_ENDS}),
    Phase.VERIFIED: frozenset({Phase.DECODING, *_ENDS}),
    Phase.DECODING: frozenset({Phase.FINISHED, *_ENDS}),
    Phase.FINISHED: frozenset(),
    Phase.FAILED: frozenset(),
    Phase.CANCELLED: frozenset(),
}


class Lifecycle:
    """One request's phase and the last time it entered each phase; a second try overwrites the stamps of the first."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.phase = Phase.RECEIVED
        self.stamps_s: dict[Phase, float] = {Phase.RECEIVED: clock.monotonic_s()}

    @property
    def ended(self) -> bool:
        return self.phase in TERMINAL

    def enter(self, phase: Phase) -> None:
        """Raises IllegalTransition for a move that the table does not hold."""
        if phase not in TRANSITIONS[self.phase]:
            raise IllegalTransition(f"{self.phase.name} -> {phase.name}")
        self.phase = phase
        self.stamps_s[phase] = self._clock.monotonic_s()

    def between_s(self, earlier: Phase, later: Phase) -> float:
        """Seconds from the entry of one phase to the entry of another; 0 if either never happened."""
        if earlier not in self.stamps_s or later not in self.stamps_s:
            return 0.0
        return self.stamps_s[later] - self.stamps_s[earlier]


@dataclass(frozen=True, slots=True)
class Waterfall:
    """Where a request's time went, as the router saw it. `stages()` adds up to `ttft_s`."""

    router_s: float  # received until dispatched: validation, template, tokenisation, waiting for room, placement
    ttft_s: float  # received until the first token was ready to be written to the client
    total_s: float
    num_output_tokens: int
    worker: StageTimings
    queue_s: float = 0.0  # of router_s: waiting in the router until workers had room

    @property
    def unexplained_s(self) -> float:
        """What no stage accounts for, either way: gaps between the clocks' accounts, and overlaps of them."""
        return abs(self.ttft_s - self.router_s - self.worker.total_s) + self.worker.rpc_s

    @property
    def network_s(self) -> float:
        """What neither the router nor the decode worker accounts for: the way there and back."""
        return max(0.0, self.ttft_s - self.router_s - self.worker.total_s)

    @property
    def tpot_s(self) -> float:
        """Time per output token after the first."""
        return (self.total_s - self.ttft_s) / (self.num_output_tokens - 1) if self.num_output_tokens > 1 else 0.0

    def stages(self) -> tuple[tuple[str, float], ...]:
        worker = self.worker
        return (
            ("router", self.router_s - self.queue_s),
            ("queue", self.queue_s),
            ("network", self.network_s),
            ("decode queue", worker.decode_queue_s),
            ("prefill queue", worker.prefill_queue_s),
            ("prefill", worker.prefill_s),
            ("transfer exposed", worker.transfer_exposed_s),
            ("rpc", worker.rpc_s),
            ("activate", worker.activate_s),
        )
