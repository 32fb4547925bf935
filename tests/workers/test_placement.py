"""A router's placement over real workers: reports are true, prompts go where their beginning is, losses are noticed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from common.blocks import block_key
from common.clock import SystemClock
from common.config import Config, DecodeConfig, EngineConfig, ModelConfig, PlacementConfig, RouterConfig, TransferConfig
from common.metrics import RouterMetrics
from common.rpc import cancel_and_wait
from common.types import Request, Role
from common.wire import registry_pb2
from common.worker import WorkerSpec
from decode_worker.server import DecodeWorker
from prefill_worker.server import PrefillWorker
from router.dispatch import Dispatcher, DispatchEvent
from router.placement.watching import Watching
from router.registry import Registry
from support.tiny_models import make_tiny_model
from support.workers import TOKEN, request, running_workers

ENGINE = EngineConfig(dtype="float32", exact=True, kv_pool_tokens=2048)
BLOCK = ENGINE.block_tokens
AnyWorker = PrefillWorker | DecodeWorker


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny"), seed=5)


@dataclass
class Pools:
    """Two prefill and two decode workers, and what a router has around its dispatcher."""

    model_path: Path
    workers: dict[str, AnyWorker]
    registry: Registry
    dispatcher: Dispatcher

    async def start(self, role: Role, index: int, incarnation: int = 1) -> AnyWorker:
        name = f"tiny/{role.value}/{index}"
        spec = WorkerSpec(
            worker_id=name,
            incarnation=incarnation,
            role=role,
            model=ModelConfig(name="tiny", source="tiny", engine=ENGINE, decode=DecodeConfig(local_prefill="never")),
            model_path=str(self.model_path),
            transfer=TransferConfig(),
            cluster_token=TOKEN,
        )
        worker = self.workers[name] = (PrefillWorker if role is Role.PREFILL else DecodeWorker)(spec)
        await worker.start()
        return worker

    def publish(self) -> None:
        infos = [worker._host.info() for worker in self.workers.values()]
        self.registry.apply(registry_pb2.ClusterSnapshot(models=[registry_pb2.ModelInfo(name="tiny")], workers=infos))

    def holder(self, event: DispatchEvent) -> str:
        assert event.admission is not None
        return event.admission.started.timings.prefill_worker

    def known(self, name: str) -> set[int]:
        """Blocks that the router's index has for a worker, without promises."""
        fleet = self.dispatcher.placer.fleet
        (worker,) = [one for ref, one in fleet.workers.items() if ref.worker_id == name and one.reporting]
        return {key for key, bits in fleet.index._holders.items() if bits >> worker.slot & 1}

    def cached(self, name: str) -> set[int]:
        return {block_key(block_hash) for block_hash in self.workers[name]._host.engine.blocks.hashes}

    def in_step(self) -> bool:
        """Every worker reports, and the index holds exactly what their block managers hold."""
        fleet = self.dispatcher.placer.fleet
        reporting = {ref.worker_id for ref, worker in fleet.workers.items() if worker.reporting}
        return reporting == set(self.workers) and all(self.known(name) == self.cached(name) for name in self.workers)

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(120):
            while not condition():
                await asyncio.sleep(0.005)

    async def ask(self, work: Request) -> tuple[list[int], str]:
        """The tokens, and who computed the prompt."""
        tokens: list[int] = []
        holder = ""
        async with aclosing(self.dispatcher.generate(work)) as events:
            async for event in events:
                holder = self.holder(event) if event.admission is not None else holder
                tokens += [token for chunk in event.chunks for token in chunk.token_ids]
        return tokens, holder


