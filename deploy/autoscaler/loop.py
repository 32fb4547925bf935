"""The autoscaler beside the pool manager: looks, decides and acts once a second, and can say why.

    run: per model  workers' reports -> signals -> needs -> law -> flip | scale -> (the manager's business)
    demand(model): somebody waits for a model that sleeps; the next look comes at once
    report: limits, pressures and the last decisions of each model

One per manager, on its loop. Whatever it does goes through the manager's own orders, so an operator can do the same by hand,
and the law takes what it finds. In a dry run everything happens but the act.
"""

from __future__ import annotations

import asyncio
import re
from collections import deque
from collections.abc import Iterable, Mapping
from contextlib import suppress
from enum import Enum
from typing import Protocol

from common.clock import Clock
from common.codec import role_from_wire
from common.config import AutoscalingConfig
from common.errors import ModelNotFound, PdserveError
from common.logs import get_logger
from common.types import Role, WorkerState
from common.wire import registry_pb2
from common.wire.registry_pb2 import AutoscalerDecision, AutoscalerReport, ClusterSnapshot, ModelAutoscaling, PoolAutoscaling
from common.wire.worker_pb2 import InfoReply
from deploy.autoscaler.law import Act, Candidate, Decision, LawState, ModelView, PoolView, decide, limits
from deploy.autoscaler.need import CapacityFit, decode_need, prefill_need
from deploy.autoscaler.signals import SignalWindow, WorkerReading
from deploy.reconcile import Phase, Pool, PoolsState

log = get_logger(__name__)

_KEPT_DECISIONS = 50
_FIGURES = re.compile(r"[\d.]+")


class Mode(Enum):
    OFF = "off"
    DRY_RUN = "dry-run"
    ON = "on"


_MODE_TO_WIRE = {
    Mode.OFF: registry_pb2.AUTOSCALER_MODE_OFF,
    Mode.DRY_RUN: registry_pb2.AUTOSCALER_MODE_DRY_RUN,
    Mode.ON: registry_pb2.AUTOSCALER_MODE_ON,
}
MODE_FROM_WIRE = {wire: mode for mode, wire in _MODE_TO_WIRE.items()}


class Pools(Protocol):
    """The manager, as far as the autoscaler goes."""

    @property
    def snapshot(self) -> ClusterSnapshot: ...

    @property
    def pools(self) -> PoolsState: ...

    async def scale(self, model: str, desired: Mapping[Role, int], wait_s: float) -> ClusterSnapshot: ...

    async def flip(self, worker_id: str, role: Role, wait_s: float) -> ClusterSnapshot: ...

    def tell_decision(self, model: str, text: str) -> None: ...

    def wakes(self, models: Iterable[str]) -> None: ...


class _Model:
    """What is known of one model."""

    def __init__(self, name: str, config: AutoscalingConfig, now_s: float) -> None:
        self.name = name
        self.config = config
        self.mode = Mode(config.mode)
        self.window = SignalWindow(config.look_back_period_s, now_s)
        self.fit = CapacityFit()
        self.law = LawState(since_s=now_s)
        self.view: ModelView | None = None
        self.looked_s = now_s - config.interval_s
        self.demanded = False
        self.decisions: deque[AutoscalerDecision] = deque(maxlen=_KEPT_DECISIONS)
        self.said = ""


