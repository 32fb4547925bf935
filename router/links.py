"""One gRPC channel per incarnation of a decode worker, shared by the requests that go there.

    acquire -> (connect, once) -> used by n requests -> release -> kept while the worker is in the snapshot, else closed

A channel is closed only when nobody uses it: a worker that vanished from a snapshot may still finish what it has.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from dataclasses import dataclass

import grpc
import grpc.aio

from common.errors import WorkerLost
from common.rpc import connect
from common.types import WorkerRef


@dataclass
class _Link:
    channel: grpc.aio.Channel
    users: int = 0
    broken: bool = False


class Links:
    def __init__(self, *, cluster_token: str, connect_timeout_s: float) -> None:
        self._cluster_token = cluster_token
        self._connect_timeout_s = connect_timeout_s
        self._links: dict[WorkerRef, _Link] = {}

    @asynccontextmanager
    async def to(self, ref: WorkerRef) -> AsyncIterator[grpc.aio.Channel]:
        """A connected channel. Raises WorkerLost if the worker cannot be reached within the connect timeout."""
        link = self._links.get(ref)
        if link is None:
            link = self._links[ref] = _Link(connect(ref.address, self._cluster_token))
        link.users += 1
        try:
            await self._connected(link, ref)
            yield link.channel
        except WorkerLost:
            # The next try starts afresh instead of sharing this channel's back-off.
            link.broken = True
            if self._links.get(ref) is link:
                del self._links[ref]
            raise
        finally:
            link.users -= 1
            if link.broken and not link.users:
                await link.channel.close(None)

    async def keep_only(self, present: Collection[WorkerRef]) -> None:
        """Closes unused channels to workers that are gone."""
        for ref in [ref for ref, link in self._links.items() if ref not in present and not link.users]:
            await self._links.pop(ref).channel.close(None)

    async def close(self) -> None:
        while self._links:
            _, link = self._links.popitem()
            await link.channel.close(None)

    async def _connected(self, link: _Link, ref: WorkerRef) -> None:
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                state = link.channel.get_state(try_to_connect=True)
                while state is not grpc.ChannelConnectivity.READY:
                    if state in (grpc.ChannelConnectivity.TRANSIENT_FAILURE, grpc.ChannelConnectivity.SHUTDOWN):
                        raise WorkerLost(f"worker {ref.worker_id} refuses connections", retry_after_s=1.0)
                    await link.channel.wait_for_state_change(state)
                    state = link.channel.get_state(try_to_connect=True)
        except TimeoutError:
            raise WorkerLost(f"worker {ref.worker_id} cannot be reached", retry_after_s=1.0) from None
