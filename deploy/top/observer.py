"""Looks at a cluster again and again: the manager's picture, and the metrics of routers and workers, all at once, each in time.

    look -> Picture (first: no rates yet) ... look -> Picture ... close

A process that does not answer costs its own figures, nobody else's. A cluster that is gone raises, each time it is looked at; one
that comes back under the same name is found again.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any

import httpx

from common.errors import EngineFailure
from common.metrics.access import metrics_token
from common.rpc import connect
from deploy.commands.manager import ask_status, called, describe
from deploy.commands.which_cluster import chosen_state
from deploy.top.picture import Changes, Picture, draw_up
from deploy.top.samples import Change, Samples, parse

if TYPE_CHECKING:
    import grpc.aio

    from deploy.cluster_state import ClusterState

_SCRAPE_TIMEOUT_S = 2.0
_LATENCY_OVER_S = 60.0

Scrapes = Mapping[str, Samples]  # by address


class Observer:
    """A context. `look` from one task at a time."""

    def __init__(self, cluster: str | None, *, latency_since_start: bool = False) -> None:
        """Quantiles and shares are over the last minute of looking, or over all that the processes have counted."""
        self._cluster = cluster
        self._latency_since_start = latency_since_start
        self._state: ClusterState | None = None
        self._channel: grpc.aio.Channel | None = None
        self._past: deque[Scrapes] = deque()
        self._http: httpx.AsyncClient | None = None

    async def __aenter__(self) -> Observer:
        # Not through a proxy of the environment: these are addresses of the cluster.
        self._http = httpx.AsyncClient(trust_env=False, timeout=_SCRAPE_TIMEOUT_S)
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self._let_go()
        if self._http is not None:
            await self._http.aclose()

    async def look(self) -> Picture:
        """Raises ClusterError, or what else the manager says, if there is nothing to see."""
        state = chosen_state(self._cluster)
        if state != self._state or self._channel is None:
            await self._let_go()
            self._past.clear()
            self._state, self._channel = state, connect(state.manager_address, state.token)
        described = describe(await called(self._channel, state, ask_status), state)
        scrapes = await self._scrape(described, state)
        picture = draw_up(described, self._changes(scrapes), at_s=time.time(), up_s=described["up_s"], first=not self._past)
        self._remember(scrapes)
        return picture

    async def _scrape(self, described: dict[str, Any], state: ClusterState) -> Scrapes:
        # Workers on other hosts show their metrics to nobody else.
        headers = {"Authorization": f"Bearer {metrics_token(state.token)}"}
        addresses = [router["http_address"] for router in described["routers"]]
        addresses += [worker["metrics_address"] for worker in described["workers"] if worker["metrics_address"]]
        found = await asyncio.gather(*(self._samples(address, headers) for address in addresses))
        return {address: samples for address, samples in zip(addresses, found, strict=True) if samples is not None}

    async def _samples(self, address: str, headers: dict[str, str]) -> Samples | None:
        assert self._http is not None
        try:
            reply = await self._http.get(f"http://{address}/metrics", headers=headers)
            return parse(reply.text, time.monotonic()) if reply.status_code == httpx.codes.OK else None
        except (httpx.HTTPError, EngineFailure):
            return None

    def _changes(self, scrapes: Scrapes) -> Changes:
        latest = self._past[-1] if self._past else {}
        oldest = self._past[0] if self._past and not self._latency_since_start else {}
        return Changes(
            short={address: Change(latest.get(address), now) for address, now in scrapes.items()},
            long={address: Change(oldest.get(address), now) for address, now in scrapes.items()},
        )

    def _remember(self, scrapes: Scrapes) -> None:
        self._past.append(scrapes)
        now_s = time.monotonic()
        while len(self._past) > 1 and all(now_s - samples.at_s > _LATENCY_OVER_S for samples in self._past[0].values()):
            self._past.popleft()

    async def _let_go(self) -> None:
        if self._channel is not None:
            await self._channel.close(None)
        self._channel, self._state = None, None
