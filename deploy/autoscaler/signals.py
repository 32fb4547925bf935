"""What a model's workers say of themselves, as rates and levels of its pools.

    add(readings of one moment) ... -> signals() over the last so many seconds

A worker's totals only grow while its incarnation lives, so a rate is the difference of two readings of the same incarnation;
one that has just come, or has said nothing, adds nothing. Pure; time is handed in.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from common.types import Role


@dataclass(frozen=True, slots=True)
class WorkerReading:
    """One worker that is ready, at one moment."""

    worker_id: str
    incarnation: int
    role: Role
    requests: int = 0  # running and waiting
    served: int = 0  # total
    blocks_total: int = 0
    blocks_free: int = 0
    queue_age_s: float = 0.0
    queued_tokens: int = 0
    decoding: int = 0
    computed_tokens: int = 0  # total
    generated_tokens: int = 0  # total
    step_s: float = 0.0  # total
    sequence_step_s: float = 0.0  # total


@dataclass(frozen=True, slots=True)
class PrefillSignals:
    workers: int = 0
    busy: float = 0.0  # workers' worth of computing, 0 .. workers
    tokens_per_s: float | None = None  # of one worker that computes; None: nothing was seen yet
    queued_tokens: float = 0.0
    queue_age_s: float = 0.0


@dataclass(frozen=True, slots=True)
class DecodeSignals:
    workers: int = 0
    sequences: float = 0.0  # that get tokens, all workers together
    tokens_per_s: float = 0.0  # all workers together
    batch: float = 0.0  # sequences in a step, while there are steps
    tpot_s: float | None = None  # None: no token was made
    kv_used: float = 0.0  # workers' worth of KV in use, 0 .. workers
    queue_age_s: float = 0.0


@dataclass(frozen=True, slots=True)
class ModelSignals:
    prefill: PrefillSignals
    decode: DecodeSignals
    requests: int  # held by any worker now
    last_use_s: float  # when a request was last seen, or asked for


class SignalWindow:
    """Of one model."""

    def __init__(self, look_back_s: float, now_s: float) -> None:
        self._look_back_s = look_back_s
        self._moments: deque[tuple[float, dict[tuple[str, int], WorkerReading]]] = deque()
        self._tokens_per_s: float | None = None
        self._last_use_s = now_s

    def used(self, now_s: float) -> None:
        """Somebody wants the model, though no worker knows yet."""
        self._last_use_s = max(self._last_use_s, now_s)

    def add(self, readings: Iterable[WorkerReading], now_s: float) -> None:
        moment = {(one.worker_id, one.incarnation): one for one in readings}
        before = self._moments[-1][1] if self._moments else {}
        if any(one.requests or one.served != (before[key].served if key in before else 0) for key, one in moment.items()):
            self.used(now_s)
        self._moments.append((now_s, moment))
        while len(self._moments) > 2 and self._moments[1][0] <= now_s - self._look_back_s:
            self._moments.popleft()

    def signals(self) -> ModelSignals:
        moments = [list(moment.values()) for _, moment in self._moments]
        latest = moments[-1] if moments else []
        return ModelSignals(
            prefill=self._prefill(moments),
            decode=self._decode(moments),
            requests=sum(one.requests for one in latest),
            last_use_s=self._last_use_s,
        )

    def _prefill(self, moments: Sequence[Sequence[WorkerReading]]) -> PrefillSignals:
        busy_s, computed_tokens, span_s = 0.0, 0, 0.0
        for earlier, later, seconds in self._pairs(Role.PREFILL):
            span_s += seconds
            busy_s += later.step_s - earlier.step_s
            computed_tokens += later.computed_tokens - earlier.computed_tokens
        if busy_s > 0 and computed_tokens > 0:
            self._tokens_per_s = computed_tokens / busy_s
        latest = [one for one in moments[-1] if one.role is Role.PREFILL] if moments else []
        return PrefillSignals(
            workers=len(latest),
            busy=len(latest) * min(1.0, busy_s / span_s) if span_s > 0 else 0.0,
            tokens_per_s=self._tokens_per_s,
            queued_tokens=_mean_sum(moments, Role.PREFILL, lambda one: one.queued_tokens),
            queue_age_s=max((one.queue_age_s for one in latest), default=0.0),
        )

    def _decode(self, moments: Sequence[Sequence[WorkerReading]]) -> DecodeSignals:
        tokens, sequence_s, step_s, tokens_per_s = 0, 0.0, 0.0, 0.0
        for earlier, later, seconds in self._pairs(Role.DECODE):
            made = later.generated_tokens - earlier.generated_tokens
            tokens += made
            tokens_per_s += made / seconds
            sequence_s += later.sequence_step_s - earlier.sequence_step_s
            step_s += later.step_s - earlier.step_s
        latest = [one for one in moments[-1] if one.role is Role.DECODE] if moments else []
        return DecodeSignals(
            workers=len(latest),
            sequences=_mean_sum(moments, Role.DECODE, lambda one: one.decoding),
            tokens_per_s=tokens_per_s,
            batch=sequence_s / step_s if step_s > 0 else 0.0,
            tpot_s=sequence_s / tokens if tokens > 0 else None,
            kv_used=_mean_sum(moments, Role.DECODE, _kv_used),
            queue_age_s=max((one.queue_age_s for one in latest), default=0.0),
        )

    def _pairs(self, role: Role) -> Iterable[tuple[WorkerReading, WorkerReading, float]]:
        """First and last reading of every incarnation that is still there, and the seconds between."""
        if not self._moments:
            return
        last_s, latest = self._moments[-1]
        for key, later in latest.items():
            if later.role is not role:
                continue
            first_s, earlier = next((at_s, moment[key]) for at_s, moment in self._moments if key in moment)
            if last_s > first_s:
                yield earlier, later, last_s - first_s


def _kv_used(reading: WorkerReading) -> float:
    return 1.0 - reading.blocks_free / reading.blocks_total if reading.blocks_total else 0.0


def _mean_sum(moments: Sequence[Sequence[WorkerReading]], role: Role, value: Callable[[WorkerReading], float]) -> float:
    """Over time, of the sum over workers."""
    if not moments:
        return 0.0
    return sum(value(one) for moment in moments for one in moment if one.role is role) / len(moments)
