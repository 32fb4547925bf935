"""What one router is made of. `assemble` makes all parts and starts none; `start` runs those that have a task of their own.

    registry, dispatcher (with its placer)     where workers are, and who computes what
    store, semantics, cache, limits            what is shared with other routers, if they share a Redis
    front                                      what both faces ask
    console                                    the page for operators

Parts end in the reverse order: first who takes work, then who does it, last what they write to.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Coroutine
from contextlib import AsyncExitStack
from dataclasses import dataclass

from prometheus_client import CollectorRegistry

from common.clock import Clock
from common.config import Config
from common.metrics import RouterMetrics
from common.rpc import cancel_and_wait
from common.tracing.tracer import Tracer, make_tracer
from common.wire import registry_pb2
from router.admission.shared_limits import Limits
from router.cache.answers import AnswerCache
from router.cache.semantic_port import SemanticLookup
from router.console.console import Console
from router.dispatch import Dispatcher
from router.feeds import Feeds
from router.front import Front
from router.generation import InFlight
from router.placement.watching import Watching
from router.registry import Registry
from router.semantic.making import make_semantics
from router.store.base import Store
from router.store.making import make_store
from router.store.redis_store import RedisStore

_LONG_S = 3600.0


@dataclass(frozen=True)
class Router:
    config: Config
    prometheus: CollectorRegistry
    metrics: RouterMetrics
    tracer: Tracer
    registry: Registry
    dispatcher: Dispatcher
    store: Store
    semantics: SemanticLookup
    cache: AnswerCache
    limits: Limits
    front: Front
    console: Console | None
    watching: Watching

    def start(self, announcement: registry_pb2.WatchRequest, ending: AsyncExitStack) -> None:
        """Once it can be said where this router is reached. What `ending` does ends the parts."""

        def run(work: Coroutine[object, object, None], name: str) -> None:
            ending.push_async_callback(cancel_and_wait, asyncio.create_task(work, name=name))

        ending.push_async_callback(self.tracer.close)
        ending.push_async_callback(self.store.close)
        ending.push_async_callback(self.front.examination.close)
        ending.push_async_callback(self.front.models.close)
        ending.push_async_callback(self.dispatcher.close)
        run(self.store.run(), "store")
        run(self.limits.run(), "shared limits")
        ending.push_async_callback(self.semantics.close)
        run(self.semantics.run(), "semantic cache")
        ending.push_async_callback(self.cache.close)
        ending.push_async_callback(self.registry.close)
        run(self.registry.run(announcement), "watch registry")
        run(self.front.observatory.run(), "observatory")
        run(self._follow(), "follow the registry")
        run(self.watching.run(), "watch workers")
        if self.console is not None:
            run(self.console.run(), "console")

    async def _follow(self) -> None:
        """What waits for room hears of workers that come; what is sent to a worker that is lost goes elsewhere."""
        while True:
            await self.registry.wait_changed(_LONG_S)
            self.front.gate.workers_changed()
            self.dispatcher.leave_lost()


def assemble(config: Config, *, manager_address: str, cluster_token: str, router_id: str, clock: Clock) -> Router:
    """Raises ConfigError and ModelLoadError for what the configuration asks for and this machine has not."""
    prometheus = CollectorRegistry()
    metrics = RouterMetrics(prometheus)
    tracer = make_tracer(config.tracing, service="pdserve-router", instance=uuid.uuid4().hex, clock=clock)
    store = make_store(config.cache, cluster_token=cluster_token, clock=clock, metrics=metrics.store)
    registry = Registry(config, manager_address=manager_address, cluster_token=cluster_token, clock=clock)
    dispatcher = Dispatcher(config.router, registry, cluster_token=cluster_token, clock=clock, metrics=metrics, feeds=Feeds())
    in_flight = InFlight()
    semantics = make_semantics(config.cache, store=store, clock=clock, metrics=metrics.semantic)
    cache = AnswerCache(
        config.cache, store=store, semantics=semantics, clock=clock, metrics=metrics, draining=lambda: in_flight.closed
    )
    limits = Limits(store if isinstance(store, RedisStore) else None, namespace=config.cache.redis.namespace, clock=clock)
    front = Front(
        config,
        registry=registry,
        dispatcher=dispatcher,
        cache=cache,
        semantics=semantics,
        in_flight=in_flight,
        limits=limits,
        metrics=metrics,
        tracer=tracer,
        clock=clock,
    )
    watching = Watching(
        config.router.placement,
        registry,
        dispatcher.placer,
        cluster_token=cluster_token,
        connect_timeout_s=config.router.connect_timeout_s,
        router_id=router_id,
        metrics=metrics,
    )
    console = None
    if config.router.console.enabled:
        console = Console(
            config,
            front=front,
            registry=registry,
            dispatcher=dispatcher,
            metrics=metrics,
            clock=clock,
            router_id=router_id,
            manager_address=manager_address,
            cluster_token=cluster_token,
        )
    return Router(
        config, prometheus, metrics, tracer, registry, dispatcher, store, semantics, cache, limits, front, console, watching
    )