@asynccontextmanager
async def pools(model_path: Path) -> AsyncIterator[Pools]:
    # Not by predicted times, which are true to how fast each worker happened to be: what the index knows has to decide.
    placement = PlacementConfig(policy="cache_aware", report_interval_s=0.02)
    config = RouterConfig(connect_timeout_s=30.0, placement=placement)
    clock, metrics = SystemClock(), RouterMetrics(CollectorRegistry())
    whole = Config(models=(ModelConfig(name="tiny", source="tiny"),))
    registry = Registry(whole, manager_address="", cluster_token=TOKEN, clock=clock)
    dispatcher = Dispatcher(config, registry, cluster_token=TOKEN, clock=clock, metrics=metrics)
    running = Pools(model_path, {}, registry, dispatcher)
    watching = Watching(
        config.placement,
        registry,
        dispatcher.placer,
        cluster_token=TOKEN,
        connect_timeout_s=30.0,
        router_id="r",
        metrics=metrics,
    )
    for role in (Role.PREFILL, Role.DECODE):
        for index in range(2):
            await running.start(role, index)
    running.publish()
    task = asyncio.create_task(watching.run())
    try:
        await running.until(running.in_step)
        yield running
    finally:
        await cancel_and_wait(task)
        await dispatcher.close()
        for worker in sorted(running.workers.values(), key=lambda one: isinstance(one, DecodeWorker)):
            await worker.stop(0.0)


async def test_prompts_go_to_who_holds_their_beginning_and_losses_are_noticed(model_path: Path) -> None:
    conversations = [[number + 3] * (4 * BLOCK) for number in range(4)]

    def turn(number: int, length: int) -> Request:
        return request([*conversations[number], *range(3, 3 + length)], request_id=f"r{number}", max_tokens=4)

    async with running_workers(model_path, engine=ENGINE, decode=DecodeConfig(local_prefill="always"), num_prefill=0) as alone:
        expected = {(n, length): (await alone.generate(turn(n, length))).tokens for n in range(4) for length in (5, 9)}

    async with pools(model_path) as cluster:
        first = [await cluster.ask(turn(number, 5)) for number in range(4)]
        assert [tokens for tokens, _ in first] == [expected[number, 5] for number in range(4)]
        assert {holder for _, holder in first} == {"tiny/prefill/0", "tiny/prefill/1"}, "an idle pool is used in turn"
        await cluster.until(cluster.in_step)

        # Those of one holder after each other, and the last one's first: the other worker is idle for longer, and only the index
        # can say who holds what.
        in_turn = sorted(range(4), key=lambda number: first[number][1] != first[-1][1])
        again = {number: await cluster.ask(turn(number, 9)) for number in in_turn}
        assert [again[number][0] for number in range(4)] == [expected[number, 9] for number in range(4)]
        assert [again[number][1] for number in range(4)] == [holder for _, holder in first]

        # A missing report: placement is told that it is blind, and a new picture puts it in step again.
        (ref,) = [ref for ref in cluster.dispatcher.placer.fleet.workers if ref.worker_id == "tiny/prefill/0"]
        cluster.dispatcher.placer.fleet.workers[ref].sequence -= 2
        await cluster.ask(turn(0, 5))
        await cluster.until(cluster.in_step)

        # A restarted worker keeps its id and has an empty cache; its old blocks are nobody's.
        lost = cluster.workers.pop("tiny/prefill/0")
        await lost.stop(0.0)
        await cluster.until(lambda: not cluster.dispatcher.placer.fleet.workers[ref].reporting)
        slot = cluster.dispatcher.placer.fleet.workers[ref].slot
        assert not any(bits >> slot & 1 for bits in cluster.dispatcher.placer.fleet.index._holders.values())
        answers = [await cluster.ask(turn(number, 5)) for number in range(4)]
        assert [tokens for tokens, _ in answers] == [expected[number, 5] for number in range(4)]
        assert {holder for _, holder in answers} == {"tiny/prefill/1"}
        await cluster.start(Role.PREFILL, 0, incarnation=2)
        cluster.publish()
        await cluster.until(cluster.in_step)
        assert not cluster.known("tiny/prefill/0")
        assert all(one.ref.incarnation == 2 for one in _named(cluster, "tiny/prefill/0"))

        # Nothing is outstanding: the account of every worker is empty, here and there.
        await cluster.until(lambda: all(one.load.requests == 0 for one in cluster.dispatcher.placer.fleet.workers.values()))
        assert all(one.num_open == one.unseen_tokens == 0 for one in cluster.dispatcher.placer.fleet.workers.values())


def _named(cluster: Pools, name: str) -> list:  # type: ignore[type-arg]
    return [one for ref, one in cluster.dispatcher.placer.fleet.workers.items() if ref.worker_id == name]
