"""The loop beside the law: what it wants is told once, also where it may not do it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping

from common.clock import ManualClock
from common.config import AutoscalingConfig
from common.types import Role
from common.wire.registry_pb2 import ClusterSnapshot
from deploy.autoscaler.loop import Autoscaler, Mode
from deploy.reconcile import Pool, PoolsState


class Manager:
    """Three decode workers where one is the most; it remembers what it is asked for."""

    def __init__(self) -> None:
        self.snapshot = ClusterSnapshot()
        self.pools = PoolsState(desired={Pool("m", Role.PREFILL): 1, Pool("m", Role.DECODE): 3})
        self.scaled: list[Mapping[Role, int]] = []
        self.told: list[str] = []
        self.waking: list[str] = []

    async def scale(self, model: str, desired: Mapping[Role, int], wait_s: float) -> ClusterSnapshot:
        self.scaled.append(desired)
        return self.snapshot

    async def flip(self, worker_id: str, role: Role, wait_s: float) -> ClusterSnapshot:
        raise AssertionError("nobody is there to be flipped")

    def tell_decision(self, model: str, text: str) -> None:
        self.told.append(text)

    def wakes(self, models: Iterable[str]) -> None:
        self.waking = list(models)


async def test_a_dry_run_says_once_what_it_wants_all_the_time() -> None:
    manager, clock = Manager(), ManualClock()
    autoscaler = Autoscaler(manager, {"m": AutoscalingConfig.model_validate({"mode": "dry-run"})}, clock)
    assert not manager.waking
    for _ in range(5):
        clock.advance(1.0)
        await autoscaler.look()
    (decision,) = autoscaler.report("m").models[0].decisions
    assert (decision.action, decision.performed, decision.decode_before, decision.decode_after) == ("shrink", False, 3, 1)
    assert len(manager.told) == 1
    assert not manager.scaled
    autoscaler.set_mode("m", Mode.ON)
    clock.advance(1.0)
    await autoscaler.look()
    assert [one.performed for one in autoscaler.report("m").models[0].decisions] == [False, True]
    assert manager.scaled == [{Role.PREFILL: 1, Role.DECODE: 1}]


async def test_it_stops_also_while_it_is_asked_to_wake_a_model() -> None:
    config = AutoscalingConfig.model_validate({"mode": "on", "decode": {"min_replicas": 0}, "prefill": {"min_replicas": 0}})
    for turns in range(4):  # of the loop, between the two
        manager = Manager()
        autoscaler = Autoscaler(manager, {"m": config}, ManualClock())
        running = asyncio.create_task(autoscaler.run())
        await asyncio.sleep(0.01)
        manager.pools = PoolsState(desired={Pool("m", Role.PREFILL): 0, Pool("m", Role.DECODE): 0})
        assert autoscaler.demand("m")
        for _ in range(turns):
            await asyncio.sleep(0)
        running.cancel()
        await asyncio.wait({running}, timeout=5.0)
        assert running.cancelled(), turns
