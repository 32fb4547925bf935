"""Any two processes that reach each other by TCP: a table of pieces and their bytes, read straight into their places in the pool.

The bytes pass through the decode worker, so it fences a writer by not reading into the pool any more: quarantine ends at once,
whatever the peer does. The link is authenticated when it is opened and is not encrypted: it listens on loopback unless the caller
vouches for the network (`KVReceiver.start`).
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Sequence
from functools import partial

from common.errors import HandshakeRefused, StartupError, TransferBroken
from common.types import KVLayout
from kvtransfer.digest import piece_digest
from kvtransfer.frames import MAX_PIECES, Frame, FrameKind, encode_table
from kvtransfer.native.choice import piece_kernel
from kvtransfer.native.writing import write_natively
from kvtransfer.region import BlockRegion
from kvtransfer.spans import columns_of
from kvtransfer.transports.authentication import AUTHENTICATION_TIMEOUT_S, PoolShape, authenticate_as_prefill
from kvtransfer.transports.base import Landing, LinkCredentials, Listener, PeerName, Piece, SenderLink
from kvtransfer.transports.listening import StreamListener
from kvtransfer.transports.sending import Send, SocketSend, StreamSenderLink

KIND = "tcp"
BACKLOG = 64
FRAME_BYTES = 768 * 1024  # pieces go out together, up to so much in one frame: what was digested is sent from a core's cache
KEEPALIVE_IDLE_S, KEEPALIVE_INTERVAL_S, KEEPALIVE_PROBES = 5, 2, 3


class TcpTransport:
    def can_serve(self, region: BlockRegion) -> bool:
        return not region.on_device

    async def listen(
        self, landing: Landing, credentials: LinkCredentials, region: BlockRegion, layout: KVLayout, host: str
    ) -> Listener:
        sock, address = listen_on(host)
        return StreamListener(
            sock, address, landing, credentials, region, layout, kind=KIND, data_kind=FrameKind.BLOCKS, introduce=tune
        )

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
        if source.on_device:
            raise HandshakeRefused("the KV pool here is on a device", param="transports")
        sock = await dial(address)
        try:
            await authenticate_as_prefill(sock, credentials, peer, PoolShape(pool_blocks, layout.block_bytes))
            return StreamSenderLink(sock, KIND, WireWriter())
        except BaseException:
            sock.close()
            raise


class WireWriter:
    """Sends pieces after a table of them, many in one frame."""

    def prepare(self, nonce: bytes, pieces: Sequence[Piece], stop: Callable[[], bool], send: Send) -> Callable[[], list[bytes]]:
        kernel = piece_kernel()
        columns = columns_of(pieces)
        sizes_bytes = columns.sizes_bytes
        ends = _ends_of_frames(sizes_bytes)
        if kernel is None or not isinstance(send, SocketSend) or min(sizes_bytes, default=0) < kernel.least_bytes:
            return partial(_write_here, nonce, pieces, ends, stop, send)
        packed = columns.packed()
        return partial(write_natively, kernel, send, FrameKind.BLOCKS, nonce, packed, sizes_bytes, ends, stop)

    def close(self) -> None:
        """Nothing of the peer's is held here."""


def _write_here(nonce: bytes, pieces: Sequence[Piece], ends: Sequence[int], stop: Callable[[], bool], send: Send) -> list[bytes]:
    digests: list[bytes] = []
    for end in ends:
        if stop():
            break
        frame = pieces[len(digests) : end]
        own = [piece_digest(source, nonce, *name) for name, _, source in frame]
        payload = [piece.source for piece in frame]
        header = Frame(FrameKind.BLOCKS, nonce, len(frame), sum([source.nbytes for source in payload])).encode()
        send([header + encode_table([piece.name for piece in frame], own), *payload])
        digests += own
    return digests


def _ends_of_frames(sizes_bytes: Sequence[int]) -> list[int]:
    """Before which pieces a frame ends, the last one's included."""
    ends: list[int] = []
    payload_bytes = first = 0
    for index, piece_bytes in enumerate(sizes_bytes):
        if index > first and (payload_bytes + piece_bytes > FRAME_BYTES or index - first == MAX_PIECES):
            ends.append(index)
            payload_bytes, first = 0, index
        payload_bytes += piece_bytes
    return [*ends, len(sizes_bytes)] if sizes_bytes else ends


def listen_on(host: str) -> tuple[socket.socket, str]:
    """A listening socket that does not block, and its address."""
    try:
        sock = socket.create_server((host, 0), backlog=BACKLOG, family=_family(host))
    except OSError as error:
        raise StartupError(f"no TCP port for KV transfer on {host}: {error.strerror}", param="host") from error
    sock.setblocking(False)
    port = sock.getsockname()[1]
    return sock, f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


async def dial(address: str) -> socket.socket:
    """A connection to what listens at `address`; it does not block."""
    host, _, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not port.isdecimal():
        raise TransferBroken("the offered address is not host:port")
    sock = socket.socket(_family(host), socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        async with asyncio.timeout(AUTHENTICATION_TIMEOUT_S):
            await asyncio.get_running_loop().sock_connect(sock, (host, int(port)))
        _notice_silence(sock)
    except (OSError, OverflowError) as error:
        sock.close()
        raise TransferBroken("no decode worker answers at the offered address") from error
    except BaseException:
        sock.close()
        raise
    return sock


async def tune(sock: socket.socket) -> None:
    """What an accepted connection needs."""
    try:
        _notice_silence(sock)
    except OSError as error:
        raise TransferBroken("the link went away while it was being set up") from error


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def _notice_silence(sock: socket.socket) -> None:
    """A peer whose host is gone sends nothing, not even the end of the link: let the kernel ask."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_IDLE_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_INTERVAL_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, KEEPALIVE_PROBES)
