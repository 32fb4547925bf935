"""A worker's state as a scrape finds it: what engine and links hold now, and what they have counted since they started."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class LeaseReadings:
    """Transfers that may still read or write KV, on one side. Written by `kvtransfer`."""

    open: int = 0
    expired: int = 0  # since the start: whose ticket or lease ran out
    oldest_s: float = 0.0
    quarantined: int = 0  # given up, while a writer may still write
    quarantined_oldest_s: float = 0.0

    def __add__(self, other: LeaseReadings) -> LeaseReadings:
        return LeaseReadings(
            open=self.open + other.open,
            expired=self.expired + other.expired,
            oldest_s=max(self.oldest_s, other.oldest_s),
            quarantined=self.quarantined + other.quarantined,
            quarantined_oldest_s=max(self.quarantined_oldest_s, other.quarantined_oldest_s),
        )


@dataclass(frozen=True, slots=True)
class MaskReadings:
    """Masks of grammars that were worked out beside the model since the start. Written by the engine."""

    count: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class WorkerReadings:
    """A worker's state at the moment of a scrape. Written by the worker's host."""

    requests_running: int
    requests_waiting: int
    blocks_total: int
    blocks_free: int
    blocks_cached: int
    blocks_used: int
    blocks_in_transfer: int
    leases: LeaseReadings
    block_tokens: int
    computed_tokens: int
    generated_tokens: int
    preemptions: int
    prefix_queries: int
    prefix_hits: int
    drafted_tokens: int
    accepted_tokens: int
    steps_by_accepted: tuple[int, ...]
    guesses_by_author: Mapping[str, tuple[int, int]]  # drafted and accepted tokens
    work_s: Mapping[str, float]  # time of steps, by what their rows were for
    masks: MaskReadings
    ranks: int = 1
    steps_ahead: int = 0  # planned while another was computed
    waits: Mapping[str, int] = field(default_factory=dict)  # steps that could not be, by the reason
    surplus_rows: int = 0
    swapped_out: int = 0
    swapped_in: int = 0
