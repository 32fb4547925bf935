"""What a router makes of the manager's snapshots."""

from __future__ import annotations

import asyncio

import pytest

from common.clock import SystemClock
from common.config import Config
from common.wire import registry_pb2, types_pb2, worker_pb2
from router.registry import Registry


def worker(role: types_pb2.Role, state: str) -> worker_pb2.InfoReply:
    name = types_pb2.Role.Name(role).removeprefix("ROLE_").lower()
    return worker_pb2.InfoReply(
        worker_id=f"m/{name}/0", incarnation=1, role=role, model="m", state=state, address="127.0.0.1:9", max_model_tokens=64
    )


@pytest.mark.parametrize("local_prefill", ["auto", "never", "always"])
@pytest.mark.parametrize("decode", ["starting", "ready"])
@pytest.mark.parametrize("prefill", ["starting", "ready"])
@pytest.mark.parametrize("wakes", [False, True])
async def test_a_model_is_served_once_the_workers_that_it_takes_are_ready(
    local_prefill: str, decode: str, prefill: str, wakes: bool
) -> None:
    config = Config.model_validate({"models": [{"name": "m", "source": "m", "decode": {"local_prefill": local_prefill}}]})
    registry = Registry(config, manager_address="127.0.0.1:9", cluster_token="secret", clock=SystemClock())
    assert not registry.serves("m"), "nobody has told of it"
    registry.apply(
        registry_pb2.ClusterSnapshot(
            version=1,
            models=[registry_pb2.ModelInfo(name="m", path="m", context_tokens=64, wakes_on_demand=wakes)],
            workers=[worker(types_pb2.ROLE_DECODE, decode), worker(types_pb2.ROLE_PREFILL, prefill)],
        )
    )
    all_there = decode == "ready" and (prefill == "ready" or local_prefill != "never")
    assert registry.serves("m") is (all_there or wakes)
    assert not registry.serves("another")


async def test_who_is_cancelled_while_there_is_news_is_cancelled() -> None:
    """A request that its client gave up, or a router that stops, in the moment in which a snapshot comes."""
    config = Config.model_validate({"models": [{"name": "m", "source": "m"}]})
    registry = Registry(config, manager_address="127.0.0.1:9", cluster_token="secret", clock=SystemClock())

    async def follow() -> None:
        while True:
            await registry.wait_changed(60.0)

    for turns in range(4):  # of the loop, between the news and the cancellation
        following = asyncio.create_task(follow())
        await asyncio.sleep(0.01)
        registry.stir()
        for _ in range(turns):
            await asyncio.sleep(0)
        following.cancel()
        await asyncio.wait({following}, timeout=5.0)
        assert following.cancelled(), turns
