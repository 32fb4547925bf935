"""The control law of one model: what there is and what is needed in, one decision with its reason out. Pure; time is handed in.

In this order:
  1. asleep: wake if somebody asks, else stay so
  2. something is still starting or draining: wait for it, for it was the last decision
  3. sizes outside their limits are brought back
  4. within the cooldown: nothing, but needs are already noted
  5. nobody used the model for `idle_s`, and it may sleep: to zero
  6. a pool is too small for `flip_delay_s` and the other one can spare a worker: that worker changes its role. It can spare
     one if the rest would be below target by the hysteresis; where no worker can be added, also if the worse pressure of the
     two falls clearly
  7. too small for `upscale_delay_s`: more workers, to what was needed at least all that time
  8. too large for `downscale_delay_s`, by the hysteresis, at its most all that time: one worker fewer
Needs are forgotten at each change, so every delay is counted from the last one. While the model is awake a pool never falls below
one worker, unless its limit is 0.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from common.config import AutoscalingConfig, PoolAutoscalingConfig
from common.types import Role
from deploy.autoscaler.need import Need

_CLEARLY = 0.85  # a flip that only evens out must bring the worse pressure down to this part of it
_SLACK = 1e-6


class Act(enum.Enum):
    NONE = "none"
    FLIP = "flip"
    GROW = "grow"
    SHRINK = "shrink"
    SLEEP = "sleep"
    WAKE = "wake"


@dataclass(frozen=True, slots=True)
class Candidate:
    """A ready worker that could change its role."""

    worker_id: str
    requests: int


@dataclass(frozen=True, slots=True)
class PoolView:
    desired: int
    need: Need
    moving: str = ""  # what the pool is still waiting for
    ready: tuple[Candidate, ...] = ()

    @property
    def pressure(self) -> float:
        return self.need.workers / self.desired if self.desired else self.need.workers


@dataclass(frozen=True, slots=True)
class ModelView:
    prefill: PoolView
    decode: PoolView
    requests: int = 0  # held by any worker
    idle_s: float = 0.0
    demanded: bool = False  # somebody waits for a model that sleeps

    def of(self, role: Role) -> PoolView:
        return self.prefill if role is Role.PREFILL else self.decode


@dataclass(frozen=True, slots=True)
class Decision:
    act: Act
    reason: str
    sizes: tuple[int, int]  # prefill, decode: as they are to be
    worker_id: str = ""  # of a flip
    role: Role | None = None  # that it is to have

    @property
    def text(self) -> str:
        prefill, decode = self.sizes
        match self.act:
            case Act.NONE:
                return "nothing to do"
            case Act.FLIP if self.role is not None:
                return f"{self.worker_id} becomes a {self.role.value} worker: {prefill} prefill, {decode} decode"
            case _:
                return f"{self.act.value} to {prefill} prefill, {decode} decode"


@dataclass(frozen=True, slots=True)
class LawState:
    """What the law remembers of one model."""

    since_s: float  # of the needs: the last change
    changed_s: float = -math.inf
    needs: tuple[tuple[float, float, float], ...] = ()  # when, prefill, decode
    sizes: tuple[int, int] | None = None


def decide(config: AutoscalingConfig, state: LawState, view: ModelView, now_s: float) -> tuple[LawState, Decision]:
    sizes = (view.prefill.desired, view.decode.desired)
    if state.sizes != sizes:  # by us or by an operator
        state = LawState(since_s=now_s, changed_s=state.changed_s, sizes=sizes)
    decision = _whatever_is_needed(config, view)
    if decision is None:
        state = _remember(config, state, view, now_s)
        decision = (
            _rest(config, state, view, now_s)
            or _sleep(config, view)
            or _flip(config, state, view, now_s)
            or _grow(config, state, view, now_s)
            or _shrink(config, state, view, now_s)
            or Decision(Act.NONE, _why_nothing(config, state, view, now_s), sizes)
        )
    elif view.prefill.moving or view.decode.moving:
        state = LawState(since_s=now_s, changed_s=state.changed_s, sizes=sizes)
    if decision.act is not Act.NONE:
        state = LawState(since_s=now_s, changed_s=now_s, sizes=sizes)
    return state, decision


def limits(config: AutoscalingConfig, role: Role) -> tuple[int, int]:
    """Fewest and most workers while the model is awake."""
    pool = _pool_config(config, role)
    return min(max(1, pool.min_replicas), pool.max_replicas), pool.max_replicas


def _pool_config(config: AutoscalingConfig, role: Role) -> PoolAutoscalingConfig:
    return config.prefill if role is Role.PREFILL else config.decode


def _whatever_is_needed(config: AutoscalingConfig, view: ModelView) -> Decision | None:
    sizes = (view.prefill.desired, view.decode.desired)
    least = (limits(config, Role.PREFILL)[0], limits(config, Role.DECODE)[0])
    if view.decode.desired == 0 and config.may_sleep:
        if view.demanded:
            return Decision(Act.WAKE, "a request waits for it", least)
        return Decision(Act.NONE, "asleep: nobody asks for it", sizes)
    if view.prefill.moving or view.decode.moving:
        return Decision(Act.NONE, f"waits: {view.prefill.moving or view.decode.moving}", sizes)
    most = (limits(config, Role.PREFILL)[1], limits(config, Role.DECODE)[1])
    within = _within(config, sizes, least, most)
    if within != sizes:
        act = Act.GROW if sum(within) >= sum(sizes) else Act.SHRINK
        return Decision(act, f"{sizes[0]} prefill and {sizes[1]} decode workers are outside the limits", within)
    return None


def _rest(config: AutoscalingConfig, state: LawState, view: ModelView, now_s: float) -> Decision | None:
    left_s = state.changed_s + config.cooldown_s - now_s
    if left_s <= 0:
        return None
    return Decision(Act.NONE, f"cools down for {left_s:.0f} s", (view.prefill.desired, view.decode.desired))


def _sleep(config: AutoscalingConfig, view: ModelView) -> Decision | None:
    if config.may_sleep and view.requests == 0 and view.idle_s >= config.idle_s:
        return Decision(Act.SLEEP, f"nobody used it for {view.idle_s:.0f} s", (0, 0))
    return None


def _within(config: AutoscalingConfig, sizes: tuple[int, int], least: tuple[int, int], most: tuple[int, int]) -> tuple[int, int]:
    prefill, decode = (min(max(size, low), high) for size, low, high in zip(sizes, least, most, strict=True))
    if config.max_workers is not None:
        decode = max(least[1], min(decode, config.max_workers - least[0]))
        prefill = max(least[0], min(prefill, config.max_workers - decode))
    return prefill, decode


def _remember(config: AutoscalingConfig, state: LawState, view: ModelView, now_s: float) -> LawState:
    longest_s = max(config.flip_delay_s, config.upscale_delay_s, config.downscale_delay_s)
    kept = tuple(one for one in state.needs if one[0] >= now_s - longest_s)
    return replace(state, needs=(*kept, (now_s, view.prefill.need.workers, view.decode.need.workers)))


def _over(state: LawState, role: Role, delay_s: float, now_s: float) -> Sequence[float]:
    """The needs of a pool for so long back; empty if it was not looked at for so long since the last change."""
    if now_s - state.since_s < delay_s - _SLACK:
        return ()
    index = 1 if role is Role.PREFILL else 2
    return [need[index] for need in state.needs if need[0] >= now_s - delay_s - _SLACK]


def _is_short(state: LawState, view: ModelView, role: Role, delay_s: float, now_s: float) -> bool:
    needs = _over(state, role, delay_s, now_s)
    return bool(needs) and min(needs) > view.of(role).desired + _SLACK


def _flip(config: AutoscalingConfig, state: LawState, view: ModelView, now_s: float) -> Decision | None:
    for to, of in ((Role.PREFILL, Role.DECODE), (Role.DECODE, Role.PREFILL)):
        taker, lender = view.of(to), view.of(of)
        if not _is_short(state, view, to, config.flip_delay_s, now_s) or not lender.ready:
            continue
        if lender.desired - 1 < limits(config, of)[0] or taker.desired + 1 > limits(config, to)[1]:
            continue
        most = max(_over(state, of, config.flip_delay_s, now_s))
        left = lender.desired - 1
        if most <= config.hysteresis * left:
            why = f"the {of.value} workers that stay are enough"
        elif _is_full(config, view) and _evens_out(taker, lender, most):
            why = f"no worker can be added, and {of.value} workers are under less pressure"
        else:
            continue
        moved = min(lender.ready, key=lambda one: one.requests)
        sizes = (taker.desired + 1, left) if to is Role.PREFILL else (left, taker.desired + 1)
        return Decision(Act.FLIP, f"{taker.need.reason}; {why}", sizes, moved.worker_id, to)
    return None


def _is_full(config: AutoscalingConfig, view: ModelView) -> bool:
    return config.max_workers is not None and view.prefill.desired + view.decode.desired >= config.max_workers


def _evens_out(taker: PoolView, lender: PoolView, lender_need: float) -> bool:
    now = max(taker.pressure, lender.pressure)
    then = max(taker.need.workers / (taker.desired + 1), lender_need / (lender.desired - 1))
    return then < _CLEARLY * now


def _grow(config: AutoscalingConfig, state: LawState, view: ModelView, now_s: float) -> Decision | None:
    sizes = {Role.PREFILL: view.prefill.desired, Role.DECODE: view.decode.desired}
    reasons = []
    # The pool under more pressure is served first, if not all can have what they need.
    for role in sorted(sizes, key=lambda one: -view.of(one).pressure):
        if not _is_short(state, view, role, config.upscale_delay_s, now_s):
            continue
        now = view.of(role).desired
        wanted = math.ceil(min(_over(state, role, config.upscale_delay_s, now_s)) - _SLACK)
        free = math.inf if config.max_workers is None else config.max_workers - sum(sizes.values())
        size = int(min(wanted, 2 * max(1, now), limits(config, role)[1], now + free))
        if size > now:
            sizes[role] = size
            reasons.append(view.of(role).need.reason)
    if not reasons:
        return None
    return Decision(Act.GROW, "; ".join(reasons), (sizes[Role.PREFILL], sizes[Role.DECODE]))


def _shrink(config: AutoscalingConfig, state: LawState, view: ModelView, now_s: float) -> Decision | None:
    for role in (Role.DECODE, Role.PREFILL):
        pool = view.of(role)
        needs = _over(state, role, config.downscale_delay_s, now_s)
        left = pool.desired - 1
        if needs and left >= limits(config, role)[0] and max(needs) <= config.hysteresis * left:
            sizes = (left, view.decode.desired) if role is Role.PREFILL else (view.prefill.desired, left)
            reason = f"{left} {role.value} workers are enough, {max(needs):.2f} were needed at most"
            return Decision(Act.SHRINK, reason, sizes)
    return None


def _why_nothing(config: AutoscalingConfig, state: LawState, view: ModelView, now_s: float) -> str:
    for role in (Role.PREFILL, Role.DECODE):
        pool = view.of(role)
        if pool.need.workers > pool.desired + _SLACK:
            if pool.desired >= limits(config, role)[1]:
                return f"{pool.need.reason}; but {role.value} has its most workers, {pool.desired}"
            if _is_full(config, view):
                return f"{pool.need.reason}; but max_workers are in use"
            return f"{pool.need.reason}; waits whether that lasts"
    return "the pools have what they need"
