"""A router's view of the cluster survives every way in which its call to the pool manager can be lost."""

from __future__ import annotations

import asyncio

import pytest

from common.clock import SystemClock
from common.wire import registry_pb2
from router import registry
from router.registry import Registry
from support.chaos.rpc_fault_proxy import RpcFault, RpcFaultProxy
from support.fake_cluster import TOKEN, FakeManager, router_config


@pytest.mark.parametrize("fault", RpcFault)
async def test_a_lost_watch_is_watched_again(fault: RpcFault, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_FIRST_SNAPSHOT_S", 0.3)
    manager = FakeManager()
    proxy = RpcFaultProxy(await manager.start())
    left = 2

    def plan(method: str, request: bytes) -> RpcFault | None:
        nonlocal left
        if left == 0:
            return None
        left -= 1
        return fault

    proxy.plan = plan
    address = await proxy.start()
    watching = Registry(router_config(), manager_address=address, cluster_token=TOKEN, clock=SystemClock())
    task = asyncio.ensure_future(watching.run(registry_pb2.WatchRequest(router_id="r")))
    try:
        for version in (1, 2, 3):
            manager.publish(registry_pb2.ClusterSnapshot(cluster="test"))
            async with asyncio.timeout(120):
                while watching.view.version < version:
                    await asyncio.sleep(0.005)
        assert sum(proxy.injected.values()) >= 1
        assert watching.connected
    finally:
        task.cancel()
        await asyncio.wait({task})
        await watching.close()
        await proxy.close()
        await manager.stop()
