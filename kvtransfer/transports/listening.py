"""Where links over sockets begin on the decode worker: accept, authenticate, keep what was let in until it ends.

accept -> authenticate -> introduce -> a `StreamReceiverLink` of its own
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable

from common.errors import HandoffError
from common.types import KVLayout
from kvtransfer.frames import FrameKind
from kvtransfer.region import BlockRegion
from kvtransfer.transports.authentication import PoolShape, authenticate_as_decode
from kvtransfer.transports.base import Landing, LinkCredentials, PeerName
from kvtransfer.transports.receiving import StreamReceiverLink

MAX_UNAUTHENTICATED = 64
ACCEPT_BACKOFF_S = 0.1


async def nothing_more(sock: socket.socket) -> None:
    """Frames follow at once."""


class StreamListener:
    """Accepts, authenticates, and keeps the links of one listening socket."""

    def __init__(
        self,
        sock: socket.socket,
        address: str,
        landing: Landing,
        credentials: LinkCredentials,
        region: BlockRegion,
        layout: KVLayout,
        *,
        kind: str,
        data_kind: FrameKind,
        introduce: Callable[[socket.socket], Awaitable[None]] = nothing_more,  # what follows authentication
    ) -> None:
        self.address = address
        self._sock = sock
        self._landing = landing
        self._credentials = credentials
        self._shape = PoolShape(region.num_blocks, region.block_bytes)
        self._layout = layout
        self._kind = kind
        self._data_kind = data_kind
        self._introduce = introduce
        self._links: set[StreamReceiverLink] = set()
        self._greetings: set[asyncio.Task[None]] = set()
        self._unauthenticated = asyncio.Semaphore(MAX_UNAUTHENTICATED)
        self._accepting = asyncio.create_task(self._accept(), name=f"kv-accept-{kind}")

    async def close(self) -> None:
        tasks = [self._accepting, *self._greetings]
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        self._sock.close()
        for link in tuple(self._links):
            link.end()

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._unauthenticated.acquire()
            try:
                sock, _ = await loop.sock_accept(self._sock)
            except OSError:  # out of descriptors, or the peer was gone before we looked: neither ends the listener
                self._unauthenticated.release()
                await asyncio.sleep(ACCEPT_BACKOFF_S)
                continue
            greeting = asyncio.create_task(self._greet(sock), name=f"kv-greet-{self._kind}")
            self._greetings.add(greeting)
            greeting.add_done_callback(self._greeted)

    def _greeted(self, greeting: asyncio.Task[None]) -> None:
        self._greetings.discard(greeting)
        self._unauthenticated.release()

    async def _greet(self, sock: socket.socket) -> None:
        link = None
        try:
            sock.setblocking(False)
            peer = await authenticate_as_decode(sock, self._credentials, self._shape, self._landing.admit)
            link = await self._welcome(sock, peer)
        except HandoffError as error:
            self._landing.link_refused(error)
            return
        finally:
            if link is None:
                sock.close()
        self._links.add(link)

    async def _welcome(self, sock: socket.socket, peer: PeerName) -> StreamReceiverLink:
        await self._introduce(sock)
        return StreamReceiverLink(
            sock,
            peer,
            self._landing,
            self._layout,
            kind=self._kind,
            data_kind=self._data_kind,
            on_end=self._links.discard,
        )
