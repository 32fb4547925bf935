"""The console of one router, put together: pages, picture, live stream, actions.

`run` follows the snapshots, so that there are rates as soon as somebody looks; `close` ends the streams of those who look. Both
are called by `router.server`. The routes are in `router.console.routes`.
"""

from __future__ import annotations

from common.clock import Clock
from common.config import Config
from common.metrics import RouterMetrics
from router.console.actions import Actions
from router.console.live import Live
from router.console.pages import Pages
from router.console.picture import Picture
from router.dispatch import Dispatcher
from router.front import Front
from router.registry import Registry

_LONG_S = 3600.0


class Console:
    def __init__(
        self,
        config: Config,
        *,
        front: Front,
        registry: Registry,
        dispatcher: Dispatcher,
        metrics: RouterMetrics,
        clock: Clock,
        router_id: str,
        manager_address: str,
        cluster_token: str,
    ) -> None:
        self._registry = registry
        self.authenticates = config.router.authenticates
        self.observatory = front.observatory
        self.pages = Pages()
        self.picture = Picture(
            config,
            front=front,
            registry=registry,
            fleet=dispatcher.placer.fleet,
            metrics=metrics,
            router_id=router_id,
            clock=clock,
        )
        self.live = Live(self.picture, front.observatory, max_viewers=config.router.console.max_viewers, clock=clock)
        self.actions = Actions(manager_address=manager_address, cluster_token=cluster_token)

    async def run(self) -> None:
        """Ends only by cancellation."""
        while True:
            self.picture.take()
            await self._registry.wait_changed(_LONG_S)

    async def close(self) -> None:
        await self.live.close()