class Autoscaler:
    def __init__(self, manager: Pools, configs: Mapping[str, AutoscalingConfig], clock: Clock) -> None:
        self._manager = manager
        self._clock = clock
        now_s = clock.monotonic_s()
        self._models = {name: _Model(name, config, now_s) for name, config in configs.items()}
        self._interval_s = min((config.interval_s for config in configs.values()), default=1.0)
        self._asked = asyncio.Event()
        self._tell_who_wakes()

    async def run(self) -> None:
        """Until it is cancelled."""
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(self._interval_s):
                    await self._asked.wait()
            self._asked.clear()
            await self.look()

    async def look(self) -> None:
        """One round over all models whose time has come."""
        now_s = self._clock.monotonic_s()
        for model in self._models.values():
            if model.demanded or now_s - model.looked_s >= 0.9 * model.config.interval_s:
                model.looked_s = now_s
                await self._look_at(model, now_s)

    def set_mode(self, name: str, mode: Mode) -> None:
        """Of one model, or of all if no name is given. Raises ModelNotFound."""
        for model in self._named(name):
            if model.mode is not mode:
                model.mode = mode
                model.law = LawState(since_s=self._clock.monotonic_s())
                self._manager.tell_decision(model.name, f"the autoscaler is {mode.value}")
        self._tell_who_wakes()

    def demand(self, name: str) -> bool:
        """Somebody waits for this model; whether workers are, or will be, on their way. Raises ModelNotFound."""
        if name not in self._models:
            raise ModelNotFound(f"this cluster does not serve {name!r}", param="model")
        model = self._models[name]
        model.window.used(self._clock.monotonic_s())
        if model.mode is not Mode.ON or not model.config.may_sleep:
            return False
        state, decode = self._manager.pools, Pool(name, Role.DECODE)
        if state.desired.get(decode, 0) == 0:
            model.demanded = True
            self._asked.set()
            return True
        return any(state.desired.get(pool, 0) and not state.ready(pool) for pool in (decode, Pool(name, Role.PREFILL)))

    def report(self, name: str) -> AutoscalerReport:
        """Raises ModelNotFound."""
        return AutoscalerReport(models=[self._report(model) for model in self._named(name)])

    # -- within --------------------------------------------------------------------------------------------------------

    def _named(self, name: str) -> list[_Model]:
        if not name:
            return list(self._models.values())
        if name not in self._models:
            raise ModelNotFound(f"this cluster does not serve {name!r}", param="model")
        return [self._models[name]]

    def _tell_who_wakes(self) -> None:
        self._manager.wakes(model.name for model in self._models.values() if model.mode is Mode.ON and model.config.may_sleep)

    async def _look_at(self, model: _Model, now_s: float) -> None:
        model.window.add(_readings(model.name, self._manager.snapshot.workers), now_s)
        view = model.view = self._view(model, now_s)
        if model.mode is Mode.OFF or self._manager.pools.closing:
            return
        model.law, decision = decide(model.config, model.law, view, now_s)
        model.demanded = False
        performed = False
        reason = decision.reason
        if decision.act is not Act.NONE and model.mode is Mode.ON:
            try:
                await self._perform(model, decision)
                performed = True
            except PdserveError as error:
                reason = f"{reason}; it failed: {error.message}"
                log.warning("the autoscaler could not act", model=model.name, wanted=decision.text, error=error.code)
        self._note(model, view, decision, reason, performed)

    def _view(self, model: _Model, now_s: float) -> ModelView:
        signals = model.window.signals()
        decode = signals.decode
        if decode.tpot_s is not None:
            model.fit = model.fit.seen(decode.batch, decode.tpot_s)
        state = self._manager.pools
        loads = {one.worker_id: one.requests_running + one.requests_waiting for one in self._manager.snapshot.workers}

        def pool_view(role: Role) -> PoolView:
            pool = Pool(model.name, role)
            need = (
                prefill_need(model.config, signals.prefill)
                if role is Role.PREFILL
                else decode_need(model.config, decode, model.fit)
            )
            ready = tuple(Candidate(one.worker_id, loads.get(one.worker_id, 0)) for one in state.ready(pool))
            return PoolView(state.desired.get(pool, 0), need, _moving(state, pool), ready)

        return ModelView(
            prefill=pool_view(Role.PREFILL),
            decode=pool_view(Role.DECODE),
            requests=signals.requests,
            idle_s=now_s - signals.last_use_s,
            demanded=model.demanded,
        )

    async def _perform(self, model: _Model, decision: Decision) -> None:
        if decision.act is Act.FLIP and decision.role is not None:
            await self._manager.flip(decision.worker_id, decision.role, 0.0)
            return
        prefill, decode = decision.sizes
        await self._manager.scale(model.name, {Role.PREFILL: prefill, Role.DECODE: decode}, 0.0)

    def _note(self, model: _Model, view: ModelView, decision: Decision, reason: str, performed: bool) -> None:
        said = f"{decision.act.value} {_FIGURES.sub('', reason)}"
        if not performed and said == model.said:
            return  # in a dry run, too, it is wanted again and again
        model.said = said
        prefill, decode = decision.sizes
        model.decisions.append(
            AutoscalerDecision(
                at_s=self._clock.wall_s(),
                action=decision.act.value,
                text=decision.text,
                reason=reason,
                performed=performed,
                prefill_before=view.prefill.desired,
                decode_before=view.decode.desired,
                prefill_after=prefill,
                decode_after=decode,
            )
        )
        if decision.act is not Act.NONE:
            log.info("autoscaler", model=model.name, decision=decision.text, reason=reason, performed=performed)
            self._manager.tell_decision(model.name, f"{'' if performed else 'not done: '}{decision.text}: {reason}")

    def _report(self, model: _Model) -> ModelAutoscaling:
        state = self._manager.pools

        def pool_report(role: Role) -> PoolAutoscaling:
            pool = Pool(model.name, role)
            view = None if model.view is None else model.view.of(role)
            configured = model.config.prefill if role is Role.PREFILL else model.config.decode
            return PoolAutoscaling(
                min_replicas=configured.min_replicas,
                max_replicas=limits(model.config, role)[1],
                desired=state.desired.get(pool, 0),
                ready=len(state.ready(pool)),
                pressure=0.0 if view is None else view.pressure,
                signal="" if view is None else view.need.reason,
            )

        return ModelAutoscaling(
            model=model.name,
            mode=_MODE_TO_WIRE[model.mode],
            prefill=pool_report(Role.PREFILL),
            decode=pool_report(Role.DECODE),
            idle_s=0.0 if model.view is None else model.view.idle_s,
            decisions=list(model.decisions),
        )


def _moving(state: PoolsState, pool: Pool) -> str:
    for one in state.of(pool):
        if one.phase not in (Phase.READY, Phase.FAILED):
            return f"{one.worker_id} is {one.phase.value}"
        if one.outgoing:
            return f"{one.worker_id} is being replaced"
    return ""


def _readings(model: str, workers: Iterable[InfoReply]) -> list[WorkerReading]:
    return [
        WorkerReading(
            worker_id=one.worker_id,
            incarnation=one.incarnation,
            role=role_from_wire(one.role),
            requests=one.requests_running + one.requests_waiting,
            served=one.requests_served,
            blocks_total=one.blocks_total,
            blocks_free=one.blocks_free,
            queue_age_s=one.pace.queue_age_s,
            queued_tokens=one.pace.queued_tokens,
            decoding=one.pace.decoding,
            computed_tokens=one.pace.computed_tokens,
            generated_tokens=one.pace.generated_tokens,
            step_s=one.pace.step_s,
            sequence_step_s=one.pace.sequence_step_s,
        )
        for one in workers
        if one.model == model and one.state == WorkerState.READY and one.pid
    ]
