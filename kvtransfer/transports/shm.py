"""Two processes on one host: the decode worker maps the prefill worker's pool, to read, and copies from it what it is offered.

    d                                                        p
    host, abstract Unix socket (no file)     <-------------  the same host? connect, authenticate
    mmap, to read                            <-------------  the pool's descriptor (SCM_RIGHTS), with which nobody can write
    may these be written? then fetch them    <--- READY ---  they lie at these places
    pool  <========= one pass over each piece: copied, and digested
    they are not read any more               ---- TAKEN -->  a transfer is through when all was taken
    the same as was found?                   <-- WRITTEN --  digests of the sources, taken meanwhile

Nobody but d writes into d's pool: a writer that is given up is fenced at once, and can do no harm whatever it does. Nor can d
harm p. What p has given up, because d was not heard, d may still read: by then it does not have the digest that p states, or p
states none.

While d copies, p digests; so what either reads is often in the cache that they share, and memory is read once and written once,
as by a copy that nobody checks. A piece that does not lie in the pool, because it was made for this peer, goes over the socket.
"""

from __future__ import annotations

import secrets
import socket
from collections.abc import Callable, Sequence
from functools import partial

from common.errors import HandshakeRefused, StartupError, TransferBroken
from common.types import KVLayout
from kvtransfer.host_identity import this_host
from kvtransfer.region import BlockRegion
from kvtransfer.spans import columns_of
from kvtransfer.transports.authentication import PoolShape, authenticate_as_prefill
from kvtransfer.transports.base import Landing, LinkCredentials, Listener, PeerName, Piece, SenderLink
from kvtransfer.transports.fetching import FetchingListener
from kvtransfer.transports.offer import Offer
from kvtransfer.transports.peer_pool import give_pool
from kvtransfer.transports.sending import StreamSenderLink
from kvtransfer.transports.tcp import WireWriter
from kvtransfer.transports.unix_socket import connect_to, listen_at

KIND = "shm"


class ShmTransport:
    def can_serve(self, region: BlockRegion) -> bool:
        return not region.on_device

    async def listen(
        self, landing: Landing, credentials: LinkCredentials, region: BlockRegion, layout: KVLayout, host: str
    ) -> Listener:
        if region.on_device:
            raise StartupError("the KV pool is on a device", param="transports")
        name = f"{this_host()}/pdserve-kv-{secrets.token_hex(16)}"
        return FetchingListener(listen_at(name), name, landing, credentials, region, layout, kind=KIND)

    async def connect(
        self,
        address: str,
        credentials: LinkCredentials,
        peer: PeerName,
        *,
        pool_blocks: int,
        layout: KVLayout,
        source: BlockRegion,
    ) -> SenderLink:
        host, _, _ = address.partition("/")
        if host != this_host():
            raise TransferBroken("the decode worker is on another host")
        if source.fd is None:
            raise HandshakeRefused("the KV pool here has no descriptor: other processes cannot map it", param="transports")
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            await connect_to(sock, address)
            await authenticate_as_prefill(sock, credentials, peer, PoolShape(pool_blocks, layout.block_bytes))
            give_pool(sock, source.fd)
            return LendingSenderLink(sock, source)
        except BaseException:
            sock.close()
            raise


class LendingSenderLink(StreamSenderLink):
    """The prefill worker's end. What it writes stays where it is until the peer has taken it."""

    def __init__(self, sock: socket.socket, source: BlockRegion) -> None:
        super().__init__(sock, KIND, WireWriter())
        self._pool = source.buffer[:]  # as long as it is held, the memory stays where it is
        self._pool_address = source.address

    async def write(self, nonce: bytes, pieces: Sequence[Piece], stop: Callable[[], bool]) -> list[bytes]:
        columns = columns_of(pieces)
        if not pieces or not self._holds(*columns.reach()):
            return await super().write(nonce, pieces, stop)
        offer = Offer(nonce, pieces, columns, self._pool_address)
        said_bytes = self._say_ahead(offer.opening)  # the peer is woken while the lane is
        digests = await self._in_lane(partial(offer.write, self._send, lambda: stop() or self.lost is not None, said_bytes))
        news = self._news.get(nonce)
        if news is not None:
            news.lent(len(digests))
        return digests

    def _holds(self, first_address: int, end_address: int) -> bool:
        return self._pool_address <= first_address and end_address <= self._pool_address + self._pool.nbytes
