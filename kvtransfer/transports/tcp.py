"""Any two processes that reach each other by TCP: header and block follow each other, read straight into the pool.

The bytes pass through the decode worker, so it fences a writer by not reading into the pool any more: quarantine ends at once,
whatever the peer does. The link is authenticated when it is opened and is not encrypted: it listens on loopback unless the caller
vouches for the network (`KVReceiver.start`).
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Sequence

from common.errors import StartupError, TransferBroken
from kvtransfer.digest import block_digest
from kvtransfer.frames import Frame, FrameKind
from kvtransfer.region import BlockRegion
from kvtransfer.transports.authentication import AUTHENTICATION_TIMEOUT_S, PoolShape, authenticate_as_prefill
from kvtransfer.transports.base import Landing, LinkCredentials, Listener, PeerName, Piece, SenderLink
from kvtransfer.transports.receiving import StreamListener
from kvtransfer.transports.sending import Send, StreamSenderLink

KIND = "tcp"
BACKLOG = 64
MERGE_BYTES = 1024 * 1024  # small blocks go out together, up to so much per system call
KEEPALIVE_IDLE_S, KEEPALIVE_INTERVAL_S, KEEPALIVE_PROBES = 5, 2, 3


class TcpTransport:
    def can_serve(self, region: BlockRegion) -> bool:
        return True

    async def listen(self, landing: Landing, credentials: LinkCredentials, region: BlockRegion, host: str) -> Listener:
        async def tune(sock: socket.socket) -> None:
            try:
                _notice_silence(sock)
            except OSError as error:
                raise TransferBroken("the link went away while it was being set up") from error

        try:
            sock = socket.create_server((host, 0), backlog=BACKLOG, family=_family(host))
        except OSError as error:
            raise StartupError(f"no TCP port for KV transfer on {host}: {error.strerror}", param="host") from error
        sock.setblocking(False)
        port = sock.getsockname()[1]
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        return StreamListener(sock, address, landing, credentials, region, kind=KIND, data_kind=FrameKind.BLOCK, introduce=tune)

    async def connect(
        self, address: str, credentials: LinkCredentials, peer: PeerName, *, pool_blocks: int, block_bytes: int
    ) -> SenderLink:
        host, _, port = address.rpartition(":")
        host = host.removeprefix("[").removesuffix("]")
        if not host or not port.isdecimal():
            raise TransferBroken("the offered address is not host:port")
        sock = socket.socket(_family(host), socket.SOCK_STREAM)
        try:
            sock.setblocking(False)
            try:
                async with asyncio.timeout(AUTHENTICATION_TIMEOUT_S):
                    await asyncio.get_running_loop().sock_connect(sock, (host, int(port)))
                _notice_silence(sock)
            except (OSError, OverflowError) as error:
                raise TransferBroken("no decode worker answers at the offered address") from error
            await authenticate_as_prefill(sock, credentials, peer, PoolShape(pool_blocks, block_bytes))
            return StreamSenderLink(sock, KIND, WireWriter(), block_bytes=block_bytes)
        except BaseException:
            sock.close()
            raise


class WireWriter:
    """Sends blocks after their headers, small ones together."""

    def write(self, nonce: bytes, pieces: Sequence[Piece], stop: Callable[[], bool], send: Send) -> list[bytes]:
        digests: list[bytes] = []
        buffers: list[bytes | memoryview] = []
        waiting_bytes = 0
        for piece in pieces:
            if stop():
                break
            digest = block_digest(piece.source, nonce, piece.logical_block)
            size = piece.source.nbytes
            buffers += (Frame(FrameKind.BLOCK, nonce, piece.logical_block, size, digest).encode(), piece.source)
            digests.append(digest)
            waiting_bytes += size
            if waiting_bytes >= MERGE_BYTES:
                send(buffers)
                buffers, waiting_bytes = [], 0
        if buffers:
            send(buffers)
        return digests

    def close(self) -> None:
        """Nothing of the peer's is held here."""


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def _notice_silence(sock: socket.socket) -> None:
    """A peer whose host is gone sends nothing, not even the end of the link: let the kernel ask."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_IDLE_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_INTERVAL_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, KEEPALIVE_PROBES)
